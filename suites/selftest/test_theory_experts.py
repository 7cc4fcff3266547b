"""What a batch does to a layer's experts: closed forms against enumeration where it is small, against seeded
simulation where it is not."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.theory import routing

ROUNDS = 2_000
"""Simulated batches; a mean's standard error is its sample deviation over sqrt(2,000), 2.2 % of that."""


def simulated(
    n_experts: int, top_k: int, tokens: int, ranks: int, skew: float, rounds: int = ROUNDS
) -> dict[str, tuple[float, float]]:
    """Mean and standard error of what rounds of Gumbel top-k (Plackett-Luce, popularity i^-s) give."""
    generator = np.random.default_rng(20_261_122)
    logits = -skew * np.log(np.arange(1, n_experts + 1))
    seen: dict[str, list[float]] = {"distinct": [], "rank distinct": [], "rank load": [], "expert load": []}
    for _ in range(rounds):
        keys = logits + generator.gumbel(size=(tokens, n_experts))
        chosen = np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k]
        loads = np.bincount(chosen.ravel(), minlength=n_experts)
        by_rank = generator.permutation(loads).reshape(ranks, -1)
        seen["distinct"].append((loads > 0).sum())
        seen["rank distinct"].append((by_rank > 0).sum(1).max())
        seen["rank load"].append(by_rank.sum(1).max())
        seen["expert load"].append(loads.max())
    return {name: (float(np.mean(x)), float(np.std(x)) / math.sqrt(rounds)) for name, x in seen.items()}


def test_distinct_experts_are_those_of_every_choice_written_out() -> None:
    """The uniform closed form is the mean over all choices of all tokens."""
    for n_experts, top_k, tokens in ((4, 2, 3), (5, 1, 4), (6, 3, 2), (3, 3, 2)):
        choices = list(combinations(range(n_experts), top_k))
        counts = [len(set().union(*batch)) for batch in product(choices, repeat=tokens)]
        expected = routing.expected_distinct_experts(n_experts, top_k, tokens)
        assert expected == pytest.approx(sum(counts) / len(counts), rel=1e-12)  # both exact but for rounding


def test_the_spread_of_touched_experts_is_that_of_every_choice() -> None:
    """Variance less covariance, of touched experts and of loads, is that of all choices written out."""
    n_experts, top_k, tokens = 5, 2, 3
    choices = list(combinations(range(n_experts), top_k))
    loads = np.array(
        [
            np.bincount([expert for one in batch for expert in one], minlength=n_experts)
            for batch in product(choices, repeat=tokens)
        ]
    )
    moments = routing.touched(n_experts, top_k, tokens)
    for x, spread in ((loads > 0, moments.share_spread), (loads, moments.load_spread)):
        covariance = np.cov(x[:, :2].astype(float), rowvar=False, bias=True)
        assert covariance[0, 0] - covariance[0, 1] == pytest.approx(spread, rel=1e-9)  # rounding of sums


@pytest.mark.parametrize(
    ("n_experts", "top_k", "tokens", "skew"),
    [(8, 2, 12, 0.0), (16, 4, 8, 0.7), (64, 8, 16, 1.0), (256, 8, 32, 1.2), (128, 1, 64, 0.5)],
)
def test_distinct_experts_of_skewed_routing_are_those_simulated(
    n_experts: int, top_k: int, tokens: int, skew: float
) -> None:
    """The skewed closed form is within 1 % of a simulation of draws without replacement."""
    mean, error = simulated(n_experts, top_k, tokens, 1, skew)["distinct"]
    expected = n_experts * routing.touched(n_experts, top_k, tokens, skew).share
    # 1 %: fixing the time of the K-th ring; four standard errors: one false alarm in 16,000.
    assert abs(expected - mean) < 0.01 * mean + 4 * error


@pytest.mark.parametrize(
    ("n_experts", "top_k", "tokens", "ranks"),
    [(4, 1, 4, 2), (6, 2, 4, 3), (8, 2, 3, 4), (8, 2, 5, 2), (8, 1, 6, 4), (6, 3, 3, 2)],
)
def test_the_busiest_rank_is_near_the_enumerated_one(
    n_experts: int, top_k: int, tokens: int, ranks: int
) -> None:
    """For a few tokens, the normal's worst case, the closed form is within 7 % of the exact mean."""
    exact = routing.exact_busiest_rank(n_experts, top_k, tokens, ranks)
    found = routing.busiest_rank(n_experts, top_k, tokens, ranks)
    for one, true in zip(found, exact, strict=True):
        assert abs(one / true - 1) < 0.07  # a normal in place of counts of one to six


@pytest.mark.parametrize(
    ("n_experts", "top_k", "tokens", "ranks", "skew"),
    [
        (256, 8, 8, 8, 0.0),
        (256, 8, 256, 32, 0.0),
        (128, 8, 128, 4, 1.0),
        (64, 8, 16, 8, 0.5),
        (256, 8, 64, 8, 1.0),
        (256, 8, 512, 32, 1.0),
    ],
)
def test_the_busiest_rank_is_near_the_simulated_one(
    n_experts: int, top_k: int, tokens: int, ranks: int, skew: float
) -> None:
    """Distinct experts and assignments of the busiest rank are within 7 % of a simulation."""
    seen = simulated(n_experts, top_k, tokens, ranks, skew, rounds=500)
    distinct, load = routing.busiest_rank(n_experts, top_k, tokens, ranks, skew)
    for found, name in ((distinct, "rank distinct"), (load, "rank load")):
        mean, error = seen[name]
        assert abs(found - mean) < 0.07 * mean + 4 * error  # popular experts make the loads' law no normal


def test_the_most_loaded_expert_is_bounded_by_independent_loads() -> None:
    """Its mean under independence is at most the enumerated one, and at least nine tenths of it."""
    for n_experts, top_k, tokens in ((4, 2, 3), (8, 2, 4), (8, 1, 6), (6, 3, 3)):
        exact = routing.exact_busiest_rank(n_experts, top_k, tokens, n_experts)[1]
        law = routing.most_loaded_expert(n_experts, top_k, tokens)
        assert law[-1] == pytest.approx(1)  # all T tokens at most: certain, but for rounding
        assert 0.9 * exact < (1 - law).sum() <= exact
    mean, error = simulated(64, 4, 128, 64, 0.8)["expert load"]
    assert abs((1 - routing.most_loaded_expert(64, 4, 128, 0.8)).sum() - mean) < 0.02 * mean + 4 * error


def test_eight_tokens_seldom_all_choose_one_of_sixteen_experts() -> None:
    """With 2 of 16 experts, some expert gets all 8 tokens of a batch about once in a million batches."""
    law = routing.most_loaded_expert(16, 2, 8)
    # Union bound: 16 (1/8)^8; two experts can both get all 8, so the sum is a little less.
    assert 1 - law[7] == pytest.approx(16 / 8**8, rel=1e-3)
    assert 1 - law[3] > 0.1  # while four of one expert are common


@given(st.integers(2, 64), st.data(), st.floats(0, 2), st.integers(0, 300))
def test_routing_moments_keep_their_bounds(
    n_experts: int, data: st.DataObject, skew: float, tokens: int
) -> None:
    """Shares are probabilities, no larger than under uniform routing, and grow with the tokens.

    Loads add up, and the busiest rank has no less than the mean and no more than it can hold.
    """
    top_k = data.draw(st.integers(1, n_experts))
    rates = routing.inclusion_probabilities(n_experts, top_k, skew)
    assert rates.sum() == pytest.approx(top_k)  # bisection to float precision
    one, more = (routing.touched(n_experts, top_k, n, skew) for n in (tokens, tokens + 1))
    even = routing.touched(n_experts, top_k, tokens)
    slack = 1e-9  # rounding of sums over experts
    assert -slack <= one.share <= even.share + slack <= 1 + 2 * slack
    assert one.share <= more.share + slack
    assert one.load * n_experts == pytest.approx(tokens * top_k)
    ranks = data.draw(st.sampled_from([n for n in range(1, n_experts + 1) if n_experts % n == 0]))
    distinct, load = routing.busiest_rank(n_experts, top_k, tokens, ranks, skew)
    assert n_experts / ranks * one.share - slack <= distinct <= n_experts / ranks + slack
    assert tokens * top_k / ranks - 1e-6 <= load <= tokens * min(top_k, n_experts / ranks) + 1e-6


def test_a_table_of_skewed_routing_is_the_function() -> None:
    """Between its points a table is within 1e-3 of the share and 2e-3 of the spread, of arrays too."""
    table = routing.touched_table(128, 8, 0.8)
    tokens = np.geomspace(0.5, 1e5, 91)
    exact, found = routing.touched(128, 8, tokens, 0.8), table(tokens)
    assert np.abs(found.share - exact.share).max() < 1e-3  # linear in log T, 16 points a doubling
    assert np.abs(found.share_spread - exact.share_spread).max() < 2e-3
    np.testing.assert_allclose(found.load_spread, exact.load_spread, rtol=1e-9)  # the same polynomial
    for i in (0, 40, 90):
        one = table(float(tokens[i]))
        assert one.share == pytest.approx(found.share[i])
        assert one.share_spread == pytest.approx(found.share_spread[i])
    assert table(0.0).share < 0.01  # beyond the table's end


def test_the_largest_of_normals_is_tabulated_right() -> None:
    """Maxima of 2 and 3 standard normals are 1 / sqrt(pi) and 3 / (2 sqrt(pi)); arrays keep their shape."""
    found = routing.expected_maximum_normal(np.array([[1, 2], [3, 2]]))
    expected = np.array([[0, 1], [1.5, 1]]) / math.sqrt(math.pi)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # midpoints of width 1e-3: error of order 1e-7
    assert routing.expected_maximum_normal(8) == pytest.approx(
        1.42360, abs=1e-5
    )  # Harter 1961, Expected values of normal order statistics


@pytest.mark.parametrize(("n_experts", "top_k", "skew"), [(4, 5, 0.0), (4, 0, 0.0), (4, 2, -1.0)])
def test_impossible_routing_is_refused(n_experts: int, top_k: int, skew: float) -> None:
    """More choices than experts, none at all, or a negative skew are a sentence with the numbers."""
    with pytest.raises(ValueError, match=f"top {top_k} of {n_experts} experts"):
        routing.inclusion_probabilities(n_experts, top_k, skew)
