"""A published figure beside what theory predicts for it: the rows that every table of the page has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from harness.theory.describe import Table

BEYOND = 0.10
"""Share of the published figure from which an error wants a reason."""
HEADERS = (
    "figure",
    "published",
    "predicted",
    "unit",
    "error",
    "within 10 %",
    "why not closer, or not predicted",
)
Bound = Literal["", ">", "<"]
Ending = Literal["within 10 %", "beyond, with a reason", "not predicted, with a reason"]
ENDINGS: tuple[Ending, ...] = get_args(Ending)


@dataclass(frozen=True)
class Row:
    """One figure. Raises ValueError where there is no reason and there should be one."""

    figure: str
    published: float
    predicted: float | None
    unit: str = ""
    why: str = ""
    """Why the prediction is beyond 10 %, or why there is none; printed in no other case."""
    bound: Bound = ""
    """Published as a bound: a prediction on its side has no error."""

    def __post_init__(self) -> None:
        if self.ending != "within 10 %" and not self.why:
            raise ValueError(f"{self.figure}: {self.published} against {self.predicted}, and no reason why")

    @property
    def error(self) -> float | None:
        """Of the prediction, as a share of the published figure; None without a prediction."""
        if self.predicted is None:
            return None
        error = self.predicted / self.published - 1
        if self.bound:
            return min(error, 0.0) if self.bound == ">" else max(error, 0.0)
        return error

    @property
    def ending(self) -> Ending:
        """How the row is counted."""
        if self.error is None:
            return "not predicted, with a reason"
        return "within 10 %" if abs(self.error) <= BEYOND else "beyond, with a reason"

    def cells(self) -> tuple[object, ...]:
        """As `HEADERS` names them."""
        error = self.error
        return (
            self.figure,
            f"{self.bound}{_number(self.published)}",
            "" if self.predicted is None else _number(self.predicted),
            self.unit,
            "" if error is None else _percent(error),
            "" if error is None else self.ending == "within 10 %",
            "" if self.ending == "within 10 %" else self.why,
        )


def _percent(error: float) -> str:
    """With its sign, but for what rounds to nothing."""
    shown = f"{100 * error:+.1f}"
    return "0.0 %" if float(shown) == 0 else f"{shown} %"


def _number(value: float) -> str:
    """Four digits, and all those before the point."""
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Section:
    """The rows of one published table."""

    title: str
    source: str
    basis: str
    """What a prediction rests on: what was assumed, what was fitted, and to which rows."""
    rows: tuple[Row, ...]

    def table(self) -> Table:
        """For printing."""
        return Table(self.title, HEADERS, tuple(row.cells() for row in self.rows))


ELSEWHERE = (
    "Parameters of shipped specs, total and active",
    "their own sources",
    "on the page of figures (`moe-harness report`), with the conventions that reproduce them",
)


def bases(sections: Iterable[Section]) -> Table:
    """What each table rests on."""
    rows = [(one.title, one.source, one.basis) for one in sections]
    return Table("What each table rests on", ("table", "source", "assumed and fitted"), (*rows, ELSEWHERE))


def tally(sections: Sequence[Section]) -> Table:
    """How many rows end how, table by table and in all."""
    rows = [_count(one.title, one.rows) for one in sections]
    rows.append(_count("all", [row for one in sections for row in one.rows]))
    return Table("Published figures by how they end", ("table", "rows", *ENDINGS), tuple(rows))


def _count(title: str, rows: Sequence[Row]) -> tuple[object, ...]:
    endings = [row.ending for row in rows]
    return (title, len(rows), *(endings.count(kind) for kind in ENDINGS))
