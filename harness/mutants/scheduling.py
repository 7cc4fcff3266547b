"""Defects of scheduling: who starts, who waits for whom, and how the tokens of a pass are shared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.mutants.defect import Method, engine_mutant, engine_patched
from harness.mutants.parts import engines, schedulers
from harness.reference.engine.sequence import Sequence
from harness.reference.engine.values import Request


@engine_mutant(engines, "add", stage="schedule", origin="vllm#1534")
def a_misfit_blocks_the_queue(engine: Any, add: Method) -> Method:
    """A request larger than the whole pool is accepted, and everybody waits behind it."""

    def changed(request: Request, **rest: Any) -> Any:
        sequence = add(request, **rest)
        done = sequence.completion
        if done is not None and "pages have" in done.error:
            sequence = Sequence(engine.requests, request, engine.draws, rest.get("arrival", 0))
            engine.scheduler.wait(sequence)
        return sequence

    return changed


@engine_mutant(schedulers, "admit", stage="schedule")
def small_requests_overtake(scheduler: Any, _: Method) -> Method:
    """Whoever fits starts, so that a large request waits as long as small ones come."""

    def changed() -> None:
        for slot, holder in enumerate(scheduler.slots):
            if holder is not None and holder.completion is None:
                continue
            scheduler.slots[slot] = None
            fitting = next((one for one in scheduler.waiting if scheduler.place(one)), None)
            if fitting is not None:
                scheduler.waiting.remove(fitting)
                scheduler.slots[slot] = fitting

    return changed


@engine_mutant(schedulers, "wait", stage="schedule")
def last_come_first_started(scheduler: Any, _: Method) -> Method:
    """Who comes is put before those that wait."""
    return lambda sequence: scheduler.waiting.insert(0, sequence)


@engine_mutant(schedulers, "wait", stage="schedule")
def shortest_prompts_start_first(scheduler: Any, wait: Method) -> Method:
    """Those that wait are sorted by the length of their prompts."""

    def changed(sequence: Any) -> None:
        wait(sequence)
        scheduler.waiting.sort(key=lambda other: len(other.request.prompt))

    return changed


@engine_mutant(schedulers, "wait", stage="preempt", origin="vllm#41951")
def the_preempted_queue_up_again(scheduler: Any, wait: Method) -> Method:
    """Who lost its pages waits behind all that came meanwhile."""

    def changed(sequence: Any) -> None:
        if sequence.preemptions:
            scheduler.waiting.append(sequence)
        else:
            wait(sequence)

    return changed


@engine_mutant(schedulers, "share_out", stage="schedule", origin="sglang#32549")
def prompts_come_first(scheduler: Any, share_out: Method) -> Method:
    """As long as there is a prompt to compute, no answer goes on."""

    def changed(budget: int) -> Any:
        work = share_out(budget)
        prompts = [s for s in scheduler.running if s.computed < s.length - 1]
        if not prompts:
            return work
        others = [s for s in scheduler.running if s not in prompts]
        slots = scheduler.slots
        scheduler.slots = [None if s in others else s for s in slots]
        try:
            return share_out(budget)
        finally:
            scheduler.slots = slots

    return changed


@engine_mutant(schedulers, "share_out", stage="schedule", origin="vllm#53130")
def long_prompts_wait_for_an_idle_engine(scheduler: Any, share_out: Method) -> Method:
    """A prompt that does not fit into one pass is computed only when nobody else runs."""

    def changed(budget: int) -> Any:
        slots = scheduler.slots
        brief = [s for s in scheduler.running if s.length - s.computed <= budget]
        if brief:
            scheduler.slots = [s if s in brief else None for s in slots]
        try:
            return share_out(budget)
        finally:
            scheduler.slots = slots

    return changed


@engine_mutant(schedulers, "share_out", stage="schedule")
def budgets_are_exceeded(_: Any, share_out: Method) -> Method:
    """A pass computes up to twice as many tokens as it may."""
    return lambda budget: share_out(2 * budget)


@engine_mutant(schedulers, "share_out", stage="schedule")
def prompts_must_fit_whole(_: Any, share_out: Method) -> Method:
    """A prompt is computed in one pass or not at all."""
    return lambda budget: [one for one in share_out(budget) if one.decides]


@engine_mutant(schedulers, "admit", stage="schedule")
def slots_are_filled_when_all_are_free(scheduler: Any, admit: Method) -> Method:
    """Continuous batching starts the next requests only when the last of a batch has ended."""

    def changed() -> None:
        if not scheduler.running:
            admit()

    return changed


@engine_mutant(schedulers, "admit", stage="schedule")
def one_request_starts_per_pass(scheduler: Any, admit: Method) -> Method:
    """However many slots are free, one request starts in a pass."""

    def changed() -> None:
        waiting = scheduler.waiting
        scheduler.waiting = waiting[:1]
        admit()
        scheduler.waiting = scheduler.waiting + waiting[1:]

    return changed


@engine_mutant(schedulers, "rollback", stage="schedule")
def prompts_are_computed_twice(_: Any, rollback: Method) -> Method:
    """With its first token a request starts its prompt anew."""

    again: set[Any] = set()

    def changed(sequence: Any) -> None:
        rollback(sequence)
        if sequence.generated and sequence not in again:
            again.add(sequence)
            sequence.computed = 0

    return changed


@engine_mutant(schedulers, "share_out", stage="schedule", origin="vllm#41951")
def windows_are_never_cut(scheduler: Any, share_out: Method) -> Method:
    """A request whose tokens and drafts do not fit into what is left of a pass waits for an empty one."""

    def changed(budget: int) -> Any:
        work = share_out(budget)
        if not any(scheduler.window(one.sequence) for one in work):
            return work
        return [one for one in work if one.decides or one.sequence.computed]

    return changed


@engine_patched(stage="schedule")
def ended_answers_hold_their_slots(engine: Any) -> None:
    """A slot is free one pass after its request ended."""
    admit, ended = engine.scheduler.admit, [0]
    leave = engine.leave

    def leaving(sequence: Any) -> None:
        ended[0] = engine.scheduler.steps
        leave(sequence)

    def changed() -> None:
        if engine.scheduler.steps > ended[0] + 1 or not engine.scheduler.running:
            admit()

    engine.leave, engine.scheduler.admit = leaving, changed


@engine_mutant(engines, "record", stage="schedule")
def slots_are_lent_twice(engine: Any, record: Method) -> Method:
    """A request that starts while another runs is run in two slots."""

    def changed(rows: Any) -> None:
        record(rows)
        last = engine.timeline[-1]
        if len(last.running) > 1:
            engine.timeline[-1] = replace(last, running=(*last.running, last.running[0]))

    return changed


@engine_mutant(engines, "record", stage="counters")
def queues_are_not_shown(engine: Any, record: Method) -> Method:
    """The timeline says that nobody waits."""

    def changed(rows: Any) -> None:
        record(rows)
        engine.timeline[-1] = replace(engine.timeline[-1], waiting=0)

    return changed


@engine_mutant(schedulers, "preempt", stage="counters")
def preemptions_are_counted_by_page(_: Any, preempt: Method) -> Method:
    """Who loses its pages counts a preemption for each of them."""

    def changed(sequence: Any) -> None:
        lost = len(sequence.pages)
        preempt(sequence)
        sequence.preemptions += max(lost - 1, 0)

    return changed


@engine_mutant(schedulers, "grow", stage="preempt")
def the_oldest_is_preempted(scheduler: Any, grow: Method) -> Method:
    """Where pages are lacking, the oldest request loses its own, up to three times."""

    def changed(sequence: Any) -> None:
        oldest, pool = scheduler.running[0], scheduler.pool
        missing = pool.needed(scheduler.extent(sequence)) - len(sequence.pages)
        if missing > pool.available and oldest is not sequence and oldest.preemptions < 3:
            scheduler.preempt(oldest)
        grow(sequence)

    return changed


@engine_mutant(schedulers, "share_out", stage="schedule")
def half_of_the_budget_is_left(scheduler: Any, share_out: Method) -> Method:
    """Where several requests run, half of the tokens of a pass are kept free."""

    def changed(budget: int) -> Any:
        running = len(scheduler.running)
        return share_out(max(running, budget // 2) if running > 1 else budget)

    return changed


@engine_mutant(schedulers, "share_out", stage="schedule")
def one_prompt_starts_per_pass(_: Any, share_out: Method) -> Method:
    """A pass computes one prompt at most, whatever room is left."""

    def changed(budget: int) -> Any:
        work = share_out(budget)
        prompts = [one for one in work if not one.sequence.generated]
        return [one for one in work if one not in prompts[1:]]

    return changed
