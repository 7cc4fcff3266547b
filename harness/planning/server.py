"""A server in simulated time: which requests run in which iteration, and when.

Scheduling is that of `harness.reference.engine`: every iteration is one pass of the model over all requests
that hold a slot (Orca, OSDI 2022, section 3.1); those that decode take their tokens first, the rest of the
token budget goes to prompts in their order of arrival (chunked prefill: arXiv 2308.16369, section 4). The
pass that ends a prompt gives its first token. A request is admitted, first come first served, when a slot is
free and its whole length fits into the cache, so that none is ever preempted. Static batching is a rule of
admission: a batch holds all slots until its last request has ended.

SimPy holds the clock of clients and server. Between two events that can matter (an arrival that could be
admitted, a request that ends) the server computes the time of each iteration by itself, in a plain loop.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from heapq import heappop, heappush
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from harness.planning.scheduling import Cache, Policy, StepTime, Sums
from harness.planning.workload import Workload
from harness.theory.passes import triangle

Process = Generator[simpy.Event, Any, None]


class Server:
    """One engine: `submit` is what clients call, `serve` its process."""

    def __init__(
        self,
        clock: simpy.Environment,
        load: Workload,
        step: StepTime,
        policy: Policy,
        cache: Cache,
        seed: int,
        stride: int,
        ended: Callable[[], object],
    ) -> None:
        self.clock, self.load, self.step, self.policy, self.cache = clock, load, step, policy, cache
        self.generator, self.stride, self.on_end = np.random.default_rng(seed), stride, ended
        self.verified = 1 + policy.draft_length
        self.drafting = policy.draft_length * policy.draft_cost
        """Drafting seconds of a round, in passes that decode one token for each request."""
        self.prompts, self.outputs = load.prompts.tolist(), load.outputs.tolist()
        self.need: list[float] = cache.held(load.prompts + load.outputs).tolist()
        count = len(load)
        self.sent, self.admitted, self.first, self.ended = ([0.0] * count for _ in range(4))
        self.rounds = [0] * count
        self.over, self.wake = clock.event(), clock.event()
        self.answers: dict[int, simpy.Event] = {}
        self.now = 0.0
        """SimPy's clock, but for what that rounds."""
        self.waiting: deque[int] = deque()
        self.filling: deque[list[int]] = deque()
        """[request, tokens of its prompt that are cached], in order of arrival."""
        self.decoding: list[tuple[int, int]] = []
        """(round at whose beginning it has ended, request): a heap."""
        self.round = 0
        self.sums = Sums(max(self.outputs), step.window, 1 + policy.draft_length)
        self.held = 0  # slots
        self.reserved = self.peak = 0.0
        self.left = count
        self.iterations = self.running = 0
        self.busy = self.filled = self.written = 0.0

    def submit(self, number: int, at: float) -> simpy.Event:
        """A request comes; the event is its answer."""
        self.sent[number] = at
        self.waiting.append(number)
        if not self.wake.triggered:
            self.wake.succeed()
        answer = self.answers[number] = self.clock.event()
        return answer

    def serve(self) -> Process:
        """Iterations for as long as a request holds a slot, else wait for the next."""
        clock = self.clock
        while True:
            while clock.peek() <= self.now:  # whatever happens at this very time happens before the iteration
                yield clock.timeout(0)
            self._admit()
            if self.filling:
                self._mixed()
            elif self.decoding:
                self._decode()
            else:
                self.wake = clock.event()
                yield self.wake
                self.now = max(self.now, self.sent[self.waiting[0]])
                continue
            yield clock.timeout(max(0.0, self.now - clock.now))
            while self.decoding and self.decoding[0][0] == self.round:
                self._end(heappop(self.decoding)[1])

    def _admit(self) -> None:
        if not (self.filling or self.decoding):
            self.held, self.reserved = 0, 0.0
        elif self.policy.batching == "static":
            return
        while self.waiting and self.held < self.policy.slots:
            number = self.waiting[0]
            if self.reserved + self.need[number] > self.cache.room:
                break
            self.waiting.popleft()
            self.filling.append([number, 0])
            self.admitted[number] = self.now
            self.held += 1
            self.reserved += self.need[number]
        self.peak = max(self.peak, self.reserved)

    def _decode(self) -> None:
        """Iterations of the requests that decode, up to the first that ends or may be joined by another."""
        batch, verified = len(self.decoding), self.verified
        joinable = self.policy.batching == "continuous" and self.held < self.policy.slots
        horizon = self.clock.peek() if joinable and not self.waiting else math.inf
        ahead = self.sums.ahead(self.round, min(self.decoding[0][0] - self.round, self.stride))
        seconds, drafting, cache = self.step.seconds, self.drafting, self.cache
        tokens, own = batch * verified, batch * verified * (verified + 1) / 2
        now, busy, written, count = self.now, self.busy, self.written, 0
        for cached, near, near_pairs in ahead:
            pairs = cached * verified + own
            took = seconds(tokens, tokens, cached, pairs, near, near_pairs, pairs)
            if drafting:
                took += drafting * self._plain(batch, cached, near)
            now += took
            busy += took
            written += took * (cache.per_token * cached + cache.per_window_token * near)
            count += 1
            if now >= horizon:
                break
        self.now, self.busy, self.written = now, busy, written
        self._passed(count, batch)

    def _mixed(self) -> None:
        """One iteration in which prompts are filled beside the requests that decode."""
        batch, verified, window = len(self.decoding), self.verified, self.step.window
        cached, near, near_pairs = self.sums.ahead(self.round, 1)[0]
        pairs = absorbed = cached * verified + batch * verified * (verified + 1) / 2
        tokens = sequences = batch * verified
        alone = drafting = 0.0
        if batch:
            alone = self.step.seconds(tokens, tokens, cached, pairs, near, near_pairs, absorbed)
            drafting = self.drafting and self.drafting * self._plain(batch, cached, near)
        left = math.inf if self.policy.chunk is None else self.policy.chunk - tokens
        held, expanded = cached, 0
        for request in self.filling:
            number, done = request
            new = int(min(self.prompts[number] - done, left))
            left -= new
            request[1] += new
            tokens, sequences = tokens + new, sequences + (new > 0)
            expanded += done if new else 0
            pairs += new * done + new * (new + 1) / 2
            if window is not None and new:
                near += min(done, window - 1)
                near_pairs += triangle(done + new, window) - triangle(done, window)
            held += done
        took = self.step.seconds(
            tokens, sequences, cached + expanded, pairs, near, near_pairs, absorbed, expanded
        )
        self.filled += took - alone
        took += drafting
        self.now += took
        self.busy += took
        self.written += took * (self.cache.per_token * held + self.cache.per_window_token * near)
        self._passed(1, batch + len(self.filling))
        while self.filling and self.filling[0][1] == self.prompts[self.filling[0][0]]:
            self._decodes(self.filling.popleft()[0])

    def _plain(self, batch: int, cached: float, near: float) -> float:
        """Seconds of a pass that decodes one token for each request."""
        pairs, near_pairs = cached + batch, 0 if self.step.window is None else near + batch
        return self.step.seconds(batch, batch, cached, pairs, near, near_pairs, pairs)

    def _passed(self, iterations: int, running: int) -> None:
        self.sums.over(self.round, iterations)
        self.round += iterations
        self.iterations += iterations
        self.running += running * iterations

    def _decodes(self, number: int) -> None:
        """A request has its first token, and decodes the rest in rounds of 1 to g + 1 tokens."""
        self.first[number] = self.now
        left, length = self.outputs[number] - 1, self.policy.draft_length
        decided = np.arange(1, left + 1)
        if length and left:
            decided = np.cumsum(1 + _standing(left, length, self.policy.acceptance, self.generator))
            decided = decided[: int(np.searchsorted(decided, left)) + 1]
        self.rounds[number] = len(decided)
        if left:
            self.sums.add(self.round, self.prompts[number] + np.append(0.0, decided[:-1]))
        heappush(self.decoding, (self.round + len(decided), number))

    def _end(self, number: int) -> None:
        self.ended[number] = self.now
        if self.policy.batching == "continuous":
            self.held -= 1
            self.reserved -= self.need[number]
        self.answers.pop(number).succeed()
        self.on_end()
        self.left -= 1
        if not self.left:
            self.over.succeed()


def _standing(
    count: int, length: int, acceptance: float, generator: np.random.Generator
) -> NDArray[np.int64]:
    """How many of g drafted tokens stand, in so many rounds: at least i of them with probability a^i."""
    if acceptance == 1:
        return np.full(count, length)
    return np.minimum(generator.geometric(1 - acceptance, size=count) - 1, length)
