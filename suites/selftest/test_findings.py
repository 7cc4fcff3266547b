"""Every reproducer in results/findings.md still shows its defect: one that upstream has fixed fails here."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
from pathlib import Path

import pytest

FINDINGS = Path(__file__).parents[2] / "results" / "findings.md"
BLOCK = re.compile(r"^```python (\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
REPRODUCERS = dict(BLOCK.findall(FINDINGS.read_text(encoding="utf-8")))
QUICK = ("early-exit-exception", "eager-float64-left-padding", "universal-subset-vocabulary")
"""Run with every change, well under five seconds together; the others on request."""


def test_every_reproducer_has_a_name_of_its_own() -> None:
    """A block of python in the findings has a slug, and no two have the same."""
    text = FINDINGS.read_text(encoding="utf-8")
    names = [name for name, _ in BLOCK.findall(text)]
    assert text.count("```python") == len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)
    assert set(QUICK) <= set(names)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in REPRODUCERS]
)
def test_reproducer_shows_its_defect(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reproducer prints a line that starts with DEFECT."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(logging.getLogger("ContinuousBatchingLogger"), "disabled", True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(REPRODUCERS[name], name, "exec"), {"__name__": name})  # noqa: S102
    assert any(line.startswith("DEFECT") for line in printed.getvalue().splitlines()), printed.getvalue()
