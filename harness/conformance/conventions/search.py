"""A convention, the search for those that explain what was seen, and how a Violation says it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any, Generic, NamedTuple, TypeVar

import pytest

from harness.conformance.checked import Malformed
from harness.conformance.property import Violation, Void
from harness.implementations.protocols import Unsupported
from harness.spec.architecture import Architecture

P = TypeVar("P")
E = TypeVar("E")
Says = Callable[[Architecture], str]
"""What the spec does in its place: the end of a sentence that begins with "the spec"."""

NAMED = 3
"""Variants that a message names; the facts have all of them."""

_finding: ContextVar[bool] = ContextVar("finding", default=True)


@dataclass(frozen=True)
class Convention(Generic[P]):
    """One way of computing a stage that is not the spec's."""

    name: str
    """That of the mutant that has it, where there is one."""
    axis: str
    """What it decides. Two conventions of one axis exclude each other."""
    variant: str
    """For messages, such as "combine weights are scaled twice"."""
    spec: Says
    change: Callable[[P], P]
    """From all that a stage computes with to the same under this convention."""
    stage: str = ""
    """Two conventions are tried together where this is the same."""


class Fit(NamedTuple):
    """A variant held against one thing that was seen."""

    agrees: bool
    """Within the property's tolerance, on every value that can be compared."""
    differs: bool
    """Measurably from what the spec's own convention gives there."""


@dataclass(frozen=True)
class Finding:
    """What the search found."""

    variants: tuple[tuple[Convention[Any], ...], ...]
    """Each explains all that was seen; more than one where the input does not tell them apart."""
    specified: tuple[str, ...] = ()
    """In place of each convention of an only variant: the end of a sentence that begins with "the spec"."""

    @property
    def names(self) -> list[str]:
        """For the facts: the conventions of a variant joined by " + "."""
        return [" + ".join(part.name for part in variant) for variant in self.variants]

    @property
    def sentence(self) -> str:
        """For the message."""
        if not self.variants:
            return "no known convention explains it"
        said = [" and ".join(part.variant for part in variant) for variant in self.variants]
        if len(said) > 1:
            more = f"; or {len(said) - NAMED} more" if len(said) > NAMED else ""
            listed = "; or ".join(said[:NAMED]) + more
            return f"this implements one of these, which this input does not tell apart: {listed}"
        spec = " and ".join(dict.fromkeys(f"the spec {what}" for what in self.specified))
        return f"this implements variant: {said[0]}, where {spec}"


def says(path: str) -> Says:
    """The spec's own value of a field of the architecture, by its path with dots."""

    def read(architecture: Architecture) -> str:
        value: object = architecture
        for name in path.split("."):
            value = getattr(value, name, None)
        shown = str(value).lower() if isinstance(value, bool) else "none" if value is None else value
        return f"says {path.rpartition('.')[2]} = {shown}"

    return read


def does(what: str) -> Says:
    """In words, where no field of the spec is named after it."""
    return lambda _: what


def search(
    conventions: Sequence[Convention[P]],
    seen: Sequence[E],
    fit: Callable[[Callable[[P], P], E], Fit],
) -> tuple[tuple[Convention[P], ...], ...]:
    """The variants of fewest conventions, one or two, that agree with all that was seen.

    `fit` holds a change of what is computed with against one thing seen; the first of these rules most
    variants out.
    """
    for size in (1, 2):
        found = []
        for variant in combinations(conventions, size):
            if len({part.axis for part in variant}) < size or len({part.stage for part in variant}) > 1:
                continue
            differs = False
            for one in seen:
                agrees, here = fit(_together(variant), one)
                differs |= here
                if not agrees:
                    break
            else:
                if differs:
                    found.append(variant)
        if found:
            return tuple(found)
    return ()


def finding(
    conventions: Sequence[Convention[P]],
    seen: Sequence[E],
    fit: Callable[[Callable[[P], P], E], Fit],
    built: Callable[[E], Architecture],
) -> Finding:
    """What `search` finds, and the spec in its place: of what was `built` where each convention is needed."""
    variants = search(conventions, seen, fit)
    if len(variants) != 1:
        return Finding(variants)
    specified = []
    for part in variants[0]:
        others = _together([other for other in variants[0] if other is not part])
        needed = next((one for one in seen if not fit(others, one).agrees), seen[0])
        specified.append(part.spec(built(needed)))
    return Finding(variants, tuple(specified))


def _together(variant: Sequence[Convention[P]]) -> Callable[[P], P]:
    return lambda given: reduce(lambda value, part: part.change(value), variant, given)


class Seen(Generic[E]):
    """What a property looks at, in order, remembered."""

    def __init__(self, source: Iterable[E] = ()) -> None:
        self._source = iter(source)
        self.items: list[E] = []
        self.broken = False
        """The source itself raised a Violation: what is wrong is not what the property compares."""

    def __iter__(self) -> Iterator[E]:
        while True:
            try:
                item = next(self._source)
            except StopIteration:
                return
            except Violation:
                self.broken = True
                raise
            self.items.append(item)
            yield item

    def add(self, item: E) -> None:
        """Remember what no source gave."""
        self.items.append(item)

    def everything(self) -> list[E]:
        """What was looked at last, then all before it, then what the source would still have given."""
        looked_at = len(self.items)
        with suppress(Violation, Void, Unsupported):  # what cannot be looked at is no evidence
            self.items.extend(self._source)
        return [*reversed(self.items[:looked_at]), *self.items[looked_at:]]


Find = Callable[[list[E]], "Finding | None"]
"""A finder, from all that was seen; None where it has nothing to say."""


@contextmanager
def explained(seen: Seen[E], find: Find[E] | Mapping[str, Find[E]]) -> Iterator[None]:
    """A Violation from within also says which convention explains all that was seen.

    With several finders, by stage, it is the one of the Violation's stage. If it crashes, the message stays
    as it was, and the fact "convention_finder" says so.
    """
    try:
        yield
    except Violation as violation:
        silent = isinstance(violation, Malformed) or seen.broken or not seen.items or not _finding.get()
        finder = find.get(violation.stage) if isinstance(find, Mapping) else find
        if finder is not None and not silent:
            _explain(violation, seen, finder)
        raise


def _explain(violation: Violation, seen: Seen[E], find: Find[E]) -> None:
    try:
        finding = find(seen.everything())
        if finding is None:
            return
        message, names = f"{violation}; {finding.sentence}", finding.names
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001  # the verdict is not the finder's
        violation.facts["convention_finder"] = f"failed: {type(error).__name__}: {error}"
        return
    violation.args = (message,)
    violation.facts["implements"] = names


@contextmanager
def unexplained() -> Iterator[None]:
    """Within it no Violation is explained: for runs that want to know only whether a property fails."""
    token = _finding.set(False)
    try:
        yield
    finally:
        _finding.reset(token)
