"""Quantities of a training run that assumptions decide: what took the utilisation, what laws of loss say."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.audit.quantities.registry import quantity
from harness.theory import failures, pipeline, scaling, training

_FAILING = (
    "training.gpus",
    "assumptions.failures_per_gpu_hour",
    "assumptions.checkpoint_seconds",
    "assumptions.restart_seconds",
)
_GOODPUT = (
    "mtbf = 3600 / (gpus * failures_per_gpu_hour)\n"
    "interval = (2 * checkpoint_seconds * mtbf) ** 0.5\n"
    "period = mtbf * exp(restart_seconds / mtbf) * (exp((interval + checkpoint_seconds) / mtbf) - 1)\n"
    "goodput = interval / period\n"
)


def _goodput(gpus: Any, failures_per_gpu_hour: Any, checkpoint_seconds: Any, restart_seconds: Any) -> Any:
    """At Young's interval between checkpoints."""
    mtbf = failures.mean_time_between_failures(gpus, failures_per_gpu_hour)
    interval = failures.young_interval(checkpoint_seconds, mtbf)
    return failures.goodput(interval, checkpoint_seconds, mtbf, restart_seconds)


@quantity(
    "training.mfu_under_restarts",
    "x",
    "restarts",
    f"{_GOODPUT}matmul_efficiency * goodput",
    "assumptions.matmul_efficiency",
    *_FAILING,
)
def _mfu_under_restarts(
    matmul_efficiency: Any,
    gpus: Any,
    failures_per_gpu_hour: Any,
    checkpoint_seconds: Any,
    restart_seconds: Any,
) -> Any:
    """What failures leave of the rate that matrix products reach, if nothing else takes from it."""
    return matmul_efficiency * _goodput(gpus, failures_per_gpu_hour, checkpoint_seconds, restart_seconds)


@quantity(
    "training.mfu_under_all_causes",
    "x",
    "all causes",
    f"{_GOODPUT}bubble = (pipeline_parallel - 1) / microbatches\n"
    "matmul_efficiency * goodput / (1 + bubble) / (1 + network_share)",
    "assumptions.matmul_efficiency",
    *_FAILING,
    "training.pipeline_parallel",
    "assumptions.microbatches",
    "assumptions.network_share",
)
def _mfu_under_all_causes(
    matmul_efficiency: Any,
    gpus: Any,
    failures_per_gpu_hour: Any,
    checkpoint_seconds: Any,
    restart_seconds: Any,
    pipeline_parallel: Any,
    microbatches: Any,
    network_share: Any,
) -> Any:
    """The same with the pipeline's bubble, and a network that adds `network_share` of the computing time."""
    bubble = pipeline.bubble("1f1b", pipeline_parallel, microbatches)
    kept = _goodput(gpus, failures_per_gpu_hour, checkpoint_seconds, restart_seconds)
    return matmul_efficiency * kept / (1 + bubble) / (1 + network_share)


@quantity(
    "training.h100_mfu",
    "x",
    "h100 run",
    "6 * active * tokens / (gpus * h100_peak_flops * days * 86400)",
    "parameters.active",
    "training.tokens",
    "assumptions.h100_peak_flops",
)
def _h100_mfu(active: Any, tokens: Any, h100_peak_flops: Any, gpus: Any, days: Any) -> Any:
    return training.implied_mfu(6 * active * tokens, gpus, h100_peak_flops, days)


LAWS = tuple(scaling.EXPERT_LAWS.values())
"""In the order that `assumptions.loss_law` numbers them, from 1."""


@quantity(
    "scaling.more_experts_help",
    "",
    "experts",
    "gain(loss_law, active, tokens, fewer, more) > 0",
    "parameters.active",
    "training.tokens",
    "assumptions.loss_law",
)
def _more_experts_help(active: Any, tokens: Any, loss_law: Any, fewer: float, more: float) -> Any:
    """Whether a law of loss falls from `fewer` to `more` experts at the same active parameters and tokens: 1
    or 0."""
    numbers = range(1, len(LAWS) + 1)
    if not np.isin(loss_law, numbers).all():
        raise ValueError(f"there is no such law of loss; give loss_law 1 to {len(LAWS)}")
    gains = [scaling.gain(law, active, tokens, fewer, more) for law in LAWS]
    return np.select([loss_law == number for number in numbers], gains) > 0


@quantity(
    "scaling.optimal_tokens_ratio",
    "x",
    "compute-optimal",
    "tokens_per_parameter * effective_parameters / tokens",
    "assumptions.tokens_per_parameter",
    "assumptions.effective_parameters",
    "training.tokens",
)
def _optimal_tokens_ratio(tokens_per_parameter: Any, effective_parameters: Any, tokens: Any) -> Any:
    """Tokens that Hoffmann et al. 2022 (arXiv 2203.15556) would take, over those that were."""
    return tokens_per_parameter * effective_parameters / tokens


@quantity("data.reported_tokens", "tokens", "reported", "reported")
def _reported(reported: float) -> Any:
    """What the model's own makers, or those who saw their papers, state."""
    return reported


@quantity(
    "vision.leaves_the_total",
    "",
    "vision parameters",
    "(total < most) * (total + vision_parameters >= most)",
    "parameters.total",
    "assumptions.vision_parameters",
)
def _vision_leaves(total: Any, vision_parameters: Any, most: float) -> Any:
    """Whether the text model alone rounds to the total, and no longer does with vision counted in: 1 or 0."""
    return (total < most) * (total + vision_parameters >= most) * 1.0
