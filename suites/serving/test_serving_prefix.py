"""Shared prefixes: what was cached for one request is worth what another would compute, or is not used.

A page holds `PAGE` tokens; a full page is shared, and the prompt's last token is always computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from harness.conformance import Case, Void, conformance, require
from harness.conformance.passes import independent
from harness.conformance.prefixes import APART, PAGE, SHARING, hits, one_by_one
from harness.conformance.serving import (
    GREEDY,
    Agreement,
    alone,
    arrivals,
    counted,
    engine,
    exact,
    greedy,
    narrow,
    offered,
    prompts,
    run,
    same_all,
    seeded_too,
    sized,
    speculations,
)
from harness.conformance.varied import varied
from harness.reference.engine import Arrival, Completion, Limits, Request


@conformance(
    "serving.a-hit-equals-a-miss",
    clause="serving.prefix_sharing",
    needs=("serve", "limits"),
    kills=(
        "half-a-page-is-a-hit",
        "whole-prompt-is-a-hit",
        "positions-after-a-hit-start-at-0",
        "positions-after-a-hit-are-one-less",
        "pages-behind-the-window-are-dropped-though-shared",
        "shared-pages-are-freed-outright",
        "page-tables-are-shared",
    ),
    applies=independent,
    costly=True,
)
def test_a_hit_equals_a_miss(case: Case) -> None:
    """A cached prefix that ends at a page's end, beside it, or with the prompt, changes no answer."""
    model = engine(case)
    first, tail = prompts(case, (17, 6))
    rows = [
        first[:n] + tail[:k] for n, k in ((3, 5), (4, 1), (4, 4), (5, 3), (8, 1), (9, 2), (12, 6), (17, 3))
    ]
    rows += [first[:n] for n in (4, 5, 8, 9, 16, 17)]
    requests = [offered(model, Request(row, 4, GREEDY, logprobs=True)) for row in (first, *rows)]
    requests += seeded_too(case, model, requests[2:6])
    wanted, agreement = alone(model, requests, APART), Agreement(exact(model))
    session = model.start(SHARING, speculation=None)
    found: Sequence[Completion] = one_by_one(session, requests)
    session.close()
    hits(case, found)
    same_all(agreement, found, wanted, requests, what="with a cached prefix", stage="prefix", but="without")
    for answer, request in zip(found, requests, strict=True):
        have, size = answer.cached_tokens, len(request.prompt)
        require(
            have < size,
            f"{have} of {size} tokens of a prompt were cached; the last is computed",
            stage="prefix",
        )
    session = model.start(SHARING, speculation=None)
    run(session, [requests[0]])
    found = run(session, arrivals(model, requests, every=1.0)).completions
    session.close()
    same_all(
        agreement, found, wanted, requests, what="with others on its prefix", stage="prefix", but="without"
    )
    agreement.noted(case)


@conformance(
    "serving.hits-and-chunks-keep-the-settings",
    clause="serving.settings",
    needs=("serve", "limits"),
    kills=(
        "cached-tokens-are-not-penalised",
        "only-last-chunks-are-penalised",
    ),
    applies=independent,
    costly=True,
)
def test_hits_and_chunks_keep_the_settings(case: Case) -> None:
    """Penalties, biases, grammars and ends count all of a prompt that came in chunks or from the cache."""
    model = engine(case)
    requests = varied(case, model, (7, 5, 9, 12, 8, 10, 6))
    wanted, agreement = alone(model, requests, APART), Agreement(exact(model))
    for limits in (SHARING, Limits(2, PAGE, chunk=3)):
        session = model.start(limits, speculation=None)
        first = run(session, arrivals(model, requests)).completions
        again = one_by_one(session, requests)
        session.close()
        hits(case, again)
        what = f"in chunks of {limits.chunk}"
        same_all(agreement, first, wanted, requests, what=what, stage="isolation")
        same_all(agreement, again, wanted, requests, what=f"asked again, {what}", stage="isolation")
    agreement.noted(case)


@conformance(
    "serving.asked-again-answers-the-same",
    clause="serving.prefix_sharing",
    needs=("serve",),
    kills=(
        "whole-prompt-is-a-hit",
        "positions-after-a-hit-start-at-0",
    ),
    applies=independent,
    costly=True,
)
def test_asked_again_answers_the_same(case: Case) -> None:
    """A request asked four times in a row, then four times at once, is answered the same each time."""
    model, agreement = engine(case), None
    requests = greedy(case, model, (8, 13, 21), (6, 6, 6))
    wanted, agreement = alone(model, requests), Agreement(exact(model))
    session = model.start(sized(model, SHARING), speculation=None)
    for request, answer in zip(requests, wanted, strict=True):
        again = [request] * 4
        same_all(
            agreement, one_by_one(session, again), [answer] * 4, again, what="asked again", stage="prefix"
        )
        found = run(session, arrivals(model, again)).completions
        same_all(agreement, found, [answer] * 4, again, what="asked at once", stage="prefix")
    session.close()
    agreement.noted(case)


@conformance(
    "serving.likeness-is-no-hit",
    clause="serving.prefix_sharing",
    needs=("serve", "limits"),
    kills=(
        "prefixes-are-told-apart-by-4-bits",
        "prefixes-are-told-apart-by-8-bits",
        "pages-are-found-without-what-precedes",
        "prefixes-are-told-apart-by-their-sum",
        "prefixes-are-told-apart-by-their-ends",
        "prefixes-are-told-apart-by-their-last-pages",
    ),
    applies=independent,
    costly=True,
)
def test_likeness_is_no_hit(case: Case) -> None:
    """Prompts alike by sum, order, beginning, end or a weak hash are told apart by their tokens."""
    model = engine(case)
    base, other = prompts(case, (2 * PAGE + 1, 2 * PAGE + 1))
    head, page, last = base[:PAGE], base[PAGE : 2 * PAGE], base[-1:]
    top = case.vocab_size - 1
    down, up = max(range(PAGE), key=lambda i: page[i]), min(range(PAGE), key=lambda i: page[i])
    moved = [t - (i == down and t > 0) + (i == up and t < top) for i, t in enumerate(page)]
    rows = [
        base,
        head[::-1] + page + last,  # the second page alike, after another first
        head + page[::-1] + last,
        page + head + last,
        other[:PAGE] + page + last,
        head + tuple(moved) + last,  # the same sum
        head[1:] + head[:1] + page + last,
        (*head[:-1], (head[-1] + 1) % (top + 1), *page, *last),
        ((head[0] + 1) % (top + 1), *head[1:], *page, *last),
        head + page + other[:1],
    ]
    # Pages whose keys are told apart by something far before them alone
    whole = tuple(itertools.chain.from_iterable(prompts(case, (5 * PAGE + 1,))))
    first, second = whole[:PAGE], whole[PAGE : 2 * PAGE]
    rows += [whole, ((whole[0] + 1) % (top + 1), *whole[1:]), second + first + whole[2 * PAGE :]]
    # 8 bits of hash have a collision among some 20 pages, 4 bits among 5.
    rows += prompts(case, (2 * PAGE + 1,) * 12)
    requests = [offered(model, Request(row, 2, GREEDY, logprobs=True)) for row in dict.fromkeys(rows)]
    wanted, agreement = alone(model, requests, APART), Agreement(exact(model))
    session = model.start(SHARING, speculation=None)
    found = one_by_one(session, [*requests, *requests])
    session.close()
    hits(case, found)
    same_all(agreement, found, [*wanted] * 2, [*requests] * 2, what="after others like it", stage="prefix")
    agreement.noted(case)


@conformance(
    "serving.eviction-changes-nothing",
    clause="serving.pages",
    needs=("serve", "limits"),
    kills=(
        "prefixes-are-told-apart-by-4-bits",
        "pages-in-use-are-evicted",
        "evicted-prefixes-are-still-found",
        "second-holder-is-not-counted",
        "shared-pages-are-freed-outright",
        "last-page-is-lent-twice",
    ),
    applies=independent,
    costly=True,
)
def test_eviction_changes_nothing(case: Case) -> None:
    """Prefixes that are evicted from a small pool while others use theirs, and come again, harm nobody."""
    model = engine(case)
    stems = prompts(case, (8, 8, 12))
    tails = prompts(case, (1, 3, 5, 2, 6, 4))
    rows = [stems[i % 3] + tails[(i + i // 3) % 6] for i in range(9)]
    requests = [offered(model, Request(row, 3 + i % 5, GREEDY, logprobs=True)) for i, row in enumerate(rows)]
    requests += seeded_too(case, model, requests[:3])
    wanted, agreement = alone(model, requests, APART), Agreement(exact(model))
    largest = max(-(-(len(r.prompt) + r.max_tokens) // PAGE) for r in requests)
    answers: list[Completion] = []
    for pages in (largest, largest + 1, 2 * largest - 1):
        session = model.start(Limits(3, PAGE, pages, chunk=16), speculation=None)
        for order in (range(12), (7, 2, 11, 5, 0, 9, 3, 10, 1, 8, 4, 6)):
            kept = [place for place in order if place < len(requests)]
            found = run(session, arrivals(model, requests, order=kept, every=1.0)).completions
            what = f"in a pool of {pages} pages that many share"
            same_all(agreement, found, wanted, requests, what=what, stage="pages")
            answers += found
        session.close()
    hits(case, answers)
    agreement.noted(case)


@conformance(
    "serving.only-complete-prefixes-are-shared",
    clause="serving.prefix_sharing",
    needs=("serve", "limits"),
    kills=(
        "prompts-are-shared-before-they-are-computed",
        "what-was-given-up-is-shared",
        "page-tables-are-shared",
    ),
    applies=independent,
    costly=True,
)
def test_only_complete_prefixes_are_shared(case: Case) -> None:
    """A request whose prefix is still being computed, or was given up half-way, is answered as if alone."""
    model = engine(case)
    row, tail = prompts(case, (23, 4))
    requests = [
        offered(model, Request(prompt, 4, GREEDY, logprobs=True))
        for prompt in (row, row, row[:16] + tail, row[:13], row[:20] + tail, row)
    ]
    wanted, agreement = alone(model, requests, APART), Agreement(exact(model))
    for chunk in (5, 7, 9):
        session = model.start(Limits(4, PAGE, chunk=chunk), speculation=None)
        gone = Arrival(requests[0], cancel_at=2.0)
        found = run(session, [gone, *arrivals(model, requests, every=1.0)]).completions[1:]
        what = f"while its prefix is computed in chunks of {chunk}"
        same_all(agreement, found, wanted, requests, what=what, stage="prefix")
        found = one_by_one(session, requests)
        session.close()
        same_all(agreement, found, wanted, requests, what=f"{what}, and later", stage="prefix")
        hits(case, found)
    agreement.noted(case)


@conformance(
    "serving.a-dialogue-goes-on-from-its-cache",
    clause="serving.prefix_sharing",
    needs=("serve", "limits"),
    kills=(
        "positions-after-a-hit-start-at-0",
        "positions-after-a-hit-are-one-less",
        "pages-behind-the-window-are-dropped-though-shared",
        "last-tokens-are-shared-before-they-are-fed",
    ),
    applies=independent,
    costly=True,
)
def test_a_dialogue_goes_on_from_its_cache(case: Case) -> None:
    """A prompt that continues an earlier prompt and its answer gives what it gives without a cache."""
    model = engine(case)
    openings, more = greedy(case, model, (7, 9, 12), (9, 6, 9)), prompts(case, (1, 2, 5))
    first = alone(model, openings, APART)
    turns = [r.prompt + answer.tokens for r, answer in zip(openings, first, strict=True)]
    rows = [turn[:-1] for turn in turns] + turns + [turn + tail for turn in turns for tail in more[1:]]
    requests = [offered(model, Request(row, 4, GREEDY, logprobs=True)) for row in rows]
    wanted, agreement = alone(model, requests, APART), Agreement(exact(model))
    session = model.start(SHARING, speculation=None)
    run(session, openings)
    found = one_by_one(session, requests)
    session.close()
    hits(case, found)
    same_all(
        agreement, found, wanted, requests, what="as a second turn", stage="prefix", but="without a first"
    )
    agreement.noted(case)


@conformance(
    "serving.drafts-are-never-shared",
    clause="serving.speculation",
    needs=("serve", "limits", "speculate"),
    kills=(
        "rejected-drafts-are-shared",
        "positions-after-a-hit-start-at-0",
    ),
    applies=independent,
    costly=True,
)
def test_drafts_are_never_shared(case: Case) -> None:
    """What was cached of rejected drafts never reaches a prompt that goes on from an answer."""
    model = engine(case)
    openings, more = narrow(case, model, greedy(case, model, (6, 9, 12), (9, 12, 9))), prompts(case, (3,))
    first = alone(model, openings, APART)
    turns = [r.prompt + answer.tokens for r, answer in zip(openings, first, strict=True)]
    rows = [turn[:end] + more[0] for turn in turns for end in range(len(turn) - 6, len(turn) + 1, 2)] + turns
    requests = [offered(model, Request(row, 3, GREEDY, logprobs=True)) for row in rows]
    wanted, agreement = alone(model, requests, APART), Agreement(exact(model))
    for speculation in speculations(case, model):
        session = model.start(SHARING, speculation=speculation)
        answers = run(session, openings).completions
        if counted(answers, "drafted") == counted(answers, "accepted"):
            raise Void(f"{speculation.method}: nothing was drafted, or nothing of it rejected")
        found = one_by_one(session, requests)
        session.close()
        hits(case, found)
        what = f"after an answer speculated by {speculation.method}"
        same_all(agreement, found, wanted, requests, what=what, stage="prefix", but="without")
    agreement.noted(case)
