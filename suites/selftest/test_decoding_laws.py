"""The laws of decoding: what is lossless passes however odd it looks, and what is lossy is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from harness import spec as specs
from harness.conformance import Case, Violation
from harness.conformance import laws as wanted
from harness.conformance.decoding import generated, precise, trial, ways
from harness.conformance.pairs import APART, designed
from harness.conformance.serving import GREEDY
from harness.implementations.reference import Reference, ReferenceUnderTest
from harness.mutants import make
from harness.reference.engine import Completion, Request, Sampling, Speculation
from suites.decoding import test_laws as laws
from suites.decoding.test_acceptance import test_rounds as rounds

EXACT = 1e-9
"""Total variation in float64, where nothing but the last digits of sums of products can differ."""


def case_of(implementation: Any, spec: str = "llama-3.1-8b", seed: int = 1) -> Case:
    """A case of an implementation on a shipped spec."""
    full = specs.load(spec).architecture
    return Case(implementation, "selftest", seed, spec, full, specs.twin(full))


@dataclass(frozen=True)
class Variant:
    """The reference with something changed in every engine."""

    change: Callable[[Any], None]
    name: str = "variant"
    needs_architecture: bool = True

    def build(self, *given: Any, **options: Any) -> ReferenceUnderTest:
        """The reference, changed."""
        built = Reference().build(*given, **options)
        built.on_engine.append(self.change)
        return built


def sample_and_match(engine: Any) -> None:
    """A draft stands where a sample of the target happens to equal it; else the sample comes."""

    def verify(proposal: Any, targets: Any, draws: Any) -> Any:
        for i, token in enumerate(proposal.tokens):
            sample = draws.choose(targets[i])
            if sample != token:
                return (*proposal.tokens[:i], sample), i
        return (*proposal.tokens, draws.choose(targets[-1])), len(proposal.tokens)

    engine.verifier.verify = verify


def certain_drafts(engine: Any) -> None:
    """The draft's most probable token is proposed, and reported as certain."""
    law = getattr(engine.proposer, "law", None)
    if law is not None:
        engine.proposer.law = lambda *given: torch.nn.functional.one_hot(
            law(*given).argmax(), engine.model.architecture.vocab_size
        ).double()


def cold_drafts(engine: Any) -> None:
    """Drafts know nothing of the request's settings, and are reported as they are drawn."""
    if hasattr(engine.proposer, "law"):
        engine.proposer.law = lambda logits, *_: logits.double().softmax(0)


def rejects_half(engine: Any) -> None:
    """Every draft stands half as often as it could, and the residual makes up for it."""
    accepts = engine.verifier.accepts

    def reluctant(token: int, p: Any, q: Any, draws: Any) -> Any:
        return accepts(token, p / 2, q, draws)

    engine.verifier.accepts = reluctant
    engine.verifier.residual = lambda p, q: normalised(p - torch.minimum(p / 2, q))


def normalised(weights: Any) -> Any:
    """Weights that sum to 1."""
    return weights / weights.sum()


LOSSLESS = (sample_and_match, certain_drafts, cold_drafts, rejects_half)
LAWS = (
    laws.test_plain_sampling,
    laws.test_grammar,
    laws.test_joint_law,
    laws.test_speculation,
    laws.test_truncated,
    laws.test_penalised,
    laws.test_ends,
    laws.test_early_exit,
    laws.test_self_draft,
    laws.test_prompt_lookup,
    laws.test_universal,
    laws.test_staged,
)


@pytest.mark.parametrize("change", LOSSLESS, ids=lambda change: change.__name__)
def test_lossless_variants_pass(change: Callable[[Any], None]) -> None:
    """Acceptance rules that look biased, and keep the law, are not accused."""
    for law in (laws.test_joint_law, laws.test_truncated):
        law(case_of(Variant(change)))


def test_fewer_drafts_than_could_stand_are_noticed() -> None:
    """A rule that keeps the law and accepts too little fails the exact law of the number of rounds."""
    with pytest.raises(Violation, match="tokens and rounds: lossy: TV = ") as caught:
        rounds(case_of(Variant(sample_and_match)))
    assert caught.value.stage == "acceptance"


@pytest.mark.parametrize(
    "name",
    ["acceptance-is-typical", "acceptance-is-relaxed", "acceptance-has-a-bonus"],
)
def test_lossy_rules_are_measured(name: str) -> None:
    """Rules that are lossy by design fail with the total variation that they cost."""
    case = case_of(make(name))
    with pytest.raises(Violation, match=r"lossy: TV = 0\.\d+ over 64 outcomes"):
        laws.test_speculation(case)
    assert 0.001 < case.facts["tv"]["1 draft"] < 1


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_reference_is_exact(law: Callable[[Case], None]) -> None:
    """In every setting and by every method the reference's law is the target's to 1e-9."""
    case = case_of(Reference())
    law(case)
    assert max(case.facts["tv"].values()) <= EXACT


def test_the_law_of_rounds_agrees_with_the_law_of_tokens() -> None:
    """Summed over rounds, the joint law of tokens and rounds is the target's law of tokens."""
    t = trial(case_of(Reference()), 3)
    request = t.request(4)
    joint = wanted.rounds_law(t.logits(request), t.drafted_logits(request), request, 2)
    tokens = t.wanted(request).of(lambda outcome: outcome[0])
    assert joint.of(lambda outcome: outcome[0]).tv(tokens) <= EXACT


@pytest.mark.parametrize("spec", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-20b", "gpt3-175b", "palm-540b"])
def test_designed_pairs_are_half_apart(spec: str) -> None:
    """Target and draft of a designed pair are between 0.4 and 0.6 apart, whatever the architecture."""
    for vocab_size in (2, 3, 4):
        assert APART[0] <= designed(case_of(Reference(), spec), vocab_size).tv <= APART[1]


@pytest.mark.parametrize(
    "broken",
    [
        {"tokens": [1, 2]},
        {"tokens": (1, 131)},
        {"tokens": (1.0, 2)},
        {"finish_reason": "eos"},
        {"logprobs": [0.0]},
        {"drafted": -1},
        {"rounds": None},
    ],
    ids=str,
)
def test_malformed_completions_are_refused(broken: dict[str, Any]) -> None:
    """A completion whose field is of another type or range is malformed, and says which."""
    model = case_of(Reference()).model()
    answer = replace(Completion((1, 2), "length"), **broken)
    model._model.__dict__["generate"] = lambda requests, **_: [answer for _ in requests]
    with pytest.raises(Violation, match=next(iter(broken))):
        model.generate([Request((1,), 2)])


@pytest.mark.slow
def test_greedy_speculation_over_a_thousand_cases() -> None:
    """A thousand seeded requests decode greedily to the same tokens with speculation and without."""
    compared = 0
    for seed in range(1, 11):
        case = case_of(Reference(), "mixtral-8x7b" if seed % 2 else "gpt-oss-20b", seed)
        model = precise(case)
        lengths = torch.randint(1, 70, (20,), generator=case.generator()).tolist()
        rows = case.tokens(20, 70).tolist()
        requests = [Request(tuple(row[:n]), 4 + n % 9, GREEDY) for row, n in zip(rows, lengths, strict=True)]
        plain = generated(model, requests)
        for speculation in ways(case, model, 1 + seed % 5).values():
            found = generated(model, requests, speculation)
            assert [answer.tokens for answer in found] == [answer.tokens for answer in plain]
            compared += len(found)
    assert compared >= 1000


def test_requests_of_one_batch_have_their_own_laws() -> None:
    """Beside a greedy neighbour under speculation a request has the law that it has alone."""
    t = trial(case_of(Reference()), 3)
    request, neighbour = t.request(3), t.request(5, Sampling(temperature=0.0))
    speculation = Speculation("draft_model", 1)
    found = t.law_of(
        lambda: wanted.outcome(generated(t.model, [neighbour, request, neighbour], speculation)[1])
    )
    assert found.tv(t.wanted(request)) <= EXACT
