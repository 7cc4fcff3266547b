"""What the constants do not explain: the residual of rows whose model had no part in them.

Logarithms of predicted / measured TPOT, by everything that a row says about itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from harness.theory.describe import Table
from harness.validation.silicon_constants import RANGES, Constants
from harness.validation.silicon_fit import NAMES, Held
from harness.validation.silicon_rows import ISLAND, Row
from harness.validation.silicon_terms import Floats

FEW = 10
"""Groups of fewer rows are not shown and not corrected for."""
WORST = 12
Key = Callable[[Row], object]
FACTORS: Mapping[str, Key] = {
    "engine": lambda row: row.engine,
    "engine and version": lambda row: (row.engine, row.version),
    "month": lambda row: row.measured,
    "who measured": lambda row: row.source,
    "model": lambda row: row.spec,
    "system": lambda row: row.system,
    "formats": lambda row: row.precision.name,
    "devices": lambda row: row.layout.devices,
    "layout": lambda row: row.layout,
    "concurrency": lambda row: bucket(row.concurrency),
    "prompt and output": lambda row: (row.prompt, row.output),
    "model and system": lambda row: (row.spec, row.system),
    "model, engine and version": lambda row: (row.spec, row.engine, row.version),
    "model, system, engine and version": lambda row: (row.spec, row.system, row.engine, row.version),
}
"""What a residual may hide behind."""


def bucket(concurrency: float) -> str:
    """Powers of two: "16 to 31"."""
    low = 2 ** int(math.log2(concurrency))
    return f"{low:>4,} to {2 * low - 1:,}" if low > 1 else "   1"


def errors(predicted: Floats, measured: Floats) -> Floats:
    """|predicted / measured - 1|."""
    return np.asarray(np.abs(predicted / measured - 1))


def mdape(predicted: Floats, measured: Floats) -> float:
    """Median error in per cent."""
    return 100 * float(np.median(errors(predicted, measured)))


def groups(rows: Sequence[Row], key: Key) -> dict[object, NDArray[np.int_]]:
    """Indices of rows by what a key says of them, in order of appearance."""
    found: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(key(row), []).append(index)
    return {name: np.array(indices) for name, indices in found.items()}


def logarithms(held: Held) -> Floats:
    """log(predicted / measured) of TPOT, each row's model left out. [R]"""
    return np.asarray(np.log(held.without_model.tpot / held.data.tpot))


def factors(held: Held) -> Table:
    """What the errors would be if the median ratio of each group of rows were known."""
    lines = []
    for name, key in FACTORS.items():
        logs = logarithms(held)
        large = [indices for indices in groups(held.data.rows, key).values() if len(indices) >= FEW]
        for indices in large:
            logs[indices] -= np.median(logs[indices])
        left = 100 * np.abs(np.expm1(logs))
        lines.append((name, len(large), round(float(np.median(left)), 1), round(float(left.mean()), 1)))
    lines.sort(key=lambda line: line[2])
    headers = ("known", f"groups of {FEW} rows or more", "TPOT MdAPE", "TPOT MAPE")
    return Table(
        "What the residual hides: errors if the bias of each group were known", headers, tuple(lines)
    )


def biases(held: Held) -> Table:
    """The groups of one model, system, engine, version and formats that are furthest off."""
    logs = logarithms(held)
    found = [
        (abs(middle), name, len(indices), round(math.exp(middle), 2))
        for name, indices in groups(held.data.rows, _build).items()
        if len(indices) >= FEW
        for middle in [float(np.median(logs[indices]))]
    ]
    found.sort(key=lambda one: one[0], reverse=True)
    headers = ("model, system, engine, version, formats", "rows", "median of predicted / measured")
    return Table(
        f"The {WORST} most biased groups, models left out", headers, tuple(f[1:] for f in found[:WORST])
    )


def _build(row: Row) -> str:
    version = row.version or "unnamed version"
    return ", ".join((row.spec, row.system, row.engine, version, row.precision.name))


def repetitions(rows: Sequence[Row]) -> list[float]:
    """Slowest over fastest TPOT of each setting that was measured more than once.

    A setting is all that a prediction looks at, and the engine; its version, and who measured, may differ.
    """
    several = ({rows[i].tpot for i in indices} for indices in groups(rows, setting).values())
    return sorted(max(times) / min(times) for times in several if len(times) > 1)


def setting(row: Row) -> Row:
    """The row without what identifies or measures it."""
    return replace(row, identity="", model="", ttft=0.0, tpot=0.0, source="", version="", measured="")


def impossible(held: Held) -> NDArray[np.bool_]:
    """Rows that are faster than the data sheet's rates allow with nothing else in the way. [R]"""
    shares = {"compute", "experts", "memory", "cache", "network"}
    ideal = Constants(**{name: float(name in shares) for name in NAMES})
    return np.asarray(held.data.terms.tpot(ideal) > held.data.tpot)


def words(held: Held) -> Table:
    """Counts that say where the rest lies."""
    data, logs = held.data, np.abs(logarithms(held))
    ratios = repetitions(data.rows)
    far, fast = logs > math.log(2), impossible(held)
    checkpoints = Counter(row.model for row, one in zip(data.rows, fast, strict=True) if one)
    wide = np.array([row.layout.devices > ISLAND for row in data.rows])
    crowded, tight = data.terms.waiting > 0, ~data.terms.holds
    above = 100 * sum(ratio > 1.2 for ratio in ratios) / max(len(ratios), 1)
    limits = [
        name
        for name in NAMES
        if min(abs(math.log(getattr(held.constants, name) / end)) for end in _ends(name)) < 0.01
    ]

    def within(mask: NDArray[np.bool_]) -> str:
        if not mask.any():
            return "no rows"
        found = mdape(held.without_model.tpot[mask], data.tpot[mask])
        return f"{int(mask.sum()):,} rows, MdAPE {found:.1f} %"

    again = f"{len(ratios):,}; the slowest takes {100 * (_median(ratios) - 1):.1f} % longer than the fastest"
    again += f" (median), and more than 20 % longer in {above:.0f} % of the settings"
    whose = ", ".join(f"{name} {count}" for name, count in checkpoints.most_common())
    lines = (
        ("settings measured more than once (other versions of the engine, other months)", again),
        (
            "faster than the data sheet allows: speculation, or fewer requests under way than stated",
            f"{within(fast)}: {whose}",
        ),
        (f"more than {ISLAND} devices: racks whose widths the file gives as one number", within(wide)),
        ("more requests in flight than the memory holds: preemption and queues", within(crowded)),
        ("stated devices cannot hold the weights and one request", within(tight)),
        ("none of these four", within(~(fast | wide | crowded | tight))),
        ("off by more than a factor of two", f"{int(far.sum()):,} rows ({100 * float(far.mean()):.1f} %)"),
        ("constants at an end of their range", ", ".join(limits) or "none"),
        (
            "what was not left out",
            "which constants there are, and the counts of kernels, were chosen with all rows in view",
        ),
    )
    return Table("What else is in the residual", ("of TPOT, models left out", "found"), lines)


def _ends(name: str) -> tuple[float, float]:
    return RANGES[name].low, RANGES[name].high


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else 1.0
