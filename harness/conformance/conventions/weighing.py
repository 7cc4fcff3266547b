"""Conventions of the stage weigh: combine weights of the selected experts.

Letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.conformance import stages
from harness.conformance.capture import FLOAT32, Captured
from harness.conformance.conventions.search import Convention, Finding, does, says
from harness.conformance.conventions.stagewise import exact, function, rounded, scored, stage_finder
from harness.conformance.stages import Judged
from harness.spec.architecture import Router


@dataclass(frozen=True)
class Weighing:
    """What combine weights are made of."""

    router: Router
    top_k: int
    scores: Judged
    logits: Tensor
    indices: Tensor
    correction: Tensor | None
    after: Callable[[Judged], Judged] = lambda judged: judged


def _weigh_start(layer: Captured) -> Weighing:
    return Weighing(
        layer.moe.router,
        layer.moe.top_k,
        layer.scores(),
        layer.logits(),
        layer.trace.indices,
        layer.correction(),
    )


def _weigh(given: Weighing) -> Judged:
    return given.after(
        stages.combine_weights(given.router, given.scores, given.logits, given.indices, FLOAT32)
    )


def _router(given: Weighing, **fields: object) -> Weighing:
    return replace(given, router=given.router.model_copy(update=fields))


def _before(given: Weighing, scores: Judged) -> Weighing:
    """Weights from these scores; normalised only where the spec says so before top-k."""
    normalise = given.router.normalise and given.router.order == "before_topk"
    return replace(_router(given, order="before_topk", normalise=normalise), scores=scores)


def _from(given: Weighing, score: str) -> Weighing:
    """Weights from the other score function."""
    if score == given.router.score:
        return given
    return _before(given, stages.scores(function(given.router, score), given.logits, FLOAT32))


def _biased(given: Weighing) -> Weighing:
    if given.correction is None:
        return given
    value = given.scores.value + given.correction.double()
    moved = Judged(value, given.scores.bound + torch.finfo(FLOAT32).eps * value.abs())
    return replace(given, scores=moved, logits=given.logits + given.correction)


WEIGH: tuple[Convention[Weighing], ...] = (
    Convention(
        "softmax-of-the-selected",
        "source",
        "combine weights are a softmax over the selected logits alone (softmax after top-k)",
        says("moe.router.order"),
        # Of a softmax over all experts the selected part, normalised, is the same: that has another name.
        lambda w: _router(w, order="after_topk") if w.router.score == "sigmoid" else w,
    ),
    Convention(
        "softmax-before-topk",
        "source",
        "combine weights are the selected scores of a softmax over all experts (softmax before top-k)",
        says("moe.router.order"),
        lambda w: _before(w, w.scores) if w.router.order == "after_topk" else w,
    ),
    Convention(
        "correction-bias-in-weights",
        "source",
        "the correction bias is in the combine weights",
        does("adds it for the selection alone"),
        _biased,
    ),
    Convention(
        "weights-from-sigmoid",
        "source",
        "combine weights are taken from the sigmoid of each logit",
        says("moe.router.score"),
        lambda w: _from(w, "sigmoid"),
    ),
    Convention(
        "weights-from-softmax",
        "source",
        "combine weights are taken from a softmax over all experts",
        says("moe.router.score"),
        lambda w: _from(w, "softmax"),
    ),
    Convention(
        "weights-from-double-softmax",
        "source",
        "combine weights are scores of scores",
        does("applies the score function once"),
        lambda w: _before(w, scored(w.router, w.scores)),
    ),
    Convention(
        "weights-are-logits",
        "source",
        "combine weights are the selected logits",
        says("moe.router.score"),
        lambda w: _before(w, exact(w.logits)),
    ),
    Convention(
        "weights-all-one",
        "source",
        "combine weights are all 1",
        does("weighs by the scores"),
        lambda w: _before(w, exact(torch.ones_like(w.logits))),
    ),
    Convention(
        "always-normalised",
        "normalise",
        "combine weights renormalised over the selected experts (norm_topk_prob = true)",
        says("moe.router.normalise"),
        lambda w: _router(w, normalise=True),
    ),
    Convention(
        "never-normalised",
        "normalise",
        "combine weights not renormalised over the selected experts (norm_topk_prob = false)",
        says("moe.router.normalise"),
        lambda w: _router(w, normalise=False),
    ),
    Convention(
        "normalised-after-scaling",
        "normalise",
        "combine weights renormalised over the selected experts (norm_topk_prob = true) after scaling",
        says("moe.router.normalise"),
        lambda w: _router(w, normalise=True, scaling_factor=1.0),
    ),
    Convention(
        "top-1-normalised",
        "normalise",
        "combine weights divided by themselves at K = 1",
        says("moe.router.normalise"),
        lambda w: _router(w, normalise=True) if w.top_k == 1 else w,
    ),
    Convention(
        "top-1-not-normalised",
        "normalise",
        "combine weights renormalised only for K > 1",
        says("moe.router.normalise"),
        lambda w: _router(w, normalise=False) if w.top_k == 1 else w,
    ),
    Convention(
        "scaling-ignored",
        "scale",
        "combine weights are not scaled",
        says("moe.router.scaling_factor"),
        lambda w: _router(w, scaling_factor=1.0),
    ),
    Convention(
        "scaling-twice",
        "scale",
        "combine weights are scaled twice",
        says("moe.router.scaling_factor"),
        lambda w: _router(w, scaling_factor=w.router.scaling_factor**2),
    ),
    Convention(
        "scaling-only-if-normalised",
        "scale",
        "combine weights are scaled only where they are normalised",
        says("moe.router.scaling_factor"),
        lambda w: w if w.router.normalise else _router(w, scaling_factor=1.0),
    ),
    Convention(
        "weights-in-bfloat16",
        "rounding",
        "combine weights rounded to bfloat16",
        says("moe.router.dtype"),
        lambda w: replace(w, after=rounded),
    ),
)


def weights_finder(conventions: Sequence[Convention[Weighing]]) -> Callable[[list[Captured]], Finding]:
    """The finder of the stage weigh, among these conventions."""
    return stage_finder(conventions, _weigh_start, _weigh, lambda layer: layer.shown("weights"))


find_weights = weights_finder(WEIGH)
