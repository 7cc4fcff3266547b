"""Speculation in an engine: sequences that accept unevenly share passes, pages and slots, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from harness.conformance import Case, Void, conformance, require
from harness.conformance.passes import independent
from harness.conformance.serving import (
    Agreement,
    alone,
    arrivals,
    ask_for,
    batchings,
    counted,
    engine,
    exact,
    greedy,
    honours,
    narrow,
    run,
    same_all,
    serve,
    sized,
    speculations,
)
from harness.conformance.varied import varied
from harness.reference.engine import Arrival, Batching, Limits, Request


def others(model: Any) -> tuple[Batching, ...]:
    """The ways of batching that the engine has beside the continuous one."""
    return batchings(model)[1:] if "limits" in model.capabilities else ()


@conformance(
    "serving.speculation-changes-nothing",
    clause="serving.speculation",
    needs=("serve", "speculate"),
    kills=(
        "windows-move-on-with-rejected-drafts",
        "used-pages-are-not-overwritten",
        "rows-are-taken-to-be-equally-long",
        "a-rejection-empties-the-cache",
        "rollback-gives-back-a-page-too-many",
        "rows-are-rolled-back-alike",
    ),
    applies=independent,
    costly=True,
)
def test_speculation_changes_nothing(case: Case) -> None:
    """A batch of greedy answers with uneven acceptance has the tokens and log probabilities of no drafts."""
    model = engine(case)
    requests = narrow(case, model, greedy(case, model, (3, 9, 6, 4, 12), (14, 9, 13, 15, 10)))
    wanted, agreement = alone(model, requests), Agreement(exact(model))
    sizes = (
        Limits(5, page_size=1),
        Limits(3, page_size=3),
        *(Limits(3, page_size=3, batching=name) for name in others(model)),
    )
    for speculation in speculations(case, model):
        rates: set[tuple[int, int]] = set()
        for limits in sizes if "limits" in model.capabilities else (None,):
            found = serve(model, arrivals(model, requests, every=1.0), limits, speculation).completions
            what = f"speculated by {speculation.method} in a batch"
            same_all(agreement, found, wanted, requests, what=what, stage="rollback", but="without")
            rates |= {(answer.drafted, answer.accepted) for answer in found}
        drafted, accepted = (sum(part) for part in zip(*rates, strict=True))
        case.note(f"acceptance_{speculation.method}", round(accepted / max(drafted, 1), 3))
        if not 0 < accepted < drafted or len(rates) == 1:
            raise Void(
                f"{speculation.method}: {accepted} of {drafted} drafted tokens stood, alike in all requests"
            )
    agreement.noted(case)


@conformance(
    "serving.speculation-in-a-tight-budget-changes-nothing",
    clause="serving.chunked_prefill",
    needs=("serve", "limits", "speculate"),
    kills=(
        "a-rejection-empties-the-cache",
        "placeholders-are-fed-after-a-gap",
        "faults-of-drafts-are-fatal",
        "who-leaves-has-accepted-the-whole-window",
    ),
    applies=independent,
    costly=True,
)
def test_speculation_in_a_tight_budget_changes_nothing(case: Case) -> None:
    """Drafts that an iteration has no room for, chunks of prompts, and clients that leave, do no harm."""
    model = engine(case)
    requests = narrow(case, model, greedy(case, model, (3, 19, 6, 14, 9), (9, 6, 8, 9, 7)))
    wanted, agreement = alone(model, requests), Agreement(exact(model))
    for speculation in speculations(case, model):
        drafted = 0
        for chunk in (4, 6):
            limits = Limits(4, page_size=4, chunk=chunk)
            gone = [Arrival(requests[0], 2.0, cancel_after=3), Arrival(requests[1], 3.0, cancel_after=0)]
            gone += [Arrival(requests[3], 4.0, cancel_after=n) for n in (2, 3)]
            given = [*arrivals(model, requests, every=2.0), *gone]
            every = serve(model, given, limits, speculation).completions
            found = every[: len(requests)]
            for answer in every[len(requests) :]:
                require(
                    answer.accepted <= len(answer.tokens),
                    f"{speculation.method}: of a client that left, {answer.accepted} drafts are accepted, "
                    f"and {len(answer.tokens)} tokens kept",
                    stage="counters",
                )
            what = f"speculated by {speculation.method} with {chunk} tokens per iteration"
            same_all(agreement, found, wanted, requests, what=what, stage="rollback", but="without")
            drafted += counted(found, "drafted")
        if not drafted:
            raise Void(f"{speculation.method}: nothing was drafted")
    agreement.noted(case)


def speculated_alike(case: Case, requests: Sequence[Request], *, stage: str) -> None:
    """Speculated in company, in chunks and in full pools, a request gives what it gives speculated alone.

    Void if nothing was drafted. A pass always has room for a whole window.
    """
    model = engine(case)
    agreement = Agreement(exact(model))
    largest = max(-(-(len(r.prompt) + r.max_tokens - 1) // 3) for r in requests)
    plain = [i for i, r in enumerate(requests) if r.sampling.temperature == 0]
    asked = [requests[i] for i in plain]
    once = alone(model, asked, Limits(1))
    for speculation in speculations(case, model):
        wanted = alone(model, requests, Limits(1), speculation)
        what = f"speculated by {speculation.method}"
        same_all(agreement, [wanted[i] for i in plain], once, asked, what=what, stage=stage, but="without")
        preempted = drafted = 0
        for limits in (Limits(5, 3, 2 * largest), Limits(3, 3, largest + 1, 5)):
            found = serve(model, arrivals(model, requests, every=0.5), limits, speculation).completions
            where = f"{what} in an engine of {limits}"
            same_all(agreement, found, wanted, requests, what=where, stage=stage, but="speculated alone")
            preempted += counted(found, "preemptions")
            drafted += counted(found, "drafted")
        case.note(f"preemptions_{speculation.method}", preempted)
        if not drafted:
            raise Void(f"{speculation.method}: nothing was drafted")
    agreement.noted(case)


@conformance(
    "serving.seeds-hold-under-speculation",
    clause="serving.seeds",
    needs=("serve", "limits", "speculate"),
    kills=(
        "drafts-are-drawn-without-the-seed",
        "a-batch-is-verified-by-its-first-seed",
        "windows-are-cut-to-the-budget",
        "windows-shrink-after-preemption",
    ),
    applies=independent,
    costly=True,
)
def test_seeds_hold_under_speculation(case: Case) -> None:
    """A seed decides what is drafted, accepted and drawn, in any company, in chunks and after preemption."""
    model = engine(case)
    ask_for(model, "seed", "temperature")
    requests = narrow(case, model, greedy(case, model, (7, 5, 9, 6, 4), (9, 8, 6, 10, 7)))
    laws = [replace(r.sampling, temperature=1.3, seed=101 + i) for i, r in enumerate(requests)]
    requests = [replace(r, sampling=law) for r, law in zip(requests, laws, strict=True)]
    speculated_alike(case, requests, stage="seed")


@conformance(
    "serving.speculation-keeps-the-settings",
    clause="serving.settings",
    needs=("serve", "limits", "speculate"),
    kills=(
        "penalties-lag-behind-in-windows",
        "grammars-stand-still-in-windows",
        "ends-inside-of-windows-are-missed",
    ),
    applies=independent,
    costly=True,
)
def test_speculation_keeps_the_settings(case: Case) -> None:
    """In windows, too, penalties, grammars, ends and least lengths follow each request's own tokens."""
    model = engine(case)
    ask_for(model, "seed", "temperature")
    requests = varied(case, model)
    if honours(model, "stop"):
        # Answers that repeat themselves are guessed far ahead: their ends lie at any place of a window
        (looped,) = narrow(case, model, greedy(case, model, (6,), (9,)))
        (answer,) = alone(model, [looped])
        requests += [replace(looped, stop=(answer.tokens[:n],)) for n in (3, 6)]
    speculated_alike(case, requests, stage="isolation")


@conformance(
    "serving.drafts-forget-former-requests",
    clause="serving.speculation",
    needs=("serve", "speculate"),
    kills=("lookups-remember-former-requests",),
    level="SHOULD",
    applies=independent,
    costly=True,
)
def test_drafts_forget_former_requests(case: Case) -> None:
    """What is drafted and accepted for a request does not depend on the requests that had its slot before."""
    model = engine(case)
    requests = narrow(case, model, greedy(case, model, (6, 9, 4, 12), (9, 12, 8, 11)))
    for speculation in speculations(case, model):
        fresh = alone(model, requests, sized(model, Limits(1)), speculation)
        session = model.start(sized(model, Limits(1)), speculation=speculation)
        later = [run(session, [request]).completions[0] for request in requests]
        session.close()
        if not counted(fresh, "drafted"):
            raise Void(f"{speculation.method}: nothing was drafted")
        for i, (one, other) in enumerate(zip(later, fresh, strict=True)):
            have, want = (one.drafted, one.accepted), (other.drafted, other.accepted)
            require(
                have == want,
                f"{speculation.method}: request {i}: (drafted, accepted) {have} after others, alone {want}",
                stage="acceptance",
            )


@conformance(
    "serving.acceptance-does-not-depend-on-company",
    clause="serving.speculation",
    needs=("serve", "limits", "speculate"),
    kills=(
        "drafts-shrink-in-company",
        "drafts-are-counted-anew-after-preemption",
        "recomputed-chunks-count-as-rounds",
    ),
    level="SHOULD",
    applies=independent,
    costly=True,
)
def test_acceptance_does_not_depend_on_company(case: Case) -> None:
    """With room for all drafts, as many are made and accepted in company, or after preemption, as alone."""
    model = engine(case)
    requests = narrow(case, model, greedy(case, model, (6, 9, 4, 12), (9, 12, 8, 11)))
    largest = max(-(-(len(r.prompt) + r.max_tokens - 1) // 4) for r in requests)
    for speculation in speculations(case, model):
        wanted = alone(model, requests, Limits(1), speculation)
        if not counted(wanted, "drafted"):
            raise Void(f"{speculation.method}: nothing was drafted")
        tight = Limits(2, 4, largest + 1, 2 * (1 + speculation.length), prefix_sharing=False)
        for limits in (Limits(4), tight):
            found = serve(model, arrivals(model, requests, every=1.0), limits, speculation).completions
            for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
                have = (one.drafted, one.accepted, one.rounds)
                want = (other.drafted, other.accepted, other.rounds)
                require(
                    have == want,
                    f"{speculation.method}: request {i}: drafted, accepted, rounds {have}, alone {want}",
                    stage="acceptance",
                )
