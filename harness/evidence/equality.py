"""Equal tokens, or a difference that rounding explains: the margin of every choice on the way.

Letters: L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.evidence.margins import topk_gap


@dataclass(frozen=True)
class Agreement:
    """Whether two greedy decodings took the same path, and how close it was."""

    position: int | None
    """Of the first token that differs; None where all are equal."""
    gap: float
    """By how much the expected token's logit exceeds that of the token that came instead: 0 where all are
    equal, infinite where one sequence goes on and the other does not."""
    admitted: float
    """The gap that rounding may close there."""
    margin: float
    """The smallest lead of a best logit over the second on the path that both took: how sharp the
    comparison was. Infinite where there was no choice."""

    @property
    def equal(self) -> bool:
        """All tokens are the same."""
        return self.position is None

    @property
    def excused(self) -> bool:
        """They differ by no more than rounding admits; what follows that token cannot be compared."""
        return not self.equal and self.gap <= self.admitted

    def __str__(self) -> str:
        if self.equal:
            return f"equal, smallest margin {self.margin:.3g}"
        verdict = "within" if self.excused else "beyond"
        return (
            f"token {self.position} differs at a gap of {self.gap:.3g}, {verdict} the {self.admitted:.3g} "
            f"that rounding admits; smallest margin before it {self.margin:.3g}"
        )


def agreement(
    expected: Sequence[int], got: Sequence[int], logits: Tensor, radius: Tensor | float = 0.0
) -> Agreement:
    """Compare greedy tokens [L] with `expected` [L], of which `logits` [L, V] are those of every choice.

    radius, of a shape that broadcasts to [L, V], is how far rounding may move a logit: 0 for float64 on both
    sides, otherwise a bound such as `margins.Spread.radius`. A difference is excused where the two logits
    may have changed places: gap <= radius of one + radius of the other. Raises ValueError where there are
    not as many logits as expected tokens.
    """
    if logits.dim() != 2 or len(expected) != logits.shape[0]:
        raise ValueError(f"{len(expected)} expected tokens need [L, V] logits, not {tuple(logits.shape)}")
    values = logits.detach().to("cpu", torch.float64)
    spread = torch.as_tensor(radius, dtype=torch.float64).detach().cpu().expand(values.shape)
    first = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
    if first is None and len(expected) != len(got):
        first = min(len(expected), len(got))
    common = values[:first]
    margin = float(topk_gap(common, 1).min()) if common.numel() else math.inf
    if first is None:
        return Agreement(None, 0.0, 0.0, margin)
    if first >= min(len(expected), len(got)):
        return Agreement(first, math.inf, 0.0, margin)
    pair = [expected[first], got[first]]
    if not 0 <= pair[1] < values.shape[1]:
        return Agreement(first, math.inf, 0.0, margin)
    gap = values[first, pair[0]] - values[first, pair[1]]
    return Agreement(first, float(gap), float(spread[first, pair].sum()), margin)
