"""What changed from one run to another."""

from __future__ import annotations

from dataclasses import dataclass

from harness.results.record import Record
from harness.results.runfile import Run


@dataclass(frozen=True)
class Comparison:
    """Two runs of the same things, side by side."""

    added: tuple[Record, ...]
    removed: tuple[Record, ...]
    changed: tuple[tuple[Record, Record], ...]
    """The same property with another outcome, before and after."""
    incomparable: tuple[tuple[Record, Record], ...]
    """The same property from another seed or another spec file: its outcomes answer other questions."""
    unchanged: int


def compare(before: Run, after: Run) -> Comparison:
    """`after` against `before`, property by property, in the order of the runs."""
    old = {record.key: record for record in before.records}
    new = {record.key: record for record in after.records}
    both = [(old[key], new[key]) for key in old if key in new]
    differing = [(a, b) for a, b in both if _question(a) != _question(b)]
    same = [(a, b) for a, b in both if _question(a) == _question(b)]
    changed = tuple((a, b) for a, b in same if a.outcome != b.outcome)
    return Comparison(
        added=tuple(record for key, record in new.items() if key not in old),
        removed=tuple(record for key, record in old.items() if key not in new),
        changed=changed,
        incomparable=tuple(differing),
        unchanged=len(same) - len(changed),
    )


def _question(record: Record) -> tuple[str | None, int]:
    """Not the input digest: a property that fails stops drawing, and digests less than one that passes."""
    return record.spec_digest, record.seed
