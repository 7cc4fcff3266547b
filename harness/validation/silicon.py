"""Predicting measured serving times: how far spec, data sheets and a few constants go.

`python -m harness.validation.silicon` fits the constants to all rows and writes them; `report` holds rows
against constants that they had no part in. Errors are |predicted / measured - 1|: MdAPE is their median, MAPE
their mean, bias the median of predicted / measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from harness.theory.describe import Table
from harness.validation import silicon_constants, silicon_reference
from harness.validation.silicon_constants import RANGES
from harness.validation.silicon_fit import (
    FIRST,
    NAMES,
    Held,
    Measured,
    Predicted,
    fit,
    hold,
    measured_rows,
)
from harness.validation.silicon_residual import Key, biases, bucket, errors, factors, groups, mdape, words
from harness.validation.silicon_rows import Rows, load_rows

BAR = 20.0
"""Per cent of TPOT MdAPE that leaving one model out may reach."""
HEADERS = ("TPOT MdAPE", "TPOT MAPE", "TPOT bias", "TTFT MdAPE", "TTFT MAPE", "TTFT bias")


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
        factors(held),
        biases(held),
        words(held),
    ]


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
        "leave the row's model and its system out": held.without_both,
        "leave one benchmark out": held.without_source,
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


def _both(predicted: Predicted, data: Measured, mask: NDArray[np.bool_]) -> tuple[object, ...]:
    cells: list[object] = []
    for one, times in ((predicted.tpot, data.tpot), (predicted.ttft, data.ttft)):
        wrong = 100 * errors(one[mask], times[mask])
        bias = float(np.median(one[mask] / times[mask]))
        cells += [round(float(np.median(wrong)), 1), round(float(wrong.mean()), 1), round(bias, 2)]
    return tuple(cells)


def _grouped(held: Held, title: str, key: Key, way: str = "without_model") -> Table:
    predicted: Predicted = getattr(held, way)
    found = groups(held.data.rows, key)
    lines = []
    for name in sorted(found, key=str):
        mask = np.zeros(len(held.data.rows), bool)
        mask[found[name]] = True
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
