"""Every layout that a search tries, as numpy arrays, and what keeps the others from running at all.

Letters: N layouts of one grid, K stages that may need most memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.planning.space import UNEVEN, Space
from harness.spec.architecture import Architecture
from harness.spec.errors import SpecError
from harness.theory import pipeline
from harness.theory.layout import Layout, Schedule, check
from harness.theory.sharding import telling_stages

IDLE = 0.05
"""Of the devices, the share that a layout may leave unused, unless the user says otherwise."""
BATCH_SLACK = 0.05
"""How far whole microbatches on every rank may be from the batch that was asked for."""
ROWS = 16384
"""Of one grid at most: arrays that stay in a core's cache."""

Ints = npt.NDArray[np.int64]


@dataclass
class RuledOut:
    """Why combinations of ways cannot run at all: how many, and the sentence on one of them."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, count: int, example: str) -> None:
        """More of them, under one name."""
        self.counts[name] = self.counts.get(name, 0) + count
        self.examples.setdefault(name, example)


@dataclass(frozen=True)
class Shapes:
    """Ways to divide the devices: [N] arrays of each kind of parallelism."""

    tensor_parallel: Ints
    pipeline_parallel: Ints
    context_parallel: Ints
    expert_parallel: Ints
    data_parallel: Ints

    def __len__(self) -> int:
        return len(self.tensor_parallel)

    def layout(self, rows: Ints, **others: Any) -> Layout:
        """The layout of some rows, which may come more than once."""
        return Layout(**{one.name: getattr(self, one.name)[rows] for one in fields(self)}, **others)


def shapes(
    architecture: Architecture, space: Space, gpus: int, least_gpus: int, ruled_out: RuledOut
) -> Shapes:
    """The shapes on at most `gpus` and at least `least_gpus` devices that `theory.layout.check` passes.

    Data-parallel ranks are as many as the devices leave, then halves of that while enough devices are used;
    rounded down to where the experts' ranks divide tensor x data. The others go into `ruled_out`.
    """
    halves = np.arange(max(1, math.floor(math.log2(gpus / least_gpus)) + 1))
    axes = (space.tensor_parallel, space.pipeline_parallel, space.context_parallel, space.expert_parallel)
    tp, pp, cp, ep, half = (grid.ravel() for grid in np.meshgrid(*axes, halves, indexing="ij"))
    width = np.maximum(1, tp // ep)
    step = ep * width // np.gcd(tp, ep * width)
    copies = (gpus // (tp * pp * cp)) >> half
    dp = copies - copies % step
    found = Shapes(tp, pp, cp, ep, dp)
    used = tp * pp * cp * dp
    attention, moe = architecture.attention, architecture.moe
    groups = attention.n_kv_heads if attention.mla is None else 0
    rules: list[tuple[str, Any]] = [
        ("heads not divisible", attention.n_heads % tp != 0),
        ("key/value heads not divisible", (groups % tp != 0) & (tp % max(1, groups) != 0) & (groups > 0)),
        ("d_ff not divisible", architecture.ffn is not None and architecture.ffn.d_ff % tp != 0),
        ("more stages than layers", pp > architecture.n_layers),
        ("experts not divisible", ep > 1 if moe is None else moe.n_experts % ep != 0),
        ("more ranks than GPUs", (copies < 1) & (half == 0)),
        ("experts not divisible over ranks", (dp < 1) & (half == 0)),
        ("expert width not divisible", moe is not None and moe.expert.d_ff % width != 0),
        ("GPUs left idle", (used < least_gpus) & (half == 0)),
    ]
    kept = np.ones(len(found), dtype=bool)
    for name, wrong in rules:
        broken = kept & wrong
        kept &= ~broken
        if broken.any():
            row = int(np.flatnonzero(broken)[0])
            one = {each.name: int(getattr(found, each.name)[row]) for each in fields(found)}
            sentence = _sentence(architecture, one, int(copies[row]), gpus, least_gpus)
            ruled_out.add(name, int(broken.sum()), sentence)
    kept &= (used >= least_gpus) & (dp >= 1)
    return Shapes(*(getattr(found, one.name)[kept] for one in fields(found)))


def _sentence(
    architecture: Architecture, one: Mapping[str, Any], copies: int, gpus: int, least_gpus: int
) -> str:
    """What is wrong with one shape of plain integers; check's own words where it is check that refuses."""
    layout = Layout(**one)
    try:
        check(architecture, replace(layout, data_parallel=max(1, layout.data_parallel or copies)))
    except SpecError as error:
        return str(error)
    ways = layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel
    names = ", ".join(f"{name} {value}" for name, value in one.items() if name != "data_parallel")
    if not copies:
        return f"{names} wants {ways:,} GPUs or more, and there are {gpus:,}"
    return f"{names} uses {layout.devices:,} of {gpus:,} GPUs, and at least {least_gpus:,} have to be used"


@dataclass(frozen=True)
class Grid:
    """Layouts of one kind with what a step of each holds."""

    layout: Layout
    """[N] arrays; zero_stage, schedule and recompute are single values."""
    microbatches: Ints
    """[N]: of one step on one data-parallel rank."""
    stages: Ints
    """[K, N]: those of which one needs most memory."""

    def __len__(self) -> int:
        return len(self.microbatches)


def training_grids(
    architecture: Architecture, space: Space, found: Shapes, sequences: float, ruled_out: RuledOut
) -> list[Grid]:
    """Shapes x microbatch x virtual stages x schedule x ZeRO stage x recomputation, in grids of ROWS at most.

    A step has the whole number of microbatches nearest to `sequences`, in rounds of the stages where they are
    interleaved. Without a pipeline every schedule is the same, and 1F1B stands for all of them.
    """
    grids: list[Grid] = []
    for schedule in space.schedule:
        virtual = {"interleaved": space.virtual_stages, "zbv": (2,)}.get(schedule, (1,))
        chunks = np.array([v for v in virtual if v > 1 or schedule not in ("interleaved", "zbv")], np.int64)
        row, size, v = _product(np.arange(len(found)), np.array(space.microbatch), chunks)
        pp, dp = found.pipeline_parallel[row], found.data_parallel[row]
        rounds = pp if schedule == "interleaved" else np.ones_like(pp)
        m = rounds * np.maximum(1, np.rint(sequences / (dp * size * rounds)).astype(np.int64))
        rules = _rules(architecture, schedule, pp, v, m, m * dp * size, sequences)
        single = (pp == 1) & (schedule != ("1f1b" if "1f1b" in space.schedule else space.schedule[0]))
        kept = ~single
        for name, wrong, sentence in rules:
            broken = kept & wrong
            kept &= ~broken
            if broken.any():
                at = int(np.flatnonzero(broken)[0])
                ruled_out.add(name, int(broken.sum()), sentence(at))
        row, size, v, m = row[kept], size[kept], v[kept], m[kept]
        for start in range(0, len(row), ROWS):
            part = slice(start, start + ROWS)
            base = found.layout(row[part], schedule=schedule, virtual_stages=v[part], microbatch=size[part])
            told = telling(architecture, base)
            grids += [
                Grid(replace(base, zero_stage=zero, recompute=recompute), m[part], told)
                for zero in space.zero_stage
                for recompute in space.recompute
            ]
    return grids


def _rules(
    architecture: Architecture,
    schedule: Schedule,
    pp: Ints,
    v: Ints,
    m: Ints,
    batch: Ints,
    sequences: float,
) -> Iterator[tuple[str, Any, Any]]:
    """Name, [N] mask and sentence of a row, of what keeps steps from running."""
    layers = architecture.n_layers
    depth = -(-layers // (pp * v))
    yield (
        "more chunks than layers",
        pp * v > layers,
        lambda i: f"{pp[i]} stages of {v[i]} chunks want {pp[i] * v[i]} layers, and there are {layers}",
    )
    yield (
        "stages uneven",
        (depth * pp * v > (1 + UNEVEN) * layers) & (v > 1),
        lambda i: (
            f"{layers} layers make {pp[i] * v[i]} chunks of up to {depth[i]}, {UNEVEN:.0%} over the mean"
        ),
    )
    yield (
        "batch too small or not divisible",
        np.abs(batch / sequences - 1) > BATCH_SLACK,
        lambda i: (
            f"whole microbatches on every rank come to {batch[i]:,} sequences, "
            f"and the batch has {sequences:,.0f}; {BATCH_SLACK:.0%} off is taken"
        ),
    )
    wrong = np.zeros(len(pp), dtype=bool)
    for fault, _ in pipeline.why_not(schedule, pp, m, v):
        wrong |= np.asarray(fault)
    yield (
        "schedule cannot run",
        wrong,
        lambda i: next(
            text for bad, text in pipeline.why_not(schedule, int(pp[i]), int(m[i]), int(v[i])) if bad
        ),
    )


@dataclass(frozen=True)
class Served:
    """Layouts with the sequences that one data-parallel rank serves at once."""

    layout: Layout
    batch: Ints
    """[N]"""
    stages: Ints
    """[K, N], as in Grid."""

    def __len__(self) -> int:
        return len(self.batch)


def serving_layouts(architecture: Architecture, space: Space, found: Shapes) -> list[Served]:
    """Shapes x batch, in parts of ROWS at most."""
    row, batch = _product(np.arange(len(found)), np.array(space.batch))
    served = []
    for start in range(0, len(row), ROWS):
        layout = found.layout(row[start : start + ROWS])
        served.append(Served(layout, batch[start : start + ROWS], telling(architecture, layout)))
    return served


def telling(architecture: Architecture, layout: Layout) -> Ints:
    """[K, N]: for each of N layouts the stages of which one needs most memory, some more than once."""
    pairs = layout.pipeline_parallel, np.broadcast_to(layout.virtual_stages, len(layout.pipeline_parallel))
    base = int(pairs[1].max(initial=0)) + 1
    kinds, kind = np.unique(pairs[0] * base + pairs[1], return_inverse=True)
    stages_of = [
        telling_stages(
            architecture,
            Layout(1, int(one // base), virtual_stages=int(one % base), schedule=layout.schedule),
        )
        for one in kinds
    ]
    most = max(map(len, stages_of), default=1)
    table = np.array([list(some) + [some[0]] * (most - len(some)) for some in stages_of], dtype=np.int64)
    return table.reshape(len(kinds), most)[kind].T


def _product(*axes: Ints) -> Sequence[Ints]:
    """Every combination: one array per axis."""
    return [grid.ravel() for grid in np.meshgrid(*axes, indexing="ij")]
