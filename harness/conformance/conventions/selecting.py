"""Conventions of the stage select: which experts a token goes to.

Letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.conformance import stages
from harness.conformance.capture import FLOAT32, Captured
from harness.conformance.conventions.search import Convention, Finding, Fit, does, finding, says
from harness.conformance.conventions.stagewise import exact, rounded, scored
from harness.conformance.stages import Judged
from harness.spec.architecture import Moe


@dataclass(frozen=True)
class Selecting:
    """What a selection is made of."""

    moe: Moe
    scores: Judged
    logits: Judged
    correction: Tensor | None
    masked_at_zero: bool = False
    after: Callable[[Judged], Judged] = lambda judged: judged


def _from_shown(layer: Captured) -> Selecting:
    return Selecting(layer.moe, layer.scores(), exact(layer.logits()), layer.correction())


def _from_hidden(layer: Captured) -> Selecting:
    logits = stages.logits(layer.variant.weights, layer.trace.layer, layer.shown("hidden"), FLOAT32)
    return Selecting(layer.moe, scored(layer.moe.router, logits), logits, layer.correction())


def _groups(given: Selecting, **fields: object) -> Selecting:
    router = given.moe.router.model_copy(update=fields)
    return replace(given, moe=given.moe.model_copy(update={"router": router}))


def _consistent(given: Selecting, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[T] and [T]: whether experts [T, K] may be the best within rounding, and whether that can be judged."""
    router = given.moe.router
    base = given.after(given.logits if router.order == "after_topk" else given.scores)
    keys = base.value if given.correction is None else base.value + given.correction.double()
    # Adding the correction bias rounds too.
    bound = base.bound + torch.finfo(FLOAT32).eps * keys.abs()
    clear = torch.ones(len(keys), dtype=torch.bool)
    if router.n_groups > 1 and router.topk_groups < router.n_groups:
        members, spread = (x.unflatten(-1, (router.n_groups, -1)) for x in (keys, bound))
        count = 1 if router.group_score == "max" else 2
        value = members.topk(count, dim=-1).values.sum(-1)
        ordered = value.sort(-1, descending=True).values
        gap = ordered[:, router.topk_groups - 1] - ordered[:, router.topk_groups]
        clear = gap > 2 * count * spread.flatten(1).amax(-1)
        best = value.topk(router.topk_groups, dim=-1).indices
        allowed = torch.zeros_like(value, dtype=torch.bool).scatter(-1, best, True)
        allowed = allowed.repeat_interleave(members.shape[-1], -1)
        keys = keys.masked_fill(~allowed, 0 if given.masked_at_zero else -torch.inf)
        bound = bound.masked_fill(~allowed, 0)
    inside = torch.zeros_like(keys, dtype=torch.bool).scatter(-1, chosen.clamp(min=0), True)
    worst_in = (keys + bound).masked_fill(~inside, torch.inf).amin(-1)
    best_out = (keys - bound).masked_fill(inside, -torch.inf).amax(-1)
    return worst_in >= best_out, clear


def _finder(start: Callable[[Captured], Selecting]) -> Callable[[list[Captured]], Finding]:
    def fit(change: Callable[[Selecting], Selecting], layer: Captured) -> Fit:
        given, chosen = start(layer), layer.trace.indices
        ours, sure = _consistent(given, chosen)
        theirs, clear = _consistent(change(given), chosen)
        compared = layer.real & clear
        return Fit(bool(theirs[compared].all()), bool((theirs & ~ours)[compared & sure].any()))

    return lambda layers: finding(SELECT, layers, fit, lambda layer: layer.variant.architecture)


SELECT: tuple[Convention[Selecting], ...] = (
    Convention(
        "correction-bias-ignored",
        "bias",
        "the correction bias is not in the selection",
        says("moe.router.correction_bias"),
        lambda s: replace(s, correction=None),
    ),
    Convention(
        "correction-bias-on-logits",
        "source",
        "the correction bias is added to logits",
        does("adds it to scores"),
        lambda s: replace(s, scores=s.logits),
    ),
    Convention(
        "groups-ignored",
        "groups",
        "every group is allowed",
        says("moe.router.topk_groups"),
        lambda s: _groups(s, n_groups=1, topk_groups=1),
    ),
    Convention(
        "group-score-max",
        "groups",
        "a group is worth its best expert",
        says("moe.router.group_score"),
        lambda s: _groups(s, group_score="max"),
    ),
    Convention(
        "group-score-top2-sum",
        "groups",
        "a group is worth the sum of its two best experts",
        says("moe.router.group_score"),
        lambda s: _groups(s, group_score="top2_sum"),
    ),
    Convention(
        "masked-groups-at-zero",
        "mask",
        "experts of excluded groups stay in the running with 0",
        does("leaves them out"),
        lambda s: replace(s, masked_at_zero=True),
    ),
    Convention(
        "selection-in-bfloat16",
        "rounding",
        "the selection is by scores rounded to bfloat16",
        says("moe.router.dtype"),
        lambda s: replace(s, after=rounded),
    ),
    Convention(
        "selection-of-bfloat16-logits",
        "rounding",
        "the selection is by scores of logits rounded to bfloat16",
        says("moe.router.dtype"),
        lambda s: replace(s, logits=rounded(s.logits), scores=scored(s.moe.router, rounded(s.logits))),
    ),
    Convention(
        "selects-the-worst",
        "order",
        "the lowest scores win",
        does("selects the highest"),
        lambda s: replace(
            s,
            scores=Judged(-s.scores.value, s.scores.bound),
            logits=Judged(-s.logits.value, s.logits.bound),
        ),
    ),
)

find_selection = _finder(_from_shown)
"""No expert left out beats a selected one by more than rounding, by the scores that are shown."""
find_selection_of_input = _finder(_from_hidden)
"""The same by scores of the layer's input: for projections and scores that are rounded before a choice."""
