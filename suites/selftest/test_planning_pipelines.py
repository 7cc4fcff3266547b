"""Simulated servers with a pipeline or data-parallel ranks: no request is divided, as in theory."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from harness.planning import outcome
from harness.planning.deployment import Deployment, divided
from harness.planning.scheduling import Policy
from harness.planning.simulation import simulate
from harness.planning.workload import workload
from harness.spec import load
from harness.spec.hardware import load_hardware
from harness.theory.inference import Pass, decode, mixed_times, prefill, steady_state
from harness.theory.precision import precision


def deployed(name: str, gpus: int, stages: int = 1, ranks: int = 1) -> Deployment:
    """A shipped spec on H100s in fp8; tensor parallelism takes what is left."""
    layout = divided(gpus, pipeline_parallel=stages, data_parallel=ranks)
    return Deployment(load(name).architecture, load_hardware("h100"), layout, precision("fp8"))


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-120b", "deepseek-v3"])
@pytest.mark.parametrize(("stages", "ranks"), [(2, 1), (1, 2), (2, 2)])
def test_iterations_with_prompts_cost_what_theory_says(name: str, stages: int, ranks: int) -> None:
    """From sums over prompts and decoding together the step time is that of both passes by themselves."""
    steps = deployed(name, 16, stages, ranks).steps(Policy(64))
    model = steps.priced.architecture
    for batch, prompts, done in ((0, 1, 0), (1, 1, 700), (30, 1, 50), (63, 3, 90), (500, 40, 0)):
        decoding = decode(model, batch, 900)
        reading = prefill(model, 1, 100, done) + prefill(model, prompts - 1, 100)
        whole = decoding + reading
        counts = [*[float(getattr(whole, one.name)) for one in fields(Pass)][:8], prompts]
        closed = mixed_times(
            steps.priced,
            decoding.spread(batch, ranks),
            reading.spread(prompts, ranks),
            prompts / ranks,
            min(stages, max(1, (batch + prompts) / ranks)),
        ).period
        # A few roundings in another order.
        assert steps.seconds(*counts) == pytest.approx(float(closed), rel=1e-9)


def answered(deployment: Deployment, users: int, prompt: int = 2048) -> tuple[float, float]:
    """Median TTFT and mean TPOT of users that each send the next request at once, after the first ten."""
    sent = workload(60 * users, str(prompt), "uniform:129-383", concurrency=users, seed=1)
    steps, policy = deployment.steps(Policy(users)), Policy(users)
    found = outcome.of_requests(simulate(sent, steps, policy, deployment.cache(sent, policy)))
    ttft, tpot = (found[name][10 * users :] for name in ("ttft", "tpot"))
    return float(np.median(ttft)), float(tpot.mean())


@pytest.mark.parametrize(("gpus", "stages", "replicas"), [(8, 1, (1, 2, 8)), (4, 2, (1, 2))])
def test_a_lone_request_gains_nothing_from_replicas(
    gpus: int, stages: int, replicas: tuple[int, ...]
) -> None:
    """One user has the same TTFT and TPOT on any number of them; stages stay in an island here."""
    found = [answered(deployed("mixtral-8x7b", gpus * n, stages, n), 1) for n in replicas]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-9)  # roundings


@pytest.mark.parametrize(
    ("name", "gpus", "stages", "ranks"),
    [
        ("mixtral-8x7b", 8, 2, 1),
        ("mixtral-8x7b", 8, 8, 1),
        ("llama-3.1-70b", 8, 4, 1),
        ("mixtral-8x7b", 16, 2, 2),
    ],
)
def test_a_pipeline_at_moderate_load_is_in_the_steady_state(
    name: str, gpus: int, stages: int, ranks: int
) -> None:
    """Up to 32 users wait as long for tokens as `steady_state` says, with whole prompts."""
    deployment = deployed(name, gpus, stages, ranks)
    first = []
    for users in (1, 2, 8, 32):
        ttft, tpot = answered(deployment, users)
        priced = deployment.steps(Policy(users)).priced
        closed = steady_state(priced, users, 2048, 256, stages, "whole")
        assert ttft == pytest.approx(closed.ttft, rel=0.01)  # few of the sequences are at another length
        # The pass of its own prompt is in the mean of the closed form, not in that of a request; ranks that
        # are simulated do not read their prompts in the same pass.
        assert tpot == pytest.approx(closed.tpot, rel=0.05 if ranks == 1 else 0.1)
        first.append(ttft)
    assert first == sorted(first)
