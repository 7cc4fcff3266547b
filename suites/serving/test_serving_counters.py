"""Counters: what an engine says of its cache, its queue and its preemptions is what happened."""

from __future__ import annotations

from harness.conformance import Case, Void, conformance, require
from harness.conformance.passes import independent
from harness.conformance.serving import arrivals, counted, engine, greedy, run, serve, timeline
from harness.reference.engine import Limits


@conformance(
    "serving.what-is-counted-adds-up",
    clause="serving.scheduling",
    needs=("serve", "limits"),
    kills=(
        "queues-are-not-shown",
        "preemptions-are-counted-by-page",
        "cached-tokens-are-counted-short",
        "cached-tokens-are-counted-when-recomputed",
        "sharing-cannot-be-turned-off",
    ),
    applies=independent,
    costly=True,
)
def test_what_is_counted_adds_up(case: Case) -> None:
    """Tokens that were fed and tokens that were cached make up each prompt, also after a full pool."""
    model = engine(case)
    requests = greedy(case, model, (9, 13, 17, 6), (5, 4, 3, 6))
    for sharing in (True, False):
        session = model.start(Limits(4, 4, 64, prefix_sharing=sharing), speculation=None)
        run(session, arrivals(model, requests))
        for request in requests:
            served = run(session, arrivals(model, [request]))
            (answer,), fed = served.completions, sum(one.prefill_tokens for one in timeline(served))
            have, size = answer.cached_tokens, len(request.prompt)
            what = f"of a prompt of {size} tokens {have} were cached and {fed}"
            require(have + fed == size, f"{what} computed", stage="counters")
            require(
                sharing or not have, f"{have} tokens were cached, though none are shared", stage="counters"
            )
        session.close()
    requests = greedy(case, model, (6, 5, 7, 4, 6, 5), (10, 9, 8, 11, 7, 9))
    for pages, sharing in ((5, False), (6, True)):
        limits = Limits(3, 4, pages, 16, prefix_sharing=sharing)
        served = serve(model, arrivals(model, requests), limits)
        iterations, answers = timeline(served), served.completions
        last = [
            max(at for at, one in enumerate(iterations) if i in one.running) for i in range(len(requests))
        ]
        for at, one in enumerate(iterations):
            queue = sum(end >= at for end in last) - len(one.running)
            what = f"iteration {at} says that {one.waiting} wait"
            require(one.waiting == queue, f"{what}, not {queue}", stage="counters")
        for i, (answer, request) in enumerate(zip(answers, requests, strict=True)):
            lost = sum(i in one.preempted for one in iterations)
            if counted(answers, "preemptions"):
                what = f"request {i} counts {answer.preemptions} preemptions"
                require(answer.preemptions == lost, f"{what}, the iterations {lost}", stage="counters")
            have, size = answer.cached_tokens, len(request.prompt)
            require(have < size, f"{have} of {size} tokens of a prompt were cached", stage="counters")


@conformance(
    "serving.what-is-known-is-found",
    clause="serving.prefix_sharing",
    needs=("serve", "limits"),
    kills=(
        "only-first-pages-are-found",
        "latest-prefixes-are-given-up",
        "beginnings-are-given-up-first",
    ),
    level="SHOULD",
    applies=independent,
    costly=True,
)
def test_what_is_known_is_found(case: Case) -> None:
    """Every full page of a known prefix is found; a full pool gives up the prefix that was longest unused."""
    model, size = engine(case), 4
    requests = greedy(case, model, (9, 13, 17, 6), (5, 4, 3, 6))
    session = model.start(Limits(4, size, 64), speculation=None)
    run(session, arrivals(model, requests))
    again = [run(session, [request]).completions[0] for request in requests]
    session.close()
    if not counted(again, "cached_tokens"):
        raise Void("no prefix was found in the cache, or the engine does not say so")
    found = [answer.cached_tokens for answer in again]
    most = [(len(request.prompt) - 1) // size * size for request in requests]
    require(found == most, f"asked again, {found} tokens are found in place of {most}", stage="prefix")
    # Of four prompts that fill three pages each, a pool of eleven keeps two while it serves another
    requests = greedy(case, model, (13, 13, 13, 13), (2, 2, 2, 2))
    session = model.start(Limits(1, size, 11), speculation=None)
    used = [run(session, [requests[i]]).completions[0].cached_tokens for i in (0, 1, 0, 2, 0, 3, 0)]
    session.close()
    require(min(used[2::2]) > 0, f"a prefix in constant use is given up: {used} were found", stage="prefix")
    # The second takes one page of the first, whose beginning is of use without its end
    requests = greedy(case, model, (13, 21, 13), (2, 2, 2))
    session = model.start(Limits(1, size, 8), speculation=None)
    used = [run(session, [requests[i]]).completions[0].cached_tokens for i in (0, 1, 0)]
    session.close()
    require(used[2] > 0, "for one page the beginning of a prefix was given up", stage="prefix")
