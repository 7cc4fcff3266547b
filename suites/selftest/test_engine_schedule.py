"""Who runs when: order, budgets, preemption and slots, as the timeline shows them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.reference.engine import Arrival, Completion, Iteration, Limits, Request, Speculation
from harness.reference.engine.benchmark import lines, measure, per_sequence
from suites.selftest.engines import GREEDY, engine, mixed, prompt, run, served, tokens

LEAK = (2, 6, 3, 8, 4, 2, 2)
"""Tokens of seven requests: in four slots the last three fit behind the short ones among the first."""


def requests(wanted: tuple[int, ...], length: int = 1) -> list[Request]:
    """One request for each number of tokens, greedy, with prompts of their own."""
    return [Request(prompt(length, i), count, GREEDY) for i, count in enumerate(wanted)]


def first_seen(timeline: tuple[Iteration, ...] | list[Iteration]) -> list[int]:
    """Arrivals in the order in which they got a slot for the first time."""
    seen: list[int] = []
    for iteration in timeline:
        seen += sorted(set(iteration.running) - set(seen) - {-1})
    return seen


def test_a_static_batch_holds_its_slots_to_the_end() -> None:
    """Four requests run as long as the longest of them, and -1 marks the slots of those that have ended."""
    limits = Limits(sequences=4, batching="static")
    timeline = run(engine(limits), requests(LEAK), every=0).timeline
    assert [iteration.running for iteration in timeline[:8]] == [
        *[(0, 1, 2, 3)] * 2,
        (-1, 1, 2, 3),
        *[(-1, 1, -1, 3)] * 3,
        *[(-1, -1, -1, 3)] * 2,
    ]
    assert [iteration.running for iteration in timeline[8:]] == [*[(4, 5, 6)] * 2, *[(4, -1, -1)] * 2]


def test_continuous_batching_serves_seven_where_static_serves_four() -> None:
    """In the same four slots and the same eight iterations, ended requests make room for waiting ones."""
    timeline = run(engine(Limits(sequences=4)), requests(LEAK), every=0).timeline
    assert [iteration.running for iteration in timeline] == [
        *[(0, 1, 2, 3)] * 2,
        (4, 1, 2, 3),
        *[(4, 1, 5, 3)] * 2,
        (4, 1, 6, 3),
        *[(6, 3)] * 1,
        (3,),
    ]


@pytest.mark.parametrize("method", [None, "draft_model", "prompt_lookup"])
@pytest.mark.parametrize(
    "limits", [Limits(), Limits(sequences=3, chunk=5), Limits(sequences=3, batching="static")], ids=repr
)
def test_tokens_are_conserved(limits: Limits, method: str | None) -> None:
    """What the timeline counts as fed is what the completions account for.

    Prompts that were not cached, one token of each further round, and the drafts.
    """
    speculation = None if method is None else Speculation(method, length=3)  # type: ignore[arg-type]
    one = engine(limits, speculation)
    for _ in range(2):
        answer = run(one, mixed())
        pairs = list(zip(mixed(), answer.completions, strict=True))
        assert sum(i.prefill_tokens for i in answer.timeline) == sum(
            len(request.prompt) - have.cached_tokens for request, have in pairs
        )
        assert sum(i.decode_tokens for i in answer.timeline) == sum(
            have.rounds - 1 + have.drafted for have in answer.completions
        )
        assert all(0 < i.prefill_tokens + i.decode_tokens <= limits.chunk for i in answer.timeline)
        assert not any(i.preempted for i in answer.timeline)


@pytest.mark.parametrize("pages", [8, 12, 20, 64])
def test_no_slot_is_idle_while_a_request_could_have_it(pages: int) -> None:
    """Whoever is first in the queue waits for a slot or for pages, and for nothing else."""
    limits = Limits(sequences=3, page_size=4, pages=pages, prefix_sharing=False)
    timeline = run(engine(limits), mixed(), every=0).timeline
    short = 0
    for iteration in timeline:
        if iteration.waiting and len(iteration.running) < limits.sequences:
            waiting = sorted(set(range(8)) - set(iteration.running))
            needed = max(-(-(len(mixed()[i].prompt) + mixed()[i].max_tokens) // 4) for i in waiting)
            assert pages - iteration.pages_used < needed
            short += 1
    assert (short > 0) == (pages < 20)


@pytest.mark.parametrize("pages", [8, 12, 64])
def test_first_come_is_first_served(pages: int) -> None:
    """Slots are given in the order of arrival, and nobody small overtakes one that waits for pages."""
    limits = Limits(sequences=3, page_size=4, pages=pages)
    assert first_seen(list(run(engine(limits), mixed(), every=0).timeline)) == list(range(8))


def test_the_youngest_is_preempted_and_keeps_its_place() -> None:
    """It loses its pages to the oldest, is computed anew, and is back before any that came after it."""
    limits = Limits(sequences=2, page_size=2, pages=8, prefix_sharing=False)
    answer = run(engine(limits), requests((10, 10, 2), length=4), every=0)
    lost = [iteration.preempted for iteration in answer.timeline if iteration.preempted]
    assert set(lost) == {(1,)}
    assert [completion.preemptions for completion in answer.completions] == [0, len(lost), 0]
    rows = [iteration.running for iteration in answer.timeline]
    third = next(i for i, row in enumerate(rows) if 2 in row)
    assert 1 in rows[third] or all(1 not in row for row in rows[third:])
    assert tokens(answer.completions) == tokens(served().generate(requests((10, 10, 2), length=4)))
    fed = sum(iteration.prefill_tokens for iteration in answer.timeline)
    assert fed > 3 * 4  # the prompts once, and what was lost again


def test_a_long_prompt_does_not_hold_up_those_that_decode() -> None:
    """While a prompt is computed in pieces, every other request has a token in every iteration."""
    limits = Limits(sequences=3, chunk=6)
    waiting = [*requests((20, 20)), Request(prompt(60, 9), 1, GREEDY)]
    timeline = run(engine(limits), waiting, every=2).timeline
    pieces = [iteration for iteration in timeline if 2 in iteration.running]
    assert len(pieces) == 60 // 4
    assert all((i.prefill_tokens, i.decode_tokens) == (4, 2) for i in pieces)


def test_a_budget_that_serves_one_goes_round() -> None:
    """Where a pass has tokens for only one window, those that decode take turns."""
    limits = Limits(sequences=3, chunk=4)
    one = engine(limits, Speculation("self_draft", length=3))
    for request in requests((12, 12, 12)):
        one.add(request)
    while one.scheduler.busy:
        one.step()
        counts = [len(sequence.generated) for sequence in one.scheduler.running]
        assert max(counts, default=0) - min(counts, default=0) <= 4


def test_an_impossible_request_blocks_nobody() -> None:
    """It ends before any pass, and the one behind it runs in the first."""
    limits = Limits(sequences=1, pages=4)
    too_long = Request(prompt(30), 1, GREEDY)
    answer = run(engine(limits), [too_long, *requests((2,))], every=0)
    assert [completion.finish_reason for completion in answer.completions] == ["error", "length"]
    assert [iteration.running for iteration in answer.timeline] == [(1,), (1,)]
    assert all(iteration.waiting == 0 for iteration in answer.timeline)


def test_a_cancelled_request_frees_its_pages_at_once() -> None:
    """In the pass after its last token nothing of it is held, and the next in the queue has its slot."""
    limits = Limits(sequences=1, page_size=4, pages=8)
    first, second = requests((20, 1), length=8)
    answer = engine(limits).run([Arrival(first, cancel_after=2), Arrival(second)])
    assert [iteration.running for iteration in answer.timeline] == [(0,), (0,), (1,)]
    assert answer.timeline[-1].pages_used == 2
    assert answer.completions[0].finish_reason == "cancelled"


def test_one_who_waits_can_be_cancelled() -> None:
    """A request that never had a slot leaves the queue, and its place is lost to nobody else."""
    one = engine(Limits(sequences=1))
    first, second, third = (one.add(request) for request in requests((3, 3, 3)))
    one.step()
    one.cancel(second)
    while one.scheduler.busy:
        one.step()
    assert second.completion == Completion((), "cancelled")
    assert first.completion is not None
    assert third.completion is not None
    assert one.pool.used == 0


def test_a_request_that_comes_later_is_served_later() -> None:
    """Arrivals come at their iteration, in any order given; idle time makes no iterations."""
    one = engine(Limits(sequences=2))
    come = [Arrival(r, at=at) for r, at in zip(requests((3, 2, 2)), (100.0, 0.0, 1.5), strict=True)]
    answer = one.run(come)
    assert [i.running for i in answer.timeline] == [(1,), (1,), (2,), (2,), (0,), (0,), (0,)]
    assert [len(completion.tokens) for completion in answer.completions] == [3, 2, 2]


def test_a_full_prefix_hit_computes_one_token() -> None:
    """The second time a prompt of whole pages is asked for, only its last page is computed again."""
    one = engine(Limits(page_size=4))
    request = Request(prompt(8), 3, GREEDY)
    first = run(one, [request])
    second = run(one, [replace(request, prompt=(*request.prompt, *first.completions[0].tokens))])
    assert second.completions[0].cached_tokens == 8
    assert second.timeline[0].prefill_tokens == 3
    again = run(one, [request])
    assert again.completions[0].cached_tokens == 4
    assert run(one, [replace(request, salt="other")]).completions[0].cached_tokens == 0


def test_the_overhead_of_an_iteration_is_measured() -> None:
    """Model, scheduler and the rest are positive times, and a line gives them per iteration and sequence."""
    measured = [measure(served().model, count, iterations=4) for count in (1, 3)]
    assert all(min(m.model, m.scheduler, m.rest) > 0 for m in measured)
    fixed, each = per_sequence(measured)
    for m in measured:
        assert fixed + each * m.sequences == pytest.approx(m.engine)
    assert len(lines(measured)) == 3
    with pytest.raises(ValueError, match="200 iterations need 208 positions of 128"):
        measure(served().model, 1, iterations=200)
