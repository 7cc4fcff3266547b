"""Laws: what a program that draws random numbers returns, and how often, exactly."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from types import MappingProxyType
from typing import Any, NamedTuple

MASS_TOLERANCE = 1e-9
"""How far from 1 the mass of an exact law may be. A sum of n float64 products of d factors errs by at most
(n + d) 1.1e-16 times its size, and probabilities are normalised in float64: 1e-9 is 10^6 paths."""


class Difference(NamedTuple):
    """The outcome on which two laws differ most."""

    outcome: Hashable
    here: float
    there: float


@dataclass(frozen=True)
class Law(Mapping[Hashable, float]):
    """Probabilities by outcome; an outcome that is absent has probability 0."""

    probabilities: Mapping[Hashable, float]
    paths: int = field(default=0, compare=False)
    """Runs of a program that it took; 0 where the law was computed otherwise."""
    pruned: float = 0.0
    """Probability of the branches that were not followed; `mass` + `pruned` is 1."""
    _total: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if any(not p >= 0 for p in self.probabilities.values()):
            raise ValueError("a law with a probability below 0, or one that is no number")
        object.__setattr__(self, "probabilities", MappingProxyType(dict(self.probabilities)))
        object.__setattr__(self, "_total", fsum(self.probabilities.values()))

    def __getitem__(self, outcome: Hashable) -> float:
        return self.probabilities.get(outcome, 0.0)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self.probabilities)

    def __len__(self) -> int:
        return len(self.probabilities)

    def __contains__(self, outcome: object) -> bool:
        return outcome in self.probabilities

    @property
    def mass(self) -> float:
        """The sum of all probabilities."""
        return self._total

    def tv(self, other: Law) -> float:
        """Total variation: the largest difference of the probability of any set of outcomes, in [0, 1].

        Half the sum of absolute differences, and half of what either law has pruned, which may lie anywhere.
        """
        apart = fsum(abs(self[x] - other[x]) for x in self.probabilities.keys() | other.probabilities.keys())
        return min(1.0, (apart + self.pruned + other.pruned) / 2)

    def largest_difference(self, other: Law) -> Difference:
        """Where the two differ most; raises ValueError where both are empty."""
        outcomes = [*self, *(x for x in other if x not in self)]
        if not outcomes:
            raise ValueError("two laws without any outcome differ nowhere")
        worst = max(outcomes, key=lambda x: abs(self[x] - other[x]))
        return Difference(worst, self[worst], other[worst])

    def expect(self, function: Callable[[Any], float]) -> float:
        """The mean of function(outcome)."""
        return fsum(p * function(x) for x, p in self.probabilities.items())

    def of(self, function: Callable[[Any], Hashable]) -> Law:
        """The law of function(outcome), such as that of the first token."""
        sums: dict[Hashable, float] = {}
        for outcome, p in self.probabilities.items():
            value = function(outcome)
            sums[value] = sums.get(value, 0.0) + p
        return Law(sums, self.paths, self.pruned)


def generations(
    following: Callable[[tuple[int, ...]], Sequence[float]],
    ended: Callable[[tuple[int, ...]], bool],
    outcome: Callable[[tuple[int, ...]], Hashable] = lambda tokens: tokens,
) -> Law:
    """The law of token sequences of which each token is drawn given those before it: the chain rule.

    `following` gives the probability [V] of each token after a prefix (a list, or a tensor), and is asked
    once per prefix; `ended` says where a sequence is complete; `outcome` maps a complete sequence to what
    is compared. Raises ValueError where the probabilities after a prefix do not sum to 1.
    """
    sums: dict[Hashable, float] = {}
    waiting: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while waiting:
        prefix, reached = waiting.pop()
        if ended(prefix):
            value = outcome(prefix)
            sums[value] = sums.get(value, 0.0) + reached
            continue
        given: Any = following(prefix)
        probabilities = [float(p) for p in (given.tolist() if hasattr(given, "tolist") else given)]
        total = fsum(probabilities)
        # a softmax in float32 of up to 10^5 tokens sums to 1 within 1e-6, by pairwise summation
        if not abs(total - 1) <= 1e-6:
            raise ValueError(f"the probabilities after {prefix} sum to {total}, not to 1")
        waiting.extend(
            ((*prefix, token), reached * p / total) for token, p in enumerate(probabilities) if p > 0
        )
    return Law(sums)
