"""Predicting measured serving times: how far spec, data sheets and a few constants go.

`python -m harness.validation.silicon` fits the constants to all rows and writes them; `report` holds rows
against constants that they had no part in. Errors are |predicted / measured - 1|: MdAPE is their median, MAPE
their mean, bias the median of predicted / measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from harness.theory.describe import Table
from harness.validation import silicon_constants, silicon_reference
from harness.validation.silicon_constants import RANGES, Constants
from harness.validation.silicon_fit import (
    FIRST,
    NAMES,
    Measured,
    Predicted,
    fit,
    left_out,
    measured_rows,
    predict,
)
from harness.validation.silicon_rows import Row, Rows, load_rows
from harness.validation.silicon_terms import Floats

BAR = 20.0
"""Per cent of TPOT MdAPE that leaving one model out may reach."""
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


@dataclass(frozen=True)
class Held:
    """All answered rows, and their times by constants from all rows and from other models or systems."""

    rows: Rows
    data: Measured
    constants: Constants
    everything: Predicted
    without_model: Predicted
    without_system: Predicted
    by_model: Mapping[str, Constants]


def hold(rows: Rows | None = None) -> Held:
    """Fit and predict, about a second. Raises SpecError where wheel or scipy are not installed."""
    rows = load_rows() if rows is None else rows
    data = measured_rows(rows.answered)
    constants = fit(data)
    without_model, by_model = left_out(data, "spec")
    without_system, _ = left_out(data, "system")
    return Held(rows, data, constants, predict(data, constants), without_model, without_system, by_model)


def report(held: Held | None = None) -> list[Table]:
    """The tables of the measured rows."""
    held = hold() if held is None else held
    return [
        _answered(held.rows),
        _overall(held),
        _grouped(held, "By model, its rows left out of the fit", lambda row: row.spec),
        _grouped(held, "By checkpoint, all of its model's rows left out", lambda row: row.model),
        _grouped(held, "By system, its rows left out of the fit", lambda row: row.system, "without_system"),
        _grouped(held, "By requests in flight, models left out", lambda row: bucket(row.concurrency)),
        _constants(held),
        *_reference(held),
        _factors(held),
        _biases(held),
        _words(held),
    ]


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


def _answered(rows: Rows) -> Table:
    total = len(rows.answered) + sum(rows.left_out.values())
    lines: list[tuple[object, ...]] = [
        ("in the file", total),
        ("aggregated", rows.aggregated),
        ("answered: aggregated, of a model whose spec exists", len(rows.answered)),
        ("of these, distinct measurements", len(rows.distinct)),
    ]
    lines += [(f"not answered: {reason}", count) for reason, count in sorted(rows.left_out.items())]
    return Table(
        "Measured serving rows (aiconfigurator-core 0.12.0, silicon_sample.csv)",
        ("rows", "count"),
        tuple(lines),
    )


def _overall(held: Held) -> Table:
    data = held.data
    ways = {
        "leave one model out": held.without_model,
        "leave one system out": held.without_system,
        "in sample": held.everything,
    }
    lines = []
    for name, mask in (("all", np.full(len(data.rows), True)), ("distinct", data.distinct)):
        for way, predicted in ways.items():
            lines.append((way, name, int(mask.sum()), *_both(predicted, data, mask)))
    headers = ("constants from", "rows", "count", *HEADERS)
    return Table(
        f"Errors in per cent (bar: TPOT MdAPE of {BAR:g} leaving one model out)", headers, tuple(lines)
    )


HEADERS = ("TPOT MdAPE", "TPOT MAPE", "TPOT bias", "TTFT MdAPE", "TTFT MAPE", "TTFT bias")


def _both(predicted: Predicted, data: Measured, mask: NDArray[np.bool_]) -> tuple[object, ...]:
    cells: list[object] = []
    for one, times in ((predicted.tpot, data.tpot), (predicted.ttft, data.ttft)):
        wrong = 100 * errors(one[mask], times[mask])
        bias = float(np.median(one[mask] / times[mask]))
        cells += [round(float(np.median(wrong)), 1), round(float(wrong.mean()), 1), round(bias, 2)]
    return tuple(cells)


def _groups(rows: Sequence[Row], key: Key) -> dict[object, NDArray[np.int_]]:
    found: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(key(row), []).append(index)
    return {name: np.array(indices) for name, indices in found.items()}


def _grouped(held: Held, title: str, key: Key, way: str = "without_model") -> Table:
    predicted: Predicted = getattr(held, way)
    groups = _groups(held.data.rows, key)
    lines = []
    for name in sorted(groups, key=str):
        mask = np.zeros(len(held.data.rows), bool)
        mask[groups[name]] = True
        inside = mdape(held.everything.tpot[mask], held.data.tpot[mask])
        lines.append(
            (str(name).strip(), int(mask.sum()), *_both(predicted, held.data, mask), round(inside, 1))
        )
    return Table(title, ("group", "rows", *HEADERS, "TPOT MdAPE in sample"), tuple(lines))


def _constants(held: Held) -> Table:
    lines = []
    for index, name in enumerate(NAMES):
        values = [getattr(one, name) for one in held.by_model.values()]
        limit, value = RANGES[name], getattr(held.constants, name)
        spread = f"{min(values):.3g} to {max(values):.3g}"
        allowed = f"{limit.low:g} to {limit.high:g}"
        lines.append(
            (name, "TPOT" if index < FIRST else "TTFT", f"{value:.3g}", spread, allowed, limit.meaning)
        )
    headers = ("constant", "fitted to", "value", "leaving models out", "allowed", "meaning")
    return Table("The constants, fitted to all distinct measurements", headers, tuple(lines))


def _reference(held: Held) -> Iterator[Table]:
    """Nothing where nobody has asked the SDK."""
    answers = silicon_reference.read()
    where = {row.identity: index for index, row in enumerate(held.data.rows)}
    asked = [identity for identity in answers if identity in where]
    if not asked:
        return
    lines: list[tuple[object, ...]] = []
    for mode in silicon_reference.MODES:
        found = {where[i]: answer for i in asked if (answer := answers[i][mode]) is not None}
        indices = np.array(list(found))
        for what, theirs, ours, times in (
            ("TPOT", 0, held.without_model.tpot, held.data.tpot),
            ("TTFT", 1, held.without_model.ttft, held.data.ttft),
        ):
            reference = np.array([answer[theirs] for answer in found.values()])
            their = errors(reference, times[indices])
            our = errors(ours[indices], times[indices])
            ratio = float(np.median(our) / np.median(their))
            cells = [
                round(100 * float(x), 1) for x in (np.median(their), their.mean(), np.median(our), our.mean())
            ]
            lines.append((mode, what, len(asked), len(found), *cells, round(ratio, 2)))
    headers = (
        "mode",
        "time",
        "asked",
        "answered",
        "its MdAPE",
        "its MAPE",
        "MdAPE here",
        "MAPE here",
        "ratio of MdAPE",
    )
    yield Table(
        "Beside aiconfigurator's own modes, on the rows that each answers (models left out here)",
        headers,
        tuple(lines),
    )


def _logs(held: Held) -> Floats:
    return np.asarray(np.log(held.without_model.tpot / held.data.tpot))


def _factors(held: Held) -> Table:
    """What the error would be if the median ratio of each group of rows were known."""
    lines = []
    for name, key in FACTORS.items():
        logs, groups = _logs(held).copy(), _groups(held.data.rows, key)
        large = [indices for indices in groups.values() if len(indices) >= FEW]
        for indices in large:
            logs[indices] -= np.median(logs[indices])
        left = 100 * np.abs(np.expm1(logs))
        lines.append((name, len(large), round(float(np.median(left)), 1), round(float(left.mean()), 1)))
    lines.sort(key=lambda line: line[2])
    headers = ("known", f"groups of {FEW} rows or more", "TPOT MdAPE", "TPOT MAPE")
    return Table(
        "What the residual hides: errors if the bias of each group were known", headers, tuple(lines)
    )


def _biases(held: Held) -> Table:
    logs = _logs(held)
    groups = _groups(
        held.data.rows, lambda row: (row.spec, row.system, row.engine, row.version, row.precision.name)
    )
    found = [
        (*map(str, name), len(indices), round(float(np.exp(np.median(logs[indices]))), 2))  # type: ignore[call-overload]
        for name, indices in groups.items()
        if len(indices) >= FEW
    ]
    found.sort(key=lambda line: -abs(math.log(line[-1])))
    headers = ("model", "system", "engine", "version", "formats", "rows", "median of predicted / measured")
    return Table(f"The {WORST} most biased groups, models left out", headers, tuple(found[:WORST]))


def spread_of_repetitions(rows: Sequence[Row]) -> tuple[int, float]:
    """Settings that were measured more than once, and the median deviation of their TPOT from their own
    median, in per cent: what no function of the setting can get below on these rows."""
    same = _groups(rows, lambda row: replace_free(row))
    several = [[rows[i].tpot for i in indices] for indices in same.values()]
    several = [times for times in several if len(set(times)) > 1]
    away = [abs(time / median(times) - 1) for times in several for time in set(times)]
    return len(several), 100 * median(away) if away else 0.0


def replace_free(row: Row) -> Row:
    """The row without what identifies or measures it: its setting."""
    return replace(row, identity="", model="", ttft=0.0, tpot=0.0, source="", version="", measured="")


def _words(held: Held) -> Table:
    data, logs = held.data, np.abs(_logs(held))
    settings, away = spread_of_repetitions(data.rows)
    far = logs > math.log(2)
    wide = np.array([row.layout.devices > 8 for row in data.rows])
    crowded, tight = data.terms.waiting > 0, ~data.terms.holds

    def within(mask: NDArray[np.bool_]) -> str:
        return (
            f"{int(mask.sum()):,} rows, MdAPE {mdape(held.without_model.tpot[mask], data.tpot[mask]):.1f} %"
        )

    lines = (
        (
            "settings that were measured again, in other versions of an engine or by others",
            f"{settings:,} settings; their TPOT lies {away:.1f} % (median) from the setting's own median",
        ),
        ("off by more than a factor of two", f"{int(far.sum()):,} rows ({100 * float(far.mean()):.1f} %)"),
        (
            "more than 8 devices: racks, measured with prefill apart though the row says aggregated",
            within(wide),
        ),
        ("more requests in flight than the memory holds: preemption and queues", within(crowded)),
        ("memory that the weights leave too little of: the engine held fewer or smaller ones", within(tight)),
        ("all others", within(~(wide | crowded | tight))),
    )
    return Table("What else is in the residual", ("of TPOT, models left out", "found"), lines)


def main() -> None:
    """Fit the constants to all rows, and write them."""
    rows = load_rows()
    data = measured_rows(rows.answered)
    about = {
        "source": "aiconfigurator-core 0.12.0, systems/silicon_sample.csv",
        "written_by": "python -m harness.validation.silicon",
        "rows": len(rows.answered),
        "distinct": int(data.distinct.sum()),
    }
    silicon_constants.write(fit(data), about)


if __name__ == "__main__":
    main()
