"""Exponential races: categorical draws by the argmax of w / e, or of log w + Gumbel noise, undrawn.

For independent e ~ Exp(1), the index of the largest w_i / e_i is i with probability w_i / sum_j w_j; and
-log e is Gumbel noise (Maddison, Tarlow and Minka 2014, arXiv 1411.0030, section 2). So all that has to be
known of an exponential is its weight, and the argmax is one draw with a finite number of answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.evidence.lazy import MOVES, Lazy, NotEnumerable, Uniforms, aten, plain, unanswerable


@dataclass(frozen=True)
class Shape:
    """How a value depends on e and its weight w: sign * form."""

    form: str
    """"linear": e / w. "inverse": w / e. "log": log(e / w). "scaled": a multiple of log(e / w)."""
    sign: int


class LazyRace(Lazy):
    """Functions of exponential numbers; its parts are the numbers' indices and log weights."""

    kind = "an exponential random number"
    shape_: Shape

    def become(self, parts: Sequence[Tensor], form: str, sign: int) -> LazyRace:
        """Other weights, or another function of the same numbers."""
        made = Lazy.remade(self, parts)
        made.shape_ = Shape(form, sign)
        return made

    def remade(self, parts: Sequence[Tensor]) -> LazyRace:
        """The same function of others of its numbers."""
        return self.become(parts, self.shape_.form, self.shape_.sign)
