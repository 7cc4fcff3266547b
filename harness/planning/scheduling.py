"""What a simulated server is made of: step times, room for caches, a policy, and sums over its requests.

Letters: B requests that decode, g drafted tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from harness.spec.errors import SpecError

Batching = Literal["static", "continuous"]
MOST_DRAFT_COST = 100
"""Of drafting one token, in passes of the model that it is to make quicker."""
Floats = NDArray[np.float64]


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
    ) -> float:
        """Seconds of one pass, counted as in `harness.theory.passes.Pass`."""


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


class Sums:
    """Sums over requests that decode, for rounds to come: a ring, to which each request is added once."""

    def __init__(self, rounds: int, window: int | None, verified: int) -> None:
        self.size = rounds + 1
        self.window, self.verified = window, verified
        self.rows = np.zeros((3, self.size))
        """Cached tokens; of them those in a window, and pairs of query and key on a window layer."""

    def add(self, start: int, contexts: Floats) -> None:
        """A request that has `contexts` tokens in its cache in the rounds from `start` on."""
        rows = [contexts]
        if self.window is not None:
            met = [np.minimum(contexts + i, self.window) for i in range(1, self.verified + 1)]
            rows += [np.minimum(contexts, self.window - 1), np.sum(met, axis=0)]
        first = start % self.size
        here = min(len(contexts), self.size - first)
        for row, values in zip(self.rows, rows, strict=False):
            row[first : first + here] += values[:here]
            row[: len(values) - here] += values[here:]

    def ahead(self, start: int, count: int) -> list[tuple[float, float, float]]:
        """The sums of the next rounds: `count` of them, or up to the end of the ring."""
        first = start % self.size
        return list(zip(*self.rows[:, first : first + count].tolist(), strict=True))

    def over(self, start: int, count: int) -> None:
        """These rounds are over."""
        first = start % self.size
        self.rows[:, first : first + count] = 0
