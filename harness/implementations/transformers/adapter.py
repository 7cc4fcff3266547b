"""Any family of transformers that decodes, under test: found by what its code announces about itself.

No code per family: the router is the class that the model records as `router_logits`, its parent is
the MoE block, a config is shrunken by the names of its attributes. The few that do not show what they select
are in `routers`. What holds for a model is tried out on two tokens, not looked up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.implementations.huggingface_like import LikeModel, WeightMap, seeded
from harness.implementations.protocols import Unsupported
from harness.implementations.registry import describe
from harness.implementations.transformers import capabilities, export, families, routers, shrink
from harness.implementations.transformers.encoder_decoder import Decoding
from harness.implementations.transformers.generation import Generation
from harness.implementations.transformers.headless import Headed
from harness.implementations.transformers.lively import enliven, forgotten_are_nan
from harness.implementations.transformers.weights import FamilyMap
from harness.spec.architecture import Architecture

GROUPED_MM_ALIGNMENT = 16
"""Bytes; torch's kernel refuses other strides ("strides should be multiple of 16 bytes")."""

MOST_PARAMETERS = 10_000_000
"""Beyond this a family is not at test size."""


@dataclass(frozen=True)
class TransformersImplementation:
    """`transformers:NAME[,experts=...][,attention=...]`.

    attention "auto" is eager in float32. In float64, where eager attention makes NaN of left padding, for
    its softmax is in float32, it is sdpa if the family has that.
    """

    family: str
    experts: str = "eager"
    attention: str = "auto"

    @classmethod
    def of(cls, family: str, *, experts: str, attention: str) -> TransformersImplementation:
        """Raises AdapterError if transformers is missing, or has nothing of that name that decodes."""
        families.family(family)
        return cls(family, experts, attention)

    @property
    def name(self) -> str:
        """As addressed, with the options that are not the default."""
        experts = "" if self.experts == "eager" else f",experts={self.experts}"
        attention = "" if self.attention == "auto" else f",attention={self.attention}"
        return f"transformers:{self.family}{experts}{attention}"

    @property
    def needs_architecture(self) -> bool:
        """False: a family can always be shrunken."""
        return False

    def build(
        self, architecture: Architecture | None, *, device: str, dtype: torch.dtype, seed: int
    ) -> LikeModel:
        """A fresh model in eval mode. Raises Unsupported naming what the family cannot express or run."""
        weight_map: WeightMap | None = None
        if architecture is None:
            config = shrink.shrunken(self.family)
        else:
            config = export.config(architecture, self.family)
            weight_map = FamilyMap.of(architecture, self.family)
        if architecture is None:
            # A size that the recipe does not know by name stays as published: see before memory is taken.
            size = sum(p.numel() for p in self._module(config, "meta", dtype, seed).parameters())
            if size > MOST_PARAMETERS:
                raise Unsupported(
                    f"{self.family} keeps {size:,} parameters: the shrink recipe misses some size"
                )
        module = self._module(config, device, dtype, seed)
        model = LikeModel(
            module=module,
            vocab_size=int(getattr(module, "vocab_size", config.vocab_size)),
            capabilities=frozenset(),
            sites=routers.sites(self.family, module),
            weight_map=weight_map,
        )
        if architecture is None:
            enliven(model.parameters(), seed)
        model = capabilities.declared(model, architecture)
        ways = self._other_ways(dtype)
        if ways and device != "meta":

            def others() -> dict[str, LikeModel]:
                made = {}
                for way, implementation in ways.items():
                    with contextlib.suppress(Unsupported):  # this size or dtype is not for it
                        made[way] = implementation.build(architecture, device=device, dtype=dtype, seed=seed)
                return made

            model = replace(model, others=others, capabilities=model.capabilities | {"alternatives"})
        if device == "meta" or not hasattr(module, "generate"):
            return model

        def make_draft(drafted: Architecture, weights: Mapping[str, Tensor]) -> nn.Module:
            draft = self.build(drafted, device=device, dtype=dtype, seed=seed)
            draft.load_weights(weights)
            return draft.module

        generator = torch.Generator().manual_seed(seed)
        decoding = Generation(module, model.vocab_size, make_draft, generator)
        return replace(
            model, decoding=decoding, capabilities=model.capabilities | capabilities.decodes(module)
        )

    def _other_ways(self, dtype: torch.dtype) -> dict[str, TransformersImplementation]:
        """The same family with each of the library's other ways to run experts and attention."""
        cls = families.family(self.family).model
        ways = {}
        if cls._can_set_experts_implementation():
            for experts in {"eager", "batched_mm", "grouped_mm"} - {self.experts}:
                ways[f"experts={experts}"] = replace(self, experts=experts)
        attention = self._attention(dtype)
        if cls._supports_sdpa:
            other = "eager" if attention == "sdpa" else "sdpa"
            ways[f"attention={other}"] = replace(self, attention=other)
        return dict(sorted(ways.items()))

    def _attention(self, dtype: torch.dtype) -> str:
        if self.attention != "auto":
            return self.attention
        cls = families.family(self.family).model
        return "sdpa" if dtype == torch.float64 and cls._supports_sdpa else "eager"

    def _module(self, config: Any, device: str, dtype: torch.dtype, seed: int) -> nn.Module:
        family = families.family(self.family)
        cls = family.model
        if self.experts != "eager" and not cls._can_set_experts_implementation():
            raise Unsupported(f"transformers:{self.family} has one way to run experts, not {self.experts}")
        if self.experts == "grouped_mm" and dtype == torch.float64:
            raise Unsupported("torch's grouped_mm has no float64 kernel: say experts=eager")

        attention = self._attention(dtype)

        def make() -> nn.Module:
            module: nn.Module = cls._from_config(
                config, dtype=dtype, attn_implementation=attention, experts_implementation=self.experts
            )
            if family.shape == "headless":
                return Headed(module, seed)
            return Decoding(module, seed) if family.shape == "encoder-decoder" else module

        try:
            with forgotten_are_nan():
                module = seeded(make, seed, device)
        except Exception as error:
            raise Unsupported(f"{self.name} cannot be built: {describe(error)}") from error
        if self.experts == "grouped_mm":
            _require_alignment(module, dtype)
        return module.to(device).eval()


def _require_alignment(module: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in module.named_parameters():
        if ".experts." not in name or parameter.dim() != 3:
            continue
        for width in parameter.shape[1:]:
            if width * dtype.itemsize % GROUPED_MM_ALIGNMENT:
                raise Unsupported(
                    f"torch's grouped_mm needs rows of a multiple of {GROUPED_MM_ALIGNMENT} bytes, "
                    f"and {name} has a width of {width} in {str(dtype).removeprefix('torch.')}"
                )
