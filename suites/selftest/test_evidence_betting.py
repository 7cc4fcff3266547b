"""Bets: right samplers are left alone, wrong ones are found soon, and every verdict has its distance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.random import Generator, default_rng

from harness.evidence.betting import (
    CONCENTRATIONS,
    RUN_ALPHA,
    Adjacency,
    Betting,
    Floats,
    Repetition,
    TwoSamples,
    dirichlet_bets,
    radius,
    share_of,
    tilt,
)

PEAKED = np.array([0.5, 0.2, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01])
FLAT = np.full(8, 1 / 8)


def law(p: Floats) -> dict[int, float]:
    """As the classes take it."""
    return dict(enumerate(p.tolist()))


def draws(p: Floats, count: int, seed: int) -> list[int]:
    """Independent draws."""
    drawn: list[int] = default_rng(seed).choice(len(p), size=count, p=p).tolist()
    return drawn


def first_rejection(test: Betting | Repetition | Adjacency, outcomes: Sequence[int]) -> int | None:
    """How many draws it took."""
    return next((i for i, outcome in enumerate(outcomes, 1) if test.update(outcome)), None)


def wealths(p: Floats, true: Floats, runs: int, count: int, rng: Generator) -> tuple[Floats, Floats]:
    """[runs] greatest wealth and draws until 1 / RUN_ALPHA (infinite where never), many runs at a time."""
    outcomes = rng.choice(len(p), size=(count, runs), p=true)
    seen, wealth = np.zeros((runs, len(p))), np.ones((runs, len(CONCENTRATIONS)))
    greatest, stopped, row = np.ones(runs), np.full(runs, math.inf), np.arange(runs)
    for t, x in enumerate(outcomes):
        wealth *= dirichlet_bets(p[x], seen[row, x], t)
        seen[row, x] += 1
        now = wealth.mean(axis=1)
        np.maximum(greatest, now, out=greatest)
        stopped[(now >= 1 / RUN_ALPHA) & np.isinf(stopped)] = t + 1
    return greatest, stopped


def test_ten_thousand_clean_runs_raise_no_false_alarm() -> None:
    """Of 10,000 runs of 2,000 draws none is rejected at 1e-9, and few at larger alphas."""
    greatest, stopped = wealths(PEAKED, PEAKED, 10_000, 2_000, default_rng(0))
    assert np.isinf(stopped).all()
    for alpha in (0.1, 0.01, 0.001):
        alarms = int((greatest >= 1 / alpha).sum())
        # 4 standard deviations of a binomial above the most that is allowed
        assert alarms <= 10_000 * alpha + 4 * math.sqrt(10_000 * alpha)
    # a test that never bets would pass the above
    assert (greatest >= 10).any()


def alternatives(p: Floats) -> dict[str, Floats]:
    """Laws at total variation 0.1 from p [8]."""
    rng = default_rng(7)
    found = {}
    pair = p.copy()
    one, other = np.argsort(p)[-2:]
    pair[[one, other]] += [0.1, -0.1]
    found["from one token to another"] = pair
    spread = p + 0.1 * np.eye(8)[int(p.argmin())] - 0.1 * p
    found["towards a rare token"] = p + (spread - p) * 0.1 / (np.abs(spread - p).sum() / 2)
    while len(found) < 6:
        step = rng.dirichlet(np.ones(8)) - p
        law_there = p + step * 0.1 / (np.abs(step).sum() / 2)
        if (law_there > 0).all():
            found[f"random {len(found)}"] = law_there
    return found


@pytest.mark.parametrize("p", [PEAKED, FLAT], ids=["peaked", "flat"])
def test_a_total_variation_of_a_tenth_is_found_within_two_thousand_draws(p: Floats) -> None:
    """Every seeded run against every alternative stops within 2,000 draws at alpha = 1e-9."""
    for seed, (name, true) in enumerate(alternatives(p).items()):
        assert np.abs(true - p).sum() / 2 == pytest.approx(0.1)
        _, stopped = wealths(p, true, 20, 2_000, default_rng(seed))
        assert np.isfinite(stopped).all(), f"{name}: {stopped}"


def test_the_hardest_direction_takes_longer() -> None:
    """Half of the runs stop within 2,000 draws where every probability moves by a fifth of itself."""
    true = FLAT * np.array([1.2, 0.8] * 4)
    _, stopped = wealths(FLAT, true, 50, 4_000, default_rng(1))
    assert np.median(stopped) <= 2_000
    assert np.isfinite(stopped).all()


def test_one_run_is_the_many() -> None:
    """The class that is used and the simulation of it agree at every draw."""
    outcomes = draws(FLAT, 200, 3)
    test = Betting(law(PEAKED))
    seen, wealth = np.zeros(8), np.ones(len(CONCENTRATIONS))
    for t, x in enumerate(outcomes):
        wealth *= dirichlet_bets(np.asarray(PEAKED[x]), np.asarray(seen[x]), t)
        seen[x] += 1
        test.update(x)
        assert test.e_value == pytest.approx(wealth.mean(), rel=1e-9)
    assert test.rejected
    assert test.draws == 200


def test_an_impossible_outcome_rejects_at_once() -> None:
    """A token of probability 0 is no matter of alpha, and stays a rejection."""
    test = Betting({"a": 0.5, "b": 0.5, "c": 0.0})
    assert not test.update("a")
    assert test.update("c")
    assert test.impossible == "c"
    assert test.e_value == math.inf
    assert test.update("a")
    with pytest.raises(ValueError, match="has mass"):
        Betting({"a": 0.9})


def residual_law(residual: Floats) -> Floats:
    """What speculative sampling emits with target PEAKED, a flat draft, and this residual."""
    kept = np.minimum(PEAKED, FLAT)
    emitted: Floats = kept + (1 - kept.sum()) * residual / residual.sum()
    return emitted


def test_a_sampler_with_a_wrong_residual_is_rejected_and_a_right_one_is_not() -> None:
    """Speculative sampling whose residual is p instead of (p - q)+ is found; its distance is bounded."""
    right = Betting(law(PEAKED), alpha=share_of(4))
    true = residual_law(np.maximum(PEAKED - FLAT, 0))
    assert np.abs(true - PEAKED).max() < 1e-15
    assert first_rejection(right, draws(true, 5_000, 1)) is None
    assert right.tv().low == 0
    assert right.tv().high < 0.08
    wrong = Betting(law(PEAKED), alpha=share_of(4))
    broken = residual_law(PEAKED)
    outcomes = draws(broken, 5_000, 2)
    stopped = first_rejection(wrong, outcomes)
    assert stopped is not None
    assert stopped <= 2_000
    for x in outcomes[stopped:]:
        wrong.update(x)
    low, high = wrong.tv()
    assert 0 < low <= np.abs(broken - PEAKED).sum() / 2 <= high


def test_frequencies_stay_within_the_radius_at_all_times() -> None:
    """No more than alpha of the runs ever leave the radius, for few outcomes and many draws."""
    runs, alpha, p = 2_000, 0.2, np.array([0.5, 0.3, 0.2])
    counts, left = np.zeros((runs, 3)), np.zeros(runs, dtype=bool)
    for t, x in enumerate(default_rng(5).choice(3, size=(1_000, runs), p=p), 1):
        counts[np.arange(runs), x] += 1
        left |= np.abs(counts / t - p).sum(axis=1) / 2 > radius(t, 3, alpha)
    assert left.mean() <= alpha
    # Hoeffding's bound for one direction and one number of draws is a lower limit of any such radius
    assert radius(40_000, 9, RUN_ALPHA) > math.sqrt(math.log(1 / RUN_ALPHA) / 80_000)
    assert radius(40_000, 9, RUN_ALPHA) < 0.023
    assert radius(0, 9, RUN_ALPHA) == 1


def test_two_samples_of_one_law_are_left_alone() -> None:
    """Whatever the common law, wealth reaches 1 / alpha in no more than alpha of the runs."""
    runs, rng, row = 4_000, default_rng(11), np.arange(4_000)
    for p in (PEAKED, FLAT):
        seen, log = np.zeros((2, runs, 8)), np.zeros((runs, len(CONCENTRATIONS)))
        greatest = np.ones(runs)
        for t, (x, y) in enumerate(rng.choice(8, size=(300, 2, runs), p=p)):
            log += np.log1p(tilt(seen[0, row, x], seen[1, row, x], t))
            log += np.log1p(-tilt(seen[0, row, y], seen[1, row, y], t))
            seen[0, row, x] += 1
            seen[1, row, y] += 1
            np.maximum(greatest, np.exp(log).mean(axis=1), out=greatest)
        for alpha in (0.1, 0.01):
            assert (greatest >= 1 / alpha).sum() <= runs * alpha + 4 * math.sqrt(runs * alpha)
        assert (greatest > 2).any()


def test_two_samplers_that_differ_are_told_apart() -> None:
    """Without knowing either law, total variation 0.2 is found within 2,000 pairs and bounded."""
    other = FLAT + 0.05 * np.array([1, -1] * 4)
    test = TwoSamples(outcomes=8)
    pairs = list(zip(draws(FLAT, 6_000, 1), draws(other, 6_000, 2), strict=True))
    stopped = next((i for i, pair in enumerate(pairs, 1) if test.update(*pair)), None)
    assert stopped is not None
    assert stopped <= 2_000
    for pair in pairs[stopped:]:
        test.update(*pair)
    assert 0 < test.tv().low <= 0.2 <= test.tv().high
    same = TwoSamples(outcomes=8)
    for pair in zip(draws(FLAT, 6_000, 1), draws(FLAT, 6_000, 2), strict=True):
        assert not same.update(*pair)
    assert same.tv().low == 0
    assert same.tv().high < 0.15


def duplicated(outcomes: Sequence[int], distance: int) -> list[int]:
    """Every stream is given out twice, `distance` requests apart."""
    result: list[int] = []
    for start in range(0, len(outcomes), distance):
        result += [*outcomes[start : start + distance]] * 2
    return result


@pytest.mark.parametrize("distance", [1, 3, 8])
def test_streams_given_out_twice_are_found(distance: int) -> None:
    """Repeated draws have the right law one by one, and are found by what they repeat."""
    outcomes = duplicated(draws(PEAKED, 400, 4), distance)
    test = Repetition(law(PEAKED))
    stopped = first_rejection(test, outcomes)
    assert stopped is not None
    assert stopped <= 200
    assert test.distance == distance
    assert first_rejection(Betting(law(PEAKED)), outcomes) is None


def test_independent_draws_are_found_independent() -> None:
    """No alarm in 150 clean runs of either test, at 1e-9; few at 0.05."""
    alarms = 0
    for seed in range(150):
        outcomes = draws(PEAKED, 200, seed)
        strict, loose = Repetition(law(PEAKED)), Repetition(law(PEAKED), alpha=0.05, distances=(1, 2))
        assert first_rejection(strict, outcomes) is None
        assert first_rejection(Adjacency(), outcomes) is None
        alarms += first_rejection(loose, outcomes) is not None
    assert alarms <= 150 * 0.05 + 4 * math.sqrt(150 * 0.05)


def test_neighbours_that_repeat_are_found_without_a_law() -> None:
    """Duplicate streams of an unknown law are found among exchangeable draws, one stream for all is not."""
    stopped = first_rejection(Adjacency(), duplicated(draws(FLAT, 400, 4), 1))
    assert stopped is not None
    assert stopped <= 400
    assert first_rejection(Adjacency(), [1] * 400) is None
    assert first_rejection(Repetition(law(FLAT)), [1] * 400) is not None
