"""From how a property's test function ended to the property's outcome."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from harness.conformance.checked import Malformed
from harness.conformance.property import Violation, Void
from harness.implementations.protocols import Unsupported

LONGEST = 500
"""Characters of a reason: an exception's message may hold a whole tensor."""


@dataclass(frozen=True)
class Verdict:
    """An outcome before any baseline is applied to it, and why."""

    outcome: Literal["passed", "failed", "unsupported", "void"]
    reason: str = ""
    stage: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    crashed: bool = False
    """It failed by an exception, a malformed answer or by taking too long, not by breaking the property."""


def verdict(error: BaseException | None) -> Verdict:
    """The verdict on a property that ended with `error`, or without one."""
    match error:
        case None:
            return Verdict("passed")
        case Violation():
            malformed = isinstance(error, Malformed)
            return Verdict("failed", _line(error), error.stage, error.facts, crashed=malformed)
        case Unsupported():
            return Verdict("unsupported", _line(error))
        case Void():
            return Verdict("void", _line(error))
        case pytest.skip.Exception():
            return Verdict("void", f"skipped: {_line(error)}")
        case pytest.fail.Exception() if "from pytest-timeout" in str(error):
            limit = str(error).partition(">")[2].partition("s)")[0]
            return Verdict("failed", f"timed out after {limit} s", crashed=True)
        case AssertionError() | pytest.fail.Exception():
            return Verdict("failed", f"{_line(error)} ({_place(error)})")
        case _:
            what = f"crashed: {type(error).__name__}: {_line(error)} ({_place(error)})"
            return Verdict("failed", what, crashed=True)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0] if len(lines[0]) <= LONGEST else lines[0][: LONGEST - 3] + "..."


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "no traceback"
