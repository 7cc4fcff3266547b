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


def speed_up(acceptance: float, length: int, draft_cost: float) -> float:
    """Improvement of the time per token: (1 - a^(g+1)) / ((1 - a) (g c + 1)); arXiv 2211.17192, theorem 3.8.

    c is the time of a draft step over the target's. The verification of g + 1 tokens is taken to last as long
    as a step of one, which holds while memory bounds; `speed_up_at` drops that.
    """
    return expected_tokens(acceptance, length) / (length * draft_cost + 1)


def operations(acceptance: float, length: int, draft_operations: float) -> float:
    """How many times the operations per token grow: (1 - a) (g c' + g + 1) / (1 - a^(g+1)), where a draft
    step takes c' of the target's operations; arXiv 2211.17192, theorem 3.11."""
    return (length * draft_operations + length + 1) / expected_tokens(acceptance, length)


Seconds = Callable[[int], float]
"""Of a target's pass that feeds each sequence so many tokens; or of a round that drafts so many."""


def round_seconds(target: Seconds, draft: float) -> Seconds:
    """A round's time by g: g draft steps of `draft` seconds, and a pass that verifies g + 1 tokens."""
    return lambda length: length * draft + target(length + 1)


def speed_up_at(acceptance: float, length: int, target: Seconds, draft: float) -> float:
    """`speed_up` where the verification's time is what `target` says: tokens of a round, times a plain step's
    time, over a round's time. Below 1 speculation costs more than it gains."""
    return expected_tokens(acceptance, length) * target(1) / round_seconds(target, draft)(length)


def best_length(acceptance: float, one_round: Seconds, longest: int = 32) -> int:
    """The g of 0 .. `longest` of most tokens per second; 0: do not speculate. The shortest of equal ones."""
    return max(range(longest + 1), key=lambda length: expected_tokens(acceptance, length) / one_round(length))


def acceptances_for_length(length: int, one_round: Seconds) -> tuple[float, float] | None:
    """Between which acceptances g is the best length; None if it never is.

    g beats g - 1 exactly where a^g / (1 + ... + a^(g-1)) exceeds the share by which the round grows. The
    left side grows from 0 to 1/g with a, so that there is one threshold, and none where the share is 1/g or
    more. Exact where rounds grow by no less with each further token (as linear ones do: thresholds then rise
    with g).
    """
    low = _threshold(length, one_round) if length else 0.0
    high = _threshold(length + 1, one_round)
    return (low, high) if low < high else None


def _threshold(length: int, one_round: Seconds) -> float:
    """The acceptance from which g beats g - 1; 1 where none below does."""
    growth = one_round(length) / one_round(length - 1) - 1
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        gains = middle**length > growth * expected_tokens(middle, length - 1)
        low, high = (low, middle) if gains else (middle, high)
    return high


def break_even_batch(speed_up_of: Callable[[int], float], largest: int = 1 << 16) -> int | None:
    """The batch from which speculation never pays again, up to `largest`; None while it still pays there.

    `speed_up_of` the batch, as of `speed_up_at`. It need not fall all the way: experts that a verification
    touches besides cost most at small batches, and nothing once all are read anyway. So powers of two are
    tried from the largest down to the last that pays, and the crossing is found between them.
    """
    if speed_up_of(largest) > 1:
        return None
    beyond = largest
    while beyond > 1 and speed_up_of(beyond // 2) <= 1:
        beyond //= 2
    pays = beyond // 2
    while beyond - pays > 1:
        middle = (pays + beyond) // 2
        pays, beyond = (middle, beyond) if speed_up_of(middle) > 1 else (pays, middle)
    return beyond
