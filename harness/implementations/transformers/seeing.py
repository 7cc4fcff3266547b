"""Families of transformers whose text looks at images by cross-attention: capability "cross_attention".

Letters: B sequences, S tokens per sequence, N images of a sequence, M frames (tiles) of one, P features of a
frame, W their width, V vocabulary.

What encodes the images stays outside: features go in where its outputs would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.implementations.huggingface_like import seeded
from harness.implementations.protocols import Capability, Unsupported
from harness.implementations.transformers.library import library
from harness.spec.architecture import Architecture
from harness.spec.vision import Sight

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATE = 1.3
"""Of what cross-attention adds, before its tanh: families start it at 0, where no image is seen."""


def _mllama(transformers: Any) -> tuple[nn.Module, Sight]:
    text = TEXT | {
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "max_num_tiles": 2,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2]],
    }
    config = transformers.MllamaConfig(text_config=text, vision_config=vision)
    module = transformers.MllamaForConditionalGeneration(config)
    # The order of tiles is a matter of the encoder's positions: here each image is one.
    return module, Sight(width=64, features=module.model.vision_model.num_patches, frames=1)


def _idefics(transformers: Any) -> tuple[nn.Module, Sight]:
    config = transformers.IdeficsConfig(
        vision_config={"embed_dim": 20, "num_hidden_layers": 1, "num_attention_heads": 2},
        cross_layer_interval=2,
        use_resampler=False,
        **TEXT,
    )
    return transformers.IdeficsForVisionText2Text(config), Sight(width=20, features=5, frames=1)


def _to_mllama(features: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """Features [B, N, M, P, W] of all images in a row, and who sees each tile [B, S, N, M]."""
    tiles = visible[..., None].expand(*visible.shape, features.shape[2])
    return {"cross_attention_states": features.flatten(1, 3), "cross_attention_mask": tiles.float()}


def _to_idefics(features: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """Features [B, N, P, W] of the one frame, and who sees each image [B, S, N]."""
    if features.shape[2] != 1:
        raise Unsupported("an image of idefics has one frame")
    return {"image_encoder_embeddings": features[:, :, 0], "image_attention_mask": visible.long()}


@dataclass(frozen=True)
class Kind:
    """How a family is made, and how it is told what to look at."""

    make: Callable[[Any], tuple[nn.Module, Sight]]
    given: Callable[[Tensor, Tensor], dict[str, Tensor]]
    gates: tuple[str, ...]
    """Endings of the names of the parameters that gate what images add."""


FAMILIES: Mapping[str, Kind] = {
    "idefics": Kind(_idefics, _to_idefics, ("alpha_cross_attn", "alpha_dense")),
    "mllama": Kind(_mllama, _to_mllama, ("cross_attn_attn_gate", "cross_attn_mlp_gate")),
}


@dataclass(frozen=True)
class SeeingLike:
    """A module of such a family, without what encodes images."""

    module: Any
    vocab_size: int
    sight: Sight
    kind: Kind
    capabilities: frozenset[Capability] = frozenset(("parameters", "cross_attention"))

    def parameters(self) -> Mapping[str, Tensor]:
        """Every learned tensor, those that encode images too."""
        return dict(self.module.named_parameters())

    def see(self, tokens: Tensor, features: Tensor, visible: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] with images [B, N, M, P, W] or [B, N, P, W], seen where visible [B, S, N]."""
        real = torch.ones_like(tokens) if mask is None else mask.long()
        videos = features if features.dim() == 5 else features[:, :, None]
        output = self.module(
            input_ids=tokens,
            attention_mask=real,
            position_ids=(real.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            **self.kind.given(videos, visible),
        )
        logits: Tensor = output.logits
        return logits


@dataclass(frozen=True)
class SeeingImplementation:
    """`transformers:mllama` and its like, in a shape of their own."""

    family: str
    needs_architecture: bool = False

    @property
    def name(self) -> str:
        """As addressed."""
        return f"transformers:{self.family}"

    def build(
        self, architecture: Architecture | None, *, device: str, dtype: torch.dtype, seed: int
    ) -> SeeingLike:
        """A fresh model in eval mode, its gates open. Raises Unsupported if an architecture is given."""
        if architecture is not None:
            raise Unsupported(f"{self.family} has a shape of its own")
        kind, sights = FAMILIES[self.family], []

        def make() -> nn.Module:
            module, sight = kind.make(library())
            sights.append(sight)
            return module

        module = seeded(make, seed, device).to(device=device, dtype=dtype).eval()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith(kind.gates):
                    parameter.fill_(GATE)
        return SeeingLike(module, TEXT["vocab_size"], sights[0], kind)
