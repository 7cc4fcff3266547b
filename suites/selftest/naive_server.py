"""A simulated server written out: one iteration at a time, every request asked in each; the tests' oracle.

It shares no code with `harness.planning.server`, and counts passes by `harness.theory.passes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from harness.planning.scheduling import Cache, Policy
from harness.planning.workload import Workload
from harness.theory.passes import NOTHING, Pass, decode, prefill


@dataclass
class Request:
    """One request, and what has become of it."""

    number: int
    prompt: int
    output: int
    sent: float = 0.0
    admitted: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    rounds: int = 0
    filled: int = 0
    known: int = 0
    plan: list[int] = field(default_factory=list)
    """Tokens that each of its rounds will decide, where tokens are drafted."""


class NaiveServer:
    """Serves a workload in `run`; its requests and counts are those of a `Record`."""

    def __init__(
        self,
        sent: Workload,
        seconds: Callable[..., float],
        policy: Policy,
        cache: Cache,
        window: int | None,
        seed: int,
    ) -> None:
        self.seconds, self.policy, self.cache, self.window = seconds, policy, cache, window
        self.model: Any = SimpleNamespace(attention=SimpleNamespace(window=window))
        self.generator = np.random.default_rng(seed)
        self.open = sent.at is not None
        at = [0.0] * len(sent) if sent.at is None else sent.at.tolist()
        self.requests = [
            Request(number, prompt, output, at[number])
            for number, (prompt, output) in enumerate(zip(sent.prompts.tolist(), sent.outputs, strict=True))
        ]
        self.coming, self.waiting, self.running = list(self.requests), [], []
        self.now = self.busy = 0.0
        self.iterations = self.seen = 0
        for _ in range(sent.users):
            self.come()

    def come(self) -> None:
        """The next request comes now, if there is one."""
        if self.coming:
            self.waiting.append(self.coming.pop(0))
            if not self.open:
                self.waiting[-1].sent = self.now

    def run(self) -> NaiveServer:
        """Until all are answered."""
        while self.coming or self.waiting or self.running:
            while self.open and self.coming and self.coming[0].sent <= self.now:
                self.come()
            self.admit()
            if self.running:
                self.iteration()
            else:
                self.now = self.coming[0].sent
        return self

    def admit(self) -> None:
        """First come, first served, while there is a slot and room for all that were admitted."""
        if self.policy.batching == "static" and self.running:
            return
        while self.waiting and len(self.running) < self.policy.slots:
            lengths = [one.prompt + one.output for one in (*self.running, self.waiting[0])]
            if sum(map(self.cache.held, lengths)) > self.cache.room:
                return
            self.running.append(self.waiting.pop(0))
            self.running[-1].admitted = self.now

    def iteration(self) -> None:
        """One pass over everything that runs, and what it gives."""
        decoding = [one for one in self.running if one.known]
        filling = [one for one in self.running if not one.known]
        self.now += (took := self.duration(decoding, filling))
        self.busy += took
        self.iterations += 1
        self.seen += len(self.running)
        for one in decoding:
            one.known += one.plan[one.rounds] if one.plan else 1
            one.rounds += 1
        for one in filling:
            if one.filled == one.prompt:
                one.known, one.first = 1, self.now
                one.plan = self.planned(one.output - 1)
        for one in [each for each in self.running if each.known >= each.output]:
            self.running.remove(one)
            one.ended = self.now
            if not self.open:
                self.come()

    def duration(self, decoding: list[Request], filling: list[Request]) -> float:
        """Seconds of the pass, and of the drafts before it; prompts are filled as far as the budget goes."""
        length, whole, plain = self.policy.draft_length, NOTHING, NOTHING
        for one in decoding:
            context = one.prompt + one.known - 1
            whole += decode(self.model, 1, context, 1 + length)
            plain += decode(self.model, 1, context)
        left = 10**9 if self.policy.chunk is None else self.policy.chunk - (1 + length) * len(decoding)
        for one in filling:
            new = min(one.prompt - one.filled, left)
            whole += prefill(self.model, 1, new, one.filled) if new else NOTHING
            left, one.filled = left - new, one.filled + new
        drafting = length * self.policy.draft_cost
        return self.price(whole) + (drafting * self.price(plain) if decoding and drafting else 0)

    def price(self, one: Pass) -> float:
        """Seconds of a pass; where there is no window its layers are not asked for."""
        near = (one.window_cached, one.window_pairs) if self.window is not None else (0, 0)
        return self.seconds(
            one.tokens, one.sequences, one.cached, one.pairs, *near, one.absorbed, one.expanded
        )

    def planned(self, left: int) -> list[int]:
        """Tokens that each round decides until so many are decided, drawn one by one."""
        length, plan = self.policy.draft_length, list[int]()
        while length and sum(plan) < left:
            stop = (
                length + 1
                if self.policy.acceptance == 1
                else self.generator.geometric(1 - self.policy.acceptance)
            )
            plan.append(min(int(stop), length + 1))
        return plan
