"""'The leak, worked': what was worked out by hand about the leak, and what theory makes of each figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.theory.describe import Table
from harness.validation.leak_serving import serving
from harness.validation.leak_training import shape, training_run
from harness.validation.worked import Worked

HEADERS = ("statement", "by hand", "by theory", "verdict", "derivation")
PARTS = {"shape": shape, "training": training_run, "serving": serving}


def worked() -> tuple[Worked, ...]:
    """All statements."""
    return tuple(one for part in PARTS.values() for one in part())


def tables() -> list[Table]:
    """The statements by part, and how many end how."""
    found = {name: tuple(part()) for name, part in PARTS.items()}
    shown = [
        Table(f"The leak, worked: {name}", HEADERS, tuple(one.cells() for one in statements))
        for name, statements in found.items()
    ]
    return [*shown, _tally(found)]


def _tally(found: dict[str, tuple[Worked, ...]]) -> Table:
    rows: list[tuple[object, ...]] = [_count(name, statements) for name, statements in found.items()]
    rows.append(_count("all", [one for statements in found.values() for one in statements]))
    return Table("The leak, worked: verdicts", ("part", "figures", "reproduced", "refuted"), tuple(rows))


def _count(name: str, statements: Sequence[Worked]) -> tuple[object, ...]:
    counted = Counter(one.verdict for one in statements)
    return name, len(statements), counted["reproduced"], counted["refuted"]
