"""The serving benchmark: what is sent and when, what each figure means, and what makes a run void."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.benchmark import picture, serving
from harness.benchmark.metrics import Slo, of_request, summarise
from harness.benchmark.workload import Workload, WorkloadError, arrivals, dataset
from harness.cli import main
from harness.reference.engine import Completion, Iteration, Request, Sampling, Streamed

GREEDY = Sampling(temperature=0)
ALPHA = 1e-9
"""Chance of a false alarm of a statistical test here; the seeds are fixed, so that it is drawn once."""


def streamed(sent: float, chunks: list[tuple[float, int]], ended: float, **more: Any) -> Streamed:
    """An answer of as many tokens as its chunks hold."""
    tokens = tuple(range(sum(count for _, count in chunks)))
    return Streamed(Completion(tokens, "length", **more), sent, tuple(chunks), ended)


def generator(seed: int = 1) -> np.random.Generator:
    """Fresh draws."""
    return np.random.default_rng(seed)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_stated_rate_and_spread(burstiness: float) -> None:
    """The mean gap is 1 / rate and its variance 1 / (burstiness rate^2), as a gamma law has it."""
    n, rate = 200_000, 8.0
    gaps = np.diff(arrivals(n + 1, rate, generator(), burstiness=burstiness))
    # Chebyshev would be loose: the mean of n gaps is normal to 1e-9 within 6.2 standard errors
    assert abs(gaps.mean() * rate - 1) < 6.2 / math.sqrt(burstiness * n)
    # the variance of a sample variance of gamma draws: (kurtosis excess 6/k, plus 2) / n
    assert abs(gaps.var() * burstiness * rate**2 - 1) < 6.2 * math.sqrt((6 / burstiness + 2) / n) * 1.2
    assert arrivals(5, 3.0, generator()) == arrivals(5, 3.0, generator())
    assert arrivals(4, math.inf, generator()) == (0, 0, 0, 0)


def test_a_dataset_gives_what_it_says() -> None:
    """Lengths are fixed, in their ranges, or geometric; prompts lie in the vocabulary; a seed fixes all."""
    fixed = dataset("fixed:5:7", 20, 11, generator(), GREEDY)
    assert {(len(one.prompt), one.max_tokens) for one in fixed} == {(5, 7)}
    uniform = dataset("uniform:2-4:1-3", 300, 11, generator(), GREEDY)
    assert {len(one.prompt) for one in uniform} == {2, 3, 4}
    assert {one.max_tokens for one in uniform} == {1, 2, 3}
    assert {token for one in uniform for token in one.prompt} == set(range(11))
    n, mean = 20_000, 16
    skewed = dataset(f"skewed:1:{mean}", n, 11, generator(), GREEDY)
    deviation = math.sqrt((1 - 1 / mean) * mean**2 / n)
    assert abs(sum(one.max_tokens for one in skewed) / n - mean) < 6.2 * deviation
    assert dataset("uniform:2-4:1-3", 300, 11, generator(), GREEDY) == uniform


def test_a_dataset_file_is_read_line_by_line(tmp_path: Path) -> None:
    """A file of JSON lines is repeated to the number asked for, and a bad line is named by its number."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": [1, 2], "max_tokens": 3}\n\n{"prompt": [4], "max_tokens": 1}\n')
    read = dataset(str(path), 3, 11, generator(), GREEDY)
    assert [(one.prompt, one.max_tokens) for one in read] == [((1, 2), 3), ((4,), 1), ((1, 2), 3)]
    for bad in ('{"prompt": "text", "max_tokens": 3}', '{"prompt": [11], "max_tokens": 3}', "{", "[]"):
        path.write_text('{"prompt": [1], "max_tokens": 3}\n' + bad)
        with pytest.raises(WorkloadError, match=r"mine\.jsonl:2: "):
            dataset(str(path), 3, 11, generator(), GREEDY)
    path.write_text('{"prompt": [1], "max_tokens": true}')
    with pytest.raises(WorkloadError, match="max_tokens is True"):
        dataset(str(path), 3, 11, generator(), GREEDY)


@pytest.mark.parametrize("text", ["fixed:0:3", "uniform:3-2:1-2", "skewed:4:0", "sharegpt", "absent.jsonl"])
def test_a_bad_dataset_is_told_in_a_sentence(text: str) -> None:
    """What is no dataset is refused by its name."""
    with pytest.raises(WorkloadError, match=re.escape(text)):
        dataset(text, 3, 11, generator(), GREEDY)


def test_figures_mean_what_they_say() -> None:
    """TTFT, TPOT and latency of answers whose times are known, with several tokens in one chunk."""
    one = streamed(10.0, [(10.5, 1), (10.7, 3), (11.1, 2)], 11.2)
    figures = of_request(one)
    assert figures["ttft"] == pytest.approx(0.5)
    assert figures["tpot"] == pytest.approx(0.6 / 5)
    assert figures["e2e"] == pytest.approx(1.2)
    assert of_request(streamed(1.0, [(2.0, 1)], 2.0))["tpot"] is None


def test_a_summary_counts_failures_apart_and_goodput_by_the_slo() -> None:
    """Only answered requests have figures; goodput counts those that keep every bound."""
    good = streamed(0.0, [(0.1, 1), (0.3, 1)], 0.3, rounds=1)
    late = streamed(0.0, [(0.9, 1), (2.0, 1)], 2.0, rounds=2)
    failed = Streamed(Completion((), "error", error="no"), 0.0, (), 1.0)
    steps = [Iteration((0, 1), 0, 0, 2, 1), Iteration((0, -1), 0, 0, 1, 1)]
    found = summarise(
        [good, late, failed], [0.0, 0.0, 0.0], slo=Slo(ttft=0.5, tpot=0.5), timeline=steps, slots=2
    )
    assert (found.overall["completed"], found.overall["failed"]) == (2, 1)
    assert found.overall["duration_s"] == pytest.approx(2.0)
    assert found.overall["goodput"] == pytest.approx(0.5)
    assert found.overall["output_throughput"] == pytest.approx(2.0)
    assert found.overall["accept_length"] == pytest.approx(4 / 3)
    assert found.overall["occupancy"] == pytest.approx(0.75)
    assert found.spread["chunk_gap"]["mean"] == pytest.approx((0.2 + 1.1) / 2)


class Echo:
    """Answers with the prompt; `wrong` puts a different token where others are being served."""

    def __init__(self, *, wrong: bool = False, fails: bool = False) -> None:
        self.wrong, self.fails, self.inside, self.lock = wrong, fails, 0, threading.Lock()

    def stream(self, request: Request) -> Streamed:
        with self.lock:
            self.inside += 1
        sent = time.perf_counter()
        time.sleep(0.02)
        others = self.inside > 1
        with self.lock:
            self.inside -= 1
        tokens = (*request.prompt[:-1], 99) if self.wrong and others else request.prompt
        done = Completion(() if self.fails else tokens, "error" if self.fails else "length", error="no")
        now = time.perf_counter()
        return Streamed(done, sent, ((now, len(tokens)),), now)


LOAD = Workload(tuple(Request((i, i + 1), 2) for i in range(6)), (0.0,) * 6)


def test_a_run_whose_answers_depend_on_the_load_is_void() -> None:
    """An engine that changes an answer in company is caught by the solo answers of the same run."""
    assert not serving.run(Echo(), LOAD).void
    void = serving.run(Echo(wrong=True), LOAD).void
    assert "differ from those that the same requests get alone" in void
    assert "part at token 1 of 2" in void
    assert serving.run(Echo(fails=True), LOAD).void == "no request was answered; the first: no"


def test_what_is_cached_under_load_does_not_hide_a_wrong_answer() -> None:
    """An engine that repeats what it answered under load is caught by asking a fresh one."""
    wrong, again = Echo(wrong=True), dict[Request, Streamed]()

    class Remembers:
        def stream(self, request: Request) -> Streamed:
            return again.setdefault(request, wrong.stream(request))

    assert not serving.run(Remembers(), LOAD).void
    again.clear()
    assert "differ" in serving.run(Remembers(), LOAD, alone=lambda: nullcontext(Echo())).void


def test_concurrency_bounds_what_is_in_flight() -> None:
    """With a bound of one no request has company; what waits is late at the client."""
    run = serving.run(Echo(wrong=True), LOAD, concurrency=1)
    assert not run.void
    lateness = run.summary.overall["lateness_p99_s"]
    assert lateness is not None
    assert lateness > 4 * 0.02


def test_a_request_keeps_its_slot_in_the_picture() -> None:
    """Rows are slots: a request stays in its own, a held one stays held, a freed one takes the next."""
    steps = [
        Iteration((0, 1), 1, 2, 0, 1),
        Iteration((-1, 1), 1, 0, 1, 1),
        Iteration((2,), 0, 1, 0, 1),
    ]
    assert picture.slots(steps, 2) == [[0, picture.HELD, 2], [1, 1, picture.FREE]]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def command(capsys: pytest.CaptureFixture[str], words: str) -> Done:
    """`moe-harness bench WORDS`, in this process: it loads torch, which takes longer than the rest."""
    with pytest.raises(SystemExit) as ending:
        main(["bench", *words.split()])
    printed = capsys.readouterr()
    return Done(int(ending.value.code or 0), printed.out, printed.err)


def test_the_command_prints_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small load on the reference gives every figure, as JSON, a Markdown file and a picture."""
    page, image = tmp_path / "serve.md", tmp_path / "serve.svg"
    words = "serve --impl reference --spec mixtral-8x7b --requests 6 --dataset fixed:4:3 --slots 2"
    done = command(capsys, f"{words} --output {page} --picture {image} --format json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["compared"] == facts["overall"]["completed"] == 6
    assert set(facts["seconds"]) == {"ttft", "tpot", "chunk_gap", "e2e"}
    assert 0 < facts["overall"]["occupancy"] <= 1
    assert "| ttft" in page.read_text()
    assert "<svg" in image.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--impl reference --spec mixtral-8x7b --rate 0", "the rate is 0"),
        ("--impl reference --spec mixtral-8x7b --rate nan", "the rate is nan"),
        ("--impl reference --spec mixtral-8x7b --dataset sharegpt", "there is no dataset 'sharegpt'"),
        ("--impl reference --spec mixtral-8x7b --slo fast=1", "SLO 'fast=1'"),
        ("--impl reference --spec mixtral-8x7b --speculation guess", "speculation 'guess'"),
        ("--impl reference --spec mixtral-8x7b --output /dev/null/x.md", "cannot be used"),
        ("--impl referense --spec mixtral-8x7b", "did you mean 'reference'"),
        ("--impl reference", "it needs a spec"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_sentence(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A load, an engine or a file that cannot be used ends in 78 with one line, and no figures."""
    done = command(capsys, f"serve {words} --requests 2")
    assert done.code == 78, done.out + done.err
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not done.out


def test_continuous_batching_ends_seven_requests_where_static_ends_four(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the same slots and iterations; both give every request the same tokens, or the command fails."""
    done = command(capsys, f"batching --picture {tmp_path / 'slots.svg'} --format json")
    assert done.code == 0, done.err
    example, mixed = json.loads(done.out)
    static, continuous = example["rows"]
    assert [row["ended after 8 iterations"] for row in (static, continuous)] == [4, 7]
    assert continuous["occupancy"] == "100.0%"
    static, continuous = mixed["rows"]
    assert continuous["iterations"] < static["iterations"]
    drawn = (tmp_path / "slots.svg").read_text()
    assert "static batching" in drawn
    assert "continuous batching" in drawn
