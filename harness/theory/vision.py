"""Vision beside a language model: encoder, resampler and gated cross-attention, in parameters and FLOPs.

Letters: w width of the encoder, P patches of one image, T its tokens, F width of a feed-forward network,
i heads x head_dim, D d_model of the language model, v width of what it attends to, R tokens of one image
there. A multiply-add is 2 FLOP; only matrix products count, as in `harness.theory.flops`.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.spec.errors import SpecError


@dataclass(frozen=True)
class Encoder:
    """A vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929, section 3.1): layers with biases and
    two norms each, learned positions, a last norm."""

    image: int
    """Pixels of a side."""
    patch: int
    width: int
    layers: int
    heads: int
    d_ff: int
    channels: int = 3
    class_token: bool = True
    patch_bias: bool = True
    """Whether the patch embedding has a bias; CLIP's has none."""
    first_norm: bool = False
    """A norm before the first layer, as in CLIP (Radford et al. 2021, arXiv 2103.00020)."""
    output: int = 0
    """Width that a last matrix without bias projects to; 0: there is none."""

    def __post_init__(self) -> None:
        if self.image % self.patch:
            raise SpecError(f"{self.image} pixels are no multiple of patches of {self.patch}; give a divisor")
        if self.width % self.heads:
            raise SpecError(f"a width of {self.width} has no {self.heads} equal heads; give a divisor")

    @property
    def patches(self) -> int:
        """Patches of one image: (side / patch)^2."""
        return (self.image // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of one image: its patches and the class token."""
        return self.patches + self.class_token

    @property
    def parameters(self) -> int:
        """All parameters, to the last bias."""
        w = self.width
        patches = self.channels * self.patch**2 * w + self.patch_bias * w
        layer = 4 * w * (w + 1) + 2 * w * self.d_ff + self.d_ff + w + 4 * w
        norms = 2 * w * (1 + self.first_norm)
        positions = (self.tokens + self.class_token) * w
        return patches + positions + norms + self.layers * layer + w * self.output

    @property
    def flops(self) -> int:
        """FLOPs of one image, forward: 2 per matrix parameter and token, 4 w per pair of tokens and layer."""
        w, tokens = self.width, self.tokens
        patches = 2 * self.patches * self.channels * self.patch**2 * w
        layer = 2 * tokens * (4 * w * w + 2 * w * self.d_ff) + 4 * tokens * tokens * w
        # Of CLIP's tokens only the class token is projected.
        return patches + self.layers * layer + 2 * w * self.output

    def data_bytes(self, bytes_per_value: float = 1) -> float:
        """Bytes of one decoded image."""
        return self.channels * self.image**2 * bytes_per_value


@dataclass(frozen=True)
class Resampler:
    """Learned queries that turn any number of visual tokens into `latents` (Flamingo, arXiv 2204.14198,
    section 2.1): in each layer they attend to the visual tokens and to themselves, then a feed-forward."""

    width: int
    layers: int
    heads: int
    head_dim: int
    latents: int
    d_ff: int
    norms: int = 3
    """Layer norms of a layer: of the visual tokens, of the latents, before the feed-forward."""
    time_positions: int = 0

    @property
    def parameters(self) -> int:
        """All parameters: query, key, value and output, two feed-forward matrices, norms, latents and a last
        norm; no biases but the norms'."""
        inner = self.heads * self.head_dim
        layer = 4 * self.width * inner + 2 * self.width * self.d_ff + 2 * self.norms * self.width
        return self.layers * layer + (self.latents + self.time_positions + 2) * self.width

    def flops(self, visual_tokens: int) -> int:
        """FLOPs of one image's (or video's) visual tokens, forward."""
        inner, keys = self.heads * self.head_dim, visual_tokens + self.latents
        projections = 2 * self.width * inner * (2 * self.latents + 2 * keys)
        attention = 4 * self.latents * keys * inner
        return self.layers * (projections + attention + 4 * self.latents * self.width * self.d_ff)


@dataclass(frozen=True)
class CrossAttention:
    """Blocks between a language model's layers in which text attends to visual tokens, each branch behind a
    tanh gate of one scalar that starts at 0 (Flamingo, arXiv 2204.14198, section 2.2)."""

    d_model: int
    visual_width: int
    heads: int
    head_dim: int
    blocks: int
    d_ff: int
    kv_heads: int | None = None
    """None: as many as heads."""
    gated: bool = False
    """Whether the feed-forward network has a third matrix (SwiGLU)."""
    norm_bias: bool = True
    head_norms: bool = False
    """Norms of queries and keys in each head (Llama 3.2 Vision)."""

    @property
    def _widths(self) -> tuple[int, int]:
        return self.heads * self.head_dim, (self.kv_heads or self.heads) * self.head_dim

    @property
    def parameters(self) -> int:
        """All parameters: attention (2 D i + 2 v i_kv), feed-forward, two norms and two gates a block."""
        inner, keys = self._widths
        attention = 2 * self.d_model * inner + 2 * self.visual_width * keys
        norms = 2 * (1 + self.norm_bias) * self.d_model + 2 * self.head_norms * self.head_dim
        return self.blocks * (attention + (2 + self.gated) * self.d_model * self.d_ff + norms + 2)

    def flops_per_text_token(self, visual_tokens: int) -> int:
        """FLOPs that the blocks add to one text token that sees so many visual tokens, forward."""
        inner, _ = self._widths
        matrices = 2 * self.d_model * inner + (2 + self.gated) * self.d_model * self.d_ff
        return self.blocks * (2 * matrices + 4 * visual_tokens * inner)

    def flops_per_visual_token(self) -> int:
        """FLOPs of a visual token's keys and values in all blocks; they are made once and cached."""
        return self.blocks * 4 * self.visual_width * self._widths[1]


def blocks_every(n_layers: int, every: int) -> int:
    """Cross-attention blocks where one stands before every `every`-th layer, the first included."""
    return -(-n_layers // every)


def bytes_per_patch(patch: int, channels: int = 3, bytes_per_value: float = 1) -> float:
    """Bytes that a data loader reads for one visual token that is one patch of decoded pixels."""
    return patch**2 * channels * bytes_per_value


def patches_within(low: float, high: float, channels: int = 3, bytes_per_value: float = 1) -> tuple[int, ...]:
    """Sides of patches whose bytes lie within these limits, both included."""
    side = range(1, int((high / (channels * bytes_per_value)) ** 0.5) + 2)
    return tuple(n for n in side if low <= bytes_per_patch(n, channels, bytes_per_value) <= high)
