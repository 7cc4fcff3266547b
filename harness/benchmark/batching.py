"""Continuous beside static batching on the reference engine, with the same requests in one run.

Static batching fills all slots at once and holds them until the last request of the batch has ended;
continuous batching gives a slot to the next request as soon as it is free (Orca, OSDI 2022, section 3.1).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from harness.benchmark import picture as pictures
from harness.benchmark import workload
from harness.benchmark.report import write
from harness.implementations.reference import Reference
from harness.reference.engine import Arrival, Iteration, Limits, Request, Sampling
from harness.reference.engine.values import Batching
from harness.spec import load, twin
from harness.theory.batching import EXAMPLE_ITERATIONS as ITERATIONS
from harness.theory.batching import EXAMPLE_OUTPUTS as OUTPUTS
from harness.theory.batching import EXAMPLE_SLOTS as SLOTS
from harness.theory.describe import Table

MIX, REQUESTS, MIX_SLOTS, ROUNDS = "skewed:8:16", 64, 8, 3
POLICIES: tuple[Batching, ...] = ("static", "continuous")
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Outcome:
    """One policy on one set of requests."""

    tokens: tuple[tuple[int, ...], ...]
    timeline: tuple[Iteration, ...]
    slots: int
    seconds: float
    model_seconds: float
    """Of them, inside of the model's forward passes."""

    @property
    def occupancy(self) -> float:
        """Mean over iterations of running requests / slots."""
        return fmean(_running(one) for one in self.timeline) / self.slots

    @property
    def overhead(self) -> float:
        """Seconds per iteration outside of the model: scheduling, pages, sampling."""
        return (self.seconds - self.model_seconds) / len(self.timeline)


def run(
    spec: str,
    *,
    seed: int,
    output: Path | None,
    picture: Path | None,
    step: Callable[[str], None],
) -> list[Table]:
    """Both examples under both policies; `output` (Markdown) and `picture` (SVG) are written.

    Raises SpecError, Unsupported, or RuntimeError if the two policies give any request other tokens.
    """
    from harness.results.files import ensure_writable

    for path in (output, picture):
        if path is not None:
            ensure_writable(path)
    model: Any = Reference().build(
        twin(load(spec).architecture), device="cpu", dtype=torch.float64, seed=seed
    )
    generator = np.random.default_rng(seed)
    prompts = generator.integers(model.vocab_size, size=(len(OUTPUTS), 2)).tolist()
    example = [Request(tuple(one), n, GREEDY) for one, n in zip(prompts, OUTPUTS, strict=True)]
    small = {policy: _serve(model, example, SLOTS, policy) for policy in POLICIES}
    step("the example")
    mix = workload.dataset(MIX, REQUESTS, model.vocab_size, generator, GREEDY)
    rounds: dict[Batching, list[Outcome]] = {policy: [] for policy in POLICIES}
    for _ in range(ROUNDS):
        for policy in POLICIES:
            rounds[policy].append(_serve(model, mix, MIX_SLOTS, policy))
            step("the mix")
    for static, continuous in ((small["static"], small["continuous"]), *zip(*rounds.values(), strict=True)):
        if static.tokens != continuous.tokens:
            raise RuntimeError("static and continuous batching gave a request different tokens")
    shown = [_example(small), _mixed(rounds)]
    if output is not None:
        write(output, "Static and continuous batching", "moe-harness bench batching", shown)
    if picture is not None:
        titles = {f"{policy} batching": (one.timeline, one.slots) for policy, one in small.items()}
        pictures.timelines(picture, titles)
    return shown


def _serve(model: Any, requests: Sequence[Request], slots: int, policy: Batching) -> Outcome:
    limits = replace(Limits(), sequences=slots, pages=1024, chunk=64, batching=policy)
    session = model.start(limits)
    start = time.perf_counter()
    served = session.run([Arrival(one) for one in requests])
    seconds = time.perf_counter() - start
    model_seconds = session.engine.model_seconds
    session.close()
    tokens = tuple(tuple(one.tokens) for one in served.completions)
    return Outcome(tokens, tuple(served.timeline), slots, seconds, model_seconds)


def _running(iteration: Iteration) -> int:
    return sum(1 for holder in iteration.running if holder >= 0)


def _ended(outcome: Outcome, within: int) -> int:
    """Requests that hold no slot any more after so many iterations."""
    seen = {one for step in outcome.timeline[:within] for one in step.running if one >= 0}
    later = {one for step in outcome.timeline[within:] for one in step.running if one >= 0}
    return len(seen - later)


def _example(small: dict[Batching, Outcome]) -> Table:
    return Table(
        f"{len(OUTPUTS)} requests of {', '.join(map(str, OUTPUTS))} tokens in {SLOTS} slots",
        ("batching", f"ended after {ITERATIONS} iterations", "iterations in all", "occupancy"),
        tuple(
            (policy, _ended(one, ITERATIONS), len(one.timeline), f"{one.occupancy:.1%}")
            for policy, one in small.items()
        ),
    )


def _mixed(rounds: dict[Batching, list[Outcome]]) -> Table:
    """Medians over the rounds; a ratio is taken within each round."""
    rows = []
    for policy, outcomes in rounds.items():
        one = outcomes[0]
        tokens = sum(map(len, one.tokens))
        ratio = median(
            base.seconds / mine.seconds for base, mine in zip(rounds["static"], outcomes, strict=True)
        )
        rows.append(
            (
                policy,
                len(one.timeline),
                f"{one.occupancy:.1%}",
                f"{tokens / len(one.timeline):.2f}",
                f"{median(tokens / each.seconds for each in outcomes):.0f}",
                f"{ratio:.2f}",
                f"{1e3 * median(each.overhead for each in outcomes):.2f}",
                f"{median(1 - each.model_seconds / each.seconds for each in outcomes):.0%}",
            )
        )
    return Table(
        f"{REQUESTS} requests of {MIX} in {MIX_SLOTS} slots: the same tokens under both, {ROUNDS} rounds",
        (
            "batching",
            "iterations",
            "occupancy",
            "tokens per iteration",
            "tokens per second",
            "throughput to static",
            "overhead per iteration, ms",
            "share of time outside the model",
        ),
        tuple(rows),
    )
