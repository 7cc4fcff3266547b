"""Which values of every field a search tries, unless it is told others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from harness.planning.constraints import known, number, word
from harness.spec.architecture import Architecture
from harness.spec.errors import SpecError
from harness.theory.layout import Recompute, Schedule

UNEVEN = 0.1
"""Stages (or chunks) are tried where the longest has at most so much more layers than the mean."""
SHORTEST_PIECE = 4096
"""Tokens of a sequence that one context-parallel rank keeps at least."""
MOST_TENSOR_WAYS = 64
MOST_VIRTUAL_STAGES = 8
MOST_SEQUENCES = 16
"""Of one microbatch."""
SHARED = ("tensor_parallel", "pipeline_parallel", "expert_parallel")
SERVED = (*SHARED, "batch")
"""Fields of Space that a search of serving layouts tries."""
TRAINED = (
    *SHARED,
    "context_parallel",
    "microbatch",
    "virtual_stages",
    "zero_stage",
    "schedule",
    "recompute",
)
WORDS: Mapping[str, tuple[str, ...]] = {"schedule": get_args(Schedule), "recompute": get_args(Recompute)}
"""Fields of Layout that are words, with what they may be."""


@dataclass(frozen=True)
class Space:
    """The values that are tried, field by field of Layout; data_parallel follows from the devices."""

    tensor_parallel: tuple[int, ...] = (1,)
    pipeline_parallel: tuple[int, ...] = (1,)
    context_parallel: tuple[int, ...] = (1,)
    expert_parallel: tuple[int, ...] = (1,)
    microbatch: tuple[int, ...] = (1,)
    virtual_stages: tuple[int, ...] = (1,)
    zero_stage: tuple[int, ...] = (0,)
    schedule: tuple[Schedule, ...] = ("1f1b",)
    recompute: tuple[Recompute, ...] = ("none",)
    batch: tuple[int, ...] = (1,)
    """Serving: sequences of one data-parallel rank."""

    def trying(self, values: Mapping[str, str], names: Sequence[str]) -> Space:
        """The space with other values of some of `names`, from text: {"pipeline_parallel": "13,17"}.

        Raises SpecError on an unknown field or a value that it cannot have.
        """
        given: dict[str, tuple[Any, ...]] = {}
        for name, text in values.items():
            known(name, names)
            parts = [part.strip() for part in text.split(",")]
            if name in WORDS:
                given[name] = tuple(dict.fromkeys(word(part, name, WORDS[name]) for part in parts))
            else:
                given[name] = tuple(dict.fromkeys(_whole(part, name) for part in parts))
        return replace(self, **given)


def _whole(text: str, name: str) -> int:
    value, least = number(text, name), 0 if name == "zero_stage" else 1
    most = {"zero_stage": 3}.get(name, 1 << 20)
    if value != int(value) or not least <= value <= most:
        raise SpecError(f"{name} is {text}; give a whole number from {least} to {most:,}")
    return int(value)


def training_space(
    architecture: Architecture, gpus: int, island: int, context: int, sequences: float
) -> Space:
    """What a search of training layouts tries by default."""
    heads, layers, experts = _sizes(architecture)
    return Space(
        tensor_parallel=tensor_ways(heads, gpus, island),
        pipeline_parallel=stages(layers, gpus),
        context_parallel=_powers(min(gpus, max(1, context // SHORTEST_PIECE))),
        expert_parallel=_divisors(experts, gpus),
        microbatch=_powers(int(min(MOST_SEQUENCES, max(1, sequences)))),
        virtual_stages=tuple(range(1, MOST_VIRTUAL_STAGES + 1)),
        zero_stage=(0, 1, 2, 3),
        schedule=get_args(Schedule),
        recompute=get_args(Recompute),
    )


def serving_space(architecture: Architecture, gpus: int, island: int, most_batch: int = 8192) -> Space:
    """What a search of serving layouts tries by default: batches by halves of octaves."""
    heads, layers, experts = _sizes(architecture)
    octaves = [3 * n // 2 for n in _powers(most_batch)[1:] if 3 * n // 2 <= most_batch]
    return Space(
        tensor_parallel=tensor_ways(heads, gpus, island),
        pipeline_parallel=stages(layers, gpus),
        expert_parallel=_divisors(experts, gpus),
        batch=tuple(sorted({*_powers(most_batch), *octaves})),
    )


def _sizes(architecture: Architecture) -> tuple[int, int, int]:
    moe = architecture.moe
    return architecture.attention.n_heads, architecture.n_layers, moe.n_experts if moe else 1


def tensor_ways(heads: int, gpus: int, island: int) -> tuple[int, ...]:
    """Divisors of the heads and powers of two: those that do not divide are then ruled out by name.

    Of several islands only ways that fill them evenly: groups of 6 would straddle islands of 8. Powers of two
    below an island are tried on any, as 64 of a rack's 72.
    """
    most = min(MOST_TENSOR_WAYS, gpus)
    powers = _powers(most)
    return tuple(
        ways
        for ways in sorted({*_divisors(heads, most), *powers})
        if gpus <= island or island % ways == 0 or ways % island == 0 or (ways in powers and ways < island)
    )


def stages(layers: int, gpus: int) -> tuple[int, ...]:
    """For each number of layers on the longest stage the fewest stages, and powers of two; see UNEVEN."""
    most = min(layers, gpus)
    fewest = {-(-layers // depth) for depth in range(1, layers + 1)}
    even = (p for p in {*fewest, *_powers(most)} if p <= most)
    return tuple(sorted(p for p in even if -(-layers // p) * p <= (1 + UNEVEN) * layers))


def _divisors(number: int, most: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, min(number, most) + 1) if number % n == 0)


def _powers(most: int) -> tuple[int, ...]:
    return tuple(1 << i for i in range(max(1, most).bit_length()))
