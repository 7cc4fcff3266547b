"""What a mutant is: the reference with one defect that shipped in somebody's model.

Letters: E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from harness.implementations.protocols import Unsupported
from harness.implementations.reference import Reference, ReferenceUnderTest
from harness.reference import ReferenceModel
from harness.spec.architecture import Architecture

Patch = Callable[[ReferenceModel], None]
Make = Callable[[Any, Callable[..., Any]], Callable[..., Any]]
"""From an instance and its method to the defective method."""


def everywhere(architecture: Architecture) -> bool:
    """The defect shows in every architecture with experts."""
    return architecture.moe is not None


@dataclass(frozen=True)
class Mutant:
    """A named defect."""

    name: str
    patch: Patch
    """Puts the defect into a model that was just built."""
    stage: str
    """The first stage that is wrong: param, proj, score, select, weigh, drop, combine, loss, gradient, mask,
    rotate, expand_kv, cache or state."""
    origin: str
    """Where it shipped: repository#issue or commit."""
    defect: str
    """What is wrong, in a line."""
    spec: str
    """A shipped spec on whose twin, or its variants, it shows."""
    applies: Callable[[Architecture], bool] = everywhere
    """Architectures that have the stage at all; on others the mutant cannot be built."""


@dataclass(frozen=True)
class MutantImplementation:
    """The Implementation "mutant:NAME"."""

    mutant: Mutant
    needs_architecture: bool = True

    @property
    def name(self) -> str:
        """As addressed."""
        return f"mutant:{self.mutant.name}"

    def build(
        self, architecture: Architecture | None, *, device: str, dtype: torch.dtype, seed: int
    ) -> ReferenceUnderTest:
        """The reference with the defect; raises Unsupported where the defect has no place."""
        if architecture is not None and not self.mutant.applies(architecture):
            raise Unsupported(f"{self.name} has no place in this architecture: {self.mutant.defect}")
        built = Reference().build(architecture, device=device, dtype=dtype, seed=seed)
        self.mutant.patch(built.model)
        return built


def whole(model: ReferenceModel) -> Iterable[Any]:
    """The model itself."""
    return [model]


def moes(model: ReferenceModel) -> Iterable[Any]:
    """The MoE of every layer that has one."""
    return [block.moe for block in model.blocks if block.moe is not None]


def routers(model: ReferenceModel) -> Iterable[Any]:
    """Their routers."""
    return [moe.router for moe in moes(model)]


def experts(model: ReferenceModel) -> Iterable[Any]:
    """Their routed experts."""
    return [moe.experts for moe in moes(model)]


def attentions(model: ReferenceModel) -> Iterable[Any]:
    """The attention of every layer."""
    return [block.attention for block in model.blocks]


def rotaries(model: ReferenceModel) -> Iterable[Any]:
    """Their rotary embeddings."""
    return [attention.rotary for attention in attentions(model) if attention.rotary is not None]


def instead(targets: Callable[[ReferenceModel], Iterable[Any]], stage: str, make: Make) -> Patch:
    """The patch that puts make(target, its method `stage`) in the place of that method, on every target."""

    def patch(model: ReferenceModel) -> None:
        for target in targets(model):
            setattr(target, stage, make(target, getattr(target, stage)))

    return patch
