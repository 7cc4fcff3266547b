"""Static against continuous batching: iterations, ended requests and occupied slots.

Letters: b slots, l_i iterations that request i holds one (its output tokens), H a horizon in iterations.

Static batching fills the slots, in the order of arrival, and holds all of them until the longest request of
the batch has ended. Continuous batching gives a slot to the next request as soon as it is free (Orca, Yu et
al. 2022, OSDI, section 3): list scheduling of jobs on b machines (Graham 1969, doi 10.1137/0117039). All
requests are there from the start, an iteration takes one unit whatever runs in it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EXAMPLE_SLOTS, EXAMPLE_ITERATIONS = 4, 8
EXAMPLE_OUTPUTS = (5, 8, 4, 6, 4, 3, 2)
"""Seven requests that fill four slots for eight iterations; the first four are one static batch."""


@dataclass(frozen=True)
class Schedule:
    """When requests run, in iterations from 0."""

    slots: int
    lengths: tuple[int, ...]
    ends: tuple[int, ...]
    """The iteration after each request's last one."""

    @property
    def iterations(self) -> int:
        """Until all have ended."""
        return max(self.ends, default=0)

    @property
    def occupancy(self) -> float:
        """Of all slots in all iterations, those in which a request runs."""
        return sum(self.lengths) / (self.slots * self.iterations)

    def ended(self, horizon: int) -> int:
        """Requests that have ended within so many iterations."""
        return sum(end <= horizon for end in self.ends)


def static(lengths: Sequence[int], slots: int) -> Schedule:
    """Batches of b in turn, each as long as its longest request."""
    _refuse(lengths, slots)
    ends: list[int] = []
    start = 0
    for first in range(0, len(lengths), slots):
        together = lengths[first : first + slots]
        ends += [start + length for length in together]
        start += max(together)
    return Schedule(slots, tuple(lengths), tuple(ends))


def continuous(lengths: Sequence[int], slots: int) -> Schedule:
    """Each request takes the slot that is free first."""
    _refuse(lengths, slots)
    free = [0] * slots
    ends = []
    for length in lengths:
        end = heapq.heappop(free) + length
        ends.append(end)
        heapq.heappush(free, end)
    return Schedule(slots, tuple(lengths), tuple(ends))


def continuous_bounds(lengths: Sequence[int], slots: int) -> tuple[float, float]:
    """Between which any order of arrival leaves the iterations of continuous batching:
    max(sum l / b, max l) and sum l / b + (1 - 1/b) max l (Graham 1969).
    """
    _refuse(lengths, slots)
    share, longest = sum(lengths) / slots, max(lengths)
    return max(share, longest), share + (1 - 1 / slots) * longest


def _refuse(lengths: Sequence[int], slots: int) -> None:
    if slots < 1 or not lengths or min(lengths) < 1:
        least = min(lengths, default=0)
        wrong = f"{len(lengths)} requests, the shortest of {least} tokens, in {slots} slots"
        raise ValueError(f"cannot batch {wrong}; give at least one of each")


Law = Mapping[int, float]
"""Probability of each length."""


def mean_length(law: Law) -> float:
    """E[l]."""
    return sum(length * chance for length, chance in law.items())


def mean_longest(law: Law, slots: int) -> float:
    """E[max of b independent lengths]: the sum over l of l (F(l)^b - F(l - 1)^b)."""
    mean = below = reached = 0.0
    for length in sorted(law):
        below, reached = reached, min(reached + law[length], 1.0)
        mean += length * (reached**slots - below**slots)
    return mean


def static_occupancy(law: Law, slots: int) -> float:
    """Share of slots in use under static batching of ever new requests: E[l] / E[max of b].

    By the renewal-reward theorem: a batch holds b slots for its longest length, of which b E[l] are used.
    Continuous batching with requests waiting uses all of them, so that the inverse is what it gains.
    """
    return mean_length(law) / mean_longest(law, slots)


def requests_per_iteration(law: Law, slots: int, *, static_batches: bool = False) -> float:
    """Requests that end in one iteration in the long run, with more always waiting: b / E[l], or under
    static batching b / E[max of b]."""
    return slots / (mean_longest(law, slots) if static_batches else mean_length(law))


def geometric(mean: float, longest: int) -> dict[int, float]:
    """The law of lengths that end with the same probability at each token, cut off at `longest`.

    Raises ValueError for a mean below 1: each request has a token.
    """
    if mean < 1:
        raise ValueError(f"a mean length of {mean} tokens is below the one that each request has")
    stop = 1 / mean
    law = {length: stop * (1 - stop) ** (length - 1) for length in range(1, longest)}
    law[longest] = (1 - stop) ** (longest - 1)
    return law
