"""The law of a sampler kernel that draws its random numbers itself: numbers of ours are injected.

Letters: V categories.

Where the answer of a kernel changes as one of its random numbers grows is found by bisection, and these
thresholds are its law: a draft is accepted below a threshold of a uniform number, and a race of exponentials
(arXiv 1411.0030) is won below a ratio of two of them. Each threshold is known up to a bracket, so the law
is known up to a box, and its total variation to a target up to an interval. That a kernel is such a sampler
is not taken on trust: it is asked at random numbers too, and must answer as its thresholds say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 40
"""Halvings of [0, 1] at most: float32 ends them at 24 near 1, and 2^-40 is far below 1e-6 near 0."""

PROBES = 64
"""Random questions per draft. A kernel that answers otherwise on a share s of them is found out with
probability 1 - (1 - s)^64: 0.999 at s = 0.1."""

FAR = 2.0**60
"""An exponential so large that its category loses against any weight above 2^-36 of the largest."""


class NotThisSampler(RuntimeError):
    """The kernel does not answer as a sampler of the assumed kind would."""


class Bracket(NamedTuple):
    """An interval that contains a number."""

    low: float
    high: float


@dataclass(frozen=True)
class Box:
    """A law of which each probability is known up to a bracket."""

    brackets: tuple[Bracket, ...]
    """[V]"""
    calls: int
    """Of the kernel."""

    def tv(self, target: Sequence[float]) -> Bracket:
        """Total variation to `target` [V]: least and greatest over all laws in the box, which contains it.

        Raises ValueError where the target has another number of categories.
        """
        pairs = list(zip(self.brackets, target, strict=True))
        least = math.fsum(max(0.0, b.low - p, p - b.high) for b, p in pairs) / 2
        greatest = math.fsum(max(abs(b.low - p), abs(b.high - p)) for b, p in pairs) / 2
        return Bracket(least, min(1.0, greatest))


def threshold(
    accepts: Callable[[float], bool], *, dtype: torch.dtype = torch.float32, steps: int = STEPS
) -> Bracket:
    """Where `accepts(u)` turns from True to False as u grows from 0 to 1: at most `steps` + 2 calls.

    Only numbers of `dtype` are asked, so that the kernel sees what we mean. [0, 0]: never accepted.
    """
    low, high = 0.0, 1.0
    if not accepts(low):
        return Bracket(0.0, 0.0)
    last = below_one(dtype)
    if accepts(last):
        return Bracket(last, 1.0)
    high = last
    for _ in range(steps):
        middle = torch.tensor((low + high) / 2, dtype=dtype).item()
        if not low < middle < high:
            break
        if accepts(middle):
            low = middle
        else:
            high = middle
    return Bracket(low, high)


def below_one(dtype: torch.dtype) -> float:
    """The largest number of `dtype` below 1."""
    return 1 - float(torch.finfo(dtype).eps) / 2


def race(
    winner: Callable[[Tensor], int], categories: int, *, dtype: torch.dtype = torch.float32
) -> tuple[Bracket, ...]:
    """[V] brackets of the weights of a race: `winner(exponentials [V])` is the index of the largest w / e.

    The weights are relative to the largest one, which wins when all exponentials are equal; the others are
    ratios found by bisection with all but two runners far behind. The kernel divides in its own dtype, which
    moves a ratio by two roundings. Raises NotThisSampler where an answer is no category.
    """
    best = winner(torch.ones(categories, dtype=dtype))
    rounding = float(torch.finfo(dtype).eps)
    weights = []
    for index in range(categories):
        if index == best:
            weights.append(Bracket(1.0, 1.0))
            continue

        def wins(ratio: float, index: int = index) -> bool:
            exponentials = torch.full((categories,), FAR, dtype=dtype)
            exponentials[best] = 1
            # zero is no exponential: the smallest question stands for it
            exponentials[index] = max(ratio, 2.0**-STEPS)
            return winner(exponentials) == index

        low, high = threshold(wins, dtype=dtype)
        if high == 0:
            high = 2.0**-STEPS
        weights.append(Bracket(low * (1 - rounding), min(1.0, high * (1 + rounding))))
    return tuple(weights)


def normalised(weights: Sequence[Bracket]) -> tuple[Bracket, ...]:
    """[V] brackets of w_i / sum_j w_j: the least where w_i is least and all others are greatest."""
    low, high = math.fsum(w.low for w in weights), math.fsum(w.high for w in weights)

    def share(part: float, others: float) -> float:
        return part / (part + others) if part > 0 else 0.0

    return tuple(Bracket(share(w.low, high - w.high), share(w.high, low - w.low)) for w in weights)


def inverse_law(
    token_of: Callable[[float], int], categories: int, *, dtype: torch.dtype = torch.float32, grid: int = 256
) -> Box:
    """The law of a kernel that turns one uniform number into a token, such as an inverse distribution
    function: the length of [0, 1) on which it returns each of V tokens.

    It is asked on a grid, and every change between neighbours is followed down to adjacent numbers of
    `dtype`. The box holds if no token hides between two equal neighbours, as none can where the token grows
    with u. Raises NotThisSampler where an answer is no category.
    """
    sure, unsure, calls = [0.0] * categories, [0.0] * categories, 0

    def asked(u: float) -> int:
        nonlocal calls
        calls += 1
        token = int(token_of(u))
        if not 0 <= token < categories:
            raise NotThisSampler(f"the kernel returned {token}, which is none of the {categories} categories")
        return token

    points = [i / grid for i in range(grid)] + [below_one(dtype)]
    answers = [asked(u) for u in points]
    waiting = list(zip(points, answers, points[1:], answers[1:], strict=False))
    unsure[answers[-1]] += 1 - points[-1]
    while waiting:
        low, first, high, second = waiting.pop()
        middle = torch.tensor((low + high) / 2, dtype=dtype).item()
        if first == second:
            sure[first] += high - low
        elif not low < middle < high or high - low < 2.0**-STEPS:
            unsure[first] += high - low
            unsure[second] += high - low
        else:
            between = asked(middle)
            waiting += [(low, first, middle, between), (middle, between, high, second)]
    return Box(tuple(Bracket(a, min(1.0, a + b)) for a, b in zip(sure, unsure, strict=True)), calls)


Kernel = Callable[[int, float, Tensor], int]
"""(draft, uniform, exponentials [V]) -> token: keeps the draft or draws another token instead."""


def rejection_law(
    kernel: Kernel,
    proposal: Sequence[float],
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    probes: int = PROBES,
) -> Box:
    """The law of the token that a rejection sampler emits when drafts come from `proposal` [V].

    sum_x q(x) (a_x 1[y = x] + (1 - a_x) r_x(y)), with the acceptance a_x and the weights r_x of the race
    found for each draft apart, so that a residual that wrongly depends on the draft is seen. The box holds
    if the kernel accepts below a threshold of u and otherwise returns the winner of a race that does not
    depend on u; `probes` random questions per draft check that. Raises NotThisSampler where it does not.
    """
    size, calls = len(proposal), 0

    def asked(draft: int, uniform: float, exponentials: Tensor) -> int:
        nonlocal calls
        calls += 1
        token = int(kernel(draft, uniform, exponentials))
        if not 0 <= token < size:
            raise NotThisSampler(f"the kernel returned {token}, which is none of the {size} categories")
        return token

    low, high = [0.0] * size, [0.0] * size
    for draft, q in enumerate(proposal):
        if q <= 0:
            continue
        accepted, residual = _conditional(asked, draft, size, dtype)
        _check(asked, draft, accepted, residual, generator, dtype, probes)
        for token, share in enumerate(normalised(residual)):
            low[token] += q * (1 - accepted.high) * share.low
            high[token] += q * (1 - accepted.low) * share.high
        # a_x + (1 - a_x) r grows with a_x, unlike its parts
        own = normalised(residual)[draft]
        low[draft] += q * (accepted.low + (accepted.high - accepted.low) * own.low)
        high[draft] += q * (accepted.high - (accepted.high - accepted.low) * own.high)
    return Box(tuple(Bracket(a, min(1.0, b)) for a, b in zip(low, high, strict=True)), calls)


def _conditional(
    asked: Kernel, draft: int, size: int, dtype: torch.dtype
) -> tuple[Bracket, tuple[Bracket, ...]]:
    """Acceptance of one draft, and the weights of the race that follows its rejection."""
    against = torch.ones(size, dtype=dtype)
    against[draft] = FAR
    accepted = threshold(lambda u: asked(draft, u, against) == draft, dtype=dtype)
    if accepted.high == 1:
        return accepted, (Bracket(0.0, 1.0),) * size
    last = below_one(dtype)
    return accepted, race(lambda e: asked(draft, last, e), size, dtype=dtype)


def _check(
    asked: Kernel,
    draft: int,
    accepted: Bracket,
    residual: Sequence[Bracket],
    generator: torch.Generator,
    dtype: torch.dtype,
    probes: int,
) -> None:
    """Ask at random numbers and compare with what the thresholds say, where they say it."""
    middle = torch.tensor([(w.low + w.high) / 2 for w in residual], dtype=torch.float64)
    uniforms = torch.rand(probes, generator=generator, dtype=dtype)
    # half of the questions where a draft is rejected, however rarely that is
    uniforms[1::2] = accepted.high + (1 - accepted.high) * uniforms[1::2]
    uniforms.clamp_(max=below_one(dtype))
    noise = torch.empty(probes, len(residual), dtype=torch.float64).exponential_(generator=generator)
    for u, e in zip(uniforms.tolist(), noise.to(dtype), strict=True):
        if accepted.low < u < accepted.high or (u >= accepted.high and accepted.high == 1):
            continue
        token = asked(draft, u, e)
        if u <= accepted.low and accepted.high > 0:
            expected = draft
        else:
            scores = middle / e.double()
            best, second = scores.topk(2).values.tolist() if len(residual) > 1 else (1.0, 0.0)
            if second > best * (1 - 1e-5):
                continue
            expected = int(scores.argmax())
        if token != expected:
            raise NotThisSampler(
                f"with draft {draft}, uniform {u:.6g} and random exponentials the kernel returned {token}; "
                f"its thresholds (acceptance {accepted.low:.6g}) say {expected}: its draws are not "
                "independent, or it is another kind of sampler"
            )
