"""Everything that theory is held against, as one page of tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from harness.spec import SpecError
from harness.theory.describe import Table
from harness.validation import (
    count_tables,
    held,
    leak_table,
    pope,
    run_tables,
    serving_tables,
    silicon_rows,
    training_tables,
)
from harness.validation.held import Section

SECTIONS: tuple[Callable[[], Section], ...] = (
    count_tables.megatron,
    count_tables.gpt_oss,
    count_tables.sparse,
    count_tables.caches,
    count_tables.korthikanti,
    run_tables.gpt3,
    run_tables.counted_flops,
    run_tables.utilisation,
    training_tables.megatron,
    training_tables.mt_nlg,
    training_tables.korthikanti,
    training_tables.megascale,
    training_tables.llama,
    run_tables.deepseek,
    run_tables.failing,
    serving_tables.mixtral_steps,
    serving_tables.llama_70b,
    serving_tables.deepseek,
    pope.palm,
)
"""In the order of the page: counts, then training, then inference."""
ROWS = "Measured serving rows"


@cache
def sections() -> tuple[Section, ...]:
    """All published tables."""
    return tuple(make() for make in SECTIONS)


def published_tables() -> list[Table]:
    """The count of rows by how they end, what they rest on, and the tables."""
    found = sections()
    shown = [one.table() for one in found]
    # Beside the steps that it explains.
    shown.insert(SECTIONS.index(serving_tables.mixtral_steps) + 1, serving_tables.rules())
    return [held.tally(found), held.bases(found), *shown]


def silicon_tables() -> list[Table]:
    """The measured rows; where their wheel is absent, a table that says so."""
    try:
        from harness.validation import silicon  # scipy comes with the extra

        silicon_rows.path()
    except (ImportError, SpecError) as error:
        return [without(str(error))]
    return silicon.report()


def without(why: str) -> Table:
    """In the place of the measured rows: that nothing was measured, and why."""
    return Table(ROWS, ("measured", "why not"), ((False, why),))


def tables(*, silicon: bool = True) -> list[Table]:
    """The whole page; without `silicon` the measured rows are left out, and a table says so."""
    rows = silicon_tables() if silicon else [without("left out, by --no-silicon")]
    return [*published_tables(), *rows, *leak_table.tables()]
