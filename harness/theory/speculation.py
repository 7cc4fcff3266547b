"""What speculative decoding gains, whatever the models: how many proposed tokens stand.

Letters: V vocabulary, g tokens proposed per round (gamma), a probability that one of them is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Following = Callable[[tuple[int, ...]], Sequence[float]]
"""The law [V] of the token after a prefix."""


def acceptance_probability(p: Sequence[float], q: Sequence[float]) -> float:
    """That a token drawn from q stands where the target's law is p: sum_x min(p(x), q(x)).

    arXiv 2211.17192, section 3.2 (theorem 3.5 and lemma 3.3); 1 minus the total variation of p and q.
    """
    return sum(map(min, p, q))


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens that one round of g proposals decides, on average: (1 - a^(g+1)) / (1 - a), and g + 1 at a = 1.

    arXiv 2211.17192, eq. 1: every proposal is accepted with the same probability, independently of the
    others, and one token always comes from the target. Written as the sum of 1, a, ..., a^g.
    """
    return expected_tokens_by_position([acceptance] * length)


def expected_tokens_by_position(acceptances: Sequence[float]) -> float:
    """The same where acceptance varies: 1 + a_1 + a_1 a_2 + ... + a_1 a_2 ... a_g.

    a_i is the probability that proposal i stands given that all before it do, so that a product of the
    first i is the probability that at least i stand.
    """
    expected, standing = 1.0, 1.0
    for acceptance in acceptances:
        standing *= acceptance
        expected += standing
    return expected


def standing_probabilities(target: Following, draft: Following, length: int) -> list[float]:
    """That at least 1, 2, ... g proposals stand, where both laws depend on the tokens before.

    Proposals x_1 .. x_i are drawn and all accepted with probability prod_j min(p_j(x_j), q_j(x_j)), each
    factor as in `acceptance_probability` after x_1 .. x_(j-1); their sum over all x_1 .. x_i is entry i.
    A draft that proposes nothing after a prefix gives zeros there.
    """
    standing: list[float] = []
    reached: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        reached = {
            (*prefix, token): before * both
            for prefix, before in reached.items()
            for token, both in enumerate(map(min, target(prefix), draft(prefix)))
            if both > 0
        }
        standing.append(sum(reached.values()))
    return standing
