"""Which sequences run, and how many tokens of each the next pass of the model computes.

Continuous batching (Orca, OSDI 2022, section 3.2): a request takes a slot as soon as one is free, whatever
the others are doing. Chunked prefill (arXiv 2308.16369): long prompts are computed in pieces, so that they
never hold up those that decode. Preemption by recomputation (arXiv 2309.06180, section 4.5).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from harness.reference.engine.pages import PagePool
from harness.reference.engine.sequence import Sequence
from harness.reference.engine.values import Limits


@dataclass(frozen=True)
class Work:
    """What one pass computes of one sequence."""

    sequence: Sequence
    known: int
    """Tokens of it that are fed: those from `sequence.computed` on."""
    window: int
    """Drafts at most that are fed after them."""

    @property
    def decides(self) -> bool:
        """Whether its last token is among them, so that what follows is decided."""
        return self.sequence.computed + self.known == self.sequence.length


class Scheduler:
    """First come, first served: nobody overtakes, and whoever came first is the last to lose its pages.

    The oldest sequence can therefore always go on, ends in time, and makes the next one the oldest.
    """

    def __init__(self, limits: Limits, pool: PagePool, window: Callable[[Sequence], int]) -> None:
        self.limits, self.pool, self.window = limits, pool, window
        self.waiting: list[Sequence] = []
        """In the order in which they came."""
        self.slots: list[Sequence | None] = [None] * limits.sequences
        self.preempted: list[Sequence] = []
        """In the last call of `schedule`."""
        self.steps = 0

    @property
    def running(self) -> list[Sequence]:
        """Sequences in a slot that have not ended, oldest first."""
        running = [s for s in self.slots if s is not None and s.completion is None]
        return sorted(running, key=lambda sequence: sequence.index)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Work]:
        """The next pass: room for those that run, then admission, then tokens for each."""
        self.steps += 1
        self.preempted = []
        for sequence in self.running:
            if sequence not in self.preempted:
                self.grow(sequence)
        self.admit()
        return self.share_out(self.limits.chunk)

    def wait(self, sequence: Sequence) -> None:
        """It waits, in its place by age."""
        bisect.insort(self.waiting, sequence, key=lambda other: other.index)

    def extent(self, sequence: Sequence) -> int:
        """Tokens whose keys and values need a place in its next pass; in a static batch, ever."""
        if self.limits.batching == "static":
            return len(sequence.request.prompt) + sequence.request.max_tokens - 1
        return sequence.length + self.window(sequence)

    def grow(self, sequence: Sequence) -> None:
        """Pages for its next pass; where none are left the youngest are preempted, perhaps itself."""
        while (missing := self.pool.needed(self.extent(sequence)) - len(sequence.pages)) > 0:
            if missing <= self.pool.available:
                sequence.pages += [self.pool.take() for _ in range(missing)]
                return
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return

    def preempt(self, sequence: Sequence) -> None:
        """It loses its slot and its pages and waits again; what was generated stays."""
        self.leave(sequence)
        sequence.preemptions += 1
        self.preempted.append(sequence)
        self.wait(sequence)

    def admit(self) -> None:
        """Free slots to those that wait, in order; the first that lacks pages holds up those behind it.

        It is not overtaken, as smaller ones might come for ever. A static batch starts when all slots are
        free.
        """
        if self.limits.batching == "static" and self.running:
            return
        for slot, holder in enumerate(self.slots):
            if holder is not None and holder.completion is not None:
                self.slots[slot] = None
        for slot, holder in enumerate(self.slots):
            if holder is None and self.waiting and self.place(self.waiting[0]):
                self.slots[slot] = self.waiting.pop(0)

    def place(self, sequence: Sequence) -> bool:
        """Pages for all that it knows, shared ones first; False, and nothing taken, if there are too few."""
        pool = self.pool
        tokens = sequence.tokens
        found = pool.find(tokens, sequence.request.salt) if self.limits.prefix_sharing else []
        missing = pool.needed(self.extent(sequence)) - len(found)
        if missing > pool.available - sum(page in pool.cached for page in found):
            return False
        for page in found:
            pool.hold(page)
        sequence.pages = [*found, *(pool.take() for _ in range(missing))]
        sequence.computed = len(found) * pool.page_size
        if sequence.preemptions == 0:
            sequence.cached_tokens = sequence.computed
        return True

    def share_out(self, budget: int) -> list[Work]:
        """At most `budget` tokens: first to those that decode, the longest unserved first, then to prompts.

        A window is never cut short, as a seeded sequence would then draw other tokens in other company.
        """
        decoding = [s for s in self.running if s.computed == s.length - 1]
        decoding.sort(key=lambda sequence: sequence.served_at)
        work: list[Work] = []
        for sequence in [*decoding, *(s for s in self.running if s not in decoding)]:
            known, window = sequence.length - sequence.computed, self.window(sequence)
            if known + window > budget:
                known, window = min(known - 1, budget), 0
            if known > 0:
                sequence.served_at = self.steps
                budget -= known + window
                work.append(Work(sequence, known, window))
        return work

    def rollback(self, sequence: Sequence) -> None:
        """Only the keys and values of its own tokens stay, without the last, which was not fed yet.

        Pages that held rejected drafts alone are given back at once; a static batch keeps what it reserved.
        """
        sequence.computed = min(sequence.computed, sequence.length - 1)
        if self.limits.batching == "continuous":
            keep = self.pool.needed(sequence.length - 1)
            self.pool.release(sequence.pages[keep:])
            del sequence.pages[keep:]

    def publish(self, sequence: Sequence, since: int) -> None:
        """Pages that were completed after the first `since` tokens may be shared: all in them is verified."""
        if not self.limits.prefix_sharing:
            return
        size, tokens = self.pool.page_size, sequence.tokens
        for page in range(since // size, sequence.computed // size):
            end = (page + 1) * size
            self.pool.publish(sequence.pages[page], tokens[:end], sequence.request.salt)

    def leave(self, sequence: Sequence) -> None:
        """Its pages are free for others, and its slot unless a static batch holds it; or it waits no more."""
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        held = self.limits.batching == "static"
        self.slots = [None if s is sequence and not held else s for s in self.slots]

    def shown(self) -> tuple[int, ...]:
        """The arrivals in the slots, in their order; -1 where a static batch holds one that has ended."""
        return tuple(s.arrival if s.completion is None else -1 for s in self.slots if s is not None)
