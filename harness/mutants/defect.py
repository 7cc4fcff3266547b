"""What a mutant is: the reference with one defect, by a patch of one stage.

A defect is written as a function and entered in the catalogue by a decorator; its name is the function's, its
description the docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from harness.implementations.protocols import Unsupported
from harness.implementations.reference import Reference, ReferenceUnderTest
from harness.reference import ReferenceModel
from harness.reference.layers import Norm
from harness.spec.architecture import Architecture

Method = Callable[..., Any]
Side = Literal["model", "engine"]
Patch = Callable[[ReferenceUnderTest], None]
Targets = Callable[[ReferenceModel], Iterable[Any]]
EngineTargets = Callable[[Any], Iterable[Any]]
"""From an Engine to those of its parts that have the defect."""
Applies = Callable[[Architecture], bool]
F = TypeVar("F", bound=Callable[..., Any])


def has_experts(architecture: Architecture) -> bool:
    """The defect shows wherever there are experts."""
    return architecture.moe is not None


def anywhere(_: Architecture) -> bool:
    """The defect shows in every architecture."""
    return True


OF_ENGINES: dict[str, Any] = {"side": "engine", "applies": anywhere}
"""Where a defect of an engine shows, unless its row says otherwise."""


@dataclass(frozen=True)
class Mutant:
    """A named defect."""

    name: str
    patch: Patch
    """Puts the defect into what was just built: into its model, or into every engine that it will build."""
    stage: str
    """What is wrong: param, proj, score, select, weigh, drop, combine, loss, gradient, embed, project,
    rotate, expand_kv, mask, scores, cache, norm, unembed, vision (cross-attention to images), compute (more
    than needed) or state (left by a call); in training noise (of the routers), balance (loads and correction
    biases) or recompute (checkpointing). Of an engine: law (of the tokens drawn), greedy, stop, logprobs,
    seed, acceptance, counters, isolation, settings (ignored), pages, prefix (shared), preempt, rollback,
    schedule or fault."""
    origin: str
    """Where a defect of this kind shipped: repository#issue or commit; empty where none is cited."""
    defect: str
    """What is wrong, in a sentence."""
    spec: str
    """A shipped spec on whose twin, or on a variant of it, it shows."""
    side: Side
    """What the patch is of: the model, or the engines that run it."""
    applies: Applies
    """Architectures that have the stage at all; on others the mutant cannot be built."""


CATALOGUE: dict[str, Mutant] = {}
"""Every mutant by name, in the order of their modules."""


def enter(
    function: F,
    patch: Patch,
    *,
    stage: str,
    origin: str = "",
    spec: str = "mixtral-8x7b",
    side: Side = "model",
    applies: Applies = has_experts,
) -> F:
    """Put the mutant that `function` describes into the catalogue, and give the function back."""
    name = function.__name__.replace("_", "-")
    defect = (function.__doc__ or "").strip()
    if name in CATALOGUE or not defect:
        raise ValueError(f"mutant {name} needs a name of its own and a docstring")
    CATALOGUE[name] = Mutant(name, patch, stage, origin, defect, spec, side, applies)
    return function


def mutant(targets: Targets, method: str, **row: Any) -> Callable[[F], F]:
    """Decorate make(target, original method) -> defective method, put in its place on every target."""

    def decorate(make: F) -> F:
        return enter(make, on_model(lambda model: replace(make, targets(model), method)), **row)

    return decorate


def engine_mutant(targets: EngineTargets, method: str, **row: Any) -> Callable[[F], F]:
    """Decorate make(part, original method) -> defective method, put in its place on every target of every
    engine that the reference builds. It shows in any architecture, unless `applies` says otherwise."""

    def decorate(make: F) -> F:
        def patch(engine: Any) -> None:
            replace(make, targets(engine), method)

        return enter(make, on_engine(patch), **(OF_ENGINES | row))

    return decorate


def on_model(patch: Callable[[ReferenceModel], None]) -> Patch:
    """The patch of a model, as one of what was built."""
    return lambda built: patch(built.model)


def on_engine(patch: Callable[[Any], None]) -> Patch:
    """The patch of every engine, as one of what was built."""
    return lambda built: built.on_engine.append(patch)


def replace(make: Method, targets: Iterable[Any], method: str) -> None:
    """Put make(target, original method) in the place of that method on every target."""
    for target in targets:
        setattr(target, method, make(target, getattr(target, method)))


def patched(**row: Any) -> Callable[[F], F]:
    """Decorate patch(model) -> None, for a defect that is not one method."""
    return lambda patch: enter(patch, on_model(patch), **row)


def engine_patched(**row: Any) -> Callable[[F], F]:
    """Decorate patch(engine) -> None, for a defect of the engine that is not one method."""
    return lambda patch: enter(patch, on_engine(patch), **(OF_ENGINES | row))


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
            raise Unsupported(f"{self.name} has no place in this architecture")
        built = Reference().build(architecture, device=device, dtype=dtype, seed=seed)
        self.mutant.patch(built)
        return built


def whole(model: ReferenceModel) -> Iterable[Any]:
    """The model itself."""
    return [model]


def norms(model: ReferenceModel) -> Iterable[Any]:
    """Every norm, those inside of attention included."""
    return [module for module in model.modules() if isinstance(module, Norm)]


def moes(model: ReferenceModel) -> Iterable[Any]:
    """The MoE of every layer that has one."""
    return [block.moe for block in model.blocks if block.moe is not None]


def sparse(model: ReferenceModel) -> Iterable[Any]:
    """Every layer that has one."""
    return [block for block in model.blocks if block.moe is not None]


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
