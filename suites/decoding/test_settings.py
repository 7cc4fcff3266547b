"""Settings at their limits, and settings that are accepted: each has the effect that it is said to have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from harness.conformance import Case, conformance, require
from harness.conformance.decoding import (
    Trial,
    generated,
    lossless,
    methods,
    offered_only,
    precise,
    remembering,
    trial,
)
from harness.conformance.serving import GREEDY, ask_for, honours, prompts
from harness.evidence.law import Law
from harness.reference.engine import Completion, Grammar, Request, Sampling, Speculation

LIMITS = {
    "temperature 1e-5": Sampling(temperature=1e-5),
    "temperature 1e-3": Sampling(temperature=1e-3),
    "temperature 50": Sampling(temperature=50.0),
    "temperature 0": Sampling(temperature=0.0, top_k=3, top_p=0.9),
    "top_k -1": Sampling(top_k=-1),
    "top_k 1": Sampling(top_k=1),
    "top_k 2": Sampling(top_k=2),
    "top_k of all": Sampling(top_k=4),
    "top_k of more than all": Sampling(top_k=9),
    "top_p 1": Sampling(top_p=1.0),
    "top_p 1e-9": Sampling(top_p=1e-9),
    "top_p 0": Sampling(top_p=0.0),
    "top_p 0.5 of the best 2": Sampling(temperature=4.0, top_k=2, top_p=0.5),
    "min_p 1": Sampling(min_p=1.0),
    "min_p 0.2": Sampling(min_p=0.2, temperature=2.0),
    "all but one forbidden": Sampling(logit_bias=tuple((token, -math.inf) for token in range(3))),
    "bias -100": Sampling(logit_bias=((0, -100.0), (1, -100.0))),
    "bias 100": Sampling(logit_bias=((2, 100.0),), temperature=2.0),
    "penalties below 1": Sampling(repetition_penalty=0.6, presence_penalty=-1.0, frequency_penalty=-0.5),
}


def first_token(t: Trial, limits: dict[str, Sampling], what: str) -> None:
    """The law of one token under each of the settings."""
    requests = {name: t.request(1, sampling) for name, sampling in limits.items()}
    with remembering(t.model):
        for name, request in offered_only(t.case, t.model, requests).items():
            t.judge(f"{name}, {what}", request)


@conformance(
    "decoding.settings-hold-at-their-limits",
    clause="engine.Sampling",
    needs=("generate", "enumerable", "weights"),
    kills=(
        "temperature-divides-in-half-precision",
        "top-k-minus-1-counts-from-the-end",
        "top-k-must-not-exceed-the-vocabulary",
        "top-p-is-ignored-near-0",
        "top-p-sums-before-top-k",
        "min-p-1-leaves-nothing",
        "temperature-comes-last",
    ),
    costly=True,
)
def test_limits(case: Case) -> None:
    """At the limits of every setting the first token has the law that the setting prescribes."""
    t = trial(case)
    first_token(t, LIMITS, "float64")
    single = replace(t, model=case.model(t.pair.architecture, t.pair.target))
    # Near 0 the temperature magnifies what float32 rounds: only what is certain there can be compared.
    first_token(
        single, {name: LIMITS[name] for name in ("temperature 1e-5", "top_k 2", "min_p 1")}, "float32"
    )


UNEQUAL = tuple((token, math.log(p)) for token, p in enumerate((0.5, 0.3, 0.12, 0.08)))
"""Biases that give equal logits this law: of what min_p 0.3 leaves, the first token has 0.625."""
TWO_BEST, ONE_BEST = ((1, 1.0), (3, 1.0)), ((0, 2.0), (1, 1.0), (3, 1.0))
"""Biases that leave two equal tokens at the top, and two below the best one."""


@conformance(
    "decoding.equal-logits-are-truncated-by-rule",
    clause="engine.Sampling.top_k",
    needs=("generate", "enumerable", "weights"),
    kills=(
        "top-k-drops-what-is-equal",
        "top-p-goes-past-the-token-that-reaches-it",
        "low-temperatures-are-greedy",
        "min-p-comes-before-top-p",
        "top-k-1-is-greedy",
        "biases-are-clamped",
    ),
    costly=True,
)
def test_equal(case: Case) -> None:
    """Of equal logits top_k keeps all that equal the k-th, top_p what reaches it, a low temperature all."""
    flat = level(trial(case))
    limits = {
        "top_k 1": Sampling(top_k=1),
        "top_k 2": Sampling(top_k=2),
        "top_k 1 of two best": Sampling(logit_bias=TWO_BEST, top_k=1),
        "top_k 2 of one best and two": Sampling(logit_bias=ONE_BEST, top_k=2),
        "top_k 3 of one best and two": Sampling(logit_bias=ONE_BEST, top_k=3),
        "top_p 0.9": Sampling(logit_bias=UNEQUAL, top_p=0.9),
        "top_p 0.95": Sampling(logit_bias=UNEQUAL, top_p=0.95),
        "min_p 0.05": Sampling(logit_bias=((0, 4.0), (2, 1.5)), min_p=0.05),
        "large biases": Sampling(logit_bias=((0, 60.0), (1, 59.0), (2, -60.0), (3, 58.0))),
        "large negative biases": Sampling(logit_bias=((0, -60.0), (1, -59.0), (2, -61.0), (3, -60.0))),
        "top_p 0.5": Sampling(top_p=0.5),
        "top_p 0.6": Sampling(top_p=0.6),
        "temperature 0.01": Sampling(temperature=0.01),
        "top_p 0.6, then min_p 0.3": Sampling(logit_bias=UNEQUAL, top_p=0.6, min_p=0.3),
        "top_p 0.25": Sampling(top_p=0.25),
        "min_p 1": Sampling(min_p=1.0),
    }
    requests = {name: flat.request(1, sampling) for name, sampling in limits.items()}
    with remembering(flat.model):
        for what, request in offered_only(case, flat.model, requests).items():
            found, wanted = flat.found(request), flat.wanted(request)
            # Which of equal tokens stay is a convention; how many, and how probable each is, is not.
            lossless(case, f"{what} of equal logits", ranked(found), ranked(wanted))


@conformance(
    "decoding.equal-logits-are-drafted-by-one-rule",
    clause="engine.Sampling.top_k",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=("ties-in-windows-go-upwards",),
)
def test_equal_drafted(case: Case) -> None:
    """Whichever of equal tokens top_k and top_p leave, with a draft model they leave the same ones."""
    t = trial(case)
    methods(case, t.model, "draft_model")
    flat = level(t)
    flat.model.load_draft(t.pair.architecture, t.pair.draft)
    limits = {
        "top_k 1 of two best": Sampling(logit_bias=TWO_BEST, top_k=1),
        "top_k 2 of one best and two": Sampling(logit_bias=ONE_BEST, top_k=2),
        "top_p 0.5": Sampling(top_p=0.5),
        "temperature 0": GREEDY,
    }
    requests = {name: flat.request(2, sampling) for name, sampling in limits.items()}
    with remembering(flat.model):
        for what, request in offered_only(case, flat.model, requests).items():
            found, plain = flat.found(request, Speculation("draft_model", 1)), flat.found(request)
            lossless(case, f"{what} of equal logits, drafted", found, plain)


def level(t: Trial) -> Trial:
    """The trial with a target whose logits are all equal."""
    weights = dict(t.pair.target)
    name = "unembedding.weight" if "unembedding.weight" in weights else "embedding.weight"
    weights[name] = torch.zeros_like(weights[name])
    model = precise(t.case, t.pair.architecture, weights)
    return replace(t, model=model, pair=replace(t.pair, target=weights))


def ranked(law: Law) -> Law:
    """The law of the rank, by probability, in place of the outcome."""
    return Law(dict(enumerate(sorted(law.probabilities.values(), reverse=True))), law.paths, law.pruned)


Effect = Callable[[Any, Request], tuple[bool, str]]
"""From an engine and a greedy request to whether a setting had its effect, and what came instead."""


def _ask(model: Any, request: Request, **changed: Any) -> Completion:
    sampling = {name: value for name, value in changed.items() if hasattr(request.sampling, name)}
    rest = {name: value for name, value in changed.items() if name not in sampling}
    return generated(model, [replace(request, sampling=replace(request.sampling, **sampling), **rest)])[0]


def as_greedy(**setting: Any) -> Effect:
    """At a high temperature the setting leaves the best token alone."""

    def effect(model: Any, request: Request) -> tuple[bool, str]:
        found = _ask(model, request, temperature=5.0, **setting)
        return found.tokens == _ask(model, request).tokens, f"{list(found.tokens)}, which is not greedy"

    return effect


def _temperature(model: Any, request: Request) -> tuple[bool, str]:
    longer = replace(request, max_tokens=16)
    hot = {_ask(model, longer, temperature=5.0).tokens for _ in range(3)}
    if len(hot) < 3:
        return False, "the same tokens in several calls at temperature 5"
    greedy, cold = (_ask(model, longer, temperature=heat).tokens for heat in (0.0, 1e-3))
    return cold == greedy, f"{list(cold)} at temperature 0.001, which is not greedy"


def _bias(model: Any, request: Request) -> tuple[bool, str]:
    token = request.prompt[1]
    found = _ask(model, request, logit_bias=((token, 100.0),)).tokens
    return found == (token,) * len(found), f"{list(found)} under a bias of 100 on {token}"


def _repetition(model: Any, request: Request) -> tuple[bool, str]:
    token = request.prompt[1]
    found = _ask(model, request, logit_bias=((token, 100.0),), repetition_penalty=1e3).tokens
    return found != (token,) * len(found), f"{list(found)}, though {token} stands in the prompt"


def _frequency(model: Any, request: Request) -> tuple[bool, str]:
    plain = _ask(model, request).tokens
    # Forty times a penalty of 2, the most that some endpoints take, outweigh the lead of any one token.
    biases = tuple((token, 100.0) for token in dict.fromkeys((*request.prompt, *plain)))
    without = _ask(model, request, logit_bias=biases, max_tokens=40).tokens
    found = _ask(model, request, logit_bias=biases, max_tokens=40, frequency_penalty=2.0).tokens
    return found != without, f"{list(found)}, as without it"


def _grammar(model: Any, request: Request) -> tuple[bool, str]:
    a, b = tuple(dict.fromkeys(request.prompt))[:2]
    found = _ask(model, request, grammar=Grammar((((a, 1),), ((b, 0),)))).tokens
    wanted = tuple((a, b)[i % 2] for i in range(len(found)))
    return found == wanted, f"{list(found)} under a grammar that alternates {a} and {b}"


def _eos(model: Any, request: Request) -> tuple[bool, str]:
    plain = _ask(model, request).tokens
    found = _ask(model, request, eos=(plain[2],))
    return found.finish_reason == "stop" and plain[2] not in found.tokens, f"{list(found.tokens)}"


def _stop(model: Any, request: Request) -> tuple[bool, str]:
    plain = _ask(model, request).tokens
    found = _ask(model, request, stop=(plain[2:4],))
    return found.finish_reason == "stop" and len(found.tokens) <= 2, f"{list(found.tokens)}"


def _min_tokens(model: Any, request: Request) -> tuple[bool, str]:
    plain = _ask(model, request).tokens
    found = _ask(model, request, eos=(plain[0],), min_tokens=3).tokens
    return len(found) >= 3, f"{list(found)} where 3 tokens were the least"


def _logprobs(model: Any, request: Request) -> tuple[bool, str]:
    found = _ask(model, request, logprobs=True)
    return found.logprobs is not None and len(found.logprobs) == len(found.tokens), f"{found.logprobs}"


def _seed(model: Any, request: Request) -> tuple[bool, str]:
    one, other = (_ask(model, request, temperature=5.0, seed=11).tokens for _ in range(2))
    return one == other, f"{list(one)} and then {list(other)} with one seed"


EFFECTS: dict[str, tuple[tuple[str, ...], Effect]] = {
    "temperature": ((), _temperature),
    "top_k": ((), as_greedy(top_k=1)),
    "top_p": ((), as_greedy(top_p=1e-6)),
    "min_p": ((), as_greedy(min_p=1.0)),
    "logit_bias": ((), _bias),
    "repetition_penalty": (("logit_bias",), _repetition),
    "frequency_penalty": (("logit_bias",), _frequency),
    "grammar": ((), _grammar),
    "eos": ((), _eos),
    "stop": ((), _stop),
    "min_tokens": (("eos",), _min_tokens),
    "logprobs": ((), _logprobs),
    "seed": ((), _seed),
}
"""By setting: others that its test needs, and the test."""


@conformance(
    "decoding.no-setting-is-ignored",
    clause="engine.Sampling",
    needs=("generate",),
    kills=("temperature-is-ignored", "min-p-is-ignored", "biases-are-ignored", "stop-sequences-are-ignored"),
    costly=True,
)
def test_effects(case: Case) -> None:
    """Every setting that the engine says it honours has its effect."""
    model = precise(case)
    ask_for(model, "temperature")
    request = Request(prompts(case, (5,))[0], 6, GREEDY)
    checked = [name for name, (others, _) in EFFECTS.items() if honours(model, name, *others)]
    case.note("settings", checked)
    for name in checked:
        holds, instead = EFFECTS[name][1](model, request)
        require(holds, f"{name} is accepted and has no effect: {instead}", stage="settings")
