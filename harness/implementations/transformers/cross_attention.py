"""Families of transformers whose text looks at images by cross-attention, each in a tiny shape of its own.

`--impl transformers:mllama`, and `transformers:idefics`, which has a resampler.
Letters: B sequences, S new tokens, N images of a sequence, M frames of one, P features of a frame, W their
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.implementations.huggingface_like import seeded
from harness.implementations.protocols import Capability, Unsupported
from harness.implementations.transformers.library import library
from harness.spec.architecture import Architecture
from harness.spec.vision import Sight, Vision

VOCAB_SIZE, WIDTH, FEATURES = 97, 48, 5
GATES = (1.2, -1.3)
"""In turn: beyond 1, where tanh is like nothing else."""

Looks = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""From images [B, N, M, P, W] and visible [B, S, N] to a model's own arguments."""


@dataclass
class CrossAttending:
    """A model that is called like a Hugging Face one and takes features of images."""

    module: Any
    sight: Sight
    first: Looks
    later: Looks
    """Where the images are in the cache."""
    capabilities: frozenset[Capability] = frozenset(("cross_attention", "cache"))
    vocab_size: int = VOCAB_SIZE

    def load_vision(self, _vision: Vision, _weights: Mapping[str, Tensor]) -> None:
        """Refused: it has a shape of its own."""
        raise Unsupported("it has a shape of its own")

    def see(self, tokens: Tensor, features: Tensor, visible: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] with images."""
        images = self.first(framed(features), visible)
        logits: Tensor = self.module(
            input_ids=tokens, attention_mask=_whole(visible, mask), use_cache=False, **images
        ).logits
        return logits

    def see_on(
        self,
        tokens: Tensor,
        cache: Any | None,
        visible: Tensor,
        *,
        features: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Logits [B, S, V] of the next tokens with images, and the cache after them."""
        given, past = (features, None) if cache is None else cache
        assert given is not None
        looks = self.first if cache is None else self.later
        out = self.module(
            input_ids=tokens,
            attention_mask=_whole(visible, mask),
            past_key_values=deepcopy(past),  # it is written in place
            use_cache=True,
            **looks(framed(given), visible[:, -tokens.shape[1] :]),
        )
        return out.logits, (given, out.past_key_values)

    def extend(self, _tokens: Tensor, _cache: Any | None, **_: Any) -> tuple[Tensor, Any]:
        """Refused: text without images is another adapter's."""
        raise Unsupported("this adapter puts text with images under test")


def framed(features: Tensor) -> Tensor:
    """[B, N, M, P, W] of those, or of single images [B, N, P, W]."""
    return features if features.dim() == 5 else features[:, :, None]


def _whole(visible: Tensor, mask: Tensor | None) -> Tensor:
    return (torch.ones(visible.shape[:2], dtype=torch.bool) if mask is None else mask).long()


def _enliven(module: nn.Module, seed: int) -> nn.Module:
    """Weights with which images are felt: published initialisers leave gates shut and branches tiny."""
    generator = torch.Generator().manual_seed(seed)
    gates = 0
    for name, tensor in module.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if "gate" in name.rpartition(".")[2] or "alpha" in name:
            noise, gates = torch.full_like(noise, GATES[gates % 2]), gates + 1
        elif tensor.dim() < 2:
            noise = 0.2 * noise + (1 if name.endswith("weight") else 0)
        elif "embed" not in name and "latents" not in name:
            noise = noise / tensor.shape[-1] ** 0.5
        with torch.no_grad():
            tensor.copy_(noise)
    return module


def _mllama(seed: int, device: str) -> CrossAttending:
    """Llama 3.2 Vision: cross-attention in the place of two layers, and no resampler."""
    t = library()
    vision = t.models.mllama.MllamaVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        vision_output_dim=32,
        image_size=28,
        patch_size=14,
        intermediate_layers_indices=[0],
    )
    text = t.models.mllama.MllamaTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1, 3],
        max_position_embeddings=128,
        pad_token_id=VOCAB_SIZE - 1,
        bos_token_id=0,
        eos_token_id=None,
    )
    config = t.MllamaConfig(vision_config=vision, text_config=text)
    module = seeded(lambda: t.MllamaForConditionalGeneration(config), seed, device)

    def later(_: Tensor, visible: Tensor) -> dict[str, Tensor]:
        return {"cross_attention_mask": visible[..., None].long()}  # one tile an image

    def first(features: Tensor, visible: Tensor) -> dict[str, Tensor]:
        return later(features, visible) | {"cross_attention_states": features.flatten(1, 3)}

    return CrossAttending(_enliven(module, seed).eval(), Sight(WIDTH, FEATURES, 1), first, later)


def _idefics(seed: int, device: str) -> CrossAttending:
    """Idefics: Flamingo's resampler without times, and gated blocks before every other layer."""
    t, width = library(), 20
    config = t.IdeficsConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=2,
        use_resampler=True,
        max_position_embeddings=128,
        pad_token_id=VOCAB_SIZE - 1,
        eos_token_id=None,
        vision_config={
            "embed_dim": width,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 28,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 3,
            "resampler_head_dim": 6,
        },
    )
    module = seeded(lambda: t.IdeficsForVisionText2Text(config), seed, device)

    def looks(features: Tensor, visible: Tensor) -> dict[str, Tensor]:
        return {"image_encoder_embeddings": features[:, :, 0], "image_attention_mask": visible.long()}

    return CrossAttending(_enliven(module, seed).eval(), Sight(width, FEATURES, 1), looks, looks)


FAMILIES: dict[str, Callable[[int, str], CrossAttending]] = {"idefics": _idefics, "mllama": _mllama}
"""By model_type: from a seed and a device."""


@dataclass(frozen=True)
class CrossAttentionFamily:
    """One of FAMILIES, in its own shape."""

    family: str
    needs_architecture: bool = False

    @property
    def name(self) -> str:
        """As addressed."""
        return f"transformers:{self.family}"

    def build(
        self, architecture: Architecture | None, *, device: str, dtype: torch.dtype, seed: int
    ) -> CrossAttending:
        """A fresh model in eval mode; raises Unsupported for an architecture that is given."""
        if architecture is not None:
            raise Unsupported(f"{self.family} is put under test in a shape of its own")
        made = FAMILIES[self.family](seed, device)
        made.module.to(device=device, dtype=dtype)
        return made
