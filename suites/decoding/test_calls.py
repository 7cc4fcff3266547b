"""What a call leaves behind: nothing. And seeds: what they fix, and what they leave free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from harness.conformance import Case, conformance, require
from harness.conformance.decoding import generated, precise, sampled, settings_of, ways
from harness.conformance.passes import independent
from harness.conformance.serving import (
    GREEDY,
    Agreement,
    ask_for,
    exact,
    greedy,
    honours,
    offered,
    prompts,
    same_all,
    seeded,
)
from harness.implementations.protocols import Unsupported
from harness.reference.engine import Completion, Grammar, Request, Sampling, Speculation

HOT = 5.0
"""A temperature at which 16 tokens are hardly ever drawn twice: logits that spread by 10 then spread by 2,
and 16 tokens of some 3 nats each make e^-48."""
SHORT, FEW = (3, 9, 5), (8, 6, 7)
"""Lengths of prompts and of completions, where the content does not matter."""


def counts(answers: Sequence[Completion]) -> list[tuple[int, int, int]]:
    """Drafted, accepted and rounds of each."""
    return [(answer.drafted, answer.accepted, answer.rounds) for answer in answers]


@conformance(
    "decoding.a-second-call-equals-the-first",
    clause="engine.generate",
    needs=("generate",),
    kills=("biases-stay-for-the-next-call",),
    applies=independent,
)
def test_second_call(case: Case) -> None:
    """The same greedy requests get the same answers again, whatever was asked in between."""
    model = precise(case)
    requests, agreement = greedy(case, model, SHORT, FEW), Agreement(exact(model))
    first = generated(model, requests)
    between = [offered(model, replace(r, sampling=sampling)) for r in requests for sampling in DISTURBING]
    generated(model, between)
    again = generated(model, requests)
    same_all(agreement, again, first, requests, what="asked again", stage="state", but="at first")
    agreement.noted(case)


DISTURBING = (
    Sampling(temperature=2.0, top_k=5, logit_bias=((1, 50.0), (2, 50.0))),
    Sampling(temperature=0.0, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=1.0),
)


@conformance(
    "decoding.speculation-leaves-nothing-behind",
    clause="engine.Speculation",
    needs=("generate", "speculate"),
    kills=("drafts-are-pruned-in-place",),
    applies=independent,
    costly=True,
)
def test_speculation_again(case: Case) -> None:
    """After all other methods, each drafts and accepts as at first, and plain decoding is what it was."""
    model = precise(case)
    requests, agreement = greedy(case, model, SHORT, FEW), Agreement(exact(model))
    plain = generated(model, requests)
    every = ways(case, model)
    first = {name: generated(model, requests, speculation) for name, speculation in every.items()}
    for name, speculation in every.items():
        again = generated(model, requests, speculation)
        same_all(
            agreement, again, first[name], requests, what=f"by {name} again", stage="state", but="at first"
        )
        require(
            counts(again) == counts(first[name]),
            f"by {name}: drafted, accepted, rounds are {counts(again)} and were {counts(first[name])}",
            stage="state",
        )
    after = generated(model, requests)
    same_all(agreement, after, plain, requests, what="without drafts again", stage="state", but="at first")
    agreement.noted(case)


@conformance(
    "decoding.a-bad-request-changes-no-later-call",
    clause="engine.generate",
    needs=("generate",),
    kills=("biases-stay-after-a-bad-request", "errors-look-like-empty-answers"),
    applies=independent,
    costly=True,
)
def test_after_a_fault(case: Case) -> None:
    """After a call with a request that cannot be served, the next call is as before."""
    model = precise(case)
    requests, agreement = greedy(case, model, SHORT, FEW), Agreement(exact(model))
    first = generated(model, requests)
    good = offered(model, replace(requests[0], sampling=Sampling(temperature=0.0, logit_bias=((3, 40.0),))))
    bad = (Request((), 4, GREEDY), Request((model.vocab_size + 7,), 4, GREEDY))
    for one in bad:
        try:
            answers = model.generate([good, one])
        except Exception as error:  # noqa: BLE001  # any refusal will do: what counts is what it leaves
            case.note("refused_by", type(error).__name__)
        else:
            require(
                answers[1].finish_reason == "error" and bool(answers[1].error),
                f"a request with prompt {list(one.prompt)} ended with {answers[1].finish_reason!r}",
                stage="fault",
            )
    again = generated(model, requests)
    same_all(agreement, again, first, requests, what="after a bad request", stage="state", but="before it")
    agreement.noted(case)


def mixed(case: Case, model: Any) -> list[Request]:
    """One prompt under settings that must not meet: greedy ones, and seeded ones."""
    prompt = prompts(case, (6,))[0]
    a, b, c, d = prompt[:4]
    alternating = Grammar((((a, 1), (b, 1)), ((c, 0), (d, 0))))
    made = [
        Request(prompt, 8, GREEDY),
        Request(prompt, 8, Sampling(temperature=0.0, logit_bias=((a, 8.0), (b, 8.5)))),
        Request(prompt, 8, Sampling(temperature=0.0, repetition_penalty=3.0)),
        Request(prompt, 8, Sampling(temperature=0.0, presence_penalty=9.0)),
        Request(prompt, 8, Sampling(temperature=0.0, frequency_penalty=5.0)),
        Request(prompt, 8, Sampling(temperature=0.0, grammar=alternating)),
        Request(prompt, 3, GREEDY),
    ]
    laws = (
        Sampling(temperature=0.3),
        Sampling(temperature=3.0),
        Sampling(temperature=3.0, top_k=2),
        Sampling(temperature=3.0, top_p=0.3),
        Sampling(temperature=3.0, min_p=0.5),
    )
    made += [Request(prompt, 8, replace(law, seed=5)) for law in laws]
    kept = [request for request in made if settings_of(request) <= set(model.settings)]
    if len({request.sampling for request in kept}) < 2:
        raise Unsupported("the engine honours no two settings that could be mixed up")
    return kept


@conformance(
    "decoding.settings-stay-with-their-requests",
    clause="engine.Sampling",
    needs=("generate",),
    kills=(
        "last-tokens-of-windows-are-drawn-without-the-seed",
        "last-requests-settings-for-all",
        "laws-are-remembered-without-settings",
        "one-penalty-is-for-all",
        "end-tokens-of-one-end-all",
        "first-requests-temperature-for-all",
        "filters-are-those-of-the-widest",
    ),
    applies=independent,
    costly=True,
)
def test_isolation(case: Case) -> None:
    """Requests with different settings in one batch give what each gives alone, drafted or not."""
    model = precise(case)
    requests = mixed(case, model)
    ends = generated(model, requests[:1])[0].tokens
    if honours(model, "eos") and len(ends) > 3:
        requests.append(replace(requests[0], eos=(ends[3],)))
    if honours(model, "stop") and len(ends) > 3:
        requests.append(replace(requests[0], stop=(ends[1:3],)))
    agreement = Agreement(exact(model))
    every: dict[str, Speculation | None] = {"without speculation": None}
    if "speculate" in model.capabilities:
        offered_ways = ways(case, model, 2)
        every |= {name: way for name, way in offered_ways.items() if name in ("draft_model", "prompt_lookup")}
    for how, speculation in every.items():
        alone = [generated(model, [request], speculation)[0] for request in requests]
        for turned in (requests, requests[::-1]):
            found = generated(model, turned, speculation)
            wanted = alone if turned is requests else alone[::-1]
            what = f"in a mixed batch, {how},"
            same_all(agreement, found, wanted, turned, what=what, stage="isolation")
    agreement.noted(case)


@conformance(
    "decoding.a-seed-fixes-the-output",
    clause="engine.Sampling.seed",
    needs=("generate",),
    kills=("seeds-are-forgotten", "seeds-depend-on-the-order"),
    applies=independent,
    costly=True,
)
def test_seeds(case: Case) -> None:
    """The same seed gives the same tokens in a second call and at another place of a batch."""
    model = precise(case)
    requests = seeded(case, model, greedy(case, model, SHORT, FEW), 2.0)
    every: dict[str, Speculation | None] = {"without speculation": None}
    if "speculate" in model.capabilities:
        every |= ways(case, model, 2)
    for how, speculation in every.items():
        agreement = Agreement(exact(model))
        first = generated(model, requests, speculation)
        again = generated(model, requests[::-1], speculation)[::-1]
        what = f"{how}, with its seed again,"
        same_all(agreement, again, first, requests, what=what, stage="seed", but="at first")
        one = generated(model, requests[1:2], speculation)
        same_all(agreement, one, first[1:2], requests[1:2], what=what, stage="seed", but="in company")


@conformance(
    "decoding.what-has-no-common-seed-differs",
    clause="engine.Sampling.seed",
    needs=("generate",),
    kills=(
        "unseeded-requests-start-alike",
        "seeds-have-eight-bits",
        "seeds-have-three-digits",
    ),
    applies=independent,
    costly=True,
)
def test_independence(case: Case) -> None:
    """Different seeds, and requests without a seed in one batch or in two calls, give different tokens."""
    model = precise(case)
    ask_for(model, "temperature")
    prompt = prompts(case, (5,))[0]
    hot = Sampling(temperature=HOT)
    same = [Request(prompt, 16, hot) for _ in range(6)]
    calls = {"without seeds": [*generated(model, same), *generated(model, same)]}
    # Of 31 bits, as torch's own generator on the CPU sees 32 of a seed; 1 and 1 more than a multiple of many
    # numbers, that of all to 22 among them, are one seed modulo any of these, and the largest two in float32
    seeds = (0, 1, 2, 1 + (1 << 30), 1 + 10**9, 1 + 232_792_560, (1 << 31) - 2, (1 << 31) - 1)
    if "seed" in model.settings:
        calls["with different seeds"] = [
            *generated(model, [sampled(same[:1], seed=seed)[0] for seed in seeds])
        ]
    if "speculate" in model.capabilities:
        name, speculation = next(iter(ways(case, model, 2).items()))
        calls[f"without seeds, by {name},"] = [
            *generated(model, same, speculation),
            *generated(model, same, speculation),
        ]
    for how, answers in calls.items():
        different = {answer.tokens for answer in answers}
        require(
            len(different) == len(answers),
            f"{how} only {len(different)} of {len(answers)} completions of 16 tokens differ",
            stage="seed",
        )
