"""Injection: the law of a kernel by bisection, and what is no such kernel."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harness.evidence.injection import (
    Box,
    Bracket,
    Kernel,
    NotThisSampler,
    inverse_law,
    normalised,
    race,
    rejection_law,
    threshold,
)

P = torch.tensor([0.30, 0.25, 0.20, 0.15, 0.10, 0.0])
Q = torch.tensor([0.05, 0.40, 0.10, 0.05, 0.15, 0.25])
CERTIFIED = 1e-6


def certified(kernel: Kernel) -> tuple[Box, Bracket]:
    """The law of a kernel whose drafts come from Q, and its distance to P."""
    box = rejection_law(kernel, Q.double().tolist(), generator=torch.Generator().manual_seed(0))
    return box, box.tv(P.double().tolist())


def rejection(residual: Tensor, accept: Callable[[float, float], float] = lambda p, q: p / q) -> Kernel:
    """A kernel in float32 that keeps a draft where u < accept(p, q)."""

    def kernel(draft: int, uniform: float, exponentials: Tensor) -> int:
        if uniform < accept(float(P[draft]), float(Q[draft])):
            return draft
        return int((residual / exponentials).argmax())

    return kernel


def test_a_right_kernel_is_certified_within_a_second() -> None:
    """The law of V = 6 is known to 1e-6 in total variation, in less than 1 s."""
    start = time.perf_counter()
    box, tv = certified(rejection((P - Q).clamp(min=0)))
    assert time.perf_counter() - start < 1
    assert tv.high < CERTIFIED
    assert box.calls < 1500
    assert all(0 <= b.low <= p <= b.high <= 1 for b, p in zip(box.brackets, P.double().tolist(), strict=True))


WRONG: dict[str, Kernel] = {
    "the residual is p": rejection(P),
    "the residual is |p - q|": rejection((P - Q).abs()),
    "the residual goes through softmax": rejection((P - Q).clamp(min=0).softmax(0)),
    "q of a greedy draft": rejection((P - Q).clamp(min=0), lambda p, q: p),
    "p and q are swapped": rejection((P - Q).clamp(min=0), lambda p, q: q / p if p else 1.0),
    "accepts from a threshold on": rejection((P - Q).clamp(min=0), lambda p, q: float(p > 0.12)),
    "a little too generous": rejection((P - Q).clamp(min=0), lambda p, q: 1.00002 * p / q),
}


@pytest.mark.parametrize("defect", WRONG)
def test_a_wrong_kernel_is_measured(defect: str) -> None:
    """Every defect has a certified distance well above that of a right kernel, in a narrow bracket."""
    box, tv = certified(WRONG[defect])
    assert tv.low > 3 * CERTIFIED
    assert tv.high - tv.low < CERTIFIED
    assert sum(b.low for b in box.brackets) <= 1 <= sum(b.high for b in box.brackets)


def test_a_wrong_residual_has_the_distance_that_follows() -> None:
    """The bracket holds the total variation that min(p, q) + (1 - sum min(p, q)) r has."""
    kept, residual = torch.minimum(P, Q).double(), P.double()
    by_hand = kept + (1 - kept.sum()) * residual / residual.sum()
    low, high = certified(WRONG["the residual is p"])[1]
    # P and Q are float32, and p / q is rounded
    assert low - 1e-7 <= float((by_hand - P.double()).abs().sum()) / 2 <= high + 1e-7


def test_draws_that_depend_on_each_other_are_no_rejection_sampler() -> None:
    """A kernel whose race uses its uniform again, or whose draft matters in no monotone way, is refused."""
    right = rejection((P - Q).clamp(min=0))

    def reused(draft: int, uniform: float, exponentials: Tensor) -> int:
        tilted = exponentials.clone()
        tilted[0] *= 3 * (1 - uniform) + 1e-3
        return right(draft, uniform, tilted)

    def islands(draft: int, uniform: float, exponentials: Tensor) -> int:
        return right(draft, uniform * 7 % 1 if uniform < 0.4 else uniform, exponentials)

    def dice(draft: int, uniform: float, exponentials: Tensor) -> int:
        return int(exponentials.argmax())

    for kernel in (reused, islands, dice):
        with pytest.raises(NotThisSampler, match="thresholds"):
            certified(kernel)
    with pytest.raises(NotThisSampler, match="none of the 6"):
        certified(lambda draft, uniform, exponentials: 6)


def test_a_threshold_is_found_in_few_calls() -> None:
    """A threshold of float32 lies between neighbours, or within 2^-40, after at most 42 calls."""
    for limit in (0.0, 1e-9, 0.3, 0.999, 1.0, 2.0):
        calls: list[float] = []

        def accepts(u: float, limit: float = limit, calls: list[float] = calls) -> bool:
            calls.append(u)
            return u < limit

        low, high = threshold(accepts)
        assert low <= min(limit, 1.0) <= high
        assert high - low <= 2.0**-24
        assert len(calls) <= 42


def test_a_race_is_weighed() -> None:
    """Weights of a race are found relative to the largest, and those that are 0 as below 2^-40."""
    weights = torch.tensor([0.2, 0.0, 0.5, 0.3])
    brackets = normalised(race(lambda e: int((weights / e).argmax()), 4))
    assert all(
        b.low <= float(w) <= b.high and b.high - b.low < 1e-6 for b, w in zip(brackets, weights, strict=True)
    )


def test_an_inverse_distribution_function_is_measured() -> None:
    """One uniform number per token: certified where right, measured where a boundary is shifted by one."""
    steps = P.cumsum(0)
    right = inverse_law(lambda u: int(torch.searchsorted(steps[:5].contiguous(), u, right=True)), 6)
    assert right.tv(P.double().tolist()).high < CERTIFIED
    shifted = inverse_law(lambda u: min(5, int((steps < u).sum()) + 1), 6)
    assert shifted.tv(P.double().tolist()).low > 0.2
    with pytest.raises(NotThisSampler, match="none of the 6"):
        inverse_law(lambda u: 7, 6)
