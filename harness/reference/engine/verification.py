"""Which proposed tokens stand: the rejection rule that keeps the target's law.

Letters: n proposed tokens, V vocabulary; p the target's law of a token, q the law it was proposed from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.reference.engine.draws import Draws
from harness.reference.engine.proposal import Proposal
from harness.reference.engine.sampling import ROUNDING, NoToken, Sampler
from harness.reference.engine.values import Request


class Verifier:
    """Speculative sampling (arXiv 2211.17192, algorithm 1; arXiv 2302.01318, algorithm 2).

    Greedy decoding is the case of laws that put all probability on one token.
    """

    def targets(
        self,
        logits: Tensor,
        request: Request,
        generated: Sequence[int],
        tokens: Sequence[int],
        sampler: Sampler,
    ) -> Tensor:
        """The target's laws [n + 1, V] after `generated` and each of the n tokens proposed next.

        logits [n + 1, V] are the target's. A row of zeros: no law there, because a token before it is
        impossible, or because every token is ruled out. Raises NoToken if there is none in the first row.
        """
        laws = torch.zeros(logits.shape, dtype=torch.float64)
        for i, row in enumerate(logits):
            try:
                laws[i] = sampler.distribution(row, request, (*generated, *tokens[:i]))
            except NoToken:
                if i == 0:
                    raise
                break
            if i < len(tokens) and laws[i, tokens[i]] == 0:
                break
        return laws

    def verify(self, proposal: Proposal, targets: Tensor, draws: Draws) -> tuple[tuple[int, ...], int]:
        """The tokens of this round, and how many of them were proposed.

        targets [n + 1, V]: the target's law after each number of proposed tokens. Proposed tokens stand up
        to the first that is rejected, in whose place one of the residual comes; if none is rejected, one
        more comes from the target's last law. Where the target has no law (a row of zeros) the round ends.
        """
        for i, token in enumerate(proposal.tokens):
            p, q = targets[i], proposal.distributions[i]
            if not bool(p.any()):
                return proposal.tokens[:i], i
            if not self.accepts(token, p, q, draws):
                return (*proposal.tokens[:i], draws.choose(self.residual(p, q))), i
        bonus = self.bonus(proposal, targets)
        if not bool(bonus.any()):
            return proposal.tokens, len(proposal.tokens)
        return (*proposal.tokens, draws.choose(bonus)), len(proposal.tokens)

    def accepts(self, token: int, p: Tensor, q: Tensor, draws: Draws) -> bool:
        """Whether a proposed token stands: with probability min(1, p / q).

        A token that is certain or impossible under p draws nothing. Any other draws, even where p >= q:
        whether it does must not hang on the last bit of p, or a seed would differ in other company. A ratio
        that is below 1 by rounding alone counts as 1.
        """
        if p[token] == 0 or p[token] == 1:
            return bool(p[token] == 1)
        ratio, uniform = float(p[token] / q[token]), draws.uniform()
        return ratio >= 1 - ROUNDING or bool(uniform < ratio)

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        """The law [V] of the token in place of a rejected one: max(p - q, 0), normalised.

        p where nothing is left, which happens only where p and q differ by rounding.
        """
        excess = (p - q).clamp(min=0)
        total = excess.sum()
        return excess / total if total > 0 else p

    def bonus(self, proposal: Proposal, targets: Tensor) -> Tensor:  # noqa: ARG002
        """The law [V] of the token after proposals that all stand: the target's own."""
        return targets[-1]
