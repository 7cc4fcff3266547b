"""Verification: whatever is proposed, by whom, what comes out has the target's own law, by enumeration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from harness.evidence.enumeration import law
from harness.evidence.law import Law, generations
from harness.reference.engine import Grammar, Request, Sampling
from harness.reference.engine.draws import Draws
from harness.reference.engine.proposal import Proposal, certain
from harness.reference.engine.proposers import Drafter
from harness.reference.engine.sampling import NoToken, Sampler
from harness.reference.engine.stopping import Stopper
from harness.reference.engine.verification import Verifier
from harness.theory import speculation as theory
from suites.selftest.engine_tables import (
    DRAFT,
    EXACT,
    GAMMA,
    PROMPT,
    REQUESTS,
    TARGET,
    WAYS,
    One,
    Remembering,
    V,
    decode,
    following,
)


def speculated(request: Request, way: str, verifier: Verifier | None = None) -> Law:
    """The exact law of what speculative decoding gives."""
    sampler = Remembering()
    proposer = WAYS[way](sampler)
    return law(lambda: decode(request, proposer, sampler, verifier or Verifier(), TARGET).ended.tokens)


@cache
def target_law(request: Request) -> Law:
    """The law of plain decoding, by the chain rule over the oracle-checked sampler."""
    stopper = Stopper()

    def kept(tokens: tuple[int, ...]) -> tuple[int, ...]:
        ended = stopper.end(request, tokens)
        assert ended is not None
        return ended.tokens

    return generations(
        partial(following, TARGET, request),
        lambda tokens: stopper.end(request, tokens) is not None,
        kept,
    )


CASES = [(asked, "draft_model") for asked in REQUESTS] + [
    (asked, way)
    for way in WAYS
    for asked in ("hot, top_k", "everything", "grammar", "eos", "greedy")
    if way != "draft_model"
]
"""One way under all settings; the others under those that leave few outcomes, which are quick."""


@pytest.mark.parametrize(("asked", "way"), CASES)
def test_speculation_changes_no_law(asked: str, way: str) -> None:
    """Under every setting and every way to propose, the output has exactly the target's law."""
    assert speculated(REQUESTS[asked], way).tv(target_law(REQUESTS[asked])) < EXACT


WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "residual is p": ("residual", lambda p, q: p),
    "residual is |p - q|": ("residual", lambda p, q: (p - q).abs() / (p - q).abs().sum()),
    "bonus from q": (
        "bonus",
        lambda proposal, targets: proposal.distributions[-1] if proposal.tokens else targets[-1],
    ),
    "accepts what is likely": ("accepts", lambda token, p, q, draws: bool(p[token] > 0.3)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_shows(name: str) -> None:
    """With one part of the verification replaced, the law is off by more than a hundredth."""
    part, wrong = WRONG[name]
    verifier = Verifier()
    setattr(verifier, part, wrong)
    request = REQUESTS["hot, top_k"]
    assert speculated(request, "draft_model", verifier).tv(target_law(request)) > 0.01


@pytest.mark.parametrize("way", ["draft_model", "universal", "staged"])
@pytest.mark.parametrize("asked", ["plain", "everything", "grammar", "eos"])
def test_proposals_have_the_law_that_is_reported(asked: str, way: str) -> None:
    """Proposed tokens are drawn from the distributions beside them, also where the draft is speculated."""
    request = REQUESTS[asked]
    proposer = WAYS[way](Remembering())
    laws: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def propose() -> tuple[int, ...]:
        proposal = proposer.propose(One(request), 3, Draws())
        assert proposal.distributions.shape == (len(proposal.tokens), V)
        for i, q in enumerate(proposal.distributions.tolist()):
            assert laws.setdefault(proposal.tokens[:i], tuple(q)) == tuple(q)
        return proposal.tokens

    found = law(propose)
    ended = lambda tokens: tokens not in laws  # noqa: E731
    assert found.tv(generations(lambda tokens: laws[tokens], ended)) < EXACT


def test_a_staged_draft_has_the_drafts_law() -> None:
    """What a draft speculated by prompt lookup proposes is what it proposes alone."""
    sampler, verified = Sampler(), []
    staged, alone = WAYS["staged"](sampler), WAYS["draft_model"](sampler)
    verify = staged.verifier.verify

    def count(proposal: Proposal, *rest: Any) -> Any:
        verified.append(len(proposal.tokens))
        return verify(proposal, *rest)

    staged.verifier.verify = count
    laws = [
        law(lambda by=by: by.propose(One(REQUESTS["plain"]), 3, Draws()).tokens) for by in (staged, alone)
    ]
    assert laws[0].tv(laws[1]) < EXACT
    assert sum(verified) > 0


def test_acceptance_is_the_closed_form() -> None:
    """How many proposals of a round stand, and how many tokens come of it, is what theory says."""
    request = replace(REQUESTS["plain"], max_tokens=GAMMA + 1)
    sampler = Remembering()
    proposer = WAYS["draft_model"](sampler)
    counts = law(lambda: decode(request, proposer, sampler, Verifier(), TARGET).accepted[0])
    p, q = (partial(following, table, request) for table in (TARGET, DRAFT))
    standing = theory.standing_probabilities(p, q, GAMMA)
    for i, expected in enumerate(standing, start=1):
        assert sum(counts[n] for n in range(i, GAMMA + 1)) == pytest.approx(expected, abs=EXACT)
    ratios = [now / before for now, before in zip(standing, [1.0, *standing], strict=False)]
    assert ratios[0] == pytest.approx(theory.acceptance_probability(p(()), q(())), abs=EXACT)
    tokens = theory.expected_tokens_by_position(ratios)
    assert 1 + counts.expect(float) == pytest.approx(tokens, abs=EXACT)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.99, 1.0])
def test_expected_tokens_are_the_geometric_sum(acceptance: float, length: int) -> None:
    """With one acceptance probability at all positions a round decides (1 - a^(g+1)) / (1 - a) tokens."""
    have = theory.expected_tokens(acceptance, length)
    if acceptance < 1:
        assert have == pytest.approx((1 - acceptance ** (length + 1)) / (1 - acceptance), rel=1e-12)
    else:
        assert have == length + 1
    laws = [1 - acceptance, acceptance]
    standing = theory.standing_probabilities(lambda _: laws, lambda _: [0.0, 1.0], length)
    assert 1 + sum(standing) == pytest.approx(have, rel=1e-12)


def test_acceptance_is_one_minus_total_variation() -> None:
    """sum min(p, q) and half of sum |p - q| add to 1."""
    p, q = following(TARGET, REQUESTS["plain"], ()), following(DRAFT, REQUESTS["plain"], ())
    apart = sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    assert 0.1 < apart == pytest.approx(1 - theory.acceptance_probability(p, q), abs=1e-12)


@pytest.mark.parametrize("asked", REQUESTS)
def test_a_draft_that_is_the_target_is_always_accepted(asked: str) -> None:
    """Self-drafted tokens stand up to the end of the request, whatever the sampling."""
    request, sampler = REQUESTS[asked], Remembering()
    for seed in range(20):
        sequence = One(request)
        draws = Draws(torch.Generator().manual_seed(seed))
        proposal = Drafter(TARGET, sampler, V).propose(sequence, GAMMA, draws)
        logits = TARGET.read(0, (*PROMPT, *proposal.tokens), last=len(proposal.tokens) + 1)
        laws = Verifier().targets(logits, request, (), proposal.tokens, sampler)
        tokens, accepted = Verifier().verify(proposal, laws, draws)
        assert accepted == len(proposal.tokens) == len(tokens) - 1


def test_the_round_ends_where_the_target_has_no_law() -> None:
    """Where every token is ruled out, the accepted ones stand, and the next round says why."""
    dead_end = Sampling(Grammar((((0, 1),), ((1, 2),), ((2, 0),))), logit_bias=((2, -torch.inf),))
    request, sampler = Request(PROMPT, 9, dead_end), Sampler()
    proposal = Drafter(DRAFT, sampler, V).propose(One(request), 4, Draws())
    assert proposal.tokens == (0, 1)  # the draft meets the same dead end
    laws = Verifier().targets(torch.zeros(3, V), request, (), proposal.tokens, sampler)
    assert Verifier().verify(proposal, laws, Draws()) == ((0, 1), 2)
    longer = certain((0, 1, 2, 0), V)
    laws = Verifier().targets(torch.zeros(5, V), request, (), longer.tokens, sampler)
    assert Verifier().verify(longer, laws, Draws()) == ((0, 1), 2)
    with pytest.raises(NoToken):
        Verifier().targets(torch.zeros(1, V), request, (0, 1), (), sampler)
