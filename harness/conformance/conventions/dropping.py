"""Conventions of the stage drop: how many places an expert has, who gets them, and what else takes one.

Letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from harness.conformance import stages
from harness.conformance.capture import FLOAT32, Captured
from harness.conformance.conventions.search import Convention, Finding, Fit, does, finding, says
from harness.conformance.stages import Judged

CAPACITY, POLICY = says("moe.router.capacity_factor"), says("moe.router.drop_policy")


@dataclass(frozen=True)
class Dropping:
    """What a drop is made of."""

    chosen: Tensor
    """[T, K]: experts before any drop, and their weights."""
    weights: Judged
    sure: Tensor
    """[T] bool: no rounding can change the choice."""
    counted: Tensor
    """[T] bool: tokens that take places, and that capacity counts."""
    share: Fraction
    """Places of an expert for each token that is counted, before any rounding."""
    policy: str
    rounds: Callable[[Fraction], float] = math.ceil


def _start(factor: Fraction, layer: Captured) -> Dropping:
    scores, logits = layer.scores(), layer.logits()
    keys = layer.keys(scores.value, logits)
    chosen, gap = stages.select(layer.moe, keys)
    weights = stages.combine_weights(layer.moe.router, scores, logits, chosen, FLOAT32)
    sure = gap > 2 * scores.bound.amax(-1) + torch.finfo(FLOAT32).eps * keys.abs().amax(-1)
    share = Fraction(layer.moe.top_k, layer.moe.n_experts) * factor
    return Dropping(chosen, weights, sure, layer.real, share, layer.moe.router.drop_policy)


def _kept(given: Dropping) -> tuple[Tensor, Tensor]:
    """[T, K] bool each: slots that keep their place, and those of which that is certain."""
    limit = given.rounds(given.share * int(given.counted.sum()))
    kept = torch.zeros_like(given.chosen, dtype=torch.bool)
    clear = given.sure[:, None].expand_as(kept).clone()
    for expert in given.chosen.unique().tolist():
        token, slot = ((given.chosen == expert) & given.counted[:, None]).nonzero(as_tuple=True)
        value, spread = given.weights.value[token, slot], given.weights.bound[token, slot]
        match given.policy:
            case "probability":
                rank = value.argsort(descending=True, stable=True)
            case "last":
                rank = token.argsort(descending=True)
            case _:
                rank = token.argsort()
        places = int(min(len(token), limit))
        first = rank[:places]
        kept[token[first], slot[first]] = True
        if given.policy == "probability" and 0 < places < len(token):
            last, next_ = value[rank[places - 1]], value[rank[places]]
            if last - next_ <= 2 * spread.amax():
                clear[token, slot] = False
        if not given.sure[token].all():
            clear[token, slot] = False
    return kept, clear


def find_drops(seen: list[tuple[Fraction, Captured]]) -> Finding:
    """The finder for which slots are kept: the experts of every token of which that is certain."""

    def fit(change: Callable[[Dropping], Dropping], one: tuple[Fraction, Captured]) -> Fit:
        layer = one[1]
        start = _start(*one)
        spec, _ = _kept(start)
        given = change(start)
        kept, clear = _kept(given)
        compared = layer.real & clear.all(-1)
        want = given.chosen.where(kept, -1).sort(-1).values
        have = layer.trace.indices.sort(-1).values
        agrees = bool((want == have)[compared].all())
        return Fit(agrees, bool((kept != spec)[compared].any()))

    return finding(DROP, seen, fit, lambda one: one[1].variant.architecture)


def _all(given: Dropping) -> Dropping:
    return replace(given, counted=torch.ones_like(given.counted))


def _padding_in_capacity(given: Dropping) -> Dropping:
    return replace(given, share=given.share * Fraction(len(given.counted), max(1, int(given.counted.sum()))))


DROP: tuple[Convention[Dropping], ...] = (
    Convention(
        "drops-nothing",
        "limit",
        "no token is ever dropped",
        CAPACITY,
        lambda d: replace(d, rounds=lambda _: math.inf),
    ),
    Convention(
        "capacity-rounded-down",
        "limit",
        "capacity is rounded down",
        does("rounds it up"),
        lambda d: replace(d, rounds=math.floor),
    ),
    Convention(
        "capacity-rounded-to-nearest",
        "limit",
        "capacity is rounded to the nearest number",
        does("rounds it up"),
        lambda d: replace(d, rounds=round),
    ),
    Convention(
        "capacity-at-least-4",
        "limit",
        "capacity is at least 4",
        does("has no least capacity"),
        lambda d: replace(d, rounds=lambda places: max(4, math.ceil(places))),
    ),
    Convention(
        "capacity-without-k",
        "share",
        "capacity is tokens / E times the factor",
        does("has tokens K / E times the factor"),
        lambda d: replace(d, share=d.share / d.chosen.shape[1]),
    ),
    Convention(
        "drops-by-position",
        "policy",
        "the earliest tokens keep their place",
        POLICY,
        lambda d: replace(d, policy="position"),
    ),
    Convention(
        "drops-by-probability",
        "policy",
        "the likeliest tokens keep their place",
        POLICY,
        lambda d: replace(d, policy="probability"),
    ),
    Convention(
        "drops-the-first",
        "policy",
        "the latest tokens keep their place",
        POLICY,
        lambda d: replace(d, policy="last") if d.policy == "position" else d,
    ),
    Convention(
        "padding-takes-places",
        "padding",
        "padding takes places and counts in the capacity",
        does("counts real tokens alone"),
        _all,
    ),
    Convention(
        "capacity-counts-padding",
        "padding",
        "padding counts in the capacity and takes no place",
        does("counts real tokens alone"),
        _padding_in_capacity,
    ),
)
