"""What the simulated server must agree with: queueing theory, closed forms, and the prices of theory.

Letters: N requests, g drafted tokens, a their acceptance.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from harness.cli import app, main
from harness.planning import outcome, scheduling
from harness.planning.deployment import Deployment, divided
from harness.planning.scheduling import Batching, Policy
from harness.planning.simulation import Record, simulate
from harness.planning.workload import Workload, arrivals, lengths, workload
from harness.spec import load
from harness.spec.hardware import load_hardware
from harness.theory import batching
from harness.theory.fitting import largest_batch
from harness.theory.inference import Pass, pipeline_times, steady_state
from harness.theory.precision import precision
from harness.theory.serving import cost_per_1k_tokens
from harness.theory.speculation import expected_tokens

SIGMAS = 5
"""Of a statistical bound: a normal law exceeds it once in 1.7e6 draws, and the seeds are fixed."""


POLICIES: tuple[Batching, ...] = ("static", "continuous")


class Constant:
    """Iterations of one second."""

    window = None

    def seconds(self, *_: float) -> float:
        """1."""
        return 1.0


class Counting:
    """Seconds that are one of the counts of a pass, by its place in `Pass`."""

    def __init__(self, place: int, window: int | None = None) -> None:
        self.place, self.window = place, window

    def seconds(self, *counts: float) -> float:
        """That count."""
        return (*counts, 0, 0)[self.place]


def deployed(name: str, gpus: int = 8, pipeline_parallel: int = 1, data_parallel: int = 1) -> Deployment:
    """A shipped spec on H100s."""
    layout = divided(gpus, pipeline_parallel=pipeline_parallel, data_parallel=data_parallel)
    return Deployment(load(name).architecture, load_hardware("h100"), layout, precision("fp8"))


def test_tokens_and_pairs_are_conserved() -> None:
    """All passes together hold each prompt once, g + 1 tokens a round, and the pairs of whole sequences."""
    sent = workload(200, "uniform:1-50", "uniform:1-30", rate=math.inf, seed=5)
    chunked = Policy(8, chunk=32, draft_length=2, acceptance=0.5)
    found = simulate(sent, Counting(0), chunked)
    assert found.filling == sent.prompts.sum()
    assert found.busy == found.filling + 3 * found.rounds.sum()
    left = sent.outputs - 1
    assert ((left / 3 <= found.rounds) & (found.rounds <= left)).all()
    found = simulate(sent, Counting(3), Policy(8, chunk=32))
    tokens = sent.prompts + left  # the last one is never fed
    assert found.busy == (tokens * (tokens + 1) // 2).sum()
    near = sum(min(token, 7) for whole in tokens.tolist() for token in range(1, whole + 1))
    assert simulate(sent, Counting(5, window=7), Policy(8, chunk=32)).busy == near


@pytest.mark.parametrize("kind", POLICIES)
def test_littles_law(kind: Batching) -> None:
    """The mean number of requests in slots is their rate times the mean time that one spends there."""
    sent = workload(500, "3", "uniform:1-20", rate=0.6, seed=2)
    found = simulate(sent, Constant(), Policy(6, kind))
    duration = found.ended.max()
    # In iterations of a second the server's own count of running requests is its integral over time.
    number, rate = found.running / duration, len(sent) / duration
    assert number == pytest.approx(rate * (found.ended - found.admitted).mean(), rel=1e-12)  # roundings


@pytest.mark.parametrize("load_", [0.3, 0.6, 0.8])
def test_one_slot_is_an_md1_queue(load_: float) -> None:
    """One slot and equal requests are M/D/1, with a wait of rho D / (2 (1 - rho)) (Pollaczek-Khinchine)."""
    found = simulate(workload(40_000, "1", "1", rate=load_, seed=7), Constant(), Policy(1))
    waits = found.admitted - found.sent
    means = waits.reshape(40, -1).mean(axis=1)  # batches of 1,000, much longer than a busy period
    error = means.std(ddof=1) / math.sqrt(len(means))
    assert abs(waits.mean() - load_ / (2 * (1 - load_))) < SIGMAS * error
    assert error < 0.1 * waits.mean()
    assert found.busy / found.ended.max() == pytest.approx(load_, rel=SIGMAS / math.sqrt(40_000))


def test_occupancy_is_that_of_the_closed_form() -> None:
    """Static batches of uniform lengths use E[l] / E[max] of the slots; continuous batching nearly all."""
    slots, batches, longest = 8, 3_000, 16
    law = dict.fromkeys(range(1, longest + 1), 1 / longest)
    sent = workload(slots * batches, "1", f"uniform:1-{longest}", rate=math.inf, seed=1)
    found = simulate(sent, Constant(), Policy(slots, "static"))
    share, closed = found.running / found.iterations / slots, batching.static_occupancy(law, slots)
    # The error of a ratio of means over batches, to first order.
    drawn = sent.outputs.reshape(batches, slots)
    apart = drawn.mean(axis=1) - closed * drawn.max(axis=1)
    error = apart.std() / math.sqrt(batches) / drawn.max(axis=1).mean()
    assert abs(share - closed) < SIGMAS * error < 0.02
    found = simulate(sent, Constant(), Policy(slots))
    # Slots are idle only at the end, while the last of them finishes.
    assert found.iterations - sent.outputs.sum() / slots < longest


@pytest.mark.parametrize(("acceptance", "length"), [(0.0, 3), (0.5, 1), (0.7, 4), (0.9, 8), (1.0, 4)])
def test_accepted_length_is_that_of_the_closed_form(acceptance: float, length: int) -> None:
    """Rounds decide (1 - a^(g+1)) / (1 - a) tokens on average (arXiv 2211.17192, eq. 1)."""
    tokens = 100_000
    sent = workload(1, "10", str(tokens + 1), rate=math.inf)
    policy = Policy(1, draft_length=length, acceptance=acceptance)
    rounds = int(simulate(sent, Constant(), policy, seed=4).rounds[0])
    expected = expected_tokens(acceptance, length)
    chances = [acceptance**i for i in range(1, length + 1)]
    square = 1 + sum((2 * i + 1) * chance for i, chance in enumerate(chances, 1))
    error = math.sqrt((square - expected**2) / rounds)
    # The last round is cut off: at most `length` tokens less.
    assert abs(tokens / rounds - expected) <= SIGMAS * error + length / rounds


@pytest.mark.parametrize("name", ["mixtral-8x7b", "llama-3.1-70b", "gpt-oss-120b", "deepseek-v3"])
@pytest.mark.parametrize("stages", [1, 2])
def test_iterations_cost_what_theory_says(name: str, stages: int) -> None:
    """The quick step time is `Pricer.of` of the same Pass, or the period of a pipeline's microbatches."""
    steps = deployed(name, 16, stages).steps(Policy(64))
    generator = np.random.default_rng(0)
    for size in (1, 10, 1_000):
        counts = [float(n) for n in generator.integers(1, 50 * size, size=8)]
        whole = Pass(*counts)
        closed = pipeline_times(steps.priced, whole, min(stages, counts[1])).period
        for _ in range(2):  # the second time what is remembered
            # A few roundings in another order.
            assert steps.seconds(*counts) == pytest.approx(float(closed), rel=1e-12)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "llama-3.1-70b", "gpt-oss-120b"])
def test_a_saturated_server_is_in_the_steady_state(name: str) -> None:
    """Where prompts are spread evenly over passes, one takes what `steady_state` says of its batch."""
    slots, prompt, output = 64, 1024, 256
    deployment, policy = deployed(name), Policy(slots, chunk=int(1.03 * slots * (1 + prompt / output)))
    sent = workload(40 * slots, str(prompt), "uniform:129-383", rate=math.inf)
    steps = deployment.steps(policy)
    found = simulate(sent, steps, policy, deployment.cache(sent, policy))
    batch = found.rounds.sum() / found.iterations
    closed = steady_state(steps.priced, float(batch), prompt, output)
    # Unequal answers meet longer contexts than a mean one, and the server fills and empties: some per cent.
    assert found.busy / found.iterations == pytest.approx(closed.tpot, rel=0.05)


def test_the_largest_batch_is_that_of_theory() -> None:
    """As many requests run at once as `fitting.largest_batch` says, on each data-parallel rank."""
    for name, gpus, data in (("mixtral-8x7b", 4, 2), ("gpt-oss-20b", 1, 1), ("deepseek-v3", 16, 1)):
        deployment = deployed(name, gpus, data_parallel=data)
        context, room = 4096, 1 - deployment.reserve
        most = data * largest_batch(
            deployment.architecture,
            deployment.layout,
            deployment.precision,
            deployment.hardware,
            context=context,
            usable=room,
        )
        sent = Workload(np.full(4, context - 1), np.ones(4, np.int64), np.zeros(4))
        cache = deployment.cache(sent, Policy(1, chunk=1))
        # `largest_batch` counts a pass of one token for each sequence beside them, this one a pass of 1.
        assert most <= cache.room // float(cache.held(context)) <= 1.02 * most + 1


def test_windows_are_cached_once() -> None:
    """A request's share of the cache is `sequence_cache` at any length, windows included."""
    deployment = deployed("gpt-oss-120b", 4)
    sent = workload(1, "4000", "10", rate=1)
    cache = deployment.cache(sent, Policy(1, chunk=8))
    for tokens in (1, 100, 128, 129, 5000):
        # Differences of two counts of bytes.
        assert float(cache.held(tokens)) == pytest.approx(deployment._held(0, tokens), rel=1e-12)


def test_figures_by_hand() -> None:
    """Two requests, the second of which waits for the only slot: every figure from the definitions."""
    sent = Workload(np.array([4, 4]), np.array([3, 1]), np.array([0.0, 1.0]))
    record = simulate(sent, Constant(), Policy(1))
    found = outcome.outcome(
        record, title="", bounds=outcome.slo(["ttft=2", "tpot=1"]), gpus=2, gpu_hour_usd=3.6
    )
    assert record.first.tolist() == [1, 4]
    assert record.ended.tolist() == [3, 4]
    assert {name: one["mean"] for name, one in found.spread.items()} == {
        "ttft": (1 + 3) / 2,
        "tpot": 1,  # of the first alone: (3 - 1) / (3 - 1)
        "e2e": (3 + 3) / 2,
        "queue": (0 + 2) / 2,
    }
    overall = found.overall
    assert (overall["goodput"], overall["slo_attainment"]) == (1 / 4, 1 / 2)
    assert (overall["output_throughput"], overall["output_throughput_per_gpu"]) == (1, 1 / 2)
    assert (overall["occupancy"], overall["iterations"], overall["accept_length"]) == (1, 4, 1)
    assert overall["usd_per_1k_output"] == pytest.approx(cost_per_1k_tokens(2, 3.6, 1), rel=1e-12)


def test_costs_add_up() -> None:
    """Prompts, decoding and idling share the rent, and none of them is negative."""
    deployment, policy = deployed("mixtral-8x7b"), Policy(32, chunk=512, draft_length=3, acceptance=0.7)
    sent = workload(200, "lognormal:800:1", "100", rate=3)
    record = simulate(sent, deployment.steps(policy), policy, deployment.cache(sent, policy))
    overall = outcome.outcome(record, title="", bounds=outcome.Slo({}), gpus=8, gpu_hour_usd=2).overall
    parts = [overall[f"usd_{name}"] for name in ("prompts", "decode", "idle")]
    assert min(parts) > 0
    # Sums of floats.
    assert sum(parts) == pytest.approx(overall["usd_per_1k_output"], rel=1e-12)


def moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and coefficient of variation."""
    return float(values.mean()), float(values.std() / values.mean())


@pytest.mark.parametrize("shape", [0.25, 1.0, 9.0])
def test_gaps_follow_their_law(shape: float) -> None:
    """Gaps between arrivals have mean 1 / rate and a coefficient of variation of shape^-1/2."""
    count, rate = 100_000, 4.0
    gaps = np.diff(arrivals(count + 1, rate, np.random.default_rng(1), burstiness=shape))
    mean, variation = moments(gaps)
    assert mean == pytest.approx(1 / rate, rel=SIGMAS * shape**-0.5 / math.sqrt(count))
    # A gamma law's kurtosis is 3 + 6 / shape; with it the error of a standard deviation, to first order.
    assert variation == pytest.approx(
        shape**-0.5, rel=SIGMAS * math.sqrt((2 + 6 / shape) / (4 * count)) * 1.5
    )


def test_lengths_follow_their_law() -> None:
    """Uniform lengths reach both ends and no further; log-normal ones have the mean and variation wanted."""
    draw = np.random.default_rng
    assert set(lengths("prompt", "uniform:3-6", 1_000, draw(1))) == {3, 4, 5, 6}
    assert lengths("output", "5,8,4", 7, draw(1)).tolist() == [5, 8, 4, 5, 8, 4, 5]
    mean, variation = moments(lengths("prompt", "lognormal:1000:0.8", 100_000, draw(1)))
    assert mean == pytest.approx(1000, rel=SIGMAS * 0.8 / math.sqrt(100_000))
    w = 1 + 0.8**2
    kurtosis = w**4 + 2 * w**3 + 3 * w**2 - 3
    assert variation == pytest.approx(0.8, rel=SIGMAS * math.sqrt((kurtosis - 1) / (4 * 100_000)))


def lines_run(work: Callable[[], Record]) -> tuple[Record, int]:
    """What a call returns, and how many lines of Python it runs."""
    count = 0

    def trace(_: FrameType, event: str, __: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return work(), count
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("name", "layout", "slots", "load_", "drafts"),
    [
        ("mixtral-8x7b", {}, 256, {"rate": 60}, {}),
        ("mixtral-8x7b", {}, 256, {"concurrency": 256}, {}),
        ("mixtral-8x7b", {}, 512, {"concurrency": 512}, {}),
        ("mixtral-8x7b", {"pipeline_parallel": 2, "data_parallel": 2}, 256, {"concurrency": 256}, {}),
        ("gpt-oss-120b", {}, 256, {"concurrency": 256}, {}),
        ("deepseek-v3", {}, 256, {"rate": 20}, {"draft_length": 3, "acceptance": 0.7}),
    ],
)
def test_iterations_are_cheap(
    name: str, layout: dict[str, int], slots: int, load_: dict[str, Any], drafts: dict[str, Any]
) -> None:
    """However many slots hold requests of any length, an iteration runs fewer than 150 lines of Python.

    With them come those of the requests that begin and end in it, and its prices. A line takes some 60 ns, so
    that 150 of them make 1e5 iterations a second; what they are in fact the command prints.
    """
    deployment, policy = deployed(name, 16, **layout), Policy(slots, chunk=2048, **drafts)
    sent = workload(2_000, "lognormal:1000:1", "lognormal:256:1", **load_)
    steps, cache = deployment.steps(policy), deployment.cache(sent, policy)
    found, lines = lines_run(lambda: simulate(sent, steps, policy, cache))
    assert found.running > slots / 8 * found.iterations
    assert lines < 150 * found.iterations


def test_iterations_are_priced_once() -> None:
    """Each iteration at its own counts, and once more where prompts join others, to tell what they add."""
    prices: list[tuple[float, ...]] = []

    class Listing(Constant):
        def seconds(self, *counts: float) -> float:
            prices.append(counts)
            return 1.0

    sent = workload(3, "5", "100", rate=math.inf)
    assert simulate(sent, Listing(), Policy(3)).iterations == len(prices) == 100
    assert [counts[2] for counts in prices[1:]] == [3 * (5 + i) for i in range(99)]
    prices.clear()
    found = simulate(
        Workload(np.array([5, 5]), np.array([100, 50]), np.array([0.0, 9.5])), Listing(), Policy(2)
    )
    assert len(prices) == found.iterations + 1


@pytest.mark.parametrize("drawn", [1, 7, 64])
def test_drafts_do_not_depend_on_how_many_are_drawn_at_once(
    drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds are those of one generator in the order of the requests, whatever is drawn ahead."""
    sent = workload(50, "10", "uniform:1-40", rate=math.inf)
    policy = Policy(4, draft_length=3, acceptance=0.7)
    whole = simulate(sent, Counting(3), policy)
    monkeypatch.setattr(scheduling, "DRAWN", drawn)
    some = simulate(sent, Counting(3), policy)
    for figure in ("ended", "rounds", "busy"):
        assert np.array_equal(getattr(whole, figure), getattr(some, figure))


def run(*words: str) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, ["simulate", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_command() -> None:
    """Tables and JSON hold every figure, and the same seed prints the same."""
    asked = ("mixtral-8x7b", "--rate", "4", "--requests", "50", "--slo", "ttft=0.5", "--slo", "tpot=0.05")
    facts = json.loads(run(*asked, "--format", "json"))
    assert set(facts["overall"]) == set(outcome.OVERALL)
    assert set(facts["seconds"]) == set(outcome.PER_REQUEST)
    shown = run(*asked)
    assert all(name in shown for name in (*outcome.OVERALL, *outcome.PER_REQUEST))
    assert shown.split("The simulator")[0] == run(*asked).split("The simulator")[0]
    assert re.search(r"continuous +7 ", run("--example"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("llama-3.1-405b --gpus 4 --rate 1", r"one rank needs [\d.,]+ GB \(weights .*h100 has 72.0 GB"),
        ("mixtral-8x7b --rate 0", "a rate of 0 never sends"),
        ("mixtral-8x7b", "neither a rate nor a concurrency is given"),
        ("mixtral-8x7b --rate 1 --concurrency 2", "a rate of 1 and a concurrency of 2 are both given"),
        ("mixtral-8x7b --concurrency 0", "0 users send nothing"),
        ("mixtral-8x7b --concurrency 2 --burstiness 3", "a burstiness of 3 shapes the gaps of a rate"),
        ("mixtral-8x7b --rate 1 --hardware h1000", 'no hardware "h1000".*did you mean "h100"'),
        ("mixtral-8x7b --rate 1 --slo tppt=1", 'no field "tppt"; did you mean "tpot"'),
        ("mixtral-8x7b --rate 1 --slo tpot=0", "an SLO of tpot=0 can never be kept"),
        ("mixtral-8x7b --rate 1 --gpus 8 --tensor-parallel 3", "3 tensor x 1 pipeline x 1 data.*take 3 GPUs"),
        ("mixtral-8x7b --rate 1 --gpus 6 --pipeline-parallel 2", "32 heads cannot be divided over 3"),
        ("mixtral-8x7b --rate 1 --prompt 40000", "a request of 40,256 tokens, and the model has 32,768"),
        ("mixtral-8x7b --rate 1 --prompt uniform:9-3", "9 to 3 is no range"),
        ("mixtral-8x7b --rate 1 --output many", "output 'many' is no length"),
        ("mixtral-8x7b --rate 1 --output 0", "a length of 0 tokens"),
        ("mixtral-8x7b --rate 1 --slots 0", "0 slots hold no request"),
        ("mixtral-8x7b --rate 1 --chunk 10", "a chunk of 10 tokens, and 64 slots decode 64"),
        ("mixtral-8x7b --rate 1 --draft-length 2 --acceptance 1.5", "an acceptance of 1.5 is no probability"),
        ("mixtral-8x7b --rate 1 --precision fp9", 'no precision "fp9"'),
        ("mixtral-8x7b --rate 1 --hardware a100-80gb --precision fp8", "multiplies no fp8"),
        ("gpt4-leak --rate 1 --gpus 128", "gpt4-leak does not say .*d_model"),
    ],
)
def test_errors_are_sentences(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be simulated is told in one sentence with the numbers, and exits 78."""
    with pytest.raises(SystemExit) as ending:
        main(["simulate", *words.split()])
    assert ending.value.code == 78
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert "Traceback" not in error
