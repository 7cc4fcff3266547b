"""A property: one statement that every conforming implementation satisfies, and how it may end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pytest

from harness.spec.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

Level = Literal["MUST", "SHOULD"]
Outcome = Literal["passed", "failed", "unsupported", "expected", "stale", "void"]
F = TypeVar("F", bound=Callable[..., Any])


class Violation(AssertionError):
    """The implementation breaks the property: the message is the counterexample in one sentence."""

    def __init__(
        self,
        message: str,
        *,
        stage: str = "",
        facts: dict[str, Any] | None = None,
        values: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """`facts`, of JSON's types, say what the message says; `values` are all that was observed, and all
        that was expected, where these are tensors of one shape."""
        super().__init__(message)
        self.stage = stage
        self.facts = facts or {}
        self.values = values


class Void(Exception):
    """The property could not be measured (nothing comparable, a fixture that missed its aim)."""


def require(holds: bool, message: str, *, stage: str = "", **facts: Any) -> None:
    """Raise Violation(message) unless `holds`; `facts` go to the run file."""
    if not holds:
        raise Violation(message, stage=stage, facts=facts)


def always(_: Architecture | None) -> bool:
    """Applies to every architecture, and to an implementation's own shape."""
    return True


@dataclass(frozen=True)
class Property:
    """The stable identity of a property."""

    slug: str
    """part.statement-in-words, for instance "routing.selects-k-distinct"."""
    clause: str
    """The clause of the spec that it checks, for instance "architecture.moe.top_k"."""
    needs: tuple[str, ...]
    """Capabilities the model must declare; otherwise the outcome is unsupported."""
    level: Level = "MUST"
    kills: tuple[str, ...] = ()
    """Mutants that this property must fail, for the right reason."""
    applies: Callable[[Architecture | None], bool] = field(default=always, compare=False)
    """To which architectures; where it does not apply it is not run and not counted."""
    statement: str = ""
    """The docstring's first sentence."""
    costly: bool = False
    """Left out of the fast profile: it takes a multiple of what most properties do."""


def conformance(
    slug: str,
    *,
    clause: str,
    needs: tuple[str, ...],
    level: Level = "MUST",
    kills: tuple[str, ...] = (),
    applies: Callable[[Architecture | None], bool] = always,
    costly: bool = False,
) -> Callable[[F], F]:
    """Mark a test function `def test_x(case: Case) -> None` as a property."""

    def mark(function: F) -> F:
        statement = (function.__doc__ or "").strip().split("\n")[0]
        prop = Property(slug, clause, needs, level, kills, applies, statement, costly)
        marked: F = pytest.mark.conformance(prop)(function)
        return marked

    return mark
