"""Gated cross-attention to images around the reference (Flamingo, arXiv 2204.14198, appendix A.1).

Letters: B sequences, S new tokens, N images (or videos) of a sequence, M frames of one, P features of a
frame, W their width, R latents of an image, Q queries, K keys, D d_model, H heads, h head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.reference import weights as drawing
from harness.reference.layers import FeedForward, Linear, Norm, Options, at_least_float32, empty
from harness.reference.model import ReferenceModel
from harness.reference.trace import Cache, LayerCache, RoutingTrace
from harness.spec import architecture as spec
from harness.spec.vision import Vision

NORM = spec.Norm(kind="layernorm", bias=True)
GATES = (1.1, 1.4)
"""Gates are drawn between these, of either sign: there tanh, tan, a sigmoid and the identity are far apart,
and tan is still finite."""


def last_image(at: Tensor, images: int) -> Tensor:
    """Flamingo's rule (section 2.3): each token sees the last image at or before it, and no other.

    at [B, S] is True where a token stands for an image; images come in the order of their tokens
    -> visible [B, S, images]. The token of an image sees it; tokens before the first image see nothing.
    """
    last = at.long().cumsum(1)
    return last[..., None] == torch.arange(1, images + 1, device=at.device)


class CrossAttention(nn.Module):
    """Attention whose keys and values come from elsewhere; stages: queries, keys, scores, forward."""

    def __init__(self, width: int, other: int, vision: Vision, *, options: Options) -> None:
        super().__init__()
        inner = vision.heads * vision.head_dim
        self.heads, self.scale = vision.heads, vision.head_dim**-0.5
        self.q = Linear(width, inner, options=options)
        self.k = Linear(other, inner, options=options)
        self.v = Linear(other, inner, options=options)
        self.o = Linear(inner, width, options=options)

    def keys(self, x: Tensor) -> LayerCache:
        """[B, K, other] -> keys and values [B, K, H, h]."""
        return LayerCache(*(part(x).unflatten(-1, (self.heads, -1)) for part in (self.k, self.v)))

    def scores(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        """Attention weights [B, H, Q, K] of queries [B, Q, H, h] over keys [B, K, H, h], as seen [B, Q, K].

        A query that sees nothing has weight 0 on everything: a softmax over nothing but -inf has no value,
        and one over nothing but a large negative number is uniform.
        """
        logits = ((q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * self.scale).to(at_least_float32(q.dtype))
        blind = ~seen.any(-1, keepdim=True)
        weights: Tensor = logits.masked_fill(~(seen | blind)[:, None], -torch.inf).softmax(-1)
        return weights.masked_fill(~seen[:, None], 0).to(q.dtype)

    def forward(self, x: Tensor, made: LayerCache, seen: Tensor) -> Tensor:
        """[B, Q, width] -> [B, Q, width] over what `keys` made."""
        q = self.q(x).unflatten(-1, (self.heads, -1))
        mixed = self.scores(q, made.keys, seen) @ made.values.transpose(1, 2)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


def _feed_forward(vision: Vision, width: int, options: Options) -> FeedForward:
    # GELU as in the code that is public; the paper's is squared ReLU.
    ff = spec.FeedForward(d_ff=vision.d_ff, activation="gelu", gated=False)
    return FeedForward(ff, width, options=options)


class ResamplerLayer(nn.Module):
    """Latents attend to the features and to themselves, then a feed-forward."""

    def __init__(self, vision: Vision, *, options: Options) -> None:
        super().__init__()
        width = vision.sight.width
        self.feature_norm = Norm(NORM, width, options=options)
        self.latent_norm = Norm(NORM, width, options=options)
        self.attention = CrossAttention(width, width, vision, options=options)
        self.ffn_norm = Norm(NORM, width, options=options)
        self.ffn = _feed_forward(vision, width, options)

    def attended(self, features: Tensor, latents: Tensor) -> Tensor:
        """What keys and values are made of, both normed: features [.., M P, W], then latents [.., R, W]."""
        return torch.cat([features, latents], dim=1)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """Latents [B N, R, W] and features [B N, M P, W] -> latents."""
        queries = self.latent_norm(latents)
        made = self.attention.keys(self.attended(self.feature_norm(features), queries))
        seen = torch.ones(len(latents), queries.shape[1], made.keys.shape[1], dtype=torch.bool)
        latents = latents + self.attention(queries, made, seen.to(latents.device))
        out: Tensor = latents + self.ffn(self.ffn_norm(latents))
        return out


class Resampler(nn.Module):
    """The perceiver resampler: any number of features of an image or video to R latents (appendix A.1.1)."""

    def __init__(self, vision: Vision, *, options: Options) -> None:
        super().__init__()
        width = vision.sight.width
        self.latents = empty(vision.latents, width, options=options)
        self.time = empty(vision.sight.frames, width, options=options)
        self.layers = nn.ModuleList(
            ResamplerLayer(vision, options=options) for _ in range(vision.resampler_layers)
        )
        self.norm = Norm(NORM, width, options=options)

    def timed(self, features: Tensor) -> Tensor:
        """[.., M, P, W] with the embedding of its frame added to every feature. An image is one frame."""
        return features + self.time[: features.shape[-3], None]

    def forward(self, features: Tensor) -> Tensor:
        """[B, N, M, P, W] -> [B, N, R, W]."""
        flat = self.timed(features).flatten(2, 3).flatten(0, 1)
        latents = self.latents.expand(len(flat), -1, -1)
        for layer in self.layers:
            latents = layer(latents, flat)
        out: Tensor = self.norm(latents).unflatten(0, features.shape[:2])
        return out


class GatedBlock(nn.Module):
    """What stands before a layer: cross-attention and a feed-forward, each behind a gate of its own.

    x + tanh(a) attention(norm(x), images), then x + tanh(b) ffn(norm(x)) (appendix A.1.2). A token that sees
    no image stays as it is, past the feed-forward too, as in Llama 3.2 Vision.
    """

    def __init__(self, d_model: int, vision: Vision, *, options: Options) -> None:
        super().__init__()
        self.attention_norm = Norm(NORM, d_model, options=options)
        self.attention = CrossAttention(d_model, vision.sight.width, vision, options=options)
        self.attention_gate = empty(options=options)
        self.ffn_norm = Norm(NORM, d_model, options=options)
        self.ffn = _feed_forward(vision, d_model, options)
        self.ffn_gate = empty(options=options)

    def gate(self, value: Tensor) -> Tensor:
        """The factor on a branch."""
        return value.tanh()

    def looks(self, seen: Tensor) -> Tensor:
        """[B, S, K] -> [B, S, 1]: the tokens that the block changes."""
        return seen.any(-1, keepdim=True)

    def forward(self, x: Tensor, made: LayerCache, seen: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]; seen [B, S, N R]."""
        x = x + self.gate(self.attention_gate) * self.attention(self.attention_norm(x), made, seen)
        added: Tensor = self.gate(self.ffn_gate) * self.ffn(self.ffn_norm(x))
        return x + added.masked_fill(~self.looks(seen), 0)


@dataclass(frozen=True)
class SeeingCache:
    """The state between two calls of `SeeingModel.see_on`."""

    text: Cache
    images: tuple[LayerCache, ...]
    """Of each block: keys and values [B, N R, H, h] of all images."""


class SeeingModel(nn.Module):
    """A ReferenceModel with gated blocks before some of its layers."""

    def __init__(self, text: ReferenceModel, vision: Vision) -> None:
        super().__init__()
        like = next(text.parameters())
        options: Options = {"device": like.device, "dtype": like.dtype}
        a = text.architecture
        self.text, self.vision, self.before = text, vision, vision.layers(a.n_layers)
        self.resampler = Resampler(vision, options=options)
        self.cross = nn.ModuleList(GatedBlock(a.d_model, vision, options=options) for _ in self.before)
        self.eval()

    @property
    def blocks(self) -> list[GatedBlock]:
        """The gated blocks, typed."""
        return [block for block in self.cross if isinstance(block, GatedBlock)]

    def vision_by_name(self) -> dict[str, Tensor]:
        """Canonical name -> tensor of all that is not the text model's."""
        own = self.state_dict(keep_vars=True).items()
        return {f"vision.{name}": tensor for name, tensor in own if not name.startswith("text.")}

    def images(self, features: Tensor) -> tuple[LayerCache, ...]:
        """[B, N, M, P, W], or [B, N, P, W] of single images -> each block's keys and values."""
        latents = self.resampler(features if features.dim() == 5 else features[:, :, None])
        return tuple(block.attention.keys(latents.flatten(1, 2)) for block in self.blocks)

    def seen(self, visible: Tensor) -> Tensor:
        """[B, S, N] -> [B, S, N R]: whoever sees an image sees all of its latents."""
        return visible.repeat_interleave(self.vision.latents, dim=-1)

    @contextmanager
    def looking(self, images: tuple[LayerCache, ...], seen: Tensor) -> Iterator[None]:
        """Within it the text model passes through the gated blocks."""

        def before(block: GatedBlock, made: LayerCache) -> Any:
            return lambda _, given: (block(given[0], made, seen), *given[1:])

        with ExitStack() as stack:
            for layer, block, made in zip(self.before, self.blocks, images, strict=True):
                hook = self.text.blocks[layer].register_forward_pre_hook(before(block, made))
                stack.callback(hook.remove)
            yield

    def run(
        self,
        tokens: Tensor,
        cache: SeeingCache | None,
        visible: Tensor,
        features: Tensor | None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, SeeingCache, list[RoutingTrace]]:
        """Logits [B, S, V], the cache after them, and the routing of every MoE layer.

        visible [B, past + S, N]; features are given where cache is None. Raises ValueError on a bad shape.
        """
        if (features is None) == (cache is None):
            raise ValueError("features are given with the first call, and with no later one")
        past = None if cache is None else cache.text
        length = tokens.shape[1] + (0 if past is None else past.length)
        if visible.shape[:2] != (len(tokens), length):
            have, want = tuple(visible.shape), (len(tokens), length)
            raise ValueError(f"visible has shape {have}; {want} and the images are needed, past included")
        images = self.images(features) if cache is None and features is not None else cache.images  # type: ignore[union-attr]
        with self.looking(images, self.seen(visible[:, -tokens.shape[1] :])):
            logits, text, traces = self.text.run(tokens, past, mask, positions)
        return logits, SeeingCache(text, images), traces

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """d loss / d parameter by canonical name, of what is not the text model's; zeros where none."""
        tensors = self.vision_by_name()
        found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, retain_graph=True)
        return {
            name: torch.zeros_like(tensor) if grad is None else grad
            for (name, tensor), grad in zip(tensors.items(), found, strict=True)
        }


def load(model: SeeingModel, weights: Mapping[str, Tensor]) -> None:
    """Copy every tensor in; raises KeyError or ValueError on a missing, unused or misshapen one."""
    drawing.load(model.vision_by_name(), weights)


def draw(architecture: spec.Architecture, vision: Vision, generator: torch.Generator) -> dict[str, Tensor]:
    """Random float64 weights by canonical name: matrices that keep the size of a normed vector, so that no
    softmax is all on one key; latents, times and norms of the order of 1; gates as GATES says."""
    options: Options = {"device": torch.device("meta"), "dtype": torch.float64}
    shapes = SeeingModel(ReferenceModel(architecture, options=options), vision).vision_by_name()
    return {name: _draw_one(name, tuple(like.shape), generator) for name, like in shapes.items()}


def _draw_one(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("_gate"):
        low, high = GATES
        size = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
        sign = torch.randint(2, shape, generator=generator).double() * 2 - 1
        return size * sign
    matrix = len(shape) == 2 and name.endswith(".weight")
    return drawing.draw_one(name, shape, generator, shape[1] ** -0.5 if matrix else 1.0)
