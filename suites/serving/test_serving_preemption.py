"""Preemption: a request that loses its pages and is computed anew is answered as if it had kept them."""

from __future__ import annotations

from collections.abc import Sequence

from harness.conformance import Case, Void, conformance, require
from harness.conformance.passes import independent
from harness.conformance.serving import (
    GREEDY,
    Agreement,
    alone,
    arrivals,
    ask_for,
    counted,
    engine,
    exact,
    greedy,
    narrow,
    offered,
    prompts,
    run,
    same_all,
    seeded,
    serve,
    speculations,
)
from harness.conformance.varied import varied
from harness.reference.engine import Completion, Limits, Request

PAGE = 4
ROOMY = Limits(1, PAGE)


def tight(requests: Sequence[Request], slots: int) -> list[int]:
    """Pool sizes in pages: `slots` of the largest at once exactly, one page less, and 100% full by one alone.

    The last token of an answer is never fed back, so it needs no place.
    """
    each = sorted(-(-(len(r.prompt) + r.max_tokens - 1) // PAGE) for r in requests)
    all_at_once = sum(each[-slots:])
    return [all_at_once, all_at_once - 1, each[-1] + each[0], each[-1] + 1, each[-1]]


def squeezed(
    case: Case,
    requests: Sequence[Request],
    wanted: Sequence[Completion],
    *,
    stage: str,
    sharing: bool = False,
    slots: int = 4,
) -> None:
    """Serve them from pools that are too small; each answer is the wanted one. Void if none was preempted."""
    model, agreement, preempted = engine(case), Agreement(exact(engine(case))), 0
    for pages in tight(requests, slots):
        limits = Limits(slots, PAGE, pages, prefix_sharing=sharing)
        found = serve(model, arrivals(model, requests, every=0.5), limits).completions
        same_all(agreement, found, wanted, requests, what=f"in a pool of {pages} pages", stage=stage)
        preempted += counted(found, "preemptions")
    case.note("preemptions", preempted)
    if not preempted:
        raise Void("no request was ever preempted")
    agreement.noted(case)


@conformance(
    "serving.preemption-changes-nothing",
    clause="serving.preemption",
    needs=("serve", "limits"),
    kills=(
        "last-page-is-lent-twice",
        "used-pages-are-not-overwritten",
        "preempted-requests-are-lost",
        "answers-are-not-recomputed",
        "preemption-drops-log-probabilities",
    ),
    applies=independent,
    costly=True,
)
def test_preemption_changes_nothing(case: Case) -> None:
    """Pools of exact fit, of one page less, and 100% full give greedy requests what a roomy one gives."""
    model = engine(case)
    requests = greedy(case, model, (7, 5, 9, 6, 4), (9, 8, 6, 10, 7))
    for sharing in (False, True):
        squeezed(case, requests, alone(model, requests, ROOMY), stage="preempt", sharing=sharing)


@conformance(
    "serving.preemption-keeps-the-seed",
    clause="serving.seeds",
    needs=("serve", "limits"),
    kills=(
        "seeds-start-again-after-preemption",
        "preemption-drops-the-answer",
        "seeds-start-again-after-a-second-preemption",
    ),
    applies=independent,
    costly=True,
)
def test_preemption_keeps_the_seed(case: Case) -> None:
    """A request with a seed goes on drawing where it was, after it lost its pages."""
    model = engine(case)
    # The youngest has most to draw, so that it loses its pages more than once
    requests = seeded(case, model, greedy(case, model, (7, 5, 9, 6, 4), (9, 8, 9, 16, 18)), 1.8)
    squeezed(case, requests, alone(model, requests, ROOMY), stage="seed")


@conformance(
    "serving.preemption-keeps-the-settings",
    clause="serving.settings",
    needs=("serve", "limits"),
    kills=(
        "preemption-drops-the-answer",
        "penalties-forget-what-came-before-preemption",
        "grammars-start-again-after-preemption",
        "least-lengths-start-again-after-preemption",
        "stop-sequences-start-again-after-preemption",
    ),
    applies=independent,
    costly=True,
)
def test_preemption_keeps_the_settings(case: Case) -> None:
    """Penalties, grammars, ends and least lengths count on as before, after a request lost its pages."""
    model = engine(case)
    requests = varied(case, model)  # the youngest lose their pages most often: they have most to remember
    squeezed(case, requests, alone(model, requests, ROOMY), stage="preempt", slots=7)


@conformance(
    "serving.preemption-and-speculation-change-nothing",
    clause="serving.speculation",
    needs=("serve", "limits", "speculate"),
    kills=(
        "answers-are-not-recomputed",
        "preemption-drops-log-probabilities",
        "rollback-gives-back-a-page-too-many",
    ),
    applies=independent,
    costly=True,
)
def test_preemption_and_speculation_change_nothing(case: Case) -> None:
    """Greedy requests that are speculated and preempted give what they give without either."""
    model = engine(case)
    requests = narrow(case, model, greedy(case, model, (7, 5, 9, 6, 4), (9, 8, 6, 10, 7)))
    wanted, agreement = alone(model, requests, ROOMY), Agreement(exact(model))
    for speculation in speculations(case, model):
        preempted = drafted = 0
        for pages in tight(requests, 4)[1:]:
            limits = Limits(4, PAGE, pages)
            found = serve(model, arrivals(model, requests, every=0.5), limits, speculation).completions
            what = f"by {speculation.method} in a pool of {pages} pages"
            same_all(agreement, found, wanted, requests, what=what, stage="preempt")
            preempted += counted(found, "preemptions")
            drafted += counted(found, "drafted")
        if not preempted or not drafted:
            raise Void(f"{speculation.method}: {preempted} preemptions and {drafted} drafted tokens")
    agreement.noted(case)


@conformance(
    "serving.preemption-keeps-the-salt",
    clause="serving.prefix_sharing",
    needs=("serve", "limits"),
    kills=(
        "preemption-drops-the-salt",
        "a-second-preemption-drops-the-salt",
    ),
    applies=independent,
)
def test_preemption_keeps_the_salt(case: Case) -> None:
    """What is computed anew after a preemption is found under the salt of its request alone."""
    model = engine(case)
    ask_for(model, "salt")
    (row,) = prompts(case, (2 * PAGE + 1,))
    # Whoever came last has most to say, and loses its pages more than once
    counts = {"one": 6, "two": 12, "three": 18, "four": 24}
    salted = [offered(model, Request(row, count, GREEDY, salt=salt)) for salt, count in counts.items()]
    plain = [offered(model, Request(row, 1, GREEDY, salt=salt)) for salt in ("", *counts)]
    session = model.start(Limits(4, PAGE, 11), speculation=None)
    lost = [answer.preemptions for answer in run(session, salted).completions]
    case.note("preemptions", lost)
    found = [run(session, [request]).completions[0].cached_tokens for request in plain]
    session.close()
    if not any(lost) or not any(found):
        raise Void(f"{lost} requests were preempted; {found} cached tokens were found")
    require(found[0] == 0, f"without a salt {found[0]} tokens of other salts were found", stage="prefix")
