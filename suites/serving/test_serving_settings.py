"""Settings: what a request asks for stays with it, whoever comes and goes beside it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from harness.conformance import Case, conformance, require
from harness.conformance.passes import independent
from harness.conformance.property import Void
from harness.conformance.serving import (
    GREEDY,
    Agreement,
    alone,
    arrivals,
    ask_for,
    engine,
    exact,
    honours,
    offered,
    prompts,
    run,
    serve,
    sized,
)
from harness.implementations.protocols import Unsupported
from harness.reference.engine import Completion, Grammar, Limits, Request, Sampling

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
ORDERS = ((0, 1, 2, 3, 4, 5, 6, 7, 8, 9), (6, 3, 9, 7, 0, 5, 8, 2, 4, 1))
ONLY = 1e-6
"""As top_p: less than the probability of the most probable of V tokens, which is at least 1 / V."""


def churn(
    case: Case, model: Any, requests: list[Request], *, stage: str, seed: int | None = None
) -> list[Completion]:
    """Each request alone against all together in few slots, so that others start and end beside it."""
    if seed is not None:
        drawn = (replace(r.sampling, seed=seed + i) for i, r in enumerate(requests))
        requests = [replace(r, sampling=s) for r, s in zip(requests, drawn, strict=True)]
    requests = [offered(model, request) for request in requests]
    if len({(r.sampling, r.eos, r.stop, r.min_tokens, r.logprobs) for r in requests}) == 1:
        raise Unsupported("the engine honours no setting in which the requests differ")
    fixed = [i for i, request in enumerate(requests) if certain(request.sampling)]
    if len(fixed) < 2:
        raise Unsupported("the engine honours no seed, and nothing else that makes an answer certain")
    wanted, agreement = alone(model, requests), Agreement(exact(model))
    limits = (Limits(sequences=3), Limits(sequences=8)) if "limits" in model.capabilities else (None,)
    for size in limits:
        for order in ORDERS[: 2 if size else 1]:
            kept = [place for place in order if place < len(requests)]
            found = serve(model, arrivals(model, requests, order=kept, every=1.0), size).completions
            for i in fixed:
                what = f"request {i} beside others"
                agreement.same(found[i], wanted[i], requests[i], what=what, stage=stage)
    agreement.noted(case)
    return wanted


def certain(law: Sampling) -> bool:
    """Whether an answer under this law is the same each time: by a seed, or as only one token remains."""
    return law.seed is not None or law.temperature == 0 or law.top_k == 1 or law.top_p <= ONLY


@conformance(
    "serving.laws-stay-with-their-requests",
    clause="serving.settings",
    needs=("serve",),
    kills=(
        "last-requests-settings-for-all",
        "first-requests-temperature-for-all",
        "filters-are-those-of-the-widest",
        "least-probabilities-are-dropped-in-mixed-batches",
        "biases-stay-when-rows-move",
        "biases-are-copied-when-rows-move",
    ),
    applies=independent,
    costly=True,
)
def test_laws_stay_with_their_requests(case: Case) -> None:
    """Temperature, top-k, top-p, min-p and biases of a request shape its own tokens, and nobody else's."""
    model = engine(case)
    ask_for(model, "temperature")
    laws = (
        Sampling(temperature=0.0),
        Sampling(temperature=0.5),
        Sampling(temperature=1.9),
        Sampling(temperature=1.0, top_k=2),
        Sampling(temperature=1.5, top_p=0.4),
        Sampling(temperature=1.5, min_p=0.2),
        Sampling(temperature=1.0, logit_bias=((5, 30.0),)),
        Sampling(temperature=1.0, logit_bias=((7, 4.0), (9, 4.0), (11, -30.0))),
        Sampling(temperature=1.9, top_k=1),
        Sampling(temperature=1.9, top_p=ONLY),
    )
    rows = prompts(case, (4, 9, 5, 13, 3, 8, 6, 7, 5, 4))
    ends = (9, 4, 7, 3, 8, 5, 6, 10, 6, 7)
    requests = [Request(row, n, law, logprobs=True) for row, n, law in zip(rows, ends, laws, strict=True)]
    churn(case, model, requests, stage="isolation", seed=17 if honours(model, "seed") else None)


@conformance(
    "serving.penalties-stay-with-their-requests",
    clause="serving.settings",
    needs=("serve",),
    kills=(
        "last-requests-settings-for-all",
        "penalties-are-those-of-the-next-row",
        "one-penalty-turns-all-off",
        "one-penalty-is-for-all",
        "padding-is-penalised",
    ),
    applies=independent,
    costly=True,
)
def test_penalties_stay_with_their_requests(case: Case) -> None:
    """Penalties count a request's own tokens, each as often as it came, and no padding."""
    model = engine(case)
    ask_for(model, "temperature")
    if not any(honours(model, name) for name in PENALTIES):
        raise Unsupported(f"the engine honours none of {', '.join(PENALTIES)}")
    # Token 0, with which batches are often padded, is likely in all of them: counting it would show.
    often = ((0, 6.0), (1, 5.0), (2, 4.0))
    laws = (
        Sampling(temperature=0.0, logit_bias=often),
        Sampling(temperature=0.0, logit_bias=often, frequency_penalty=1.5),
        Sampling(temperature=0.0, logit_bias=often, presence_penalty=2.0),
        Sampling(temperature=0.0, logit_bias=often, repetition_penalty=1.8),
        Sampling(temperature=1.0, logit_bias=often, frequency_penalty=1.0, repetition_penalty=1.3),
        Sampling(temperature=1.0, logit_bias=often),
        Sampling(temperature=1.0, logit_bias=often, presence_penalty=-1.0),
        Sampling(temperature=1.0, logit_bias=often, repetition_penalty=1.4),
    )
    rows = prompts(case, (9, 3, 5, 13, 4, 8, 3, 7))
    rows = [tuple(token for token in row if token > 0) or (3,) for row in rows]
    ends = (5, 10, 9, 8, 10, 3, 8, 9)
    requests = [Request(row, n, law, logprobs=True) for row, n, law in zip(rows, ends, laws, strict=True)]
    wanted = churn(case, model, requests, stage="isolation", seed=23 if honours(model, "seed") else None)
    if exact(model) and len({token for answer in wanted for token in answer.tokens}) < 4:
        raise Void("the penalised requests repeat hardly any token, so that penalties do not show")


@conformance(
    "serving.ends-stay-with-their-requests",
    clause="serving.settings",
    needs=("serve",),
    kills=(
        "end-tokens-of-one-end-all",
        "stop-sequences-of-one-end-all",
        "lengths-are-those-of-the-shortest",
        "least-lengths-are-for-all",
        "log-probabilities-only-if-all-ask",
        "stop-sequences-go-on-from-former-requests",
    ),
    applies=independent,
    costly=True,
)
def test_ends_stay_with_their_requests(case: Case) -> None:
    """End tokens, stop sequences, least and most tokens, and log probabilities are each request's own."""
    model = engine(case)
    if not honours(model, "eos") and not honours(model, "stop"):
        raise Unsupported("the engine honours neither eos nor stop")
    rows = prompts(case, (4, 9, 5, 13, 3, 8))
    plain = [offered(model, Request(row, 9, GREEDY)) for row in rows]
    drafts = [answer.tokens for answer in alone(model, plain)]
    # Each ends where its own answer will be, and nobody else's: the third to last token of it
    third, pair = [tokens[3:4] for tokens in drafts], [(tokens[4:6],) for tokens in drafts]
    # What all others answer, and never the fifth of them: whoever is ended by that was ended by a neighbour.
    others = tuple(sorted({token for tokens in drafts for token in tokens} - set(drafts[4])))
    requests = [
        Request(rows[0], 9, GREEDY, eos=third[0], logprobs=True),
        Request(rows[1], 9, GREEDY, eos=third[1], min_tokens=6),
        Request(rows[2], 9, GREEDY, stop=pair[2], logprobs=True),
        Request(rows[3], 7, GREEDY),
        Request(rows[4], 9, GREEDY, eos=(*others, *third[4])),
        # The second of these is in the answer of another, who did not ask for it.
        Request(rows[5], 9, GREEDY, stop=((*third[5],), drafts[3][2:4]), logprobs=True),
    ]
    wanted = churn(case, model, requests, stage="isolation")
    if honours(model, "stop"):
        # One after another: what one ended with and the next begins with is nobody's stop sequence
        joint = [(one[-1:] + other[:1],) for one, other in itertools.pairwise(drafts)]
        later = [plain[0], *(replace(r, stop=s) for r, s in zip(plain[1:], joint, strict=True))]
        session = model.start(sized(model, Limits(1)), speculation=None)
        found = [run(session, [request]).completions[0].tokens for request in later]
        session.close()
        require(found == drafts, f"after others: {found}, alone {drafts}", stage="isolation")
    ended = [answer.finish_reason for answer in wanted]
    require("stop" in ended, f"no request ends where it was told to: {ended}", stage="isolation")


@conformance(
    "serving.grammars-stay-with-their-requests",
    clause="serving.settings",
    needs=("serve",),
    kills=(
        "last-requests-settings-for-all",
        "equal-grammars-share-a-state",
        "grammars-advance-with-the-engine",
    ),
    applies=independent,
    costly=True,
)
def test_grammars_stay_with_their_requests(case: Case) -> None:
    """Each request follows its own grammar from its own start, beside others with and without one."""
    model = engine(case)
    ask_for(model, "grammar", "temperature", "seed")
    tokens = sorted({token for row in prompts(case, (24,)) for token in row})[:12]

    def ring(chosen: list[int]) -> Grammar:
        """Any of two tokens in each state, and on to the next."""
        states = len(chosen) // 2
        return Grammar(
            tuple(
                tuple((token, (i + 1) % states) for token in chosen[2 * i : 2 * i + 2]) for i in range(states)
            )
        )

    grammars = (ring(tokens[:6]), None, ring(tokens[6:12]), ring(tokens[2:10]), ring(tokens[:6]), None)
    rows = prompts(case, (4, 9, 5, 13, 3, 8))
    requests = [
        Request(row, n, Sampling(grammar=grammar, temperature=2.0), logprobs=True)
        for row, n, grammar in zip(rows, (9, 4, 8, 6, 10, 7), grammars, strict=True)
    ]
    for answer, grammar in zip(
        churn(case, model, requests, stage="isolation", seed=29), grammars, strict=True
    ):
        state = 0
        for i, token in enumerate(answer.tokens if grammar else ()):
            assert grammar is not None
            after = dict(grammar.states[state])
            require(
                token in after, f"token {i} is {token}, which its grammar does not allow", stage="isolation"
            )
            state = after[token]


@conformance(
    "serving.duplicates-without-a-seed-are-independent",
    clause="serving.seeds",
    needs=("serve",),
    kills=(
        "unseeded-requests-start-alike",
        "duplicates-are-merged",
    ),
    applies=independent,
    costly=True,
)
def test_duplicates_without_a_seed_are_independent(case: Case) -> None:
    """One request asked several times at once without a seed is answered by other draws each time."""
    model = engine(case)
    ask_for(model, "temperature")
    (row,) = prompts(case, (5,))
    request = offered(model, Request(row, 12, Sampling(temperature=1.8), logprobs=True))
    session = model.start(None, speculation=None)
    rounds = [run(session, arrivals(model, [request] * 4)).completions for _ in range(2)]
    session.close()
    distinct = [len({answer.tokens for answer in served}) for served in rounds]
    case.note("distinct_of_4", distinct)
    logprobs = [sum(answer.logprobs) for served in rounds for answer in served if answer.logprobs]
    # Each pair of 6 is equal by chance with a probability of about e^-12 at most.
    improbable = max(logprobs) < -12 if logprobs else rounds[0][0].tokens != rounds[1][0].tokens
    if min(distinct) < 4 and not improbable:
        raise Void("equal answers need no common cause: nothing shows that they are improbable")
    # Without log probabilities only answers that are all equal, and others the next time, are no chance.
    least = 4 if logprobs else 2
    require(min(distinct) >= least, f"of 4 answers without a seed only {min(distinct)} differ", stage="seed")


@conformance(
    "serving.seeds-decide",
    clause="serving.seeds",
    needs=("serve",),
    kills=(
        "equal-seeds-share-a-generator",
        "seeds-are-forgotten",
        "seeds-depend-on-the-order",
        "seed-0-is-no-seed",
    ),
    applies=independent,
    costly=True,
)
def test_seeds_decide(case: Case) -> None:
    """Duplicates with one seed are equal, with two seeds different, at once and one after another."""
    model = engine(case)
    ask_for(model, "seed", "temperature")
    (row,) = prompts(case, (5,))
    laws = [Sampling(temperature=1.8, seed=seed) for seed in (7, 8, 7, 8, 7, 0, 0)]
    requests = [offered(model, Request(row, 12, law, logprobs=True)) for law in laws]
    agreement = Agreement(exact(model))
    for every in (0.0, 3.0):
        found = serve(model, arrivals(model, requests, every=every)).completions
        for i in (2, 4):
            agreement.same(found[i], found[0], requests[i], what="the same seed", stage="seed", but="before")
        for i, before in ((3, 1), (6, 5)):
            what = f"seed {laws[i].seed}"
            agreement.same(found[i], found[before], requests[i], what=what, stage="seed", but="before")
        require(found[0].tokens != found[1].tokens, "two seeds give the same tokens", stage="seed")
    agreement.noted(case)
