"""What a simulated server is made of: step times, room for caches, a policy, and sums over its requests.

Letters: B requests that decode, g drafted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from operator import add
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from harness.spec.errors import SpecError

Batching = Literal["static", "continuous"]
MOST_DRAFT_COST = 100
"""Of drafting one token, in passes of the model that it is to make quicker."""
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
DRAWN = 2**16
"""Rounds whose drafts are drawn at once."""


class StepTime(Protocol):
    """What an iteration takes."""

    @property
    def window(self) -> int | None:
        """Tokens that a window layer sees, where there is one."""

    def seconds(
        self,
        tokens: float,
        sequences: float,
        cached: float,
        pairs: float,
        window_cached: float = 0,
        window_pairs: float = 0,
        absorbed: float = 0,
        expanded: float = 0,
        prompts: float = 0,
    ) -> float:
        """Seconds of one pass, counted as in `harness.theory.passes.Pass`.

        `prompts` of its sequences are read, the others decode.
        """


@dataclass(frozen=True)
class Cache:
    """Room for keys and values, and what a sequence takes of it; any unit of memory, such as bytes."""

    room: float = math.inf
    per_token: float = 1.0
    """On the layers that see everything."""
    per_window_token: float = 0.0
    window: int | None = None
    """Tokens that the other layers keep."""

    def held(self, tokens: Any) -> Any:
        """What sequences of so many tokens take, each."""
        near = 0 if self.window is None else np.minimum(tokens, self.window)
        return self.per_token * tokens + self.per_window_token * near


ENDLESS = Cache()
"""Room for everything."""


@dataclass(frozen=True)
class Policy:
    """How requests are batched, and how tokens are drafted."""

    slots: int
    batching: Batching = "continuous"
    chunk: int | None = None
    """Tokens of an iteration at most, decoding first, the rest of it for prompts; None: whole prompts."""
    draft_length: int = 0
    acceptance: float = 0.0
    """Probability that a drafted token stands, whatever the others do (arXiv 2211.17192, section 3.1)."""
    draft_cost: float = 0.0
    """Of drafting one token for every request, as a share of the pass that decodes one for each; prompts cost
    the draft nothing."""

    def words(self) -> str:
        """The policy in a few words."""
        drafts = f", {self.draft_length} drafted tokens" if self.draft_length else ""
        return f"{self.batching} batching in {self.slots} slots{drafts}"

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise SpecError(f"{self.slots} slots hold no request; give 1 or more")
        if not 0 <= self.acceptance <= 1:
            raise SpecError(f"an acceptance of {self.acceptance:g} is no probability; give 0 to 1")
        if self.draft_length < 0 or not 0 <= self.draft_cost <= MOST_DRAFT_COST:
            wrong = f"{self.draft_length} drafted tokens, each at {self.draft_cost:g} of a pass, cannot be"
            raise SpecError(f"{wrong}; give 0 or more at 0 to {MOST_DRAFT_COST}")
        least = self.slots * (1 + self.draft_length)
        if self.chunk is not None and self.chunk < least:
            raise SpecError(
                f"a chunk of {self.chunk} tokens, and {self.slots} slots decode {least} in one iteration; "
                f"give a chunk of {least} or more, or fewer slots"
            )


class Drafts:
    """Drafts that stand: at least i of a round's g with chance a^i. Drawn for many requests at once."""

    def __init__(self, length: int, acceptance: float, generator: np.random.Generator) -> None:
        self.length, self.acceptance, self.generator = length, acceptance, generator
        self.decided = np.zeros(1, np.int64)
        """Tokens that all rounds drawn decide before each."""
        self.stood, self.used = self.decided, 0
        """The same for drafts, one less a round, and how many of these rounds are used up."""

    def draw(self, left: int) -> tuple[int, Integers]:
        """Rounds in which a request decides `left` tokens, and drafts that stood before each [rounds].

        The latter from any number on: the first is as good as 0.
        """
        if self.used + left >= len(self.decided):  # it may need as many rounds
            kept, drawn = np.diff(self.decided[self.used :]), self._rounds(max(left, DRAWN))
            self.decided, self.used = np.concatenate([[0], kept, drawn]).cumsum(), 0
            self.stood = self.decided - np.arange(len(self.decided))
        first = self.used
        decided = self.decided[first : first + left + 1]
        rounds = int(decided.searchsorted(decided[0] + left))
        self.used += rounds
        return rounds, self.stood[first : self.used]

    def _rounds(self, count: int) -> Integers:
        """Tokens that rounds decide: drafts up to the first that does not stand, and one more."""
        if self.acceptance == 1:
            return np.full(count, 1 + self.length)
        return np.minimum(self.generator.geometric(1 - self.acceptance, size=count), 1 + self.length)


class Sums:
    """Sums over the requests that decode, in this round and in those to come.

    A context grows by a token each round, so that the sum of all is a number and the batch times the round.
    What is more (drafts that stood) and less (windows that a short context does not fill) is in a ring, to
    which each request is added once.
    """

    def __init__(self, rounds: int, window: int | None, verified: int) -> None:
        self.size, self.verified = rounds + 1, verified
        self.window = 0 if window is None else window
        self.sum = 0
        """Of prompts less the rounds in which they began to decode."""
        self.near, self.near_pairs = (0, 0) if window is None else (window - 1, verified * window)
        """Of one request: cached tokens in a full window, and pairs of query and key on a window layer."""
        self.ring = np.zeros((3, self.size), np.int64)
        """What is to be added to the three sums."""
        self.until = 0
        """The round from which the ring holds nothing."""

    def add(self, start: int, prompt: int, rounds: int, stood: Integers | None) -> int:
        """A request decodes from round `start` on; `stood`: drafts that stood before each, as `Drafts.draw`.

        Returns its share of `sum`, to be taken away when it has ended.
        """
        contexts = prompt - start
        if stood is not None:
            contexts -= int(stood[0])
            self._ring(0, start, stood)
        self.sum += contexts
        if prompt < self.near:
            each = contexts + np.arange(start, start + rounds) + (0 if stood is None else stood)
            missing = [np.minimum(each + i - self.window, 0) for i in range(1, self.verified + 1)]
            self._ring(1, start, missing[0])
            self._ring(2, start, np.sum(missing, axis=0))
        return contexts

    def at(self, start: int, batch: int) -> tuple[int, int, int]:
        """Cached tokens of a batch in a round, of them those in a window, and pairs on a window layer."""
        whole = self.sum + batch * start, batch * self.near, batch * self.near_pairs
        if start >= self.until:
            return whole
        more = self.ring[:, start % self.size].tolist()
        return whole[0] + more[0], whole[1] + more[1], whole[2] + more[2]

    def ahead(self, start: int, rounds: int, batch: int) -> Iterable[tuple[int, int, int]]:
        """The same for so many rounds, or up to the end of the ring."""
        first = self.sum + batch * start
        cached = range(first, first + batch * rounds, batch)
        sums = (cached, repeat(batch * self.near), repeat(batch * self.near_pairs))
        if start >= self.until:
            return zip(*sums, strict=False)
        here = start % self.size
        more = self.ring[:, here : here + rounds].tolist()
        return zip(*(map(add, one, row) for one, row in zip(sums, more, strict=True)), strict=True)

    def over(self, start: int, rounds: int) -> None:
        """These rounds are over."""
        if start < self.until:
            here = start % self.size
            self.ring[:, here : here + rounds] = 0

    def _ring(self, row: int, start: int, values: Integers) -> None:
        self.until = max(self.until, start + len(values))
        ring, here = self.ring[row], start % self.size
        fitting = self.size - here
        ring[here : here + len(values)] += values[:fitting]
        if fitting < len(values):
            ring[: len(values) - fitting] += values[fitting:]
