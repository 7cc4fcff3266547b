"""What a search found, as tables and as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.planning.selection import Found
from harness.theory.describe import Table

Column = tuple[str, Callable[[Mapping[str, Any]], object]]
"""A header, and what stands under it."""
GB = 1e9


@dataclass(frozen=True)
class Broken:
    """What one limit costs."""

    layouts: int
    """That break it."""
    alone: int
    """That break nothing else."""
    best: Found | None
    """The best of those: what loosening this limit would gain."""


@dataclass(frozen=True)
class Plan:
    """The layouts that fit, best first, those that nothing beats, and what rules the others out."""

    goal: str
    title: str
    """Of what, on what, for what."""
    by: str
    """What the ranking is by."""
    key: str
    """The fact that the ranking is of."""
    axes: tuple[str, str]
    """Facts that the front trades for each other."""
    columns: tuple[Column, ...]
    definitions: Mapping[str, str]
    """Of columns that a header does not explain."""
    rows: int
    """Of a table at most."""
    evaluated: int
    """Layouts whose time and memory were computed."""
    fitting: int
    ranked: tuple[Found, ...]
    front: tuple[Found, ...]
    excluded: tuple[Found, ...]
    """The best of those that break a limit."""
    broken: Mapping[str, Broken]
    impossible: Mapping[str, tuple[int, str]]
    """Reasons why combinations of ways cannot run at all: how many, and a sentence on one of them."""

    def tables(self) -> Iterator[Table]:
        """The same for people."""
        headers = tuple(header for header, _ in self.columns)
        fit = f"{self.fitting:,} of {self.evaluated:,} layouts fit"
        yield Table(f"{self.title}: {fit}, the best by {self.by}", headers, self._rows(self.ranked))
        first, second = self.axes
        some = _spread(self.front, max(2, self.rows))
        front = f"Nothing is better in both {_spoken(first)} and {_spoken(second)}"
        yield Table(f"{front}: {len(some)} of {len(self.front)}", headers, self._rows(some))
        rows = tuple(
            (*row, "; ".join(one.why))
            for row, one in zip(self._rows(self.excluded), self.excluded, strict=True)
        )
        yield Table(f"Ruled out, the best by {self.by} if it could be", (*headers, "because"), rows)
        limits = tuple(
            (name, one.layouts, one.alone, *self._gain(one.best))
            for name, one in self.broken.items()
            if one.layouts
        )
        heads = (
            "limit",
            "broken by",
            "alone by",
            f"the best of those: {_spoken(self.key)}{', s' if self.key == 'tpot' else ''}",
            "layout",
            "because",
        )
        yield Table("What each limit rules out", heads, limits)
        impossible = tuple((name, count, text) for name, (count, text) in self.impossible.items())
        yield Table("Combinations that cannot run", ("because", "combinations", "for example"), impossible)
        yield Table("What columns mean", ("column", "definition"), tuple(self.definitions.items()))

    def as_dict(self) -> dict[str, Any]:
        """The same, ready for json.dumps: every fact in its unit, bytes and seconds and USD."""
        return {
            "goal": self.goal,
            "title": self.title,
            "by": self.by,
            "definitions": dict(self.definitions),
            "evaluated": self.evaluated,
            "fitting": self.fitting,
            "ranked": _facts(self.ranked),
            "front": {"axes": list(self.axes), "layouts": _facts(self.front)},
            "excluded": _facts(self.excluded),
            "limits": {
                name: {
                    "broken": one.layouts,
                    "alone": one.alone,
                    "best": _facts([one.best] if one.best else []),
                }
                for name, one in self.broken.items()
            },
            "impossible": {
                name: {"combinations": count, "example": text}
                for name, (count, text) in self.impossible.items()
            },
        }

    def _gain(self, best: Found | None) -> tuple[object, ...]:
        if best is None:
            return ("", "", "")
        return (best.facts[self.key], ways(best.facts), "; ".join(best.why))

    def _rows(self, found: Sequence[Found]) -> tuple[tuple[object, ...], ...]:
        return tuple(tuple(cell(one.facts) for _, cell in self.columns) for one in found)


def ways(facts: Mapping[str, Any]) -> str:
    """How a layout divides the devices, in words."""
    names = ("tensor", "pipeline", "data", "expert")
    return ", ".join(f"{name}_parallel {facts[f'{name}_parallel']:,}" for name in names)


def _spread(found: Sequence[Found], most: int) -> Sequence[Found]:
    """At most so many of them, evenly spaced, both ends among them."""
    if len(found) <= most:
        return found
    return [found[round(place * (len(found) - 1) / (most - 1))] for place in range(most)]


def _facts(found: Sequence[Found]) -> list[dict[str, Any]]:
    return [dict(one.facts) | {"ruled_out_by": list(one.why)} for one in found]


def _spoken(name: str) -> str:
    return {"usd_per_1k": "USD per 1,000 tokens", "tpot": "TPOT", "gpus": "GPUs"}.get(
        name, name.replace("_", " ")
    )


def plain(header: str, name: str) -> Column:
    """A fact as it is."""
    return header, lambda facts: facts[name]


def scaled(header: str, name: str, unit: float) -> Column:
    """A fact in a larger or smaller unit."""
    return header, lambda facts: facts[name] / unit


def rounded(header: str, name: str) -> Column:
    """A large fact, to the nearest whole number."""
    return header, lambda facts: round(facts[name])


def percent(header: str, name: str) -> Column:
    """A share."""
    return header, lambda facts: f"{facts[name]:.1%}"


WAYS: tuple[Column, ...] = (
    plain("GPUs", "gpus"),
    plain("TP", "tensor_parallel"),
    plain("PP", "pipeline_parallel"),
    plain("DP", "data_parallel"),
    plain("EP", "expert_parallel"),
)
