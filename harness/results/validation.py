"""The page on how far theory is from what was published and measured."""

from __future__ import annotations

from harness.results.report import Page
from harness.validation.page import tables

COMMAND = "moe-harness validation"


def page(file: str = "validation.md", *, silicon: bool = True) -> Page:
    """Tables of `harness.validation`; parameter counts of specs are on the page of figures."""
    made_by = COMMAND if silicon else f"{COMMAND} --no-silicon"
    return Page(
        file, "Theory held against what was published and measured", made_by, tuple(tables(silicon=silicon))
    )
