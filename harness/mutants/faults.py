"""Defects by which one request's error, absence or double is everybody's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from harness.mutants.defect import Method, engine_mutant, engine_patched
from harness.mutants.parts import engines, schedulers
from harness.reference.engine.values import Arrival, Request, Served


@engine_mutant(engines, "add", stage="fault", origin="transformers continuous batching, 5.23.0")
def a_bad_request_ends_the_loop(_: Any, add: Method) -> Method:
    """A request that cannot be served raises in the engine's loop, and all others are lost."""

    def changed(request: Request, **rest: Any) -> Any:
        sequence = add(request, **rest)
        if sequence.completion is not None and sequence.completion.finish_reason == "error":
            raise RuntimeError(sequence.completion.error)
        return sequence

    return changed


@engine_mutant(engines, "run", stage="fault", origin="transformers continuous batching, 5.23.0")
def errors_look_like_empty_answers(_: Any, run: Method) -> Method:
    """A request that fails is answered by no tokens at all, as if the model had stopped."""

    def changed(arrivals: Any) -> Served:
        served: Served = run(arrivals)
        shown = (
            replace(one, finish_reason="stop", error="") if one.finish_reason == "error" else one
            for one in served.completions
        )
        return replace(served, completions=list(shown))

    return changed


@engine_mutant(engines, "prepare", stage="seed", origin="vLLM CPU 0.32.0")
def seeds_fail_with_chunks(engine: Any, prepare: Method) -> Method:
    """A request with a seed fails where its prompt is computed in chunks: its generator cannot move on."""

    def changed(work: Any) -> Any:
        sequence = work.sequence
        chunked = sequence.computed + work.known < len(sequence.request.prompt)
        if chunked and sequence.request.sampling.seed is not None:
            engine.fail(sequence, RuntimeError("a CPU generator has no offset to set"))
            return None
        return prepare(work)

    return changed


@engine_mutant(engines, "add", stage="fault")
def foreign_tokens_wrap_around(engine: Any, add: Method) -> Method:
    """A token beyond the vocabulary is taken modulo its size."""

    def changed(request: Request, **rest: Any) -> Any:
        size = engine.model.architecture.vocab_size
        return add(replace(request, prompt=tuple(token % size for token in request.prompt)), **rest)

    return changed


@engine_mutant(engines, "add", stage="fault")
def long_prompts_are_cut(engine: Any, add: Method) -> Method:
    """A prompt longer than the context is cut at the front, and nobody is told."""

    def changed(request: Request, **rest: Any) -> Any:
        most = engine.model.architecture.max_positions - request.max_tokens
        if len(request.prompt) <= most:
            return add(request, **rest)
        return add(replace(request, prompt=request.prompt[-max(most // 4, 1) :]), **rest)

    return changed


@engine_mutant(engines, "fail", stage="fault")
def a_fault_ends_the_whole_batch(engine: Any, fail: Method) -> Method:
    """When one request fails, all that run fail with it."""

    advance, doomed = engine.advance, {}

    def failing(sequence: Any, fault: Exception) -> None:
        doomed.update(dict.fromkeys(engine.scheduler.running, fault))
        fail(sequence, fault)

    def changed(row: Any, logits: Tensor) -> None:
        sequence = row.work.sequence
        if sequence in doomed:
            fail(sequence, doomed[sequence])
        else:
            advance(row, logits)

    engine.advance = changed
    return failing


@engine_mutant(engines, "fail", stage="fault")
def a_fault_skips_the_rest_of_the_pass(engine: Any, fail: Method) -> Method:
    """After one request fails, what the same pass decided for the rows after it is not looked at."""
    advance, failed = engine.advance, [-1]

    def failing(sequence: Any, fault: Exception) -> None:
        failed[0] = engine.scheduler.steps
        fail(sequence, fault)

    def changed(row: Any, logits: Tensor) -> None:
        if failed[0] != engine.scheduler.steps:
            advance(row, logits)

    engine.advance = changed
    return failing


@engine_mutant(engines, "fail", stage="fault")
def a_fault_keeps_its_pages(_: Any, fail: Method) -> Method:
    """A request that fails in the middle of its answer never gives its pages back."""

    def changed(sequence: Any, fault: Exception) -> None:
        sequence.pages = []
        fail(sequence, fault)

    return changed


@engine_patched(stage="fault")
def an_error_closes_the_engine(engine: Any) -> None:
    """After a run with an error every later request is refused."""
    run, add = engine.run, engine.add
    closed = [False]

    def running(arrivals: Any) -> Served:
        served: Served = run(arrivals)
        closed[0] = closed[0] or any(one.finish_reason == "error" for one in served.completions)
        return served

    def adding(request: Request, **rest: Any) -> Any:
        return add(replace(request, max_tokens=0) if closed[0] else request, **rest)

    engine.run, engine.add = running, adding


def move_on(engine: Any) -> None:
    """Each request that runs with a seed loses one of the numbers that it would draw."""
    for sequence in engine.scheduler.running:
        if sequence.request.sampling.seed is not None:
            sequence.draws.uniform()


@engine_mutant(engines, "fail", stage="fault")
def a_fault_moves_seeds_on(engine: Any, fail: Method) -> Method:
    """When a request fails, the generators of those that run with it draw for it once."""

    def changed(sequence: Any, fault: Exception) -> None:
        fail(sequence, fault)
        move_on(engine)

    return changed


@engine_mutant(engines, "cancel", stage="fault")
def who_leaves_moves_seeds_on(engine: Any, cancel: Method) -> Method:
    """When a client leaves, the generators of those that run beside it draw for it once."""

    def changed(sequence: Any) -> None:
        cancel(sequence)
        move_on(engine)

    return changed


@engine_mutant(engines, "cancel", stage="fault")
def who_leaves_keeps_the_pages(_: Any, cancel: Method) -> Method:
    """The pages of a request whose client left are never free again."""

    def changed(sequence: Any) -> None:
        sequence.pages = []
        cancel(sequence)

    return changed


@engine_mutant(engines, "leave", stage="fault")
def who_leaves_keeps_the_slot(engine: Any, leave: Method) -> Method:
    """The slot of a request whose client left in the middle of its answer is lost."""

    def changed(sequence: Any) -> None:
        had = sequence in engine.scheduler.slots
        leave(sequence)
        if had and sequence.completion.finish_reason == "cancelled" and None in engine.scheduler.slots:
            engine.scheduler.slots.remove(None)

    return changed


@engine_mutant(engines, "cancel", stage="fault")
def who_leaves_takes_a_neighbour_along(engine: Any, cancel: Method) -> Method:
    """The row after that of a client that left is ended too."""

    def changed(sequence: Any) -> None:
        running = engine.scheduler.running
        after = running[running.index(sequence) + 1 :] if sequence in running else running[-1:]
        cancel(sequence)
        for other in after[:1]:
            cancel(other)

    return changed


@engine_mutant(engines, "cancel", stage="fault")
def who_leaves_frees_pages_of_others(engine: Any, cancel: Method) -> Method:
    """The pages of a request whose client left are free at once, those that others share too."""

    def changed(sequence: Any) -> None:
        pool = engine.pool
        for page in sequence.pages:
            if pool.references[page] > 1:
                pool.free.append(page)
        sequence.pages = [page for page in sequence.pages if pool.references[page] == 1]
        cancel(sequence)

    return changed


@engine_patched(stage="fault")
def who_left_is_known_by_number(engine: Any) -> None:
    """A client that left is remembered by its place in the run: who has that place later is cut off too."""
    run = engine.run
    gone: set[int] = set()

    def changed(arrivals: list[Arrival]) -> Served:
        marked = [replace(one, cancel_after=0) if i in gone else one for i, one in enumerate(arrivals)]
        gone.update(i for i, one in enumerate(arrivals) if one.cancel_after is not None)
        served: Served = run(marked)
        return served

    engine.run = changed


@engine_mutant(engines, "add", stage="fault")
def duplicates_are_merged(engine: Any, add: Method) -> Method:
    """A request equal to one in progress gets what becomes of that one, even if that one's client leaves."""

    def changed(request: Request, **rest: Any) -> Any:
        for other in (*engine.scheduler.waiting, *engine.scheduler.running):
            if other.request == request:
                if rest.get("cancel_after") is not None:
                    other.cancel_after = max(1, rest["cancel_after"])
                return other
        return add(request, **rest)

    return changed


@engine_mutant(engines, "add", stage="fault")
def equal_prompts_are_reported_alike(engine: Any, add: Method) -> Method:
    """Who has the prompt of one that runs without log probabilities gets none."""

    def changed(request: Request, **rest: Any) -> Any:
        alike = (one.request for one in engine.scheduler.running if one.request.prompt == request.prompt)
        given = request.logprobs and all(other.logprobs for other in alike)
        return add(replace(request, logprobs=given), **rest)

    return changed


@engine_mutant(schedulers, "leave", stage="fault")
def who_leaves_the_queue_ends_the_queue(scheduler: Any, leave: Method) -> Method:
    """When a client leaves that still waits, those that wait behind it are forgotten."""

    def changed(sequence: Any) -> None:
        if sequence in scheduler.waiting:
            del scheduler.waiting[scheduler.waiting.index(sequence) + 1 :]
        leave(sequence)

    return changed


@engine_mutant(engines, "run", stage="fault")
def who_left_is_served_to_the_end(_: Any, run: Method) -> Method:
    """Nobody looks whether a client is still there."""
    return lambda arrivals: run([replace(one, cancel_at=None, cancel_after=None) for one in arrivals])


@engine_patched(stage="fault")
def who_left_a_prompt_is_noticed_after_it(engine: Any) -> None:
    """A client that leaves while its prompt is computed is noticed when that is done."""
    cancel, advance = engine.cancel, engine.advance
    gone: set[Any] = set()

    def cancelling(sequence: Any) -> None:
        if sequence.computed and not sequence.generated:
            gone.add(sequence)
        else:
            cancel(sequence)

    def changed(row: Any, logits: Tensor) -> None:
        advance(row, logits)
        sequence = row.work.sequence
        if sequence in gone and sequence.generated and sequence.completion is None:
            cancel(sequence)

    engine.cancel, engine.advance = cancelling, changed


@engine_mutant(engines, "cancel", stage="fault")
def who_left_comes_back_from_preemption(engine: Any, cancel: Method) -> Method:
    """A client that leaves while its request waits for pages is not found, and served on."""

    def changed(sequence: Any) -> None:
        if not (sequence.preemptions and sequence in engine.scheduler.waiting):
            cancel(sequence)

    return changed
