"""Log probabilities: those of the model's own law, however the token came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from harness.conformance import Case, conformance, require
from harness.conformance.decoding import generated, precise, ways
from harness.conformance.passes import independent
from harness.conformance.property import Void
from harness.conformance.serving import (
    GREEDY,
    ROUNDING,
    Agreement,
    ask_for,
    exact,
    greedy,
    offered,
    same_all,
    seeded,
)
from harness.reference.engine import Completion, Grammar, Request


def forced(
    case: Case, model: Any, requests: Sequence[Request], answers: Sequence[Completion], how: str
) -> None:
    """Each log probability must be that which one pass over the whole text gives."""
    worst = 0.0
    for request, answer in zip(requests, answers, strict=True):
        count = len(answer.tokens)
        given = answer.logprobs or ()
        require(
            len(given) == count,
            f"{how}: {count} tokens have {len(given)} log probabilities",
            stage="logprobs",
        )
        if not count:
            continue
        text = torch.tensor([[*request.prompt, *answer.tokens]])
        with torch.no_grad():
            law = model.forward(text[:, :-1])[0, len(request.prompt) - 1 :].double().log_softmax(-1)
        want = law.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
        away = (torch.tensor(given, dtype=torch.float64) - want).abs()
        worst = max(worst, float(away.max()))
        at = int(away.argmax())
        require(
            float(away.max()) <= ROUNDING[exact(model)],
            f"{how}: log probability {given[at]:.6g} of token {at} is {float(want[at]):.6g} in one pass",
            stage="logprobs",
        )
    case.note("worst_logprob_difference", worst)
    if not any(answer.tokens for answer in answers):
        raise Void("no token came")


@conformance(
    "decoding.log-probabilities-are-those-of-one-pass",
    clause="engine.Completion.logprobs",
    needs=("generate", "forward"),
    kills=(
        "log-probabilities-follow-the-temperature",
        "log-probabilities-follow-the-penalty",
        "log-probabilities-follow-the-grammar",
        "log-probabilities-are-told-of-the-end",
    ),
    applies=independent,
    costly=True,
)
def test_one_pass(case: Case) -> None:
    """Log probabilities of tokens, greedy and sampled, are those of one pass over prompt and completion."""
    model = precise(case)
    ask_for(model, "logprobs", "temperature")
    requests = greedy(case, model, LENGTHS, ENDS)
    forced(case, model, requests, generated(model, requests), "greedy")
    if "seed" in model.settings:
        drawn = seeded(case, model, requests, 0.7)
        forced(case, model, drawn, generated(model, drawn), "sampled")
    even = Grammar((tuple((token, 0) for token in range(0, case.vocab_size, 2)),))
    settings = {
        "a penalty and a bias": replace(GREEDY, repetition_penalty=1.5, logit_bias=((1, 2.0),), top_k=7),
        "a grammar": replace(GREEDY, grammar=even),
    }
    for what, sampling in settings.items():
        bent = [offered(model, replace(request, sampling=sampling)) for request in requests]
        forced(case, model, bent, generated(model, bent), f"greedy, with {what}")
    cut = [offered(model, one) for one in ended(requests, generated(model, requests))]
    forced(case, model, cut, generated(model, cut), "ended within")


OFTEN = ("draft_model", "prompt_lookup")
LENGTHS, ENDS = (3, 8, 9, 60), (9, 5, 12, 7)


def ended(requests: Sequence[Request], answers: Sequence[Completion]) -> list[Request]:
    """The greedy requests, by turns with an end token and with a stop sequence from their middle."""
    made = []
    for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        middle = len(answer.tokens) // 2
        tokens = answer.tokens[middle : middle + 2]
        made.append(replace(request, stop=(tokens,)) if i % 2 else replace(request, eos=tokens[:1]))
    return made


@conformance(
    "decoding.log-probabilities-of-drafts-are-the-targets",
    clause="engine.Completion.logprobs",
    needs=("generate", "forward", "speculate"),
    kills=(
        "drafts-have-log-probability-0",
        "log-probabilities-are-shifted",
        "log-probabilities-come-from-the-draft",
        "log-probabilities-of-windows-follow-the-grammar",
    ),
    applies=independent,
    costly=True,
)
def test_drafted(case: Case) -> None:
    """Under speculation log probabilities are the target's own, of tokens that were drafted too."""
    model = precise(case)
    ask_for(model, "logprobs", "temperature")
    requests = greedy(case, model, LENGTHS, ENDS)
    even = Grammar((tuple((token, 0) for token in range(0, case.vocab_size, 2)),))
    laws = (replace(GREEDY, grammar=even), replace(GREEDY, repetition_penalty=1.5, logit_bias=((1, 2.0),)))
    bent = [offered(model, replace(one, sampling=law)) for one, law in zip(requests, laws * 2, strict=True)]
    for name, speculation in ways(case, model, 2).items():
        forced(case, model, requests, generated(model, requests, speculation), f"greedy, by {name}")
        if name in OFTEN:
            what = f"greedy, with settings, by {name}"
            forced(case, model, bent, generated(model, bent, speculation), what)
        if "seed" in model.settings:
            drawn = seeded(case, model, requests, 0.7)
            forced(case, model, drawn, generated(model, drawn, speculation), f"sampled, by {name}")


@conformance(
    "decoding.log-probabilities-do-not-depend-on-speculation",
    clause="engine.Completion.logprobs",
    needs=("generate", "speculate"),
    kills=("drafts-have-log-probability-0", "log-probabilities-are-shifted"),
    applies=independent,
    costly=True,
)
def test_on_and_off(case: Case) -> None:
    """The same greedy tokens have the same log probabilities with speculation and without."""
    model = precise(case)
    ask_for(model, "logprobs", "temperature")
    requests, agreement = greedy(case, model), Agreement(exact(model))
    requests = [replace(request, logprobs=True) for request in requests]
    plain = generated(model, requests)
    for name, speculation in ways(case, model).items():
        if "forward" in model.capabilities and name not in OFTEN:
            continue  # held to one pass by the property above
        found = generated(model, requests, speculation)
        same_all(agreement, found, plain, requests, what=f"by {name}", stage="logprobs", but="without")
    agreement.noted(case)
