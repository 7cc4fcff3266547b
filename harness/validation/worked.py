"""One statement worked by hand beside theory's figure for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.spec.printed import interval

NEAR = 0.005
"""Of the figure. The hand starts from the leak's own rounded figures (111e9, 55e9, 280e9), theory where it
can from the shape that they agree on: they leave half a per cent open."""
Verdict = Literal["reproduced", "refuted"]


@dataclass(frozen=True)
class Worked:
    """`theory` is in the unit that the hand's figure is printed in, and stands for what `how` says."""

    statement: str
    hand: str
    theory: float
    unit: str
    how: str
    """The derivation, with its numbers."""

    @property
    def verdict(self) -> Verdict:
        """Reproduced to the rounding of the printed figure, or to `NEAR`."""
        printed = interval(self.hand)
        middle = (printed.low + printed.high) / 2
        near = abs(self.theory / middle - 1) <= NEAR
        return "reproduced" if self.theory in printed or near else "refuted"

    def cells(self) -> tuple[object, ...]:
        """A row of the table."""
        return self.statement, f"{self.hand} {self.unit}", f"{self.theory:.5g}", self.verdict, self.how
