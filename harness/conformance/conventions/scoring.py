"""Conventions of the stages proj and score: what router logits are, and what scores are made of them.

Letters: T tokens, D d_model, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from harness.conformance import stages
from harness.conformance.capture import FLOAT32, Captured
from harness.conformance.conventions.search import Convention, does, says
from harness.conformance.conventions.stagewise import (
    BFLOAT16,
    exact,
    function,
    rounded,
    scored,
    stage_finder,
)
from harness.conformance.stages import Judged
from harness.spec.architecture import Router


@dataclass(frozen=True)
class Projecting:
    """What router logits are made of."""

    router: Router
    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None
    hidden: Tensor
    after: Callable[[Judged], Judged] = lambda judged: judged


def _project_start(layer: Captured) -> Projecting:
    at, weights = f"layers.{layer.trace.layer}.moe.router", layer.variant.weights
    weight, bias = weights[f"{at}.weight"], weights.get(f"{at}.bias")
    return Projecting(layer.moe.router, weight, bias, layer.correction(), layer.shown("hidden"))


def _project(given: Projecting) -> Judged:
    held = {"layers.0.moe.router.weight": given.weight}
    if given.bias is not None:
        held["layers.0.moe.router.bias"] = given.bias
    return given.after(stages.logits(held, 0, given.hidden, FLOAT32))


def _turned(given: Projecting) -> Projecting:
    square = given.weight.shape[0] == given.weight.shape[1]
    return replace(given, weight=given.weight.T) if square else given


def _reported_as_scores(given: Projecting) -> Projecting:
    return replace(given, after=lambda judged: scored(given.router, given.after(judged)))


def _narrow_inputs(given: Projecting) -> Projecting:
    weight, hidden = given.weight.to(BFLOAT16), given.hidden.to(BFLOAT16)
    bias = None if given.bias is None else given.bias.to(BFLOAT16)
    return replace(given, weight=weight, hidden=hidden, bias=bias, after=rounded)


def _corrected(given: Projecting) -> Projecting:
    if given.correction is None:
        return given
    return replace(given, bias=given.correction + (0 if given.bias is None else given.bias))


PROJECT: tuple[Convention[Projecting], ...] = (
    Convention(
        "router-bias-unused",
        "bias",
        "router logits without the router's bias",
        says("moe.router.bias"),
        lambda p: replace(p, bias=None),
    ),
    Convention(
        "correction-bias-in-logits",
        "bias",
        "the correction bias added to the logits",
        does("adds it to the scores, for the selection alone"),
        _corrected,
    ),
    Convention(
        "router-in-bfloat16",
        "rounding",
        "router logits rounded to bfloat16",
        says("moe.router.dtype"),
        lambda p: replace(p, after=rounded),
    ),
    Convention(
        "router-computed-in-bfloat16",
        "rounding",
        "router logits computed from bfloat16 inputs and rounded to bfloat16",
        says("moe.router.dtype"),
        _narrow_inputs,
    ),
    Convention(
        "router-reports-probabilities",
        "shown",
        "what is shown as router logits are scores",
        does("means the linear layer's output"),
        _reported_as_scores,
    ),
    Convention(
        "router-transposed-if-square",
        "layout",
        "a square router matrix is transposed",
        does("has it as [experts, d_model]"),
        _turned,
    ),
)


@dataclass(frozen=True)
class Scoring:
    """What scores are made of."""

    router: Router
    logits: Judged
    times: int = 1
    over_tokens: bool = False
    after: Callable[[Judged], Judged] = lambda judged: judged


def _score_start(layer: Captured) -> Scoring:
    return Scoring(layer.moe.router, exact(layer.shown("logits")))


def _score(given: Scoring) -> Judged:
    judged = given.logits
    for _ in range(given.times):
        if given.over_tokens:
            turned = scored(given.router, Judged(judged.value.T, judged.bound.T))
            judged = Judged(turned.value.T, turned.bound.T)
        else:
            judged = scored(given.router, judged)
    return given.after(judged)


SCORE: tuple[Convention[Scoring], ...] = (
    Convention(
        "sigmoid-scores",
        "function",
        "scores are the sigmoid of each logit",
        says("moe.router.score"),
        lambda s: replace(s, router=function(s.router, "sigmoid")),
    ),
    Convention(
        "softmax-scores",
        "function",
        "scores are the softmax over all experts",
        says("moe.router.score"),
        lambda s: replace(s, router=function(s.router, "softmax")),
    ),
    Convention(
        "double-softmax",
        "times",
        "the score function is applied twice",
        does("applies it once"),
        lambda s: replace(s, times=2),
    ),
    Convention(
        "scores-are-logits",
        "times",
        "what is shown as scores are logits",
        says("moe.router.score"),
        lambda s: replace(s, times=0),
    ),
    Convention(
        "softmax-over-tokens",
        "axis",
        "the softmax is over the tokens",
        does("takes it over the experts"),
        lambda s: replace(s, over_tokens=True),
    ),
    Convention(
        "scores-in-bfloat16",
        "rounding",
        "scores rounded to bfloat16",
        says("moe.router.dtype"),
        lambda s: replace(s, after=rounded),
    ),
    Convention(
        "scores-in-model-dtype",
        "rounding",
        "scores computed in bfloat16",
        says("moe.router.dtype"),
        lambda s: replace(s, logits=rounded(s.logits), after=rounded),
    ),
    Convention(
        "scores-of-bfloat16-logits",
        "rounding",
        "scores of logits that were rounded to bfloat16",
        says("moe.router.dtype"),
        lambda s: replace(s, logits=rounded(s.logits)),
    ),
)


find_projection = stage_finder(PROJECT, _project_start, _project, lambda layer: layer.shown("logits"))
find_scores = stage_finder(SCORE, _score_start, _score, lambda layer: layer.shown("scores"))
