"""The pages of `results/`: tables that a command writes, and that a test can write again.

Nothing on a page tells a date, a duration or a machine, so that two runs of one commit give one text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.audit import audit
from harness.results import tables
from harness.results.render import render
from harness.results.runfile import Run
from harness.spec import Spec, load, names
from harness.theory.describe import Description, Table, describe

COMMAND = "moe-harness report"
LEAK = "gpt4-leak"
CONTEXT = 2048
"""Tokens, for what depends on them."""


@dataclass(frozen=True)
class Page:
    """One file of Markdown."""

    file: str
    title: str
    made_by: str
    """The command that writes it."""
    tables: tuple[Table, ...]

    def text(self) -> str:
        """The file's content."""
        head = f"# {self.title}\n\nWritten by `{self.made_by}`; not to be edited.\n"
        return "\n".join((head, *(render(table, "markdown") for table in self.tables)))


def write(folder: Path, page: Page) -> Path:
    """Write a page and return its path. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / page.file
    path.write_text(page.text(), encoding="utf-8")
    return path


def leak(name: str = LEAK) -> Page:
    """Which claims of a leak can be true, and which cannot hold together."""
    found = audit(load(name))
    return Page(f"audit-{name}.md", f"Audit of {found.spec.title}", COMMAND, tuple(found.tables()))


def figures() -> Page:
    """What theory counts for every shipped spec without unknowns, beside what its sources print."""
    known = [spec for spec in map(load, names()) if not spec.unknowns]
    described = [(spec, describe(spec, context=CONTEXT)) for spec in known]
    return Page(
        "figures.md",
        "Parameters and FLOPs against published figures",
        COMMAND,
        (
            Table(
                "Published parameter counts, and the conventions that reproduce them",
                ("spec", "quantity", "printed", "counted", "reproduced under"),
                tuple(row for spec, found in described for row in _published(spec, found)),
            ),
            Table(
                f"Counted, at a context of {CONTEXT:,} tokens",
                (
                    "spec",
                    "parameters",
                    "active per token",
                    "forward GFLOP per token, full attention",
                    "causal attention",
                    "dtype",
                    "weight bytes, all in that dtype",
                    "KV cache bytes per token",
                ),
                tuple(_counted(spec, found) for spec, found in described),
            ),
        ),
    )


def conformance(run: Run) -> Page:
    """How every property ended on everything that was put under test."""
    return Page("conformance.md", "Conformance", COMMAND, tables.summary(run))


def engines(run: Run) -> Page:
    """How every property of what is generated ended."""
    made_by = f"{COMMAND} --engines"
    return Page("engines.md", "Conformance of decoding and serving", made_by, tables.summary(run))


def _published(spec: Spec, found: Description) -> Iterator[tuple[object, ...]]:
    parameters = found.facts["parameters"]
    under = {"parameters.total": parameters["total_under"], "parameters.active": parameters["active"]}
    for one in found.facts["published"]:
        matching = one["reproduced_by"]
        shown = matching[0] if matching else "all"
        printed = f"{one['printed']} {one['unit']}"
        yield (
            spec.name,
            one["quantity"],
            printed,
            under[one["quantity"]][shown],
            ", ".join(matching) or "none",
        )


def _counted(spec: Spec, found: Description) -> tuple[object, ...]:
    facts = found.facts
    flops = facts["flops"]["forward_per_token"]
    return (
        spec.name,
        facts["parameters"]["total"],
        facts["parameters"]["active"]["all"],
        f"{flops['full'] / 1e9:.3f}",
        f"{flops['causal'] / 1e9:.3f}",
        spec.architecture.dtype,
        facts["bytes"]["weights"],
        facts["bytes"]["kv_cache_per_token"],
    )
