"""A server in simulated time: which requests run in which iteration, and when.

Scheduling is that of `harness.reference.engine`: every iteration is one pass of the model over all requests
that hold a slot (Orca, OSDI 2022, section 3.1); those that decode take their tokens first, the rest of the
token budget goes to prompts in their order of arrival (chunked prefill: arXiv 2308.16369, section 4). The
pass that ends a prompt gives its first token. A request is admitted, first come first served, when a slot is
free and its whole length fits into the cache, so that none is ever preempted. Static batching is a rule of
admission: a batch holds all slots until its last request has ended.

First come, first served makes every queue a range of numbers: requests filled .. taken - 1 hold a slot and
read their prompts, taken .. came - 1 wait. Clients are as plain (a list of times, or a next request for each
that ends), so that no event is queued anywhere: an iteration costs less than an event of SimPy would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush

import numpy as np

from harness.planning.scheduling import Cache, Drafts, Policy, StepTime, Sums
from harness.planning.workload import Workload
from harness.theory.passes import triangle


class Server:
    """One engine and its clients; `serve` answers all requests."""

    def __init__(
        self,
        load: Workload,
        step: StepTime,
        policy: Policy,
        cache: Cache,
        seed: int,
        stride: int,
        ended: Callable[[], object],
    ) -> None:
        self.step, self.policy, self.cache, self.window = step, policy, cache, step.window
        self.stride, self.on_end = stride, ended
        self.continuous = policy.batching == "continuous"
        self.budget = math.inf if policy.chunk is None else policy.chunk
        self.verified = 1 + policy.draft_length
        self.drafting = policy.draft_length * policy.draft_cost
        """Drafting seconds of a round, in passes that decode one token for each request."""
        self.prompts, self.outputs = load.prompts.tolist(), load.outputs.tolist()
        self.need: list[float] = cache.held(load.prompts + load.outputs).tolist()
        count = len(load)
        self.sent, self.admitted, self.first, self.ended = ([0.0] * count for _ in range(4))
        self.rounds, self.shares = [0] * count, [0] * count
        self.closed = load.at is None
        self.came = min(load.users, count) if self.closed else 0
        self.at = [math.inf] * (count + 1)
        """When each comes by itself, and that nobody comes after the last."""
        if load.at is not None:
            self.sent = load.at.tolist()
            self.at = [*self.sent, math.inf]
        self.taken = self.filled = 0
        self.done = 0
        """Tokens of the first prompt that is not filled; of the others none are cached."""
        self.decoding: list[tuple[int, int]] = []
        """(round at whose beginning it has ended, request): a heap."""
        self.sums = Sums(max(self.outputs), step.window, self.verified)
        self.drafts = Drafts(policy.draft_length, policy.acceptance, np.random.default_rng(seed))
        self.held = 0  # slots
        self.reserved = self.peak = 0.0
        self.left = count
        self.iterations = self.running = 0
        self.now = self.busy = self.filling = self.written = 0.0

    def serve(self) -> None:
        """Iterations while a request holds a slot, else wait for the next, until all are answered."""
        decoding = self.decoding
        while self.left:
            self._admit()
            if self.filled < self.taken:
                self._mixed()
            elif decoding:
                self._decode()
            else:
                self.now = self.at[self.came]
            while decoding and decoding[0][0] == self.iterations:
                self._end(heappop(decoding)[1])

    def _admit(self) -> None:
        while self.at[self.came] <= self.now:
            self.came += 1
        if not (self.decoding or self.filled < self.taken):
            self.held, self.reserved = 0, 0.0
        elif not self.continuous:
            return
        while self.taken < self.came and self.held < self.policy.slots:
            reserved = self.reserved + self.need[self.taken]
            if reserved > self.cache.room:
                break
            self.admitted[self.taken] = self.now
            self.taken += 1
            self.held += 1
            self.reserved = reserved
            self.peak = max(self.peak, reserved)

    def _decode(self) -> None:
        """Iterations of the requests that decode, up to the first that ends or may be joined by another."""
        batch, verified = len(self.decoding), self.verified
        joinable = self.continuous and self.held < self.policy.slots and self.taken == self.came
        horizon = self.at[self.came] if joinable else math.inf
        ahead = min(self.decoding[0][0] - self.iterations, self.stride)
        seconds, drafting, cache = self.step.seconds, self.drafting, self.cache
        tokens, own = batch * verified, batch * verified * (verified + 1) / 2
        now, busy, written, count = self.now, self.busy, self.written, 0
        for cached, near, near_pairs in self.sums.ahead(self.iterations, ahead, batch):
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
        batch, verified, window = len(self.decoding), self.verified, self.window
        cached, near, near_pairs = self.sums.at(self.iterations, batch)
        pairs = absorbed = cached * verified + batch * verified * (verified + 1) / 2
        tokens = sequences = batch * verified
        alone = drafting = 0.0
        if batch:
            alone = self.step.seconds(tokens, tokens, cached, pairs, near, near_pairs, absorbed)
            drafting = self.drafting and self.drafting * self._plain(batch, cached, near)
        number, done, left = self.filled, self.done, self.budget - tokens
        held, expanded = cached + done, 0
        while left and number < self.taken:
            missing = self.prompts[number] - done
            new = missing if missing <= left else int(left)
            left -= new
            tokens += new
            sequences += 1
            expanded += done
            pairs += new * done + new * (new + 1) / 2
            if window is not None:
                near += min(done, window - 1)
                near_pairs += triangle(done + new, window) - triangle(done, window)
            if new < missing:
                done += new
                break
            number, done = number + 1, 0
        took = self.step.seconds(
            tokens,
            sequences,
            cached + expanded,
            pairs,
            near,
            near_pairs,
            absorbed,
            expanded,
            sequences - batch * verified,
        )
        self.filling += took - alone
        took += drafting
        self.now += took
        self.busy += took
        self.written += took * (self.cache.per_token * held + self.cache.per_window_token * near)
        self._passed(1, batch + self.taken - self.filled)
        for full in range(self.filled, number):
            self._decodes(full)
        self.filled, self.done = number, done

    def _plain(self, batch: int, cached: float, near: float) -> float:
        """Seconds of a pass that decodes one token for each request."""
        pairs, near_pairs = cached + batch, 0 if self.window is None else near + batch
        return self.step.seconds(batch, batch, cached, pairs, near, near_pairs, pairs)

    def _passed(self, iterations: int, running: int) -> None:
        self.sums.over(self.iterations, iterations)
        self.iterations += iterations
        self.running += running * iterations

    def _decodes(self, number: int) -> None:
        """A request has its first token, and decodes the rest in rounds of 1 to g + 1 tokens."""
        self.first[number] = self.now
        rounds, stood = self.outputs[number] - 1, None
        if self.policy.draft_length and rounds:
            rounds, stood = self.drafts.draw(rounds)
        self.rounds[number] = rounds
        self.shares[number] = self.sums.add(self.iterations, self.prompts[number], rounds, stood)
        heappush(self.decoding, (self.iterations + rounds, number))

    def _end(self, number: int) -> None:
        self.ended[number] = self.now
        self.sums.sum -= self.shares[number]
        if self.continuous:
            self.held -= 1
            self.reserved -= self.need[number]
        self.left -= 1
        if self.closed and self.came < len(self.sent):  # its user sends the next
            self.sent[self.came] = self.now
            self.came += 1
        self.on_end()
