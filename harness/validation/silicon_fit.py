"""Fitting the constants to measured rows, and predicting rows that had no part in it.

The sum of a robust loss of log(predicted / measured) is minimised over the logarithms of the constants,
inside of their ranges: first those of TPOT, on TPOT; then, with these, those of TTFT on TTFT. Repetitions of
one measurement under other names count once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from harness.spec import SpecError
from harness.validation.silicon_constants import RANGES, Constants
from harness.validation.silicon_rows import Row, Rows, load_rows
from harness.validation.silicon_terms import Floats, Terms, of_rows, terms

LOSS, SCALE = "soft_l1", 0.1
"""Quadratic to errors of about 10 %, linear beyond: rows that no physics explains do not lead the fit."""
NAMES = tuple(one.name for one in fields(Constants))
FIRST = NAMES.index("request_seconds")
"""Constants before it are fitted to TPOT, the others to TTFT."""


@dataclass(frozen=True)
class Measured:
    """Rows with their terms and times. [R]"""

    rows: tuple[Row, ...]
    terms: Terms
    tpot: Floats
    ttft: Floats
    distinct: NDArray[np.bool_]
    """Whether a row is the first entry of its measurement."""

    def values(self, key: str) -> NDArray[np.str_]:
        """One field of each row."""
        return np.array([str(getattr(row, key)) for row in self.rows])


@dataclass(frozen=True)
class Predicted:
    """Seconds. [R]"""

    tpot: Floats
    ttft: Floats


def measured_rows(rows: Sequence[Row]) -> Measured:
    """Rows made ready for fitting."""
    seen: set[object] = set()
    distinct = []
    for row in rows:
        distinct.append(row.measurement not in seen)
        seen.add(row.measurement)
    times = np.array([(row.tpot, row.ttft) for row in rows]).T
    return Measured(tuple(rows), terms(rows), times[0], times[1], np.array(distinct))


def fit(data: Measured, chosen: NDArray[np.bool_] | None = None) -> Constants:
    """Constants by the rows that are chosen (None: all). Raises SpecError where scipy is not installed."""
    wanted = data.distinct if chosen is None else data.distinct & chosen
    if not wanted.any():
        raise ValueError("no rows to fit constants to")
    some = of_rows(data.terms, np.flatnonzero(wanted))
    start = Constants(**{name: RANGES[name].start for name in NAMES})
    found = _minimum(NAMES[:FIRST], start, some.tpot, data.tpot[wanted])
    tpot, own = some.tpot(found), some.seconds(some.prompt, found)
    return _minimum(NAMES[FIRST:], found, lambda c: some.ttft(c, tpot, own), data.ttft[wanted])


def predict(data: Measured, constants: Constants) -> Predicted:
    """All rows by one set of constants."""
    tpot = data.terms.tpot(constants)
    own = data.terms.seconds(data.terms.prompt, constants)
    return Predicted(tpot, data.terms.ttft(constants, tpot, own))


def left_out(data: Measured, *keys: str) -> tuple[Predicted, dict[str, Constants]]:
    """Each row by constants in which no row with the same value of any key ("spec", "system") had a part."""
    groups = np.stack([data.values(key) for key in keys], axis=1)
    result = Predicted(np.zeros(len(groups)), np.zeros(len(groups)))
    by_group: dict[str, Constants] = {}
    for group in np.unique(groups, axis=0):
        same = groups == group
        by_group[", ".join(group)] = constants = fit(data, ~same.any(axis=1))
        all_rows, out = predict(data, constants), same.all(axis=1)
        result.tpot[out], result.ttft[out] = all_rows.tpot[out], all_rows.ttft[out]
    return result, by_group


@dataclass(frozen=True)
class Held:
    """All answered rows, and their times by constants from all rows, and from rows unlike them."""

    rows: Rows
    data: Measured
    constants: Constants
    everything: Predicted
    without_model: Predicted
    without_system: Predicted
    without_both: Predicted
    without_source: Predicted
    by_model: Mapping[str, Constants]


def hold(rows: Rows | None = None) -> Held:
    """Fit and predict, some seconds. Raises SpecError where wheel or scipy are not installed."""
    rows = load_rows() if rows is None else rows
    data = measured_rows(rows.answered)
    constants = fit(data)
    without_model, by_model = left_out(data, "spec")
    return Held(
        rows,
        data,
        constants,
        predict(data, constants),
        without_model,
        left_out(data, "system")[0],
        left_out(data, "spec", "system")[0],
        left_out(data, "source")[0],
        by_model,
    )


def _minimum(
    names: Sequence[str], start: Constants, predicted: Callable[[Constants], Floats], measured: Floats
) -> Constants:
    try:
        from scipy.optimize import least_squares
    except ImportError:
        right = 'run: pip install "moe-harness[silicon]"'
        raise SpecError(f"fitting the constants needs scipy, which is not installed; {right}") from None

    def at(logs: Floats) -> Constants:
        return replace(start, **dict(zip(names, np.exp(logs).tolist(), strict=True)))

    low, high = (np.log([getattr(RANGES[name], end) for name in names]) for end in ("low", "high"))
    solution = least_squares(
        lambda logs: np.log(predicted(at(logs)) / measured),
        np.log([getattr(start, name) for name in names]),
        bounds=(low, high),
        loss=LOSS,
        f_scale=SCALE,
    )
    return at(solution.x)
