"""Finders for the stages of a MoE layer, each on the implementation's own input to the stage.

Letters: T tokens, E experts, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harness.conformance import stages
from harness.conformance.capture import FLOAT32, Captured
from harness.conformance.conventions.search import Convention, Finding, Fit, P, finding
from harness.conformance.stages import Judged
from harness.spec.architecture import Router

BFLOAT16 = torch.bfloat16


def stage_finder(
    conventions: Sequence[Convention[P]],
    start: Callable[[Captured], P],
    compute: Callable[[P], Judged],
    shown: Callable[[Captured], Tensor],
    rows: Callable[[P, Tensor], P] | None = None,
) -> Callable[[list[Captured]], Finding]:
    """A finder for a stage whose values are compared.

    `start` gives what the stage computes with, `compute` what it must give, `shown` what it gave. `rows`
    picks some tokens [R] of what a costly stage computes with: those most off rule out most variants.
    """

    def find(layers: list[Captured]) -> Finding:
        own: dict[int, tuple[P, Judged]] = {}

        def fit(change: Callable[[P], P], layer: Captured) -> Fit:
            if id(layer) not in own:
                given = start(layer)
                own[id(layer)] = given, compute(given)
            given, spec = own[id(layer)]
            if rows is not None:
                some = _worst(shown(layer), spec, layer.real)
                part = compute(change(rows(given, some)))
                if not ((shown(layer)[some].double() - part.value).abs() <= part.bound).all():
                    return Fit(agrees=False, differs=False)
            other = compute(change(given))
            error = (shown(layer).double() - other.value).abs()[layer.real]
            apart = (other.value - spec.value).abs() > other.bound + spec.bound
            return Fit(bool((error <= other.bound[layer.real]).all()), bool(apart[layer.real].any()))

        return finding(conventions, layers, fit, lambda layer: layer.variant.architecture)

    return find


def _worst(shown: Tensor, spec: Judged, real: Tensor) -> Tensor:
    """[R]: the real tokens that are furthest from what the spec gives."""
    off = ((shown.double() - spec.value).abs() / spec.bound.clamp(min=1e-300)).amax(-1)
    return off.masked_fill(~real, -1).topk(min(3, int(real.sum()))).indices


def rounded(judged: Judged) -> Judged:
    """After a rounding to bfloat16, which is monotone: the interval that all allowed values go to."""
    low, high = ((judged.value + sign * judged.bound).to(BFLOAT16).double() for sign in (-1, 1))
    return Judged((low + high) / 2, (high - low) / 2)


def function(router: Router, score: str) -> Router:
    """The router with another score function."""
    return router.model_copy(update={"score": score})


def scored(router: Router, logits: Judged) -> Judged:
    """The scores of logits that err."""
    judged = stages.scores(router, logits.value, FLOAT32)
    # Softmax and sigmoid move by at most their own value times twice the logits' error.
    return Judged(judged.value, judged.bound + 2 * judged.value * logits.bound.amax(-1, keepdim=True))


def exact(value: Tensor) -> Judged:
    """What is known without error."""
    return Judged(value.double(), torch.zeros_like(value, dtype=torch.float64))
