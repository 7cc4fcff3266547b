"""Where a counterexample in whole logits comes from: checks of less, made only once there is one.

Letters: B sequences, S tokens per sequence, T = B * S tokens, R of these tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.conformance.capture import traces
from harness.conformance.case import Case
from harness.conformance.conventions import unexplained
from harness.conformance.property import Violation, Void
from harness.evidence.margins import unit_roundoff
from harness.implementations.protocols import Routing, Unsupported

Check = Callable[[Case], object]
HALF_THE_DIGITS = math.sqrt(unit_roundoff(torch.float32))
"""Relative to the largest value of a stage: rounding moves the last digits, and a defect the first ones."""


@contextmanager
def narrowed(case: Case, *checks: Check, otherwise: str) -> Iterator[None]:
    """A Violation from within that names no stage is of that which the first failing check names.

    Each check leaves something out of what failed. Where all of them hold, it is what they leave out that is
    wrong: the stage `otherwise`. A check that cannot be made tells nothing, and no stage is named.
    """
    try:
        yield
    except Violation as violation:
        if not violation.stage:
            # What it draws and notes is not of the case that failed.
            aside = replace(case, facts={}, looked_at={}, _digest=hashlib.sha256())
            violation.stage = _first(aside, checks, otherwise)
        raise


def _first(case: Case, checks: Iterable[Check], otherwise: str) -> str:
    with unexplained():
        for check in checks:
            try:
                check(case)
            except Violation as smaller:
                return smaller.stage
            except (Unsupported, Void):
                return ""
    return otherwise


@dataclass(frozen=True)
class Call:
    """Tokens of one call, of which some are compared with those of another."""

    tokens: Tensor
    """[B, S]."""
    rows: Tensor
    """[R]: numbers of tokens, 0 to T - 1."""
    mask: Tensor | None = None


def parted(case: Case, model: Any, pairs: Iterable[tuple[Call, Call]], *, between: str = "") -> Check:
    """A check that the tokens of two calls are routed alike, for each pair.

    It names the first stage that differs, in the order of the layers. A layer's input that differs is of the
    stage `between`: attention, for tokens that are the same.
    """

    def routed(call: Call) -> list[Routing]:
        return traces(model, call.tokens, mask=call.mask, architecture=case.architecture)

    def check(_: Case) -> None:
        for one, other in pairs:
            for a, b in zip(routed(one), routed(other), strict=True):
                stage = _differing(a, one.rows, b, other.rows, between)
                if stage is not None:
                    raise Violation(f"layer {a.layer} differs", stage=stage)

    return check


def _differing(a: Routing, rows: Tensor, b: Routing, others: Tensor, between: str) -> str | None:
    if _apart(a.hidden, rows, b.hidden, others):
        return between
    for stage, name in (("proj", "logits"), ("score", "scores")):
        if _apart(getattr(a, name), rows, getattr(b, name), others):
            return stage
    # The order of a token's slots is free.
    (first, order), (second, reorder) = a.indices[rows].sort(-1), b.indices[others].sort(-1)
    if not torch.equal(first, second):
        return "drop" if bool(((first < 0) | (second < 0)).any()) else "select"
    if a.weights is not None and b.weights is not None:
        every = torch.arange(len(rows))
        if _apart(a.weights[rows].gather(-1, order), every, b.weights[others].gather(-1, reorder), every):
            return "weigh"
    return "combine" if _apart(a.output, rows, b.output, others) else None


def _apart(a: Tensor | None, rows: Tensor, b: Tensor | None, others: Tensor) -> bool:
    if a is None or b is None:
        return False
    x, y = a[rows].double(), b[others].double()
    return not bool(((x - y).abs() <= HALF_THE_DIGITS * x.abs().amax()).all())
