"""Pipeline schedules: how long stages idle, and how many microbatches' activations they keep.

Letters: p stages, i a stage from 0, m microbatches of one step, v chunks of layers on one stage (virtual
stages), F, I, W the times of one microbatch on one stage, all its chunks together: forward, gradient by
the input, gradient by the weights. Stages are equally long and sending takes no time. Numbers may be
arrays that broadcast.

Every closed form here is what an exact simulation of the schedule's order of passes gives
(`suites/selftest/test_theory_pipeline.py`), under the conditions that `why_not` states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np

from harness.spec.errors import SpecError
from harness.theory.layout import Schedule

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
SPLIT: frozenset[Schedule] = frozenset({"zb-h1", "zb-h2", "zbv"})
"""Schedules that run the gradient by the weights apart from the gradient by the input."""
_SLACK = 1e-9
"""Relative: times that are equal on paper may differ by rounding."""


def why_not(
    schedule: Schedule,
    stages: Any,
    microbatches: Any,
    virtual_stages: Any = 1,
    forward: Any = 1.0,
    input_grad: Any = 1.0,
    weight_grad: Any = 1.0,
) -> Iterator[tuple[Any, str]]:
    """What keeps a schedule from running so: pairs (whether it does, a sentence about plain numbers).

    1F1B runs with fewer microbatches than stages, and idles accordingly: warm-up ends when they are used up.
    Interleaving needs a multiple of the stages (Narayanan et al. 2021, arXiv 2104.04473, section 2.2). The
    zero-bubble schedules fill their warm-up (Qi et al. 2023, arXiv 2401.10241, figures 3 and 6), and their
    bubble has a closed form where W is the shortest of the three passes, as it is in a transformer.
    """
    p, m, v = stages, microbatches, virtual_stages
    many, some, chunks = _said(p), _said(m), _said(v)
    yield (
        (np.asarray(m) < 1) | (np.asarray(p) < 1) | (np.asarray(v) < 1),
        f"{some} microbatches over {many} stages of {chunks} chunks: each has to be at least 1",
    )
    single = np.asarray(p) == 1
    if schedule == "interleaved":
        wrong = "interleaved 1F1B deals microbatches out in rounds of the stages"
        right = f"{some} is no multiple of {many}; give a multiple of {many}"
        yield np.asarray(m) % np.maximum(p, 1) != 0, f"{wrong}, and {right}"
    elif schedule == "zbv":
        yield (
            np.asarray(v) != 2,
            f"zbv has 2 chunks of layers on a stage, and virtual_stages is {chunks}; give 2",
        )
    else:
        right = 'give 1, or schedule "interleaved"'
        yield (
            np.asarray(v) != 1,
            f"{schedule} has one chunk of layers on a stage, and virtual_stages is {chunks}; {right}",
        )
    if schedule in SPLIT:
        least = p if schedule == "zb-h1" else 2 * np.asarray(p) - 1
        few = _said(least)
        wrong = (
            f"{schedule} over {many} stages fills its warm-up with {few} microbatches, and there are {some}"
        )
        yield ~single & (np.asarray(m) < least), f"{wrong}; give at least {few}"
        shortest = np.minimum(forward, input_grad) * (1 + _SLACK)
        wrong = f"a gradient by the weights of {_said(weight_grad)} is longer than one of the other passes"
        right = f"the bubble of {schedule} has a closed form up to {_said(np.minimum(forward, input_grad))}"
        yield ~single & (weight_grad > shortest), f"{wrong}; {right}"
    if schedule == "zbv":
        longer = ~single & (forward > np.asarray(input_grad) * (1 + _SLACK))
        wrong = f"a forward pass of {_said(forward)} is longer than the gradient by the input"
        right = "the bubble of zbv has a closed form up to that"
        yield longer, f"{wrong} of {_said(input_grad)}; {right}"


def _said(value: Any) -> Any:
    """A number as a sentence has it; writing thousands of them out would take longer than all else."""
    return "several" if np.ndim(value) else value


def refuse(schedule: Schedule, stages: int, microbatches: int, virtual_stages: int = 1) -> None:
    """Raise SpecError, with the numbers, where a schedule (of plain integers) cannot run."""
    if schedule not in SCHEDULES:
        raise SpecError(f'no pipeline schedule "{schedule}"; there are {", ".join(SCHEDULES)}')
    for fault, sentence in why_not(schedule, stages, microbatches, virtual_stages):
        if fault:
            raise SpecError(sentence)


def bubble(
    schedule: Schedule,
    stages: Any,
    microbatches: Any,
    virtual_stages: Any = 1,
    forward: Any = 1.0,
    input_grad: Any = 1.0,
    weight_grad: Any = 1.0,
    *,
    flush: bool | None = None,
) -> Any:
    """Idle time over working time of a step; the efficiency of the pipeline is 1 / (1 + bubble).

    gpipe, 1f1b   (p - 1) / m                                    (Huang et al. 2018, arXiv 1811.06965;
                                                                 Narayanan et al. 2021, section 2.2)
    interleaved   (p - 1) / (v m)                                (the same, section 2.2)
    zb-h1         (p - 1) (F + I - W) / (m (F + I + W))          (Qi et al. 2023, arXiv 2401.10241, table 2)
    zb-h2         (p - 1) (F + I - 2 W) / (m (F + I + W)), flushed (p - 1) max(F, F + I - 2 W) / ...
    zbv           (p - 1) (I - W) / (m (F + I + W)), flushed (p - 1) max(I / 2, I - W) / ...

    `flush` says whether all stages wait for each other between steps, as for the norm of the gradient: then
    the time from the first pass to the last one counts. Without it a stage starts its next step when its own
    work is done, the optimizer checks afterwards (Qi et al. 2023, section 4), and a stage's own span counts.
    It matters to the last two alone. None: as each is published, zb-h2 without and zbv with (as torch ships
    it). With F = I = W zbv then idles (p - 1) / (6 m), and flushed zb-h2 is no better than zb-h1.

    Raises SpecError where plain numbers cannot run so (see `why_not`); in arrays such an element is infinite.
    """
    plain = not any(
        isinstance(x, np.ndarray)
        for x in (stages, microbatches, virtual_stages, forward, input_grad, weight_grad)
    )
    if schedule not in SCHEDULES:
        raise SpecError(f'no pipeline schedule "{schedule}"; there are {", ".join(SCHEDULES)}')
    faults: Any = False
    for fault, sentence in why_not(
        schedule, stages, microbatches, virtual_stages, forward, input_grad, weight_grad
    ):
        if plain and fault:
            raise SpecError(sentence)
        faults = faults | fault
    idle = _idle(schedule, virtual_stages, forward, input_grad, weight_grad, flush)
    work = forward + input_grad + weight_grad
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (stages - 1) * (idle / work) / microbatches
    return float(share) if plain else np.where(faults, np.inf, share)


def _idle(
    schedule: Schedule,
    virtual_stages: Any,
    forward: Any,
    input_grad: Any,
    weight_grad: Any,
    flush: bool | None,
) -> Any:
    """Idle time of a step per stage after the first, in the unit of the times."""
    if schedule == "interleaved":
        return (forward + input_grad + weight_grad) / virtual_stages
    if schedule == "zb-h1":
        return forward + input_grad - weight_grad
    if schedule == "zb-h2":
        span = forward + input_grad - 2 * weight_grad
        return np.maximum(forward, span) if flush else span
    if schedule == "zbv":
        span = input_grad - weight_grad
        return span if flush is False else np.maximum(input_grad / 2, span)
    return forward + input_grad + weight_grad


def in_flight(
    schedule: Schedule,
    stages: Any,
    microbatches: Any,
    virtual_stages: Any = 1,
    stage: Any = 0,
    weight_share: Any = 1.0,
) -> Any:
    """The most microbatches whose activations stage i keeps at once, each over all layers of the stage.

    gpipe         m
    1f1b          min(p - i, m)
    interleaved   min((v - 1) p + 2 (p - i) - 1, m v) / v: 1 + (p - 1) / (p v) times 1F1B's p on stage 0
                  (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.3)
    zb-h1         p - i + w i
    zb-h2         2 (p - i) - 1 + 2 w i                          (Qi et al. 2023, section 2.3)
    zbv           p on every stage                               (the same, section 6)

    w, `weight_share`, is what a microbatch keeps between its gradients by the input and by the weights, as a
    share of its activations: 1, the upper bound, where nothing is freed in between. Raises SpecError on
    another schedule.
    """
    p, m, v, w = stages, microbatches, virtual_stages, weight_share
    if schedule == "gpipe":
        kept = m + 0 * stage
    elif schedule == "1f1b":
        kept = np.minimum(p - stage, m)
    elif schedule == "interleaved":
        chunks = np.where(np.asarray(v) == 1, p - stage, (v - 1) * p + 2 * (p - stage) - 1)
        kept = np.minimum(chunks, m * v) / v
    elif schedule == "zb-h1":
        kept = np.minimum(p - stage + w * stage, m)
    elif schedule == "zb-h2":
        kept = np.minimum(2 * (p - stage) - 1 + 2 * w * stage, m)
    elif schedule == "zbv":
        kept = np.minimum(p + 0 * stage, m)
    else:
        raise SpecError(f'no pipeline schedule "{schedule}"; there are {", ".join(SCHEDULES)}')
    return kept if np.ndim(kept) else float(kept)


def efficiency(bubble: Any) -> Any:
    """The share of a step in which stages work: 1 / (1 + bubble)."""
    return 1 / (1 + bubble)
