"""The engine: one pass of the target model per step, over all scheduled sequences.

Letters: B sequences in a pass, S tokens of the longest row, P tokens of the longest past, n proposed tokens,
V vocabulary.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.reference.engine import proposers
from harness.reference.engine.draws import Draws
from harness.reference.engine.pages import PagePool
from harness.reference.engine.proposal import Proposal, certain
from harness.reference.engine.sampling import Sampler, log_probabilities
from harness.reference.engine.scheduler import Scheduler, Work
from harness.reference.engine.sequence import Sequence, problem
from harness.reference.engine.stopping import Stopper
from harness.reference.engine.values import (
    Arrival,
    Completion,
    Iteration,
    Limits,
    Request,
    Served,
    Speculation,
)
from harness.reference.engine.verification import Verifier
from harness.reference.model import ReferenceModel
from harness.reference.trace import Cache

FAULTS = (ValueError, RuntimeError, LookupError, ArithmeticError)
"""What a request may cause in the parts that deal with it alone: it ends, and its neighbours go on."""


@dataclass(frozen=True)
class Row:
    """One sequence's part of a pass."""

    work: Work
    tokens: list[int]
    """What is fed: tokens of the sequence, then the proposed ones."""
    proposal: Proposal


class Engine:
    """Speculative decoding under continuous batching over one model.

    Its parts are `sampler`, `stopper`, `verifier`, `proposer` (None without speculation), `pool` and
    `scheduler`. A request with a seed draws from a generator of its own; the others share `generator`.
    """

    def __init__(
        self,
        model: ReferenceModel,
        limits: Limits,
        *,
        speculation: Speculation | None = None,
        draft: ReferenceModel | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Raises ValueError for an architecture or a speculation that cannot be served."""
        check(model, limits, speculation)
        self.model, self.limits, self.speculation = model, limits, speculation
        self.sampler, self.stopper, self.verifier = Sampler(), Stopper(), Verifier()
        self.proposer = (
            None if speculation is None else proposers.make(speculation, model, draft, self.sampler)
        )
        weight = next(model.parameters())
        self.device = weight.device
        self.pool = PagePool(
            model.architecture, limits.pages, limits.page_size, device=weight.device, dtype=weight.dtype
        )
        self.scheduler = Scheduler(limits, self.pool, self.window)
        self.draws = Draws(generator)
        self.timeline: list[Iteration] = []
        self.requests = 0
        self.clock = time.perf_counter
        self.model_seconds = 0.0
        """Spent in the target's passes; the rest of the time of `step` is the engine's own."""

    def window(self, sequence: Sequence) -> int:
        """How many drafts its next pass may verify; of its own state alone, so the same in any company."""
        if self.speculation is None:
            return 0
        return max(0, min(self.speculation.length, sequence.room - 1, self.limits.chunk - 1))

    def run(self, arrivals: Many[Arrival]) -> Served:
        """Serve them all to their end. Time is counted in passes; idle time is skipped."""
        self.timeline = []
        order = sorted(range(len(arrivals)), key=lambda i: arrivals[i].at)
        coming = collections.deque(order)
        served: dict[int, Sequence] = {}
        clock = 0.0
        try:
            while coming or self.scheduler.busy:
                while coming and not arrivals[coming[0]].at > clock:
                    i = coming.popleft()
                    served[i] = self.add(
                        arrivals[i].request, arrival=i, cancel_after=arrivals[i].cancel_after
                    )
                for i, sequence in served.items():
                    gone = arrivals[i].cancel_at
                    if gone is not None and clock >= gone and sequence.completion is None:
                        self.cancel(sequence)
                if self.scheduler.busy:
                    self.step()
                    clock += 1
                elif coming:
                    clock = arrivals[coming[0]].at
        finally:
            for sequence in served.values():
                if sequence.completion is None:
                    self.cancel(sequence)
        return Served([completed(served[i]) for i in range(len(arrivals))], tuple(self.timeline))

    def add(self, request: Request, *, arrival: int = 0, cancel_after: int | None = None) -> Sequence:
        """Accept a request; one that can never be served ends at once, and says why."""
        self.requests += 1
        positions = self.model.architecture.max_positions
        why = problem(
            request, self.model.architecture.vocab_size, positions, self.pool.pages * self.pool.page_size
        )
        if why:
            sequence = Sequence(self.requests, request, self.draws, arrival)
            sequence.complete("error", error=why)
            return sequence
        request = replace(request, max_tokens=min(request.max_tokens, positions - len(request.prompt)))
        sequence = Sequence(self.requests, request, self.draws_of(request), arrival, cancel_after)
        self.scheduler.wait(sequence)
        if cancel_after is not None and cancel_after <= 0:
            self.cancel(sequence)
        return sequence

    def draws_of(self, request: Request) -> Draws:
        """The request's own where it has a seed, else the engine's."""
        seed = request.sampling.seed
        return self.draws if seed is None else Draws(torch.Generator().manual_seed(seed))

    def cancel(self, sequence: Sequence) -> None:
        """Nobody waits for it any more; what it holds is free at once."""
        sequence.complete("cancelled")
        self.leave(sequence)

    def step(self) -> None:
        """One pass of the target: schedule, propose, compute, decide. RuntimeError where nothing moves."""
        work = self.scheduler.schedule()
        for sequence in self.scheduler.preempted:
            self.forget(sequence)
        if not work:
            raise RuntimeError("no request can go on: the scheduler found nothing to compute")
        rows = [row for item in work if (row := self.prepare(item)) is not None]
        if rows:
            self.record(rows)
            for row, logits in zip(rows, self.compute(rows), strict=True):
                self.advance(row, logits)

    def prepare(self, work: Work) -> Row | None:
        """What is fed of one sequence; None where its proposer failed, which ends it."""
        sequence = work.sequence
        proposal = certain((), self.model.architecture.vocab_size)
        if work.window and self.proposer is not None:
            try:
                proposal = self.proposer.propose(sequence, work.window, sequence.draws)
            except FAULTS as fault:
                self.fail(sequence, fault)
                return None
        known = sequence.tokens[sequence.computed : sequence.computed + work.known]
        return Row(work, [*known, *proposal.tokens], proposal)

    def compute(self, rows: Many[Row]) -> list[Tensor]:
        """Logits of every row's tokens, one [tokens, V] each; their keys and values are written to pages.

        The pass is one batch [B, S] padded on the right, after a past [B, P] padded on the right.
        """
        sequences = [row.work.sequence for row in rows]
        lengths = [len(row.tokens) for row in rows]
        pasts = [sequence.computed for sequence in sequences]
        past = self.pool.gather([sequence.pages for sequence in sequences], pasts)
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.tokens) for r in rows], batch_first=True)
        column = torch.arange(tokens.shape[1])
        real = column[None] < torch.tensor(lengths)[:, None]
        positions = torch.where(real, torch.tensor(pasts)[:, None] + column, 0)
        logits, cache = self.forward(tokens, past, real, positions)
        slots = [
            self.pool.slots(sequence.pages, start, start + length)
            for sequence, start, length in zip(sequences, pasts, lengths, strict=True)
        ]
        row, place = real.nonzero(as_tuple=True)
        self.pool.write(torch.cat(slots), cache, row, past.length + place)
        for sequence, length in zip(sequences, lengths, strict=True):
            sequence.computed += length
        return [logits[i, :length] for i, length in enumerate(lengths)]

    def forward(self, tokens: Tensor, past: Cache, real: Tensor, positions: Tensor) -> tuple[Tensor, Cache]:
        """The target's pass: logits [B, S, V] on the CPU, and the cache after it."""
        begin = self.clock()
        mask = torch.cat([past.real, real.to(self.device)], dim=1)
        with torch.no_grad():
            logits, cache = self.model.extend(
                tokens.to(self.device), past, mask=mask, positions=positions.to(self.device)
            )
            logits = logits.cpu()
        self.model_seconds += self.clock() - begin
        return logits, cache

    def advance(self, row: Row, logits: Tensor) -> None:
        """What the pass decided for one sequence, from its logits [tokens, V]."""
        sequence, since = row.work.sequence, row.work.sequence.computed - len(row.tokens)
        decides = since + row.work.known == sequence.length
        if decides:
            try:
                self.decide(sequence, row.proposal, logits[row.work.known - 1 :])
            except FAULTS as fault:
                self.fail(sequence, fault)
                return
        self.scheduler.rollback(sequence)
        self.scheduler.publish(sequence, since)
        if sequence.completion is not None:
            self.leave(sequence)

    def decide(self, sequence: Sequence, proposal: Proposal, logits: Tensor) -> None:
        """Verify a proposal by the target's logits [n + 1, V], keep what stands, and end what has ended."""
        before = len(sequence.generated)
        targets = self.verifier.targets(
            logits, sequence.request, sequence.generated, proposal.tokens, self.sampler
        )
        tokens, accepted = self.verifier.verify(proposal, targets, sequence.draws)
        sequence.generated += tokens
        sequence.logprobs += log_probabilities(logits[: len(tokens)], tokens)
        sequence.rounds += 1
        sequence.drafted += len(proposal.tokens)
        seen = len(sequence.generated)
        if sequence.cancel_after is not None:
            seen = min(seen, sequence.cancel_after)
        ended = self.stopper.end(sequence.request, sequence.generated[:seen], before)
        consumed = seen if ended is None else ended.consumed
        sequence.accepted += min(accepted, consumed - before)
        del sequence.generated[consumed:], sequence.logprobs[consumed:]
        if ended is not None:
            sequence.complete(ended.finish_reason, len(ended.tokens))
        elif seen == sequence.cancel_after:
            sequence.complete("cancelled")

    def fail(self, sequence: Sequence, fault: Exception) -> None:
        """A fault of one request ends it alone."""
        sequence.complete("error", error=str(fault) or type(fault).__name__)
        self.leave(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It has ended: slot, pages and drafts are given back."""
        self.scheduler.leave(sequence)
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Nothing of it is remembered by the proposer."""
        if self.proposer is not None:
            self.proposer.forget(sequence)

    def record(self, rows: Many[Row]) -> None:
        """The pass, as it goes into the timeline."""
        fed = sum(len(row.tokens) for row in rows)
        # A generated token is fed once to decode; whatever is fed before it was known before
        decoded = sum(
            len(row.proposal.tokens) + (row.work.decides and bool(row.work.sequence.generated))
            for row in rows
        )
        scheduler = self.scheduler
        preempted = tuple(sequence.arrival for sequence in scheduler.preempted)
        self.timeline.append(
            Iteration(
                scheduler.shown(), len(scheduler.waiting), fed - decoded, decoded, self.pool.used, preempted
            )
        )


def completed(sequence: Sequence) -> Completion:
    """The completion of a sequence that has ended."""
    assert sequence.completion is not None
    return sequence.completion


def check(model: ReferenceModel, limits: Limits, speculation: Speculation | None) -> None:
    """Raise ValueError for what no engine can be made of."""
    moe = model.architecture.moe
    if moe is not None and moe.router.capacity_factor is not None:
        raise ValueError(
            "moe.router.capacity_factor: the tokens of a pass compete for capacity, so that a request would "
            "depend on its neighbours; an architecture without it is needed"
        )
    for name in ("sequences", "page_size", "pages", "chunk"):
        if getattr(limits, name) < 1:
            raise ValueError(f"limits.{name} is {getattr(limits, name)}; it must be at least 1")
    if speculation is not None and speculation.length < 1:
        raise ValueError(f"speculation.length is {speculation.length}; it must be at least 1")
