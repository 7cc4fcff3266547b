"""Runs: utilisation by convention, ramps, epochs, failures in closed form and event by event."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.planning.failing import Outcome, simulate
from harness.spec import Architecture, load
from harness.theory import failures, routing, training
from suites.selftest.test_theory_laws import architectures

FALSE_ALARM = 1e-6
"""Of one comparison of a simulated mean with its expectation, two-sided, if the mean is normal."""
Z = NormalDist().inv_cdf(1 - FALSE_ALARM / 2)
CYCLES = 10_000
"""Finished checkpoints of one simulated run: their mean is close to normal, and a case takes 0.1 s."""

times = st.floats(1e-2, 1e4)


# Utilisation -----------------------------------------------------------------------------------------------


def test_full_recomputation_is_megatrons_formula() -> None:
    """Hardware FLOPs of GPT-3 with full recomputation are 96 l h^2 (1 + s/6h + V/16lh) per token, exactly."""
    architecture, context = load("gpt3-175b").architecture, 2048
    layers, width, vocabulary = architecture.n_layers, architecture.d_model, architecture.vocab_size
    published = 96 * layers * width**2 + 16 * layers * width * context + 6 * vocabulary * width
    work = training.work_per_token(architecture, context, recompute="full")
    assert work.hardware == published  # arXiv 2104.04473, eq. 3, over B s; integers below 2**53


def test_selective_recomputation_repeats_two_products_of_attention() -> None:
    """Selective recomputation of GPT-3 costs 4 s^2 h FLOP per sequence and layer, full 4/3 of the layers."""
    architecture, context = load("gpt3-175b").architecture, 2048
    work = training.work_per_token(architecture, context, recompute="selective")
    assert work.recomputed == 4 * context * architecture.d_model * architecture.n_layers


@given(architectures(), st.integers(1, 40))
def test_recomputation_adds_to_hardware_and_never_to_the_model(
    architecture: Architecture, context: int
) -> None:
    """None <= selective <= full < one more forward pass, MFU as before, and HFU in the same proportion."""
    for attention in ("full", "causal"):
        work = {
            kind: training.work_per_token(architecture, context, recompute=kind, attention=attention)
            for kind in ("none", "selective", "full")
        }
        assert len({one.model for one in work.values()}) == 1
        assert work["none"].hardware == work["none"].model
        assert 0 == work["none"].recomputed < work["selective"].recomputed < work["full"].recomputed
        assert work["full"].recomputed < work["full"].forward
        # Rounding of two divisions.
        assert training.hfu(0.4, work["none"]) == pytest.approx(0.4, rel=1e-12)
        assert 0.4 < training.hfu(0.4, work["selective"]) < training.hfu(0.4, work["full"]) < 0.4 * 4 / 3
    full = training.work_per_token(architecture, context)
    assert full.model == training.flops_per_token(architecture, context, "forward-x3")


@pytest.mark.parametrize("name", ["llama-3.1-405b", "mixtral-8x7b", "deepseek-v3"])
def test_causal_attention_lowers_the_mfu_that_a_run_claims(name: str) -> None:
    """Counting admitted pairs alone halves the attention term, up to the diagonal."""
    architecture, context = load(name).architecture, 8192
    full, causal, none = (
        training.work_per_token(architecture, context).model,
        training.work_per_token(architecture, context, attention="causal").model,
        3 * training.forward_per_token(architecture, 0),
    )
    # (S + 1) / 2 S pairs: the diagonal is counted once.
    assert (causal - none) / (full - none) == pytest.approx((context + 1) / (2 * context), rel=1e-9)


def test_llama_3_utilisation_as_published() -> None:
    """A run at 400 TFLOP/s per H100, as Llama-3 405B on 16,384, has the 41 % MFU of its table 4."""
    architecture = load("llama-3.1-405b").architecture
    days = 15.6e12 * training.flops_per_token(architecture, 8192) / (16_384 * 400e12) / 86_400
    utilisation = training.run_mfu(
        architecture, context=8192, tokens=15.6e12, devices=16_384, peak_flops=989.4e12, days=days
    )
    # 400 is printed without decimals (0.1 %) and 41 % is 40.4 rounded up (1.4 %).
    assert utilisation == pytest.approx(0.41, rel=0.015)


# Batches and data ------------------------------------------------------------------------------------------


@given(st.floats(1e3, 1e6), st.floats(1.01, 1e3), st.floats(1e8, 1e12))
def test_a_ramp_takes_the_steps_of_its_batches(start: float, growth: float, tokens: float) -> None:
    """A linear ramp's steps are the integral of 1 / batch, and stages approach it from above."""
    end = start * growth
    ramp = training.Ramp(start, end, tokens)
    middles = (np.arange(200_000) + 0.5) / 200_000
    summed = float(np.mean(1 / (start + (end - start) * middles))) * tokens
    # The midpoint rule errs by (growth - 1)^2 / (12 n^2), below 1e-5 here; ln growth divides it further.
    assert ramp.steps == pytest.approx(summed, rel=1e-5)
    staged = [training.Ramp(start, end, tokens, stages).steps for stages in (1, 4, 64, 4096)]
    assert staged == sorted(staged, reverse=True)
    assert staged[-1] > ramp.steps
    assert staged[0] == pytest.approx(tokens / start, rel=1e-12)
    assert tokens / end < ramp.steps < tokens / start
    # A falling function's upper sum exceeds its integral by at most one stage of its whole fall.
    assert staged[-1] - ramp.steps <= tokens / 4096 * (1 / start - 1 / end)


def test_a_ramp_at_its_limits() -> None:
    """A ramp from b to b is no ramp, a run may not end within one, and the share of tokens is theirs."""
    flat = training.Ramp(4e6, 4e6, 1e9)
    assert flat.steps == 250
    assert flat.run_steps(5e9) == 1250
    ramp = training.Ramp(32e3, 3.2e6, 12e9)  # GPT-3, arXiv 2005.14165, appendix B
    assert ramp.share(300e9) == 0.04
    assert ramp.run_steps(300e9) == pytest.approx(ramp.steps + 288e9 / 3.2e6, rel=1e-12)
    # ln 100 / 0.99 times as many steps as at the full batch.
    assert ramp.steps == pytest.approx(12e9 / 3.2e6 * math.log(100) / 0.99, rel=1e-12)
    with pytest.raises(ValueError, match=r"a run of 1e\+09 tokens ends within a ramp of 1.2e\+10"):
        ramp.run_steps(1e9)
    with pytest.raises(ValueError, match="start to end"):
        training.Ramp(2, 1, 1)
    with pytest.raises(ValueError, match="at least 1 stage"):
        training.Ramp(1, 2, 1, 0)


def test_tokens_of_a_few_days_and_of_an_expert() -> None:
    """Three days of 95 see 3 % of the tokens; a batch of 60e6 gives each of 16 experts 7.5e6."""
    assert training.tokens_in(3, 13e12, 95) / 13e12 == pytest.approx(3 / 95, rel=1e-12)
    assert routing.tokens_per_expert(60e6, 16, 2) == 7.5e6


@given(st.floats(0, 1), st.floats(1, 50), st.floats(1, 50), st.floats(1e6, 1e14))
def test_a_mix_of_epochs_conserves_tokens(share: float, text: float, code: float, seen: float) -> None:
    """Distinct tokens times epochs are the tokens seen, lie in their range, and give the share back."""
    epochs = {"text": text, "code": code}
    parts = {"text": seen * (1 - share), "code": seen * share}
    unique = training.unique_tokens(parts, epochs)
    # Rounding of a division and a product.
    assert sum(unique[name] * epochs[name] for name in epochs) == pytest.approx(seen, rel=1e-12)
    low, high = training.unique_range(seen, epochs)
    assert low * (1 - 1e-12) <= sum(unique.values()) <= high * (1 + 1e-12)
    if abs(1 / text - 1 / code) > 1e-3:
        back = training.share_of_part(seen, sum(unique.values()), epochs, "code")
        # The difference of the inverse epochs divides rounding errors of 1e-15 by at least 1e-3.
        assert back == pytest.approx(share, abs=1e-11)


def test_shares_need_two_parts_that_differ() -> None:
    """With equal epochs, or a part that is not there, no share can be told."""
    for epochs, part in (
        ({"text": 2, "code": 2}, "code"),
        ({"text": 2, "code": 4}, "books"),
        ({"a": 1}, "a"),
    ):
        with pytest.raises(ValueError, match="want two parts of different epochs"):
            training.share_of_part(13e12, 5e12, epochs, part)


@given(st.floats(1, 1e3), st.floats(1e6, 1e13))
def test_repeated_tokens_are_worth_less_than_fresh_ones(epochs: float, unique: float) -> None:
    """One epoch is worth itself, more are worth more but less than fresh tokens, and at most 16.4 epochs."""
    worth = training.effective_tokens(unique, epochs)
    # Rounding near one epoch, where both sides agree.
    assert unique * (1 - 1e-12) <= worth <= unique * min(epochs, 16.4) * (1 + 1e-12)
    assert training.effective_tokens(unique, 1) == unique
    assert training.effective_tokens(unique, epochs + 1) > worth or epochs > 500  # by then below rounding


# Failures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mtbf", "printed"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_daly_interval_as_published(mtbf: float, printed: float) -> None:
    """Daly's own examples: C = 5 min, M = 24 h, 6 h and 15 min (captions of figures 3 to 5)."""
    digits = 1 if printed < 10 else 0
    assert round(float(failures.daly_interval(5, mtbf)), digits) == printed


@given(times, st.floats(1e-6, 0.1))
def test_daly_approximates_the_optimum_to_fourth_order(mtbf: float, ratio: float) -> None:
    """The exact optimum exceeds Daly's by s^4 / 270 of M, s = sqrt(2C/M), and Young's exceeds it by < C."""
    checkpoint = ratio * mtbf
    exact, daly = failures.optimal_interval(checkpoint, mtbf), failures.daly_interval(checkpoint, mtbf)
    s = math.sqrt(2 * ratio)
    # t/M = s - s^2/3 + s^3/36 + s^4/270 + O(s^5): the series of Lambert's W; below 1e-12 rounding.
    assert (exact - daly) / mtbf == pytest.approx(s**4 / 270, rel=s, abs=1e-12)
    assert exact < failures.young_interval(checkpoint, mtbf) < exact + checkpoint


@given(times, st.floats(1e-6, 50), st.floats(0, 2))
def test_the_optimum_is_the_largest_goodput(mtbf: float, ratio: float, restart: float) -> None:
    """No interval on a fine grid beats the optimum, whatever the restart; it lies between 0 and M."""
    checkpoint = ratio * mtbf
    best = failures.optimal_interval(checkpoint, mtbf)
    assert 0 < best <= mtbf
    grid = best * np.geomspace(0.01, 100, 401)
    grid = grid[grid < 500 * mtbf]  # exp overflows beyond 700
    values = failures.goodput(grid, checkpoint, mtbf, restart * mtbf)
    # Equality at the grid's middle, up to rounding.
    assert values.max() <= failures.best_goodput(checkpoint, mtbf, restart * mtbf) * (1 + 1e-9)


@given(times, st.floats(1e-5, 1), st.floats(0, 1))
def test_the_availability_interval_is_the_largest_availability(
    mtbf: float, ratio: float, restart: float
) -> None:
    """The closed form of arXiv 2410.18124 maximises the availability that it is derived from."""
    args = ratio * mtbf, mtbf, restart * mtbf
    best = failures.availability_interval(*args)
    values = failures.availability(best * np.geomspace(0.1, 10, 201), *args)
    # Equality at the grid's middle, up to rounding.
    assert values.max() <= failures.availability(best, *args) * (1 + 1e-12)


@given(times, st.floats(1e-3, 10), st.floats(1e-3, 10), st.floats(0, 10))
def test_goodput_is_a_share_that_only_falls(
    mtbf: float, interval: float, checkpoint: float, restart: float
) -> None:
    """Goodput lies in 0 .. 1, falls with checkpoint and restart, rises with M, and has no unit of time."""
    args = [interval * mtbf, checkpoint * mtbf, mtbf, restart * mtbf]
    value = failures.goodput(*args)
    assert 0 < value < interval / (interval + checkpoint)
    assert failures.goodput(args[0], args[1] * 1.1, args[2], args[3]) < value
    assert failures.goodput(args[0], args[1], args[2], args[3] + mtbf / 10) < value
    assert failures.goodput(args[0], args[1], args[2] * 1.1, args[3]) > value
    # Hours in place of seconds; rounding of exp at arguments up to 20.
    assert failures.goodput(*(one / 3600 for one in args)) == pytest.approx(value, rel=1e-12)


@given(times, st.floats(1e-6, 1e-3), st.floats(1e-6, 1e-3), st.floats(1e-6, 1e-3))
def test_rare_failures_cost_their_first_order(
    interval: float, checkpoint: float, rarity: float, restart: float
) -> None:
    """While C << t << M, goodput is 1 - C/t - t/2M - R/M up to the square of what is lost."""
    mtbf = interval / rarity
    args = interval, checkpoint * interval, mtbf, restart * mtbf
    lost = 1 - failures.goodput_first_order(*args)
    # Second-order terms have coefficients below 1 each.
    assert failures.goodput(*args) == pytest.approx(1 - lost, abs=2 * lost**2)


def test_failures_of_a_cluster_add_up() -> None:
    """Twice the devices fail twice as often; Llama-3's rate is one failure in 3.1 hours of its job."""
    rate = failures.LLAMA_3_RATE
    assert failures.mean_time_between_failures(2 * 16_384, rate) * 2 == pytest.approx(
        failures.mean_time_between_failures(16_384, rate), rel=1e-12
    )
    # 54 days x 24 h / 419 = 3.093 h, which the paper calls one in three hours.
    assert failures.mean_time_between_failures(16_384, rate) / 3600 == pytest.approx(54 * 24 / 419, rel=1e-12)


@pytest.mark.parametrize(
    ("devices", "checkpoint", "minutes", "goodput"),
    [(24_960, 10, 6.4, 0.874), (24_960, 60, 15.6, 0.808), (24_960, 300, 35, 0.681), (16_384, 10, 7.9, 0.908)],
)
def test_goodput_of_large_clusters(devices: int, checkpoint: float, minutes: float, goodput: float) -> None:
    """At Llama-3's failure rate and restarts of 10 min: figures worked by hand, and its own '> 90 %'."""
    mtbf = failures.mean_time_between_failures(devices, failures.LLAMA_3_RATE)
    interval = failures.young_interval(checkpoint, mtbf)
    # Half a unit of the last digit given.
    assert interval / 60 == pytest.approx(minutes, abs=0.5 if minutes == 35 else 0.05)
    assert failures.goodput(interval, checkpoint, mtbf, 600) == pytest.approx(goodput, abs=0.0006)


def test_impossible_times_are_refused() -> None:
    """A negative checkpoint, or no time between failures, is refused with the numbers."""
    with pytest.raises(ValueError, match="-1 s at 5 s between failures"):
        failures.optimal_interval(-1, 5)
    with pytest.raises(ValueError, match="interval 1, checkpoint 1, mtbf 0, restart 1 s"):
        run(1, 1, 0, 1)


def run(
    interval: float, checkpoint: float, mtbf: float, restart: float, seed: int = 0, cycles: int = CYCLES
) -> Outcome:
    """One simulated run."""
    return simulate(
        np.random.default_rng(seed),
        interval=interval,
        checkpoint=checkpoint,
        mtbf=mtbf,
        restart=restart,
        checkpoints=cycles,
    )


CASES = [
    (900, 60, 7200, 600),
    (300, 100, 1000, 0),
    (1000, 500, 1000, 800),
    (50, 1, 3600, 3600),
    (2, 0, 1, 0.5),
]
"""Interval, checkpoint, time between failures, restart, in seconds: rare and frequent failures."""


@pytest.mark.parametrize("case", CASES)
def test_closed_form_and_simulation_agree(case: tuple[float, float, float, float]) -> None:
    """Simulated goodput lies within Z standard errors of the closed form; all seconds are accounted for."""
    outcome = run(*case)
    # A false alarm once in 1e6 seeds if the mean were exactly normal; the seed is fixed, so it comes never or
    # always.
    assert abs(outcome.goodput - failures.goodput(*case)) < Z * outcome.standard_error
    parts = outcome.kept + outcome.saving + outcome.lost + outcome.restarting
    # Rounding of some 1e5 additions.
    assert parts == pytest.approx(outcome.seconds, rel=1e-9)
    # A Poisson count over the run's seconds, by its own normal bound.
    expected = outcome.seconds / case[2]
    assert abs(outcome.failures - expected) < Z * expected**0.5


@pytest.mark.parametrize("case", CASES[1:3])
def test_the_simulation_tells_other_models_apart(case: tuple[float, float, float, float]) -> None:
    """Refuted are closed forms where checkpoints cannot fail or restarts are free, and the first order."""
    interval, checkpoint, mtbf, restart = case
    outcome = run(*case)
    work = mtbf * math.exp(restart / mtbf) * math.expm1(interval / mtbf)
    others = [failures.goodput_first_order(*case), interval / (work + checkpoint)]
    if restart:
        others.append(failures.goodput(interval, checkpoint, mtbf, 0))
    assert [other for other in others if abs(outcome.goodput - other) < Z * outcome.standard_error] == []


def test_the_simulated_optimum_is_dalys() -> None:
    """Simulated goodput at Daly's interval is higher than at a third and three times of it, beyond noise."""
    checkpoint, mtbf, restart = 60, 7309, 600
    daly = float(failures.daly_interval(checkpoint, mtbf))
    at = [run(daly * factor, checkpoint, mtbf, restart, seed=i) for i, factor in enumerate((1 / 3, 1, 3))]
    for other in (at[0], at[2]):
        noise = math.hypot(at[1].standard_error, other.standard_error)
        assert at[1].goodput - other.goodput > Z * noise


def test_a_seed_gives_its_run_again() -> None:
    """The same seed gives the same run, another seed another; without failures nothing is lost."""
    assert run(*CASES[0], cycles=200) == run(*CASES[0], cycles=200)
    assert run(*CASES[0], cycles=200) != run(*CASES[0], seed=1, cycles=200)
    calm = run(100, 10, 1e12, 50, cycles=200)
    assert (calm.failures, calm.lost, calm.restarting) == (0, 0, 0)
    assert calm.goodput == pytest.approx(100 / 110, rel=1e-12)
