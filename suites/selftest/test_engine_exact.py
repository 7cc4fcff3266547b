"""The reference engine against its own model, without cache, batch or speculation: token for token, and law
for law. A few cases in every run; with -m slow a thousand, and every setting with every method."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch

from harness.evidence.enumeration import law
from harness.evidence.law import Law
from harness.implementations.reference import Reference, ReferenceUnderTest
from harness.reference import ReferenceModel, weights
from harness.reference.engine import Completion, Grammar, Method, Request, Sampling, Speculation
from harness.reference.engine.sampling import Sampler
from harness.reference.remembered import remembered
from harness.spec import load, twin
from harness.spec.architecture import Architecture

METHODS: tuple[Method, ...] = get_args(Method)
SPECS = ("mixtral-8x7b", "gpt-oss-20b", "deepseek-v3", "llama-3.1-8b")
"""Grouped queries, windows and sinks, latent attention, and no experts."""
GREEDY = Sampling(temperature=0)
EXACT = 1e-9
"""Of total variation. Sums of at most 10^4 float64 probabilities are 10^4 roundings of 1e-16 off."""

SETTINGS = {
    "plain": Sampling(),
    "temperature": Sampling(temperature=0.6),
    "top_k": Sampling(top_k=2),
    "top_p": Sampling(top_p=0.8),
    "min_p": Sampling(min_p=0.3),
    "repetition_penalty": Sampling(repetition_penalty=1.7),
    "presence_penalty": Sampling(presence_penalty=0.8),
    "frequency_penalty": Sampling(frequency_penalty=0.6),
    "logit_bias": Sampling(logit_bias=((1, 1.5), (2, -2.0))),
    "grammar": Sampling(grammar=Grammar((((0, 1), (1, 1), (2, 0)), ((1, 0), (3, 1))))),
    "all": Sampling(
        logit_bias=((0, 0.5),),
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        temperature=0.8,
        top_k=3,
        top_p=0.95,
        min_p=0.05,
    ),
    "greedy": GREEDY,
}


def small(spec: str, vocab_size: int, n_layers: int) -> Architecture:
    """The spec's twin, with that vocabulary and so many of its layers."""
    full = twin(load(spec).architecture)
    data = full.model_dump() | {"vocab_size": vocab_size}
    if full.moe is None or full.moe.first_dense < n_layers:
        data["n_layers"] = n_layers
    return Architecture.model_validate(data)


def pair(architecture: Architecture, seed: int) -> ReferenceUnderTest:
    """A target with a draft whose weights are the target's, mixed with others: often right, often wrong."""
    model = Reference().build(architecture, device="cpu", dtype=torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed + 10**6)
    other = weights.draw(architecture, generator)
    own = model.parameters()
    model.load_draft(
        architecture, {name: (own[name].detach() + 0.3 * value).double() for name, value in other.items()}
    )
    return model


def speculated(method: Method, length: int, vocab_size: int) -> Speculation:
    """The method; the universal one with a vocabulary that turns all ids round."""
    vocabulary = tuple(reversed(range(vocab_size))) if method == "universal" else ()
    return Speculation(method, length, vocabulary=vocabulary)


def greedily(model: ReferenceUnderTest, request: Request) -> tuple[tuple[int, ...], str]:
    """What the definition of a request says, by a pass over the whole sequence for every token."""
    generated: list[int] = []
    while len(generated) < request.max_tokens:
        with torch.no_grad():
            logits = model.forward(torch.tensor([[*request.prompt, *generated]]))[0, -1]
        if len(generated) < request.min_tokens:
            logits[list(request.eos)] = -torch.inf
        token = int(logits.argmax())
        if token in request.eos:
            return tuple(generated), "stop"
        generated.append(token)
        for stop in request.stop:
            if tuple(generated[-len(stop) :]) == stop:
                return tuple(generated[: -len(stop)]), "stop"
    return tuple(generated), "length"


def ended(completions: Sequence[Completion]) -> list[tuple[tuple[int, ...], str]]:
    """Tokens and finish reason of each."""
    return [(tuple(one.tokens), one.finish_reason) for one in completions]


def greedy_case(seed: int) -> None:
    """A few requests of all lengths, with ends at any place, together under one method."""
    dice = random.Random(seed)
    vocab = dice.choice((5, 11, 23))
    model = pair(small(dice.choice(SPECS), vocab, 2), seed)
    method, length = dice.choice(METHODS), dice.randint(1, 6)
    tokens = range(vocab)
    requests = [
        Request(
            tuple(dice.choices(tokens, k=dice.randint(1, 24))),
            dice.randint(1, 16),
            GREEDY,
            eos=tuple(dice.sample(tokens, k=dice.randint(0, 2))),
            stop=tuple(tuple(dice.choices(tokens, k=dice.randint(1, 3))) for _ in range(dice.randint(0, 2))),
            min_tokens=dice.choice((0, 0, 3)),
        )
        for _ in range(dice.randint(1, 3))
    ]
    want = [greedily(model, request) for request in requests]
    assert ended(model.generate(requests)) == want, seed
    assert ended(model.generate(requests, speculation=speculated(method, length, vocab))) == want, (
        seed,
        method,
    )


def test_a_remembered_pass_is_the_same_and_computed_once() -> None:
    """Within `remembered` equal calls give equal answers from one pass; afterwards nothing is left of it."""
    model = pair(small("mixtral-8x7b", 5, 2), 1).model
    tokens, count = torch.tensor([[1, 2, 3]]), [0]
    run = type(model).run

    def counted(self: ReferenceModel, *given: Any) -> Any:
        count[0] += 1
        return run(self, *given)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(ReferenceModel, "run", counted)
        logits, cache = model.extend(tokens, None)
        after, _ = model.extend(tokens, cache)
        with remembered(model):
            for _ in range(3):
                again, cached = model.extend(tokens.clone(), None)
                assert torch.equal(again, logits)
                assert torch.equal(model.extend(tokens, cached)[0], after)
        assert count[0] == 2 + 2
        model.extend(tokens, None)
        assert count[0] == 5


@pytest.mark.parametrize("start", range(0, 20, 5))
def test_greedy_decoding_is_the_definition(start: int) -> None:
    """With and without speculation, in a batch, every request gets the tokens that its definition says."""
    for seed in range(start, start + 5):
        greedy_case(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_a_thousand_greedy_cases_are_the_definition(start: int) -> None:
    """The same, a thousand times."""
    for seed in range(start, start + 100):
        greedy_case(seed)


def target_law(model: ReferenceUnderTest, request: Request) -> Law:
    """The law of a completion by its definition, each next token from a pass over the whole sequence."""
    sampler = Sampler()

    def sums(generated: tuple[int, ...], mass: float, out: dict[Any, float]) -> None:
        if generated and generated[-1] in request.eos:
            out[(generated[:-1], "stop")] = out.get((generated[:-1], "stop"), 0.0) + mass
        elif len(generated) == request.max_tokens:
            out[(generated, "length")] = mass
        else:
            with torch.no_grad():
                logits = model.forward(torch.tensor([[*request.prompt, *generated]]))[0, -1]
            for token, p in enumerate(sampler.distribution(logits, request, generated).tolist()):
                if p:
                    sums((*generated, token), mass * p, out)

    found: dict[Any, float] = {}
    sums((), 1.0, found)
    return Law(found)


def exact_case(setting: str, method: Method | None, *, eos: tuple[int, ...] = ()) -> float:
    """Total variation between what the engine draws, joint over the tokens, and the target's law."""
    model = pair(small("mixtral-8x7b", 4, 1), 3)
    request = Request((1, 2, 1), 3, SETTINGS[setting], eos=eos, min_tokens=1 if eos else 0)
    how = None if method is None else speculated(method, 1, 4)
    with model.remembering():
        drawn = law(lambda: ended(model.generate([request], speculation=how))[0])
    return drawn.tv(target_law(model, request))


@pytest.mark.parametrize("method", [None, "draft_model", "staged"])
def test_a_law_is_the_targets(method: Method | None) -> None:
    """Sampling with every filter at once, joint over draft length + 2 tokens, has the target's law."""
    assert exact_case("all", method) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("eos", [(), (3,)], ids=["endless", "eos"])
@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_law_is_the_targets(setting: str, method: Method | None, eos: tuple[int, ...]) -> None:
    """Every setting with every method, with and without a token that ends."""
    assert exact_case(setting, method, eos=eos) <= EXACT
