"""Batching, speculation and prices: closed forms against simulation, and the leak's figures worked out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.spec import Architecture, load
from harness.spec.architecture import Attention, FeedForward, Moe
from harness.spec.hardware import load_hardware
from harness.theory import batching, parameters, serving, speculation
from harness.theory.inference import Pricer, decode, pipeline_times, pricer
from harness.theory.layout import Layout
from harness.theory.precision import precision

lengths = st.lists(st.integers(1, 20), min_size=1, max_size=30)
slots = st.integers(1, 8)
acceptance = st.floats(0.01, 0.99)


def test_the_leaked_example_ends_four_and_seven() -> None:
    """In 4 slots and 8 iterations static batching ends 4 of 7 requests, continuous batching all of them."""
    outputs, horizon = batching.EXAMPLE_OUTPUTS, batching.EXAMPLE_ITERATIONS
    static = batching.static(outputs, batching.EXAMPLE_SLOTS)
    continuous = batching.continuous(outputs, batching.EXAMPLE_SLOTS)
    assert (static.ended(horizon), continuous.ended(horizon)) == (4, 7)
    assert (static.iterations, continuous.iterations) == (12, 8)
    assert (static.occupancy, continuous.occupancy) == (pytest.approx(2 / 3), 1.0)


@given(lengths, slots)
def test_continuous_batching_stays_within_its_bounds(outputs: list[int], width: int) -> None:
    """It lies between Graham's bounds, never after static batching, and never has more than b running."""
    static, continuous = batching.static(outputs, width), batching.continuous(outputs, width)
    low, high = batching.continuous_bounds(outputs, width)
    assert low <= continuous.iterations <= high + 1e-9  # rounding of a quotient
    assert continuous.iterations <= static.iterations
    assert 0 < static.occupancy <= continuous.occupancy <= 1
    for one in (static, continuous):
        starts = [end - length for end, length in zip(one.ends, outputs, strict=True)]
        for moment in range(one.iterations):
            running = sum(a <= moment < b for a, b in zip(starts, one.ends, strict=True))
            assert running <= width
        assert min(starts) == 0
        assert one.ended(one.iterations) == len(outputs)
    if width == 1:
        assert static == continuous


@pytest.mark.parametrize("width", [1, 4, 16])
def test_static_occupancy_is_what_long_runs_have(width: int) -> None:
    """E[l] / E[max of b] is the occupancy, and b / E[max] the rate, of 40,000 requests of drawn lengths."""
    law = batching.geometric(20, 100)
    assert sum(law.values()) == pytest.approx(1)
    generator = np.random.default_rng(4)
    drawn = generator.choice(list(law), p=list(law.values()), size=40_000).tolist()
    played = batching.static(drawn, width)
    # Relative deviation of a mean of 40,000 / 16 = 2,500 maxima (deviation below 0.5 of the mean): 1 %; four.
    assert played.occupancy == pytest.approx(batching.static_occupancy(law, width), rel=0.04)
    rate = batching.requests_per_iteration(law, width, static_batches=True)
    assert len(drawn) / played.iterations == pytest.approx(rate, rel=0.04)
    rate = batching.requests_per_iteration(law, width)
    assert len(drawn) / batching.continuous(drawn, width).iterations == pytest.approx(rate, rel=0.04)


def test_the_longest_of_a_batch_is_enumerated() -> None:
    """E[max of b] is the mean over all b-tuples of lengths; equal lengths waste nothing."""
    law = {1: 0.5, 3: 0.25, 8: 0.25}
    tuples = itertools.product(law, repeat=3)
    expected = sum(max(one) * law[one[0]] * law[one[1]] * law[one[2]] for one in tuples)
    assert batching.mean_longest(law, 3) == pytest.approx(expected)
    assert batching.mean_longest(law, 1) == pytest.approx(batching.mean_length(law))
    assert batching.static_occupancy({7: 1.0}, 32) == 1


@pytest.mark.parametrize(("outputs", "width"), [([], 4), ([3, 0], 4), ([3], 0)])
def test_batches_of_nothing_are_refused(outputs: list[int], width: int) -> None:
    """No requests, none of a token, or no slots are a sentence with the numbers."""
    for run in (batching.static, batching.continuous, batching.continuous_bounds):
        with pytest.raises(ValueError, match=f"in {width} slots; give at least one"):
            run(outputs, width)
    with pytest.raises(ValueError, match="below the one that each request has"):
        batching.geometric(0.5, 10)


@pytest.mark.parametrize(("chance", "length"), [(0.6, 3), (0.8, 5), (0.9, 8)])
def test_accepted_tokens_are_those_of_a_simulation(chance: float, length: int) -> None:
    """The closed form of tokens per round is the mean of 20,000 rounds of independent acceptances."""
    generator = np.random.default_rng(7)
    stands = generator.random((20_000, length)) < chance
    tokens = 1 + np.cumprod(stands, axis=1).sum(axis=1)
    error = tokens.std() / np.sqrt(len(tokens))
    assert abs(tokens.mean() - speculation.expected_tokens(chance, length)) < 4 * error


@given(acceptance, st.integers(0, 12), st.floats(0, 0.5))
def test_speed_up_is_theorem_3_8(chance: float, length: int, cost: float) -> None:
    """It is (1 - a^(g+1)) / ((1 - a) (g c + 1)), at most g + 1, and operations never fall."""
    found = speculation.speed_up(chance, length, cost)
    formula = (1 - chance ** (length + 1)) / ((1 - chance) * (length * cost + 1))
    assert found == pytest.approx(formula, rel=1e-9)  # the same in other terms
    assert found <= length + 1
    assert found == pytest.approx(speculation.speed_up_at(chance, length, lambda _: 1.0, cost))
    assert speculation.operations(chance, length, cost) >= 1


@given(acceptance, st.floats(0.01, 0.4))
def test_the_best_length_is_where_its_acceptances_say(chance: float, cost: float) -> None:
    """The g of most tokens per second is the one between whose thresholds the acceptance lies."""
    one_round: Callable[[int], float] = speculation.round_seconds(lambda _: 1.0, cost)
    best = speculation.best_length(chance, one_round, longest=400)
    between = speculation.acceptances_for_length(best, one_round)
    assert between is not None
    low, high = between
    assert low - 1e-9 <= chance <= high + 1e-9  # bisection to 1e-18, and rounding of powers


def test_a_draft_of_four_is_best_between_two_acceptances() -> None:
    """With drafts of 5 % of a step, 4 is best for acceptances of 0.54 to 0.63; of a whole step, for none."""
    low, high = speculation.acceptances_for_length(4, lambda g: 1 + 0.05 * g) or (0, 0)
    assert (round(low, 2), round(high, 2)) == (0.54, 0.63)
    assert speculation.best_length(0.6, lambda g: 1 + 0.05 * g) == 4
    # From 3 to 4 such a round grows by a quarter, and tokens by a^4 / (1 + a + a^2 + a^3), less than that.
    assert speculation.acceptances_for_length(4, lambda g: 1.0 + g) is None
    assert speculation.best_length(0.99, lambda g: 1.0 + g) == 0


def of_batch(target: Pricer, draft: Pricer, length: int, context: int) -> Callable[[int], float]:
    """Speed-up by batch at an acceptance of 0.8."""

    def at(batch: int) -> float:
        step = draft.of(decode(draft.architecture, batch, context))
        return speculation.speed_up_at(
            0.8, length, lambda n: target.of(decode(target.architecture, batch, context, n)), step
        )

    return at


def served(name: str) -> Pricer:
    """On 8 H100 at the data sheet's rates."""
    return pricer(
        load(name).architecture, load_hardware("h100"), Layout(tensor_parallel=8), precision("bfloat16")
    )


def test_speculation_stops_paying_at_a_batch() -> None:
    """A dense model gains at one sequence and loses where compute bounds; the batch in between is found."""
    gain = of_batch(served("llama-3.1-70b"), served("llama-3.1-8b"), 4, 2048)
    batch = speculation.break_even_batch(gain)
    assert batch is not None
    assert gain(1) > 1.5
    assert gain(batch) <= 1 < gain(batch - 1)
    # Five tokens of a sequence reach the ridge at a fifth of its 295 tokens, and from there cost ever more.
    ridge = serving.compute_bound_batch(989.4e12, 3.35e12, 2)
    assert ridge / 5 < batch < ridge
    assert speculation.break_even_batch(lambda _: 1.5) is None
    assert speculation.break_even_batch(lambda _: 0.5) == 1


def test_experts_delay_what_speculation_gains() -> None:
    """Speculation gains less at one sequence than at eight with experts, and pays to larger batches.

    A verification of one sequence touches more of them than a step; once all are read, it touches no more.
    """
    draft = served("llama-3.1-8b")
    experts = of_batch(served("mixtral-8x22b"), draft, 4, 2048)
    dense = of_batch(served("llama-3.1-70b"), draft, 4, 2048)
    assert experts(1) < experts(8)
    assert dense(1) > dense(8)
    found = [speculation.break_even_batch(gain) for gain in (experts, dense)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0] > found[1]


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(1, 1e4), st.floats(1, 1e4))
def test_a_requests_cost_is_that_of_its_parts(fast: float, slow: float, prompt: float, output: float) -> None:
    """Input and output at their own prices add up to the rent of a request, and blend to its mean."""
    inward, outward = (serving.cost_per_1k_tokens(8, 2.0, rate) for rate in (fast, slow))
    whole = serving.cost_of_request(8, 2.0, prompt, output, fast, slow)
    assert whole == pytest.approx(inward * prompt / 1000 + outward * output / 1000)
    blend = serving.blended_cost_per_1k(inward, outward, prompt, output)
    assert blend * (prompt + output) / 1000 == pytest.approx(whole)
    assert min(inward, outward) * (1 - 1e-9) <= blend <= max(inward, outward) * (1 + 1e-9)
    assert outward / inward == pytest.approx(serving.output_over_input_cost(fast, slow))


@given(st.floats(0.01, 1), st.floats(0, 0.9))
def test_idle_time_is_paid_by_the_tokens_served(load_: float, reused: float) -> None:
    """Half the load doubles the cost without reuse; reuse of all idle time would leave it as it is."""
    factor = serving.cost_factor_at_load(load_, reused)
    assert 1 <= factor <= 1 / load_ + 1e-12
    assert serving.load_at_cost_factor(factor, reused) == pytest.approx(load_)
    assert serving.load_at_cost_factor(2) == 0.5
    assert serving.cost_factor_at_load(load_, 1.0) == pytest.approx(1)
    assert serving.load_of_day([1.0] * 12 + [0.0] * 12) == 0.5


LEAK = Architecture(
    d_model=10_752,
    n_layers=120,
    vocab_size=100_352,
    max_positions=8192,
    positions="learned",
    attention=Attention(n_heads=96, n_kv_heads=96, head_dim=112),
    moe=Moe(n_experts=16, top_k=2, expert=FeedForward(d_ff=43_008, gated=False, activation="gelu")),
    dtype="float16",
)
"""Widths that give the leaked 16 x 111e9 + 55e9 parameters."""


def test_the_leaked_price_is_a_throughput() -> None:
    """0.0049 USD at 1 USD an hour is 7,256 tokens/s on 128 A100, a tenth of their FLOP/s.

    0.0021 USD at 2 USD an hour is 33,862 tokens/s on 128 H100, at 1 USD half as many.
    """
    rate = serving.tokens_per_second_at_cost(128, 1.0, 0.0049)
    assert round(rate) == 7256
    assert round(rate / 128, 1) == 56.7
    assert round(rate * 2 * parameters.active(LEAK) / (128 * 312e12), 2) == 0.10
    assert round(serving.tokens_per_second_at_cost(128, 2.0, 0.0021)) == 33_862
    assert round(serving.tokens_per_second_at_cost(128, 1.0, 0.0021)) == 16_931


def test_the_leaked_price_needs_microbatches_of_a_hundred() -> None:
    """A stage of 8 A100 reads its weights in 14 ms: 7,256 tokens/s are about 100 sequences a stage.

    Each of the 1,600 in flight then gets 4.4 tokens/s.
    """
    layout: dict[str, Any] = {"tensor_parallel": 8, "pipeline_parallel": 16}
    one = pricer(LEAK, load_hardware("a100-80gb"), Layout(**layout), precision("float16"))
    stage = serving.weight_bytes_per_device(parameters.total(LEAK), 2, 8, 16) / 2.039e12
    assert round(1e3 * stage, 1) == 14.0
    rate = serving.tokens_per_second_at_cost(128, 1.0, 0.0049)
    assert round(rate * stage) == 102
    assert round(1 / (16 * stage), 1) == 4.4
    found = pipeline_times(one, decode(LEAK, 1600, 0), 16)
    # Seven or eight layers a stage (120 / 16), and the all-reduces: slower than weights alone, by a fifth.
    assert stage < found.slowest < 1.2 * stage
    assert 0.8 * rate < found.tokens_per_second < rate


def test_the_leaked_reading_speeds_take_two_tokens_a_word() -> None:
    """250 and 1,000 words a minute are 8.33 and 33.33 tokens/s only at two tokens a word."""
    for words, tokens in ((250, 8.33), (1000, 33.33)):
        assert serving.tokens_per_word(words, tokens) == pytest.approx(
            2, abs=0.001
        )  # printed to 0.01 tokens/s
        assert serving.reading_tokens_per_second(words, 2) == pytest.approx(tokens, abs=0.005)


def test_a_dense_trillion_is_not_read_fast_enough() -> None:
    """8 H100 read 1e12 parameters 13 times a second in 16 bits, and 27 times in 8.

    33.33 tokens/s leave 402e9, or 302e9 at three quarters of the bandwidth; 20 use half a percent of FLOP/s.
    """
    hardware = load_hardware("h100")
    bandwidth, peak = hardware.bandwidth.value, hardware.peak_flops("bfloat16")
    assert round(serving.weight_bound_tokens_per_second(2e12, 8, bandwidth), 1) == 13.4
    assert round(serving.weight_bound_tokens_per_second(1e12, 8, bandwidth), 1) == 26.8
    most = serving.parameters_at_tokens_per_second(1000 / 30, 8, bandwidth, 2)
    assert round(most / 1e9) == 402
    assert round(0.75 * most / 1e9) == 302
    assert 20 * 2e12 / (8 * peak) < 0.006
    assert serving.weight_bound_tokens_per_second(2 * most, 8, bandwidth) == pytest.approx(1000 / 30)


def test_the_leaked_intensities_are_of_one_byte_a_weight() -> None:
    """Batches of 256 and 512 are 512 and 1,024 FLOP per byte in 8 bits, half of that in 16."""
    assert [serving.flops_per_weight_byte(batch, 1) for batch in (256, 512)] == [512, 1024]
    assert [serving.flops_per_weight_byte(batch, 2) for batch in (256, 512)] == [256, 512]
    # Two of sixteen experts: eight times the batch of a dense model turns them to compute.
    ratio = serving.compute_bound_batch(1e15, 1e12, 2, 16, 2) / serving.compute_bound_batch(1e15, 1e12, 2)
    assert ratio == 8
