"""What failures leave of a run: mean time between them, when to save, and how much of the time is progress.

Letters, all in seconds: C one checkpoint, R one restart, M mean time between failures of the whole job,
t the work between two checkpoints. A failure loses all work since the last finished checkpoint.

Failures are a Poisson process and strike work, checkpoints and restarts alike. Numbers may be arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SECONDS_PER_HOUR = 3_600
HOURS_PER_DAY = 24


def failure_rate(failures: float, devices: float, days: float) -> float:
    """Failures per device and hour, as counted over a run."""
    return failures / (devices * days * HOURS_PER_DAY)


LLAMA_3_RATE = failure_rate(419, 16_384, 54)
"""Unexpected interruptions of Llama-3 405B (arXiv 2407.21783, table 5): 419 in 54 days on 16,384 H100."""


def mean_time_between_failures(devices: float, rate_per_device_hour: float) -> float:
    """Seconds between two failures of a job that any device's failure stops: 1 / (n lambda)."""
    return SECONDS_PER_HOUR / (devices * rate_per_device_hour)


def young_interval(checkpoint: Any, mtbf: Any) -> Any:
    """Work between two checkpoints, to first order: sqrt(2 C M) (Young 1974, CACM 17(9))."""
    return np.sqrt(2 * checkpoint * mtbf)


def daly_interval(checkpoint: Any, mtbf: Any) -> Any:
    """The same to higher order (Daly 2006, Future Generation Computer Systems 22(3), eq. 37).

    sqrt(2 C M) [1 + sqrt(C / 2M) / 3 + (C / 2M) / 9] - C for C < 2 M, and M beyond.
    """
    small = checkpoint / (2 * mtbf)
    interval = young_interval(checkpoint, mtbf) * (1 + np.sqrt(small) / 3 + small / 9) - checkpoint
    return np.where(small < 1, interval, mtbf)[()]


def optimal_interval(checkpoint: Any, mtbf: Any) -> Any:
    """The interval at which `goodput` is largest, exactly; the restart does not matter.

    The derivative of `goodput` is 0 where ln(1 - x) + x + C / M = 0, x = t / M (Lambert's W, as in Daly
    2006). Newton from above the root: the function is concave and falls, so no step passes it. Raises
    ValueError unless C >= 0 and M > 0.
    """
    if not (np.all(np.asarray(checkpoint) >= 0) and np.all(np.asarray(mtbf) > 0)):
        raise ValueError(f"a checkpoint of {checkpoint} s at {mtbf} s between failures: want C >= 0, M > 0")
    ratio = np.asarray(checkpoint / mtbf, dtype=np.float64)
    ratio = np.minimum(ratio, 30.0)  # beyond, the root is 1 to 13 digits
    x = np.minimum(np.sqrt(2 * ratio), -np.expm1(-(1 + ratio)))
    # Quadratic from the first step on, since the start is the root itself to first order.
    for _ in range(8):
        slope = np.where(x > 0, x / (1 - x), 1.0)
        x = x + (np.log1p(-x) + x + ratio) / slope
    return (x * mtbf)[()]


def availability_interval(checkpoint: Any, mtbf: Any, restart: Any) -> Any:
    """Work between checkpoints at the largest availability when a failure costs R and half a period.

    Saxena et al. 2024, arXiv 2410.18124: the period T = C + sqrt(2 (M + R) C + C^2) maximises
    (T - C) / T x M / (M + R + T / 2). What is returned is T - C, to compare with the other intervals.
    """
    return np.sqrt(2 * (mtbf + restart) * checkpoint + checkpoint**2)


def availability(interval: Any, checkpoint: Any, mtbf: Any, restart: Any) -> Any:
    """Share of time in work that is kept, if each failure costs R and half a period, and none strikes
    twice: what `availability_interval` maximises."""
    period = interval + checkpoint
    return interval / period * mtbf / (mtbf + restart + period / 2)


def goodput(interval: Any, checkpoint: Any, mtbf: Any, restart: Any) -> Any:
    """Expected share of time in work that is kept: t / [M exp(R/M) (exp((t + C)/M) - 1)].

    The denominator is the mean time until t of work and its checkpoint pass without a failure, each
    attempt after a failure behind a restart that has to pass too (the complete model of Daly 2006).
    """
    return interval / (mtbf * np.exp(restart / mtbf) * np.expm1((interval + checkpoint) / mtbf))


def goodput_first_order(interval: Any, checkpoint: Any, mtbf: Any, restart: Any) -> Any:
    """The same while failures are rare: 1 - C/t - t/2M - R/M; below 0 it says nothing."""
    return 1 - checkpoint / interval - interval / (2 * mtbf) - restart / mtbf


def best_goodput(checkpoint: Any, mtbf: Any, restart: Any) -> Any:
    """`goodput` at its optimal interval."""
    return goodput(optimal_interval(checkpoint, mtbf), checkpoint, mtbf, restart)
