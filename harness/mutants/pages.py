"""Defects of pages: who holds them, when they are free, what is in them; and of preemption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import Method, engine_mutant, engine_patched
from harness.mutants.parts import engines, pools, schedulers
from harness.reference.engine.draws import Draws
from harness.reference.trace import Cache


@engine_mutant(pools, "evict", stage="pages", origin="vllm#37076")
def pages_in_use_are_evicted(pool: Any, evict: Method) -> Method:
    """The page that was shared first is evicted, even while somebody holds it."""

    def changed() -> None:
        held = [page for page in pool.key_of if pool.references[page] > 0]
        if held and pool.cached:
            pool.cached[held[0]] = None
            pool.cached.move_to_end(held[0], last=False)
        evict()

    return changed


@engine_mutant(pools, "evict", stage="pages")
def evicted_prefixes_are_still_found(pool: Any, _: Method) -> Method:
    """A page that was evicted keeps its key, and is found with what another has written into it."""

    def changed() -> None:
        page, _ = pool.cached.popitem(last=False)
        del pool.key_of[page]
        pool.free.append(page)

    return changed


@engine_mutant(pools, "hold", stage="pages")
def second_holder_is_not_counted(pool: Any, _: Method) -> Method:
    """A shared page is free when the first of its holders ends."""

    def changed(page: int) -> None:
        pool.references[page] = 1
        pool.cached.pop(page, None)

    return changed


@engine_mutant(pools, "release", stage="pages")
def shared_pages_are_freed_outright(pool: Any, release: Method) -> Method:
    """Whoever ends frees all its pages, those of others too, and their keys stay."""

    def changed(pages: Sequence[int]) -> None:
        for page in pages:
            if pool.references[page] > 1 and page not in pool.free:
                pool.free.append(page)
        release([page for page in pages if pool.references[page] == 1])

    return changed


@engine_mutant(pools, "take", stage="pages")
def last_page_is_lent_twice(pool: Any, take: Method) -> Method:
    """In a pool that is full to its last page, that page is given to two."""

    def changed() -> int:
        page: int = take()
        if not pool.free and not pool.cached and not getattr(pool, "lent", False):
            pool.lent = True
            pool.free.append(page)
        return page

    return changed


@engine_mutant(pools, "write", stage="pages")
def used_pages_are_not_overwritten(_: Any, write: Method) -> Method:
    """What was once written into a slot stays, though the page belongs to another now."""
    written: set[int] = set()

    def changed(slots: Tensor, cache: Cache, rows: Tensor, columns: Tensor) -> None:
        fresh = [i for i, slot in enumerate(slots.tolist()) if slot not in written]
        written.update(slots.tolist())
        write(slots[fresh], cache, rows[fresh], columns[fresh])

    return changed


@engine_mutant(schedulers, "place", stage="prefix")
def page_tables_are_shared(scheduler: Any, place: Method) -> Method:
    """A request with the prompt of one that runs gets its page in progress too, and both write into it."""

    def changed(sequence: Any) -> bool:
        placed: bool = place(sequence)
        size = scheduler.pool.page_size
        page = sequence.computed // size
        for other in scheduler.running if placed and sequence.computed else ():
            alike = other.request.prompt[: page * size] == sequence.request.prompt[: page * size]
            begun = other.computed > page * size and page < len(sequence.pages)
            if other is not sequence and alike and begun:
                scheduler.pool.release([sequence.pages[page]])
                sequence.pages[page] = other.pages[page]
                scheduler.pool.references[other.pages[page]] += 1
                break
        return placed

    return changed


@engine_mutant(pools, "slots", stage="pages")
def page_ends_are_off_by_one(pool: Any, slots: Method) -> Method:
    """The last place of a page is taken for the first."""
    size = pool.page_size

    def changed(pages: Sequence[int], start: int, end: int) -> Tensor:
        found: Tensor = slots(pages, start, end)
        return torch.where(found % size == size - 1, found - size + 1, found)

    return changed


@engine_mutant(engines, "compute", stage="pages", origin="transformers#46084")
def chunks_start_at_position_0(engine: Any, compute: Method) -> Method:
    """A prompt's second chunk counts its positions from 0."""
    forward = engine.forward

    def changed(rows: Sequence[Any]) -> Any:
        sequences = [row.work.sequence for row in rows]
        later = [s.computed if 0 < s.computed < len(s.request.prompt) - 1 else 0 for s in sequences]
        shift = torch.tensor(later)[:, None]

        def moved(tokens: Tensor, past: Cache, real: Tensor, positions: Tensor) -> Any:
            return forward(tokens, past, real, (positions - shift).clamp(min=0))

        engine.forward = moved
        return compute(rows)

    return changed


@engine_mutant(engines, "prepare", stage="pages")
def chunks_overlap_by_one(_: Any, prepare: Method) -> Method:
    """A prompt's later chunk begins with the last token of the one before."""

    def changed(work: Any) -> Any:
        row, sequence = prepare(work), work.sequence
        if row is None or not 0 < sequence.computed < len(sequence.request.prompt) - 1:
            return row
        before = sequence.tokens[sequence.computed - 1]
        return replace(row, tokens=[before, *row.tokens[:-1]])

    return changed


@engine_mutant(schedulers, "preempt", stage="preempt")
def preempted_requests_are_lost(scheduler: Any, preempt: Method) -> Method:
    """Who loses its pages never comes back."""

    def changed(sequence: Any) -> None:
        preempt(sequence)
        scheduler.waiting.remove(sequence)

    return changed


@engine_mutant(schedulers, "place", stage="preempt")
def answers_are_not_recomputed(_: Any, place: Method) -> Method:
    """Who comes back has its prompt computed anew, and takes its answer's keys and values to be there."""

    def changed(sequence: Any) -> bool:
        placed: bool = place(sequence)
        if placed and sequence.preemptions and sequence.generated:
            sequence.computed = max(sequence.computed, sequence.length - 1)
        return placed

    return changed


@engine_mutant(schedulers, "preempt", stage="seed", origin="vllm#19940")
def seeds_start_again_after_preemption(_: Any, preempt: Method) -> Method:
    """Who comes back draws from a new generator of the same seed."""

    def changed(sequence: Any) -> None:
        preempt(sequence)
        seed = sequence.request.sampling.seed
        if seed is not None:
            sequence.draws = Draws(torch.Generator().manual_seed(seed))

    return changed


@engine_mutant(schedulers, "preempt", stage="preempt")
def preemption_drops_log_probabilities(_: Any, preempt: Method) -> Method:
    """Log probabilities of what was generated before a preemption are lost."""

    def changed(sequence: Any) -> None:
        preempt(sequence)
        sequence.logprobs.clear()

    return changed


@engine_mutant(schedulers, "preempt", stage="seed")
def preemption_drops_the_answer(_: Any, preempt: Method) -> Method:
    """Who comes back begins its answer anew, with what its generator has left."""

    def changed(sequence: Any) -> None:
        preempt(sequence)
        sequence.generated.clear()
        sequence.logprobs.clear()

    return changed


def since_preemption(methods: Sequence[str]) -> Callable[[Any], None]:
    """A patch under which parts of the sampler take the answer to begin after the last preemption."""

    def patch(engine: Any) -> None:
        began: dict[Any, int] = {}
        now = {"began": 0}
        preempt, decide = engine.scheduler.preempt, engine.decide

        def preempted(sequence: Any) -> None:
            began[sequence] = len(sequence.generated)
            preempt(sequence)

        def deciding(sequence: Any, *rest: Any) -> None:
            now["began"] = began.get(sequence, 0)
            decide(sequence, *rest)

        engine.scheduler.preempt, engine.decide = preempted, deciding
        for method in methods:
            original = getattr(engine.sampler, method)
            setattr(engine.sampler, method, forgetful(original, now))

    return patch


def forgetful(method: Method, now: dict[str, int]) -> Method:
    """The method of a sampler, with the answer, its last argument, cut off at the front."""
    return lambda *given: method(*given[:-1], tuple(given[-1])[now["began"] :])


@engine_patched(stage="preempt")
def penalties_forget_what_came_before_preemption(engine: Any) -> None:
    """The answer so far becomes part of the prompt, so that presence and frequency no longer count it."""
    since_preemption(("presence_penalty", "frequency_penalty"))(engine)


@engine_patched(stage="preempt")
def grammars_start_again_after_preemption(engine: Any) -> None:
    """Who comes back is in the first state of its grammar."""
    since_preemption(("allowed",))(engine)


@engine_patched(stage="preempt")
def least_lengths_start_again_after_preemption(engine: Any) -> None:
    """Who comes back has min_tokens before it once more."""
    since_preemption(("min_tokens",))(engine)


@engine_patched(stage="preempt")
def stop_sequences_start_again_after_preemption(engine: Any) -> None:
    """A stop sequence is not found where its first half was generated before a preemption."""
    preempt, end = engine.scheduler.preempt, engine.stopper.end
    began: dict[Any, int] = {}

    def preempted(sequence: Any) -> None:
        began[id(sequence.request)] = len(sequence.generated)
        preempt(sequence)

    def ending(request: Any, generated: Sequence[int], since: int = 0) -> Any:
        first = began.get(id(request), 0)
        long = replace(
            request, stop=tuple(stop for stop in request.stop if len(stop) <= len(generated) - first)
        )
        return end(long, generated, since)

    engine.scheduler.preempt, engine.stopper.end = preempted, ending


@engine_mutant(schedulers, "preempt", stage="prefix")
def preemption_drops_the_salt(_: Any, preempt: Method) -> Method:
    """What a preempted request computes anew is shared with everybody."""

    def changed(sequence: Any) -> None:
        preempt(sequence)
        sequence.request = replace(sequence.request, salt="")

    return changed
