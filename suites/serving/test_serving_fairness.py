"""Fairness: who may be served is served, in order; prompts and answers do not hold each other up for long.

Times and waits are iterations of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.conformance import Case, Void, conformance, require
from harness.conformance.passes import independent
from harness.conformance.serving import (
    GREEDY,
    arrivals,
    batchings,
    counted,
    engine,
    greedy,
    narrow,
    offered,
    prompts,
    run,
    serve,
    speculations,
    startable,
    timeline,
)
from harness.reference.engine import Arrival, Completion, Iteration, Limits, Request

WAIT = 3
"""How much longer than alone a request in a slot may take: its own work, and twice as much for others."""


def whole(answers: Sequence[Completion], requests: Sequence[Request], what: str) -> None:
    """Raise Violation unless every request has all its tokens: none has an end of its own."""
    for i, (answer, request) in enumerate(zip(answers, requests, strict=True)):
        have = (
            f"{len(answer.tokens)} of {request.max_tokens} tokens and {answer.finish_reason!r} {answer.error}"
        )
        fine = answer.finish_reason == "length" and len(answer.tokens) == request.max_tokens
        require(fine, f"{what}: request {i} ends with {have.strip()}", stage="schedule")


def held(iterations: Sequence[Iteration], arrival: int) -> list[int]:
    """The iterations in which an arrival had a slot."""
    found = [i for i, one in enumerate(iterations) if arrival in one.running]
    require(bool(found), f"arrival {arrival} never had a slot", stage="schedule")
    return found


def starts(iterations: Sequence[Iteration], count: int) -> list[int]:
    """The first iteration in which each arrival had a slot."""
    return [held(iterations, arrival)[0] for arrival in range(count)]


@conformance(
    "serving.all-who-may-be-served-are-served",
    clause="serving.scheduling",
    needs=("serve", "limits"),
    kills=(
        "preempted-requests-are-lost",
        "static-batches-end-together",
        "a-misfit-blocks-the-queue",
        "prompts-must-fit-whole",
    ),
    applies=independent,
    costly=True,
)
def test_all_who_may_be_served_are_served(case: Case) -> None:
    """In full pools, batched either way, behind a request that can never fit, every answer is whole."""
    model = engine(case)
    requests = greedy(case, model, (9, 3, 14, 5, 4, 12, 7, 3), (6, 9, 3, 8, 11, 4, 5, 1))
    largest = max(-(-(len(r.prompt) + r.max_tokens - 1) // 4) for r in requests)
    misfit = offered(model, Request(requests[2].prompt * 8, 4, GREEDY))
    for pages in (largest, largest + 2):
        for batching in batchings(model):
            for sequences, chunk in ((3, 4), (6, 7)):
                limits = Limits(sequences, 4, pages, chunk, batching)
                given = [Arrival(misfit), *arrivals(model, requests, every=0.5), Arrival(misfit, 3.0)]
                found = serve(model, given, limits, stage="schedule").completions
                whole(found[1:-1], requests, f"in an engine of {limits}")
                ends = {found[0].finish_reason, found[-1].finish_reason}
                require(
                    ends == {"error"}, f"a prompt larger than the pool ends with {ends}", stage="schedule"
                )


@conformance(
    "serving.first-come-first-started",
    clause="serving.scheduling",
    needs=("serve", "limits"),
    kills=("last-come-first-started",),
    applies=independent,
    costly=True,
)
def test_first_come_first_started(case: Case) -> None:
    """Equal requests start in the order in which they came, at once or one after another."""
    model = engine(case)
    (row,) = prompts(case, (6,))
    requests = [offered(model, Request(row, 4, GREEDY))] * 9
    for order in (tuple(range(9)), (4, 0, 8, 2, 6, 1, 5, 3, 7)):
        given = arrivals(model, requests, order=order, every=0.5)
        sizes = [Limits(2, batching=batching) for batching in batchings(model)]
        for limits in (*sizes, Limits(3, pages=6)):
            served = serve(model, given, limits, stage="schedule")
            first = starts(timeline(served), len(given))
            came = [first[i] for i in order]
            require(
                came == sorted(came),
                f"{limits}: they start at {came}, in the order of coming",
                stage="schedule",
            )


@conformance(
    "serving.the-large-are-not-overtaken-for-ever",
    clause="serving.scheduling",
    needs=("serve", "limits"),
    kills=(
        "small-requests-overtake",
        "shortest-prompts-start-first",
    ),
    applies=independent,
    costly=True,
)
def test_the_large_are_not_overtaken_for_ever(case: Case) -> None:
    """A request that needs nearly all pages starts before those that come long after it, however small."""
    model = engine(case)
    small, large = prompts(case, (4, 30))
    requests = [offered(model, Request(small, 6, GREEDY))] * 24
    requests[2] = offered(model, Request(large, 6, GREEDY))
    limits = Limits(3, 4, 9, 32, prefix_sharing=False)
    served = serve(model, arrivals(model, requests, every=1.5), limits, stage="schedule")
    whole(served.completions, requests, "beside many small ones")
    first = starts(timeline(served), len(requests))
    before = sum(start < first[2] for start in first[3:])
    case.note("overtaken_by", before)
    # Those that are there already when it comes, and as many again while it waits for pages
    require(
        before <= 2 * limits.sequences,
        f"a large request was overtaken by {before} small ones",
        stage="schedule",
    )


@conformance(
    "serving.prompts-do-not-starve-answers",
    clause="serving.scheduling",
    needs=("serve", "limits"),
    kills=("prompts-come-first",),
    applies=independent,
    costly=True,
)
def test_prompts_do_not_starve_answers(case: Case) -> None:
    """An answer goes on while long prompts keep coming: it never takes three times its own iterations."""
    model = engine(case)
    short, long = prompts(case, (3, 40))
    requests = [offered(model, Request(short, 10, GREEDY))]
    requests += [offered(model, Request(long[i:], 1, GREEDY)) for i in range(12)]
    limits = Limits(4, 4, 64, 8, prefix_sharing=False)
    served = serve(model, arrivals(model, requests, every=1.0), limits, stage="schedule")
    whole(served.completions, requests, "under a stream of prompts")
    took = len(held(timeline(served), 0))
    case.note("iterations_of_an_answer_of_10", took)
    require(
        took <= WAIT * 10,
        f"an answer of 10 tokens took {took} iterations beside long prompts",
        stage="schedule",
    )


@conformance(
    "serving.answers-do-not-starve-prompts",
    clause="serving.scheduling",
    needs=("serve", "limits"),
    kills=("long-prompts-wait-for-an-idle-engine",),
    applies=independent,
    costly=True,
)
def test_answers_do_not_starve_prompts(case: Case) -> None:
    """A long prompt is computed while short answers keep coming, from at least a share of each iteration."""
    model = engine(case)
    short, long = prompts(case, (3, 32))
    requests = [offered(model, Request(short, 9, GREEDY))] * 26
    requests[3] = offered(model, Request(long, 2, GREEDY))
    limits = Limits(4, 4, 64, 8, prefix_sharing=False)
    served = serve(model, arrivals(model, requests, every=1.0), limits, stage="schedule")
    whole(served.completions, requests, "under a stream of answers")
    took = len(held(timeline(served), 3))
    case.note("iterations_of_a_prompt_of_32", took)
    # A fair quarter of 8 tokens an iteration: 16 iterations for the prompt, one for its second token
    require(
        took <= WAIT * 17, f"a prompt of 32 tokens took {took} iterations beside answers", stage="schedule"
    )


@conformance(
    "serving.the-preempted-come-back-first",
    clause="serving.scheduling",
    needs=("serve", "limits"),
    kills=(
        "preempted-requests-are-lost",
        "the-preempted-queue-up-again",
    ),
    applies=independent,
    costly=True,
)
def test_the_preempted_come_back_first(case: Case) -> None:
    """Who lost its pages gets a slot again before anybody who came later gets a first one."""
    model = engine(case)
    requests = greedy(case, model, (6, 5, 7, 4, 6, 5, 8, 4, 6), (10, 9, 8, 11, 7, 9, 6, 8, 5))
    preempted = 0
    for pages in (5, 6, 8):
        served = serve(
            model, arrivals(model, requests, every=1.0), Limits(3, 4, pages, 16, prefix_sharing=False)
        )
        whole(served.completions, requests, f"in a pool of {pages} pages")
        iterations = timeline(served)
        first = starts(iterations, len(requests))
        preempted += counted(served.completions, "preemptions")
        for at, one in enumerate(iterations):
            for arrival in one.preempted:
                back = next((i for i in held(iterations, arrival) if i >= at), None)
                require(
                    back is not None, f"arrival {arrival} was preempted and never came back", stage="preempt"
                )
                assert back is not None
                passed = [later for later in range(arrival + 1, len(first)) if at <= first[later] < back]
                require(not passed, f"{passed} started while {arrival}, preempted, waited", stage="preempt")
    if not preempted:
        raise Void("no request was ever preempted")


@conformance(
    "serving.the-oldest-keep-their-pages",
    clause="serving.preemption",
    needs=("serve", "limits"),
    kills=("the-oldest-is-preempted",),
    level="SHOULD",
    applies=independent,
    costly=True,
)
def test_the_oldest_keep_their_pages(case: Case) -> None:
    """Nobody loses its pages while somebody who came later keeps them, so that the oldest always go on."""
    model = engine(case)
    requests = greedy(case, model, (6, 5, 7, 4, 6, 5), (10, 9, 8, 11, 7, 9))
    preempted = 0
    for pages in (6, 8):
        limits = Limits(3, 4, pages, 16, prefix_sharing=False)
        iterations = timeline(serve(model, arrivals(model, requests, every=1.0), limits))
        for at, one in enumerate(iterations):
            before = iterations[at - 1].running if at else ()
            for arrival in one.preempted:
                younger = [other for other in one.running if other > arrival and other in before]
                what = f"iteration {at}: {younger} keep their pages while {arrival} loses its own"
                require(not younger, what, stage="preempt")
                preempted += 1
    if not preempted:
        raise Void("no request was ever preempted")


@conformance(
    "serving.no-slot-idles-while-somebody-waits",
    clause="serving.scheduling",
    needs=("serve", "limits"),
    kills=(
        "slots-are-filled-when-all-are-free",
        "one-request-starts-per-pass",
        "ended-answers-hold-their-slots",
    ),
    applies=independent,
    costly=True,
)
def test_no_slot_idles_while_somebody_waits(case: Case) -> None:
    """With pages for all, a free slot is taken at once; a static batch is as large as the slots allow."""
    model = engine(case)
    requests = greedy(case, model, (6, 5, 7, 4, 6, 5, 8, 4, 6), (3, 9, 2, 6, 1, 4, 6, 2, 5))
    steps: dict[str, int] = {}
    for batching in batchings(model):
        served = serve(model, arrivals(model, requests), Limits(3, batching=batching), stage="schedule")
        whole(served.completions, requests, f"under {batching} batching")
        steps[batching] = len(timeline(served))
        for at, one in enumerate(timeline(served)):
            idle = 3 - len(one.running)
            require(
                not (idle and one.waiting),
                f"{batching}: {idle} of 3 slots idle in iteration {at}",
                stage="schedule",
            )
    case.note("iterations", steps)
    if len(steps) > 1:
        require(
            steps["continuous"] < steps["static"],
            f"continuous batching takes {steps['continuous']} iterations, static {steps['static']}",
            stage="schedule",
        )


@conformance(
    "serving.budgets-are-used",
    clause="serving.scheduling",
    needs=("serve", "limits"),
    kills=(
        "half-of-the-budget-is-left",
        "one-prompt-starts-per-pass",
    ),
    level="SHOULD",
    applies=independent,
)
def test_budgets_are_used(case: Case) -> None:
    """Prompts that have slots are computed in as few iterations as their tokens fill, and one more."""
    model = engine(case)
    requests = greedy(case, model, (10,) * 8, (1,) * 8)
    limits = Limits(8, 4, 64, 32, prefix_sharing=False)
    served = serve(model, arrivals(model, requests), limits, stage="schedule")
    whole(served.completions, requests, "at once")
    took, least = len(timeline(served)), -(-80 // limits.chunk)
    what = f"{took} iterations for 80 tokens of 8 prompts, {limits.chunk} an iteration"
    require(took <= least + 1, what, stage="schedule")


@conformance(
    "serving.tokens-are-fed-once",
    clause="serving.scheduling",
    needs=("serve", "limits"),
    kills=(
        "budgets-are-exceeded",
        "prompts-are-computed-twice",
        "slots-are-lent-twice",
    ),
    applies=independent,
    costly=True,
)
def test_tokens_are_fed_once(case: Case) -> None:
    """No iteration exceeds slots, pages or budget, and without preemption each token is fed once."""
    model = engine(case)
    requests = greedy(case, model, (6, 15, 7, 4, 9), (3, 9, 2, 6, 5))
    sizes = (Limits(3, 4, 64, 7), Limits(5, 1, 99, 64), Limits(2, 4, 32, 5), Limits(4, 3, 9, 8))
    for limits in startable(case, model, sizes):
        session = model.start(limits, speculation=None)
        served = run(session, arrivals(model, requests, every=1.0), stage="schedule")
        session.close()
        answers, iterations = served.completions, timeline(served)
        whole(answers, requests, f"in an engine of {limits}")
        for at, one in enumerate(iterations):
            fed = one.prefill_tokens + one.decode_tokens
            for what, have, most in (
                ("tokens", fed, limits.chunk),
                ("slots", len(one.running), limits.sequences),
                ("pages", one.pages_used, limits.pages),
            ):
                require(have <= most, f"{limits}: iteration {at} uses {have} {what}", stage="schedule")
            twice = len([a for a in one.running if a >= 0]) - len({a for a in one.running if a >= 0})
            require(not twice, f"{limits}: iteration {at} has a request in two slots", stage="schedule")
        if counted(answers, "preemptions"):
            continue
        prefill = sum(len(r.prompt) for r in requests) - counted(answers, "cached_tokens")
        have = sum(one.prefill_tokens for one in iterations)
        require(
            have == prefill, f"{limits}: {have} tokens of prompts fed in place of {prefill}", stage="schedule"
        )
        decode = sum(len(answer.tokens) - 1 for answer in answers)
        have = sum(one.decode_tokens for one in iterations)
        require(
            have == decode, f"{limits}: {have} generated tokens fed in place of {decode}", stage="schedule"
        )


@conformance(
    "serving.speculation-starves-nobody",
    clause="serving.scheduling",
    needs=("serve", "limits", "speculate"),
    kills=(
        "prompts-must-fit-whole",
        "windows-are-never-cut",
    ),
    applies=independent,
    costly=True,
)
def test_speculation_starves_nobody(case: Case) -> None:
    """With drafts, in tight budgets and pools, every answer is whole, and nobody waits in a slot for ever."""
    model = engine(case)
    requests = narrow(case, model, greedy(case, model, (6, 15, 7, 4, 9), (8, 6, 7, 9, 5)))
    for speculation in speculations(case, model):
        for limits in (Limits(4, 4, 24, 4), Limits(3, 2, 11, 6), Limits(5, 4, 64, 16)):
            served = serve(model, arrivals(model, requests, every=1.0), limits, speculation, stage="schedule")
            whole(served.completions, requests, f"by {speculation.method} in an engine of {limits}")
            for i, request in enumerate(requests):
                fed = len(request.prompt) + request.max_tokens
                took = len(held(timeline(served), i))
                # At least one of `sequences` has its turn in an iteration, perhaps with a single token.
                most = limits.sequences * fed * (1 + counted(served.completions, "preemptions"))
                require(took <= most, f"request {i} of {fed} tokens took {took} iterations", stage="schedule")
