"""Choices of one run of a program that is run again and again: the tape of a depth-first search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

SAME = 1e-6
"""How far the probabilities of a draw may lie apart when it is repeated: float32 kernels may sum in another
order according to how memory is aligned, which moves a softmax by some 1e-7."""


class Undetermined(RuntimeError):
    """The program is not a function of its draws: the same answers led it elsewhere."""


@dataclass
class Draw:
    """One draw on the current path: the probabilities of its answers, and which is being followed."""

    probabilities: tuple[float, ...]
    taken: int


@dataclass
class Tape:
    """The answers of one run: those of `draws` first, then the first possible one of each new draw."""

    draws: list[Draw]
    at: int = 0
    failure: Exception | None = None
    """What went wrong in a draw; kept, because an engine may catch it as the fault of one request."""

    def answer(self, weights: Sequence[float]) -> int:
        """The index of the answer to a draw with these weights. Raises Undetermined where it was another
        draw at the last run."""
        total = fsum(weights)
        probabilities = tuple(w / total for w in weights)
        if self.at == len(self.draws):
            first = next(i for i, p in enumerate(probabilities) if p > 0)
            self.draws.append(Draw(probabilities, first))
        draw = self.draws[self.at]
        if len(draw.probabilities) != len(probabilities) or any(
            abs(a - b) > SAME for a, b in zip(draw.probabilities, probabilities, strict=True)
        ):
            raise self.failed(
                Undetermined(
                    f"the program is no function of its draws: after the same {self.at} answers, draw "
                    f"{self.at + 1} had probabilities {_shown(draw.probabilities)} and then "
                    f"{_shown(probabilities)}; it must start from the same state at every run"
                )
            )
        self.at += 1
        return draw.taken

    def failed(self, error: Exception) -> Exception:
        """Remember the first error of the run."""
        self.failure = self.failure or error
        return error


def _shown(probabilities: Sequence[float]) -> str:
    rest = ", ..." if len(probabilities) > 8 else ""
    return "[" + ", ".join(f"{p:.4g}" for p in probabilities[:8]) + rest + "]"


def advance(draws: list[Draw], prune: float) -> float:
    """Move `draws` to the next path, or empty it; the probability of the branches left out."""
    reached = [1.0]
    for draw in draws:
        reached.append(reached[-1] * draw.probabilities[draw.taken])
    pruned = 0.0
    while draws:
        draw, before = draws[-1], reached[len(draws) - 1]
        for index in range(draw.taken + 1, len(draw.probabilities)):
            branch = before * draw.probabilities[index]
            if branch >= prune and branch > 0:
                draw.taken = index
                return pruned
            pruned += branch
        draws.pop()
    return pruned
