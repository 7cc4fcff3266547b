"""Faults: what goes wrong with one request is its own affair, and the engine goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from harness.conformance import Case, conformance, require
from harness.conformance.passes import independent
from harness.conformance.property import Violation
from harness.conformance.serving import (
    GREEDY,
    Agreement,
    alone,
    arrivals,
    engine,
    exact,
    greedy,
    honours,
    offered,
    prompts,
    run,
    same_all,
    seeded_too,
    serve,
    sized,
    speculations,
    timeline,
)
from harness.reference.engine import Arrival, Completion, Grammar, Limits, Request, Sampling

LIMITS = Limits(sequences=3, page_size=4, pages=24, chunk=16)
EMPTY = "an empty prompt"
BEYOND = 20_000
"""Tokens that no small server's context holds, where the engine does not say what its own does."""


def faults(case: Case, model: Any) -> dict[str, Request]:
    """Requests that cannot be served, by what is wrong with them."""
    (row,) = prompts(case, (5,))
    fine = Request(row, 6, GREEDY)
    context = BEYOND if case.architecture is None else case.architecture.max_positions
    made = {
        EMPTY: replace(fine, prompt=()),
        "a token beyond the vocabulary": replace(fine, prompt=(*row, case.vocab_size)),
        "a negative token": replace(fine, prompt=(-1, *row)),
        "a prompt longer than the context": replace(fine, prompt=(row * context)[: context + 1]),
    }
    if "limits" in model.capabilities:
        large = (row * context)[: min(LIMITS.pages * LIMITS.page_size + 1, context - 2)]
        made["a prompt larger than the pool"] = replace(fine, prompt=large)
        made |= {f"max_tokens of {n}": replace(fine, max_tokens=n) for n in (0, -1)}
    if honours(model, "temperature"):
        made["a temperature that is no number"] = replace(fine, sampling=Sampling(temperature=math.nan))
    if honours(model, "grammar", "logit_bias"):
        # From its second token on nothing is possible: it goes wrong in the middle of its answer.
        dead = Grammar((tuple((t, 1) for t in row[:1]), tuple((t, 1) for t in row[1:2])))
        law = Sampling(temperature=0.0, grammar=dead, logit_bias=((row[1], -math.inf),))
        made["a grammar without a way on"] = replace(fine, sampling=law)
    return made


def some_seeded(case: Case, model: Any, requests: Sequence[Request]) -> list[Request]:
    """The requests, every other one with a seed; none where the engine is a server, which may round."""
    drawn = seeded_too(case, model, requests) if "limits" in model.capabilities else requests
    return [(drawn or requests)[i] if i % 2 == 0 else request for i, request in enumerate(requests)]


def failed(model: Any, answer: Completion, what: str) -> None:
    """Raise Violation unless the request ended with an error of its own that says something."""
    if what == EMPTY and "limits" not in model.capabilities:
        return  # some servers put a token of their own before every prompt
    require(
        answer.finish_reason == "error",
        f"{what} ended with {answer.finish_reason!r}, not an error",
        stage="fault",
    )
    require(bool(answer.error.strip()), f"{what} ended with an error that says nothing", stage="fault")


@conformance(
    "serving.bad-requests-harm-nobody",
    clause="serving.faults",
    needs=("serve",),
    kills=(
        "a-bad-request-ends-the-loop",
        "errors-look-like-empty-answers",
        "foreign-tokens-wrap-around",
        "long-prompts-are-cut",
        "a-fault-ends-the-whole-batch",
        "a-fault-skips-the-rest-of-the-pass",
        "an-error-closes-the-engine",
        "a-fault-moves-seeds-on",
    ),
    applies=independent,
    costly=True,
)
def test_bad_requests_harm_nobody(case: Case) -> None:
    """Requests that cannot be served end with an error each, and others are answered as if alone."""
    model = engine(case)
    requests = some_seeded(case, model, greedy(case, model, (5, 9, 4), (7, 5, 8)))
    bad = faults(case, model)
    wanted, agreement = alone(model, requests, sized(model, LIMITS)), Agreement(exact(model))
    session = model.start(sized(model, LIMITS), speculation=None)
    for what, fault in bad.items():
        good = arrivals(model, requests, every=1.0)
        found = run(session, [good[0], Arrival(fault, good[1].at), *good[1:]]).completions
        same_all(agreement, [found[0], *found[2:]], wanted, requests, what=f"beside {what}", stage="fault")
        failed(model, found[1], what)
    found = run(session, [*bad.values(), *requests]).completions
    same_all(agreement, found[len(bad) :], wanted, requests, what="after all of them", stage="fault")
    found = run(session, requests).completions
    session.close()
    same_all(agreement, found, wanted, requests, what="in a later run", stage="fault")
    agreement.noted(case)


@conformance(
    "serving.clients-that-leave-harm-nobody",
    clause="serving.faults",
    needs=("serve",),
    kills=(
        "who-leaves-takes-a-neighbour-along",
        "who-left-is-known-by-number",
        "who-leaves-the-queue-ends-the-queue",
        "who-leaves-moves-seeds-on",
    ),
    applies=independent,
    costly=True,
)
def test_clients_that_leave_harm_nobody(case: Case) -> None:
    """Clients that leave before, at or after the start of an answer get its beginning; others all of it."""
    model = engine(case)
    requests = some_seeded(case, model, greedy(case, model, (5, 17, 9, 4, 6), (8, 9, 5, 8, 7)))
    wanted, agreement = alone(model, requests, sized(model, LIMITS)), Agreement(exact(model))
    session = model.start(sized(model, LIMITS), speculation=None)
    for after in ((None, 0, None, 3, 1), (2, None, 4, 0, None), (0, 1, 2, 3, None)):
        given = arrivals(model, requests, every=1.0)
        given = [replace(one, cancel_after=count) for one, count in zip(given, after, strict=True)]
        # A long prompt is left in the middle, an answer, and one that waits while others wait behind it.
        times = sorted(one.at for one in given)
        given.append(Arrival(requests[1], times[0], cancel_at=times[1]))
        given.append(Arrival(requests[2], times[2], cancel_at=times[4]))
        given.append(Arrival(requests[4], times[3], cancel_at=times[4]))
        found = run(session, given).completions
        for i, request in ((5, 1), (6, 2), (7, 4)):
            left(found[i], wanted[request], 0)
        stay = [i for i, count in enumerate(after) if count is None]
        same_all(
            agreement,
            [found[i] for i in stay],
            [wanted[i] for i in stay],
            [requests[i] for i in stay],
            what="beside clients that leave",
            stage="fault",
        )
        for i, count in enumerate(after):
            if count is not None:
                left(found[i], wanted[i], count)
    found = run(session, requests).completions
    session.close()
    same_all(agreement, found, wanted, requests, what="after clients that left", stage="fault")
    agreement.noted(case)


def left(answer: Completion, whole: Completion, count: int) -> None:
    """Raise Violation unless the answer of a client that left after `count` tokens begins the whole one."""
    ends = ("cancelled", whole.finish_reason)
    what = f"the answer of a client that left after {count} tokens"
    require(
        answer.finish_reason in ends,
        f"{what} ends with {answer.finish_reason!r} {answer.error}",
        stage="fault",
    )
    have = answer.tokens
    require(
        have == whole.tokens[: len(have)], f"{what} is {list(have)}, no beginning of its own", stage="fault"
    )
    if answer.finish_reason == "cancelled":
        return
    require(len(have) == len(whole.tokens), f"{what} ends early, and says that it is whole", stage="fault")


NOTICED = 3
"""Iterations after which an engine must have noticed that a client left; it may look but once in a pass."""


@conformance(
    "serving.who-leaves-is-served-no-longer",
    clause="serving.faults",
    needs=("serve", "limits"),
    kills=(
        "who-left-is-served-to-the-end",
        "who-left-a-prompt-is-noticed-after-it",
        "who-left-comes-back-from-preemption",
    ),
    level="SHOULD",
    applies=independent,
    costly=True,
)
def test_who_leaves_is_served_no_longer(case: Case) -> None:
    """Soon after a client left a prompt, an answer, the queue or a full pool, nothing is computed for it."""
    model = engine(case)
    requests = greedy(case, model, (5, 40, 9, 4, 7), (30, 9, 24, 20, 24))
    limits = Limits(sequences=3, page_size=4, pages=64, chunk=6)
    whole = [Arrival(request) for request in requests]
    ways = [(limits, i, at) for i, at in ((1, 3.0), (0, 6.0), (3, 4.0))]
    tight = replace(limits, pages=17)
    for at, one in enumerate(timeline(serve(model, whole, tight))):
        ways += [(tight, i, at + 1.0) for i in one.preempted[:1]]
    for size, i, at in ways[:4]:
        served = serve(
            model, [replace(one, cancel_at=at if k == i else None) for k, one in enumerate(whole)], size
        )
        late = [k for k, one in enumerate(timeline(served)) if i in one.running and k >= at + NOTICED]
        what = f"request {i}, whose client left at iteration {at:g}"
        require(not late, f"{what}, runs in iterations {late}", stage="fault")
        end = served.completions[i].finish_reason
        require(end == "cancelled", f"{what}, ends with {end!r}", stage="fault")
    served = serve(model, [replace(one, cancel_after=5) for one in whole], limits)
    for answer, request in zip(served.completions, requests, strict=True):
        many = len(answer.tokens)
        most = min(5 + NOTICED, request.max_tokens)
        require(many <= most, f"{many} tokens for a client that left after 5", stage="fault")


@conformance(
    "serving.duplicates-are-all-answered",
    clause="serving.batching",
    needs=("serve",),
    kills=(
        "who-leaves-frees-pages-of-others",
        "duplicates-are-merged",
        "equal-prompts-are-reported-alike",
    ),
    applies=independent,
)
def test_duplicates_are_all_answered(case: Case) -> None:
    """The very same request asked several times at once is answered as often, though one client leaves."""
    model = engine(case)
    size = sized(model, Limits(sequences=8, page_size=4, pages=48, chunk=64))
    requests = greedy(case, model, (9, 13), (7, 8))
    first, second = requests
    wanted, agreement = alone(model, requests, size), Agreement(exact(model))
    session = model.start(size, speculation=None)
    order = (first, second, first, first, second)
    given = arrivals(model, order, every=1.0)
    times = [one.at for one in given]
    given += [Arrival(first, cancel_after=2), Arrival(second, times[1], cancel_at=times[4])]
    given += [Arrival(first, times[2], cancel_at=times[4])]
    # Nearly duplicates: they differ in what is told of them.
    given += [Arrival(replace(request, logprobs=False), times[0]) for request in requests]
    found = run(session, given).completions[: len(order)]
    session.close()
    answers = [wanted[requests.index(request)] for request in order]
    same_all(agreement, found, answers, list(order), what="beside its duplicates", stage="fault")
    agreement.noted(case)


@conformance(
    "serving.what-ends-gives-all-back",
    clause="serving.pages",
    needs=("serve", "limits"),
    kills=(
        "a-fault-keeps-its-pages",
        "who-leaves-keeps-the-pages",
        "who-leaves-keeps-the-slot",
    ),
    applies=independent,
    costly=True,
)
def test_what_ends_gives_all_back(case: Case) -> None:
    """After answers, errors, clients that left and preemptions, a request that needs every page is served."""
    model = engine(case)
    small = Limits(sequences=3, page_size=4, pages=8, chunk=16)
    requests = greedy(case, model, (5, 9, 13, 6), (8, 5, 9, 7))
    (row,) = prompts(case, (small.pages * small.page_size - 6,))
    whole = offered(model, Request(row, 7, GREEDY, logprobs=True))
    (wanted,), agreement = alone(model, [whole], small), Agreement(exact(model))
    ways = {
        "answers": requests,
        "clients that left at once": [Arrival(r, i, cancel_after=0) for i, r in enumerate(requests * 2)],
        "clients that left later": [
            Arrival(r, i, cancel_after=1 + i % 3) for i, r in enumerate(requests * 2)
        ],
        "clients that left at some time": [
            replace(one, cancel_at=one.at + 2) for one in arrivals(model, requests * 2, every=1.0)
        ],
        "errors": [fault for fault in faults(case, model).values() for _ in range(3)],
    }
    for sharing in (False, True):
        session = model.start(replace(small, prefix_sharing=sharing), speculation=None)
        for what, given in ways.items():
            run(session, given)
            found = run(session, [whole]).completions
            same_all(
                agreement, found, [wanted], [whole], what=f"that fills the pool, after {what}", stage="pages"
            )
            full = run(session, arrivals(model, requests)).completions
            if any(answer.finish_reason != "length" for answer in full):
                raise Violation(f"after {what} not all slots and pages are there again", stage="pages")
        session.close()
    agreement.noted(case)


@conformance(
    "serving.faults-under-speculation-harm-nobody",
    clause="serving.speculation",
    needs=("serve", "speculate"),
    kills=(
        "a-bad-request-ends-the-loop",
        "an-error-closes-the-engine",
        "faults-of-drafts-are-fatal",
    ),
    applies=independent,
    costly=True,
)
def test_faults_under_speculation_harm_nobody(case: Case) -> None:
    """With drafts, too, bad requests and clients that leave neither change nor lose a neighbour's answer."""
    model = engine(case)
    requests, bad = greedy(case, model, (5, 9, 4), (7, 5, 8)), faults(case, model)
    wanted, agreement = alone(model, requests, sized(model, LIMITS)), Agreement(exact(model))
    for speculation in speculations(case, model, 2):
        session = model.start(sized(model, LIMITS), speculation=speculation)
        gone = [Arrival(request, cancel_after=count) for count, request in enumerate(requests)]
        given = [*map(Arrival, bad.values()), *gone, *arrivals(model, requests, every=1.0)]
        found = run(session, given).completions
        again = run(session, requests).completions
        session.close()
        for what, answer in zip(bad, found, strict=False):
            failed(model, answer, what)
        what = f"beside faults, speculated by {speculation.method}"
        same_all(agreement, found[-3:], wanted, requests, what=what, stage="fault")
        same_all(agreement, again, wanted, requests, what=f"after {what}", stage="fault")
    agreement.noted(case)
