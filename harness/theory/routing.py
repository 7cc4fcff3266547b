"""What routing to k of E experts implies, whatever the weights.

Letters: E n_experts, K top_k, T tokens, R expert-parallel ranks of E / R experts each, s skew, f_i share of
assignments to expert i, P_i its mean probability, pi_i the probability that a token takes expert i, and
u_i = 1 - (1 - pi_i)^T that one of T tokens does. Tokens are routed independently of one another.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb, lgamma, log2
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from harness.theory.sharding import least, most

Floats = NDArray[np.float64]
LEAST, GREATEST, STEPS = -4, 22, 16
"""log2 T at the ends of a `TouchedTable`, and its steps for a doubling."""


def expected_distinct_experts(n_experts: float, top_k: float, tokens: float) -> float:
    """Experts that T tokens hit together, on average: E (1 - (1 - K/E)^T).

    Exact if every token takes K distinct experts, uniformly and independently of the others.
    """
    missed: float = (1 - top_k / n_experts) ** tokens
    return n_experts * (1 - missed)


def tokens_per_expert(tokens: float, n_experts: float, top_k: float) -> float:
    """Mean tokens that one expert receives out of T: T K / E."""
    return tokens * top_k / n_experts


@cache
def inclusion_probabilities(n_experts: int, top_k: int, skew: float = 0.0) -> Floats:
    """pi [E], summing to K: a token draws K experts one by one, without replacement, with weights i^-s.

    Drawing so is a race of independent exponential clocks of rates p_i, of which the first K to ring are
    taken (Efraimidis and Spirakis 2006, Weighted random sampling with a reservoir). The time
    of the K-th ring is taken as fixed at the t where K clocks have rung on average, so that
    pi_i = 1 - exp(-p_i t) with sum_i pi_i = K (Rosen 1972): exact at s = 0 and at K = E, otherwise off by
    what that time varies, which matters for few experts (5 % of pi_1 at E = 16, K = 2, s = 1). Raises
    ValueError for K > E or s < 0.
    """
    if not 1 <= top_k <= n_experts or skew < 0:
        wrong = f"top {top_k} of {n_experts} experts with a skew of {skew}"
        raise ValueError(f"no routing to {wrong}; K is 1 to E, and s at least 0")
    if skew == 0 or top_k == n_experts:
        return np.full(n_experts, top_k / n_experts)
    rates = np.arange(1, n_experts + 1) ** -skew
    low, high = 0.0, 1.0
    while -np.expm1(-rates * high).sum() < top_k:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-rates * middle).sum() < top_k else (low, middle)
    return np.asarray(-np.expm1(-rates * high))


@dataclass(frozen=True)
class Touched:
    """What T tokens do to the experts of a layer, seen from one expert drawn at random; shaped like T."""

    share: Any
    """Probability that it is touched: distinct experts / E."""
    share_spread: Any
    """Variance of being touched, less the covariance of two different experts."""
    load: Any
    """Mean assignments: T K / E."""
    load_spread: Any
    """Variance of the assignments, less the covariance of two different experts."""
    hottest: Any
    """Mean assignments of the most popular expert."""


@dataclass(frozen=True)
class UniformTouched:
    """Uniform routing: the moments of `touched` for any T, exact."""

    n_experts: Any
    top_k: Any
    missed: Any
    """By one token, of one expert."""
    both_missed: Any
    """Of two different ones."""
    load: Any
    """Of one token, and its spread."""
    load_spread: Any

    def __call__(self, tokens: Any) -> Touched:
        """For numbers or arrays of T."""
        missed = self.missed**tokens
        apart = missed - self.both_missed**tokens
        # abs: rounding may leave -0.0...1, whose root would be complex.
        load = tokens * self.load
        return Touched(1 - missed, abs(apart), load, tokens * self.load_spread, load)


def uniform(n_experts: Any, top_k: Any) -> UniformTouched:
    """Two experts are both missed by a token with probability (E-K)(E-K-1) / (E (E-1)); dimensions may be
    arrays."""
    others, left, load = most(n_experts - 1, 1), n_experts - top_k, top_k / n_experts
    # K = E - 1 leaves no second expert to miss, and K = E none at all.
    both = left * most(left - 1, 0) / (n_experts * others)
    return UniformTouched(n_experts, top_k, 1 - load, both, load, load * left / others)


def touched(n_experts: Any, top_k: Any, tokens: Any, skew: float = 0.0) -> Touched:
    """The moments from which the busiest rank follows, for numbers or arrays of T.

    Loads add up to T K whatever happens, so that their spread is (sum_i E[c_i^2] - (T K)^2 / E) / (E - 1),
    exact given pi. Uniform routing is exact. Skewed, two experts enter one token's choice with the covariance
    -pi_i (1 - pi_i) pi_j (1 - pi_j) / sum pi (1 - pi) (Hajek 1964, for samples of fixed size), which is
    taken to first order over T tokens.
    """
    if skew == 0:
        return uniform(n_experts, top_k)(tokens)
    others = max(n_experts - 1, 1)
    rates = inclusion_probabilities(n_experts, top_k, skew)
    each = np.asarray(tokens, dtype=np.float64)[..., None]
    missed = (1 - rates) ** each
    share = 1 - missed
    taken = (rates * (1 - rates)).sum()
    pulled = rates * missed
    pairs = n_experts * others
    apart = (share.sum(-1) ** 2 - (share**2).sum(-1)) / pairs
    if taken > 0:
        apart = apart - tokens * (pulled.sum(-1) ** 2 - (pulled**2).sum(-1)) / (pairs * taken)
    second = tokens * taken + tokens**2 * (rates**2).sum()
    spread = (second - (tokens * top_k) ** 2 / n_experts) / others
    mean = share.mean(-1)
    load = tokens * top_k / n_experts
    return Touched(mean, most(mean - apart, 0.0), load, most(spread, 0.0), tokens * rates.max())


@dataclass(frozen=True)
class TouchedTable:
    """`touched` of one skewed layer for any T, quickly: tabulated in equal steps of log2 T, linear between.

    Of 16 steps for a doubling; the share is off by less than 1e-3 (tested).
    """

    n_experts: int
    top_k: int
    share: tuple[float, ...]
    share_spread: tuple[float, ...]
    load_spread_linear: float
    """Of T, and of T^2: what the spread of loads is made of."""
    load_spread_square: float
    hottest: float
    """Of one token."""

    def __call__(self, tokens: Any) -> Touched:
        """As `touched`; T beyond the table (2^-4 to 2^22) is taken at its end."""
        load = tokens * self.top_k / self.n_experts
        spread = tokens * (self.load_spread_linear + tokens * self.load_spread_square)
        if isinstance(tokens, np.ndarray):
            place = (np.log2(np.maximum(tokens, 2.0**LEAST)) - LEAST) * STEPS
            at = np.arange(len(self.share))
            share, share_spread = np.interp(place, at, self.share), np.interp(place, at, self.share_spread)
            return Touched(share, share_spread, load, spread, tokens * self.hottest)
        last = (GREATEST - LEAST) * STEPS
        step = min(max((log2(tokens) - LEAST) * STEPS if tokens > 0 else 0.0, 0.0), last - 1e-6)
        low = int(step)
        right = step - low
        share = self.share[low] + right * (self.share[low + 1] - self.share[low])
        between = self.share_spread[low] + right * (self.share_spread[low + 1] - self.share_spread[low])
        return Touched(share, between, load, spread, tokens * self.hottest)


@cache
def touched_table(n_experts: int, top_k: int, skew: float) -> TouchedTable:
    """The table of one skewed layer."""
    tokens = 2 ** np.linspace(LEAST, GREATEST, (GREATEST - LEAST) * STEPS + 1)
    all_of_them = touched(n_experts, top_k, tokens, skew)
    rates = inclusion_probabilities(n_experts, top_k, skew)
    others, squares = max(n_experts - 1, 1), float((rates**2).sum())
    return TouchedTable(
        n_experts,
        top_k,
        tuple(all_of_them.share.tolist()),
        tuple(all_of_them.share_spread.tolist()),
        (top_k - squares) / others,
        max(squares - top_k**2 / n_experts, 0.0) / others,
        float(rates.max()),
    )


def expected_maximum_normal(n: Any) -> Any:
    """The largest of n independent standard normals, on average; 0 for n = 1. An array for an array.

    n integral of x phi(x) Phi(x)^(n-1) dx (David and Nagaraja 2003, Order Statistics, chapter 3), summed.
    """
    if isinstance(n, np.ndarray):
        distinct, where = np.unique(n, return_inverse=True)
        return np.array([_maximum_normal(int(one)) for one in distinct])[where].reshape(n.shape)
    return _maximum_normal(int(n))


@cache
def _maximum_normal(n: int) -> float:
    # By parts: 1 - F^n integrated over x > 0, less F^n over x < 0; at midpoints, where cumsum gives F.
    width = 1e-3
    x = (np.arange(20_000) + 0.5) * width - 10
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    below = np.clip(width * (np.cumsum(density) - density / 2), 0, 1)
    return float(width * np.where(x > 0, 1 - below**n, -(below**n)).sum()) if n > 1 else 0.0


def busiest_rank(n_experts: Any, top_k: Any, tokens: Any, ranks: Any, skew: float = 0.0) -> tuple[Any, Any]:
    """Expected (distinct experts, assignments) on the rank that has most of them, of R that share a layer.

    Ranks are exchangeable (popular experts lie where chance put them), and the largest of R exchangeable
    normals of mean m, variance v and covariance c is m + sqrt(v - c) times that of R independent standard
    normals; for a rank of n experts v - c is n times the spread in `touched`. Assignments are no fewer than
    those of the rank with the most popular expert, on average; neither exceeds what a rank can reach, n and
    T min(K, n). Tested against `exact_busiest_rank` and against simulation: within 5 % where a rank holds
    several experts; for the load of single experts see `most_loaded_expert`.
    """
    one, largest = touched(n_experts, top_k, tokens, skew), expected_maximum_normal(ranks)
    return busiest(one, n_experts, top_k, tokens, n_experts / ranks, largest)


def busiest(
    one: Touched, n_experts: Any, top_k: Any, tokens: Any, held: Any, largest: Any
) -> tuple[Any, Any]:
    """`busiest_rank` from the moments of one expert: a rank holds `held`, and `largest` is the largest of as
    many standard normals as there are ranks."""
    distinct = least(held * one.share + largest * (held * one.share_spread) ** 0.5, held)
    load = held * one.load + largest * (held * one.load_spread) ** 0.5
    others = (tokens * top_k - one.hottest) / most(n_experts - 1, 1)
    load = most(load, one.hottest + (held - 1) * others)
    return distinct, least(load, tokens * least(top_k, held))


def most_loaded_expert(n_experts: int, top_k: int, tokens: int, skew: float = 0.0) -> Floats:
    """P(no expert receives more than x of T tokens) for x = 0 .. T: [T + 1].

    The product over experts of the binomial P(c_i <= x) at pi_i, as if loads were independent. They are
    negatively associated, which makes the product the larger one (Joag-Dev and Proschan 1983, Negative
    association of random variables; Mallows 1968 for multinomial counts), and so the mean, the sum of
    1 - this, a lower bound.
    """
    rates = inclusion_probabilities(n_experts, top_k, skew)
    counts = np.arange(tokens + 1)
    choices = np.array([lgamma(tokens + 1) - lgamma(x + 1) - lgamma(tokens - x + 1) for x in counts])
    law = np.ones(tokens + 1)
    for rate, experts in zip(*np.unique(rates, return_counts=True), strict=True):
        if rate >= 1:
            cumulated = (counts == tokens) * 1.0
        else:
            logs = choices + counts * np.log(rate) + (tokens - counts) * np.log1p(-rate)
            cumulated = np.minimum(np.cumsum(np.exp(logs)), 1.0)
        law *= cumulated**experts
    return law


def exact_busiest_rank(n_experts: int, top_k: int, tokens: int, ranks: int) -> tuple[float, float]:
    """The same, uniform and exact, by enumerating every choice of every token: for small E, K and T.

    States are merged where experts of a rank, and ranks, are interchanged. Raises ValueError where E is no
    multiple of R.
    """
    if n_experts % ranks:
        raise ValueError(f"{n_experts} experts do not lie evenly on {ranks} ranks; give a divisor")
    held = n_experts // ranks
    choices = list(combinations(range(n_experts), top_k))
    states: Counter[tuple[tuple[int, ...], ...]] = Counter({((0,) * held,) * ranks: 1})
    for _ in range(tokens):
        after: Counter[tuple[tuple[int, ...], ...]] = Counter()
        for state, ways in states.items():
            for choice in choices:
                loads = [list(rank) for rank in state]
                for expert in choice:
                    loads[expert // held][expert % held] += 1
                after[tuple(sorted(tuple(sorted(rank)) for rank in loads))] += ways
        states = after
    total = comb(n_experts, top_k) ** tokens
    distinct = sum(ways * max(sum(n > 0 for n in rank) for rank in state) for state, ways in states.items())
    load = sum(ways * max(map(sum, state)) for state, ways in states.items())
    return distinct / total, load / total


def balance_loss_at_uniform(top_k: int, balance: Literal["switch", "huggingface", "sequence"]) -> int:
    """The balance loss when all loads f_i are equal, whatever P (and when all P_i are equal, whatever f).

    switch (arXiv 2101.03961, eq. 4, with f_i = c_i / (T K)) and sequence (DeepSeek-V3, arXiv 2412.19437,
    eq. 17-20): 1. huggingface (f_i = c_i / T): K. It is no minimum: with E = 2, K = 1, three quarters of the
    tokens at P = (1/2, 1/2) that choose the first expert, and the others at (0, 1), switch gives 7/8.
    """
    return top_k if balance == "huggingface" else 1


def balance_loss_at_collapse(
    n_experts: int, top_k: int, balance: Literal["switch", "huggingface", "sequence"]
) -> float:
    """The largest possible balance loss: all tokens choose the same K experts, which hold all probability.

    From f_i <= 1/K and sum_i P_i = 1: E / K for switch and sequence; E for huggingface.
    """
    return n_experts / (1 if balance == "huggingface" else top_k)
