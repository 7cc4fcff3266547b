"""What every search asks and does: limits, ranking, the front, and an answer where nothing fits.

Letters: N layouts of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.planning.constraints import Constraint
from harness.planning.layouts import IDLE, RuledOut
from harness.planning.report import GB, Broken, Column, Plan, ways
from harness.planning.selection import Batch, Best, Front, Limit, breaking
from harness.planning.settings import rates, refuse_price
from harness.spec.architecture import Architecture
from harness.spec.errors import SpecError, did_you_mean
from harness.spec.hardware import Hardware
from harness.theory.efficiency import IDEAL, Efficiency
from harness.theory.layout import Layout
from harness.theory.states import Memory

RESERVE = 0.1
"""Of a device's memory, the share for what theory does not count: the runtime, buffers, fragments."""
MOST_GPUS = 10**7
MOST_TOKENS = 10**12
"""Of a batch, a sequence, a prompt, an answer: what counts stay exact in."""
FIELDS = tuple(one.name for one in fields(Layout))
PARTS = tuple(one.name for one in fields(Memory))
Watch = Callable[[int, int], None]
"""Told how many layouts are evaluated, of how many."""


@dataclass(frozen=True)
class Question:
    """What is asked of a search, whatever its goal. Raises SpecError where a number cannot be."""

    architecture: Architecture
    hardware: Hardware
    gpus: int
    """At most so many devices."""
    name: str = "the model"
    least_gpus: int | None = None
    """At least so many; None: all but a share of IDLE."""
    constraints: tuple[str, ...] = ()
    tries: Mapping[str, str] = field(default_factory=dict)
    """Values to try in place of the default ones: `Space.trying`."""
    efficiency: Efficiency = IDEAL
    gpu_hour_usd: float | None = None
    """None: the hardware's own."""
    memory_reserve: float = RESERVE
    rank: str = "time"
    limit: int = 10
    """Rows of each table."""
    every: bool = False
    """Rank every layout; else the best one of each way to divide the devices."""

    def __post_init__(self) -> None:
        if not 1 <= self.gpus <= MOST_GPUS:
            raise SpecError(f"{self.gpus:,} GPUs cannot be divided here; give 1 to {MOST_GPUS:,}")
        if not 1 <= self.fewest <= self.gpus:
            wrong = f"at least {self.fewest:,} of {self.gpus:,} GPUs cannot be used"
            raise SpecError(f"{wrong}; give 1 to {self.gpus:,}")
        refuse_price(self.price)
        if not 0 <= self.memory_reserve < 1:
            raise SpecError(f"a memory reserve of {self.memory_reserve} is no share; give 0 to below 1")

    @property
    def fewest(self) -> int:
        """The least number of devices."""
        return math.ceil((1 - IDLE) * self.gpus) if self.least_gpus is None else self.least_gpus

    @property
    def price(self) -> float:
        """USD of an hour of one device."""
        return self.hardware.gpu_hour_usd.value if self.gpu_hour_usd is None else self.gpu_hour_usd

    @property
    def room(self) -> float:
        """Bytes of one device that layouts may fill."""
        return (1 - self.memory_reserve) * self.hardware.memory.value

    @property
    def title(self) -> str:
        """The question in short."""
        return f"{self.name} on {self.gpus:,} x {self.hardware.name} at {rates(self.efficiency)}"


@dataclass(frozen=True)
class Goal:
    """What the layouts of a search are judged by."""

    name: str
    ranks: Mapping[str, tuple[str, int]]
    """Column and sign of each way to rank: -1 where more is better."""
    axes: tuple[str, str]
    shape: tuple[str, ...]
    """Columns that say how the devices are divided."""
    columns: tuple[Column, ...]
    definitions: Mapping[str, str]
    """Of columns that a header does not explain."""


def counted(name: str, tokens: float, most: float = MOST_TOKENS) -> None:
    """Raise SpecError where `tokens` is no number of tokens."""
    if not 1 <= tokens <= most:
        raise SpecError(f"a {name} of {tokens:g} tokens cannot be; give 1 to {most:g}")


def within(architecture: Architecture, what: str, tokens: int) -> None:
    """Raise SpecError where a sequence is longer than the model's positions."""
    if tokens > (positions := architecture.max_positions):
        raise SpecError(f"{what} of {tokens:,} tokens, and the model has {positions:,} positions; give fewer")


def worst(memory: Memory, width: int) -> dict[str, npt.NDArray[Any]]:
    """Columns of the stage that needs most memory: `memory` holds [K, N] arrays over stages."""
    total = np.broadcast_to(memory.total, np.broadcast_shapes(np.shape(memory.total), (1, width)))
    stage = total.argmax(0)[None]
    parts = {
        name: np.take_along_axis(np.broadcast_to(getattr(memory, name), total.shape), stage, 0)[0]
        for name in PARTS
    }
    return {"memory": np.take_along_axis(total, stage, 0)[0]} | {
        f"memory_{name}": part for name, part in parts.items()
    }


def memory_limit(question: Question, columns: Mapping[str, Any]) -> Limit:
    """What a device has room for."""
    room = question.room
    return Limit("memory", columns["memory"] <= room, lambda facts: memory_sentence(facts, room))


def memory_sentence(facts: Mapping[str, Any], room: float) -> str:
    """How much one rank needs, of what, and by how much that is too much."""
    sizes = sorted(((facts[f"memory_{name}"], name) for name in PARTS), reverse=True)
    parts = ", ".join(f"{name} {size / GB:,.1f}" for size, name in sizes if size >= 0.05 * GB)
    need = facts["memory"]
    return f"needs {need / GB:,.1f} GB a GPU ({parts}), {(need - room) / GB:,.1f} over {room / GB:,.1f} free"


def constraint_limits(constraints: Iterable[Constraint], columns: Mapping[str, Any]) -> Iterable[Limit]:
    """What the user wants kept."""
    for one in constraints:
        yield Limit(one.text, one.holds(columns), partial(_broken, one))


def _broken(one: Constraint, facts: Mapping[str, Any]) -> str:
    names = (name for name in (one.field, one.other) if name)
    values = " and ".join(f"{name} is {_shown(facts[name])}" for name in names)
    return f"{one.text} does not hold: {values}"


def _shown(value: Any) -> str:
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


def search(
    question: Question,
    goal: Goal,
    batches: Iterable[Batch],
    total: int,
    impossible: RuledOut,
    watch: Watch | None = None,
) -> Plan:
    """Judge every batch. Raises SpecError where no layout keeps all limits, saying why the nearest do not."""
    if question.rank not in goal.ranks:
        wrong = f'layouts for {goal.name} are not ranked by "{question.rank}"'
        raise SpecError(f"{wrong}; {did_you_mean(question.rank, goal.ranks)}")
    key, sign = goal.ranks[question.rank]
    shape = () if question.every else goal.shape
    ranked, excluded = (Best(key, "memory", shape, question.limit, sign) for _ in range(2))
    smallest = Best("memory", key, (), 1)
    front, done, fitting = Front(*goal.axes), 0, 0
    broken: dict[str, tuple[int, int]] = {}
    nearest: dict[str, Best] = {}
    for batch in batches:
        fits, priced = batch.fits, np.isfinite(np.broadcast_to(batch.columns[key], len(batch)))
        good, bad = np.flatnonzero(fits & priced), np.flatnonzero(~fits & priced)
        ranked.add(batch, good)
        front.add(batch, good)
        excluded.add(batch, bad)
        if not fitting:
            smallest.add(batch, bad)
        for one, some, alone in breaking(batch):
            before = broken.get(one.name, (0, 0))
            broken[one.name] = (before[0] + len(some), before[1] + len(alone))
            nearest.setdefault(one.name, Best(key, "memory", (), 1, sign)).add(batch, alone[priced[alone]])
        done, fitting = done + len(batch), fitting + len(good)
        if watch is not None:
            watch(done, total)
    if not fitting:
        raise SpecError(_nothing(question, done, broken, smallest, excluded, impossible))
    return Plan(
        goal=goal.name,
        title=question.title,
        by=question.rank,
        key=key,
        axes=goal.axes,
        columns=goal.columns,
        definitions=goal.definitions,
        rows=question.limit,
        evaluated=done,
        fitting=fitting,
        ranked=ranked.found,
        front=front.found,
        excluded=excluded.found,
        broken={
            name: Broken(some, alone, next(iter(nearest[name].found), None))
            for name, (some, alone) in broken.items()
        },
        impossible={name: (count, impossible.examples[name]) for name, count in impossible.counts.items()},
    )


def _nothing(
    question: Question,
    done: int,
    broken: Mapping[str, tuple[int, int]],
    smallest: Best,
    excluded: Best,
    impossible: RuledOut,
) -> str:
    """Why no layout fits."""
    start = f"no layout of {question.title} fits"
    if not done:
        most = max(impossible.counts, key=lambda name: impossible.counts[name], default="")
        why = f"{most}, for example {impossible.examples[most]}" if most else "there is nothing to try"
        return f"{start}: {why}"
    always = [name for name, (some, _) in broken.items() if some == done]
    if "memory" in always:
        facts = smallest.found[0].facts
        right = "take more GPUs, or hardware with more memory"
        return f"{start}: the least, {ways(facts)}, {memory_sentence(facts, question.room)}; {right}"
    if always:
        return f"{start}: all {done:,} of them break {' and '.join(always)}; loosen that"
    if not excluded.found:
        return f"{start}: none of {done:,} can be priced"
    one = excluded.found[0]
    return f"{start} all limits at once; the best by {question.rank}, {ways(one.facts)}, {'; '.join(one.why)}"
