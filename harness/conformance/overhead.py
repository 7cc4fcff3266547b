"""The null implementation, in every run: the harness's own time per property, and whether the run could fail.

A property that ends early on an implementation that computes nothing takes less time on it than elsewhere:
`Case.clock` measures the same on the implementations under test, where it counts what they were asked for.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

import pytest

from harness.conformance import subjects
from harness.conformance.conventions import unexplained
from harness.conformance.property import Property
from harness.conformance.subjects import Subject
from harness.conformance.verdict import verdict

BUDGET_S = 4.0
"""Of processor time, for all properties of a run together: what is left when it is spent is not measured. A
run of all suites takes ten times as long, and an idle core measures nearly all of them in this time."""
PATIENCE_S = 30.0
"""Of wall time: a property that waits for what never comes ends there."""

Wanted = tuple[Property, Callable[..., Any], Subject]
"""A property, its test function, and a subject on whose architecture it is run."""


@dataclass(frozen=True)
class Measured:
    """One property on the null implementation."""

    slug: str
    outcome: str
    """As of any implementation, or crashed."""
    reason: str
    harness_s: float
    """Processor time of the property, less the little that the implementation takes."""


def measure(
    wanted: Sequence[Wanted], seed: int, *, budget_s: float = BUDGET_S
) -> tuple[list[Measured], list[str]]:
    """What was measured, one property of each part of the suites in turn, and the slugs of the rest."""
    from harness.implementations.registry import resolve

    null, began, since = resolve("null"), time.process_time(), time.monotonic()
    declared: dict[str, frozenset[str] | BaseException] = {}
    found, left = [], []
    for prop, function, subject in _in_turn(wanted):
        spent = time.process_time() - began >= budget_s or time.monotonic() - since >= PATIENCE_S
        if spent or set(inspect.signature(function).parameters) != {"case"}:
            left.append(prop.slug)
            continue
        on_null = replace(subject, address=null.name, implementation=null)
        found.append(_one(prop, function, on_null, seed, declared))
    return found, left


def _one(
    prop: Property,
    function: Callable[..., Any],
    subject: Subject,
    seed: int,
    declared: dict[str, frozenset[str] | BaseException],
) -> Measured:
    case = subjects.case(subject, prop, seed)
    start, error = time.process_time(), None
    try:
        subjects.need(subject, prop, seed, declared)
        with unexplained():
            function(case)
    except (Exception, pytest.fail.Exception, pytest.skip.Exception) as raised:  # noqa: BLE001  # as of any
        error = raised
    taken = time.process_time() - start - case.clock.seconds
    ending = verdict(error)
    return Measured(
        prop.slug, "crashed" if ending.crashed else ending.outcome, ending.reason, max(taken, 0.0)
    )


def _in_turn(wanted: Sequence[Wanted]) -> list[Wanted]:
    """Each property once, on the first subject given with it: the first of each part, then the second."""
    first: dict[str, Wanted] = {}
    for one in wanted:
        first.setdefault(one[0].slug, one)
    parts: dict[str, list[Wanted]] = {}
    for slug, one in first.items():
        parts.setdefault(slug.partition(".")[0], []).append(one)
    return [one for one in chain.from_iterable(zip_longest(*parts.values())) if one is not None]
