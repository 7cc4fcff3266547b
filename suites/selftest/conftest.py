"""Fixtures of the tests of the harness itself."""

from __future__ import annotations

import pytest


@pytest.fixture
def whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed is read by a program, as in a pipe: a worker of pytest-xdist sets COLUMNS."""
    monkeypatch.delenv("COLUMNS", raising=False)
