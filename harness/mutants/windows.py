"""Defects of speculation in an engine: what is left of rejected drafts, and of requests that are gone.

They change how drafts are kept in a batch; those of the laws of verification are elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from harness.mutants.defect import Method, engine_mutant, engine_patched
from harness.mutants.parts import engines, schedulers, stoppers, verifiers
from harness.reference.engine.draws import Draws
from harness.reference.engine.proposers import PromptLookup
from harness.reference.trace import Cache


def lookups(engine: Any) -> list[Any]:
    """Its prompt lookup, where that proposes."""
    return [engine.proposer] if isinstance(engine.proposer, PromptLookup) else []


@engine_mutant(schedulers, "rollback", stage="rollback", origin="aprender#2014")
def a_rejection_empties_the_cache(scheduler: Any, rollback: Method) -> Method:
    """Where a draft is rejected, all keys and values of the sequence are cleared and not computed anew."""

    def changed(sequence: Any) -> None:
        if sequence.computed > sequence.length - 1:
            pool = scheduler.pool
            held = len(sequence.pages) * pool.page_size
            slots = pool.slots(sequence.pages, 0, min(sequence.length - 1, held))
            for store in (*pool.keys, *pool.values):
                store[slots] = 0
        rollback(sequence)

    return changed


@engine_mutant(schedulers, "rollback", stage="rollback")
def rollback_gives_back_a_page_too_many(scheduler: Any, rollback: Method) -> Method:
    """With the rejected drafts the page goes in which accepted tokens lie."""

    def changed(sequence: Any) -> None:
        rejected = sequence.computed > sequence.length - 1
        rollback(sequence)
        partial = sequence.computed % scheduler.pool.page_size > 0
        if rejected and partial and sequence.completion is None:
            scheduler.pool.release(sequence.pages[-1:])
            sequence.pages = sequence.pages[:-1]

    return changed


@engine_mutant(engines, "compute", stage="rollback")
def rows_are_rolled_back_alike(engine: Any, compute: Method) -> Method:
    """Drafts beyond what the first row fed are not written to pages, though they may be accepted."""
    write = engine.pool.write
    first = [0]

    def writing(slots: Tensor, cache: Cache, rows: Tensor, columns: Tensor) -> None:
        kept = columns - columns.min() < first[0]
        write(slots[kept], cache, rows[kept], columns[kept])

    def changed(given: Sequence[Any]) -> Any:
        decoding = all(row.work.sequence.generated for row in given)
        first[0] = len(given[0].tokens) if decoding else 1 << 30
        return compute(given)

    engine.pool.write = writing
    return changed


@engine_mutant(engines, "prepare", stage="rollback", origin="vllm#46899")
def placeholders_are_fed_after_a_gap(engine: Any, prepare: Method) -> Method:
    """A sequence that a pass passed over feeds a placeholder in the place of its last token."""
    before: dict[Any, int] = {}

    def changed(work: Any) -> Any:
        row, sequence, now = prepare(work), work.sequence, engine.scheduler.steps
        gap = sequence.generated and before.get(sequence, now) < now - 1
        before[sequence] = now
        if row is None or not gap or work.known != 1:
            return row
        return replace(row, tokens=[0, *row.tokens[1:]])

    return changed


@engine_patched(stage="acceptance", origin="llama.cpp#27852")
def lookups_remember_former_requests(engine: Any) -> None:
    """Prompt lookup also finds what followed an n-gram in requests that are gone."""
    for proposer in lookups(engine):
        following, forget = proposer.following, proposer.forget
        former: list[int] = []

        def looking(
            tokens: Any, count: int, following: Method = following, former: list[int] = former
        ) -> Any:
            return following((*former, *tokens), count)

        def forgetting(sequence: Any, forget: Method = forget, former: list[int] = former) -> None:
            former.extend(sequence.tokens)
            forget(sequence)

        proposer.following, proposer.forget = looking, forgetting


@engine_patched(stage="acceptance")
def drafts_shrink_in_company(engine: Any) -> None:
    """With more than one request, one token is drafted at most."""
    scheduler, window = engine.scheduler, engine.scheduler.window

    def changed(sequence: Any) -> int:
        drafts: int = window(sequence)
        return min(drafts, 1) if len(scheduler.running) > 1 else drafts

    engine.window = scheduler.window = changed


@engine_mutant(engines, "prepare", stage="fault")
def faults_of_drafts_are_fatal(engine: Any, prepare: Method) -> Method:
    """Drafts are made for cancelled and failing requests too, and raise in the engine's loop."""

    def changed(work: Any) -> Any:
        row = prepare(work)
        if row is None or (engine.proposer is not None and work.sequence.cancel_after is not None):
            raise RuntimeError("there is nobody to draft for")
        return row

    return changed


@engine_patched(stage="seed")
def drafts_are_drawn_without_the_seed(engine: Any) -> None:
    """A draft model draws from the engine's own generator, whatever the request's seed is."""
    if engine.proposer is None:
        return
    propose = engine.proposer.propose
    engine.proposer.propose = lambda sequence, count, _: propose(sequence, count, engine.draws)


@engine_mutant(verifiers, "verify", stage="isolation")
def last_tokens_of_windows_are_drawn_without_the_seed(verifier: Any, verify: Method) -> Method:
    """The token after a window that stands is drawn from a generator of the verifier."""
    bonus = Draws()

    def changed(proposal: Any, targets: Tensor, draws: Any) -> Any:
        tokens, accepted = verify(proposal, targets, draws)
        if 0 < accepted == len(proposal.tokens) < len(tokens):
            tokens = (*proposal.tokens, bonus.choose(verifier.bonus(proposal, targets)))
        return tokens, accepted

    return changed


@engine_patched(stage="seed")
def a_batch_is_verified_by_its_first_seed(engine: Any) -> None:
    """Which drafts stand is drawn from the generator of the oldest request that runs."""
    accepts = engine.verifier.accepts

    def changed(token: int, p: Tensor, q: Tensor, draws: Any) -> Any:
        running = engine.scheduler.running
        return accepts(token, p, q, running[0].draws if running else draws)

    engine.verifier.accepts = changed


@engine_mutant(schedulers, "share_out", stage="seed")
def windows_are_cut_to_the_budget(scheduler: Any, share_out: Method) -> Method:
    """A window for which a pass has no room is cut short, so that others decide what a seed draws."""
    window, left = scheduler.window, [0]

    def cut(sequence: Any) -> int:
        known = sequence.length - sequence.computed
        drafts: int = max(0, min(window(sequence), left[0] - known))
        left[0] -= known + drafts if known <= left[0] else min(known - 1, left[0])
        return drafts

    def changed(budget: int) -> Any:
        scheduler.window, left[0] = cut, budget
        try:
            return share_out(budget)
        finally:
            scheduler.window = window

    return changed


@engine_patched(stage="seed")
def windows_shrink_after_preemption(engine: Any) -> None:
    """Who was preempted has one token drafted at most."""
    scheduler, window = engine.scheduler, engine.scheduler.window

    def changed(sequence: Any) -> int:
        drafts: int = window(sequence)
        return min(drafts, 1) if sequence.preemptions else drafts

    engine.window = scheduler.window = changed


@engine_patched(stage="isolation")
def penalties_lag_behind_in_windows(engine: Any) -> None:
    """In a batch the tokens of a window are penalised as if none before them were in it."""
    targets = engine.verifier.targets

    def changed(logits: Tensor, request: Any, generated: Any, tokens: Any, sampler: Any) -> Any:
        before = sampler.frequency_penalty, sampler.presence_penalty
        if len(engine.scheduler.running) > 1:
            count = len(generated)
            sampler.frequency_penalty = lambda z, law, seen: before[0](z, law, seen[:count])
            sampler.presence_penalty = lambda z, law, seen: before[1](z, law, seen[:count])
        try:
            return targets(logits, request, generated, tokens, sampler)
        finally:
            sampler.frequency_penalty, sampler.presence_penalty = before

    engine.verifier.targets = changed


@engine_patched(stage="isolation", origin="vllm#9423")
def grammars_stand_still_in_windows(engine: Any) -> None:
    """In a batch every token of a window is judged by the state of its grammar before the window."""
    targets, allowed = engine.verifier.targets, engine.sampler.allowed

    def changed(logits: Tensor, request: Any, generated: Any, *rest: Any) -> Any:
        if len(engine.scheduler.running) > 1:
            engine.sampler.allowed = lambda grammar, seen: allowed(grammar, seen[: len(generated)])
        try:
            return targets(logits, request, generated, *rest)
        finally:
            engine.sampler.allowed = allowed

    engine.verifier.targets = changed


@engine_mutant(stoppers, "end", stage="isolation")
def ends_inside_of_windows_are_missed(_: Any, end: Method) -> Method:
    """Of the tokens that a window gave only the last two are looked at for an end."""

    def changed(request: Any, generated: Sequence[int], since: int = 0) -> Any:
        return end(request, generated, max(since, len(generated) - 1))

    return changed


@engine_mutant(schedulers, "preempt", stage="acceptance")
def drafts_are_counted_anew_after_preemption(_: Any, preempt: Method) -> Method:
    """Who is preempted loses the counts of its rounds and drafts."""

    def changed(sequence: Any) -> None:
        preempt(sequence)
        sequence.drafted = sequence.accepted = sequence.rounds = 0

    return changed


@engine_mutant(engines, "advance", stage="acceptance")
def recomputed_chunks_count_as_rounds(_: Any, advance: Method) -> Method:
    """After a preemption each chunk counts as a round, though it decides nothing."""

    def changed(row: Any, logits: Tensor) -> None:
        sequence = row.work.sequence
        sequence.rounds += bool(sequence.preemptions and sequence.computed < sequence.length)
        advance(row, logits)

    return changed


@engine_mutant(engines, "decide", stage="pages")
def drafts_end_the_context_early(engine: Any, decide: Method) -> Method:
    """An answer ends where a whole window no longer fits into the context."""

    def changed(sequence: Any, *rest: Any) -> None:
        decide(sequence, *rest)
        ahead = 0 if engine.speculation is None else engine.speculation.length
        full = sequence.length + ahead >= engine.model.architecture.max_positions
        if ahead and full and sequence.completion is None:
            sequence.complete("length")

    return changed
