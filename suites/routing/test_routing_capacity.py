"""Capacity: how many tokens an expert keeps, which, and that the others lose nothing else.

Letters: T real tokens, E experts, K top-k, C = ceil(T K / E * factor) places of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

from harness.conformance import Case, Violation, conformance, require, stages
from harness.conformance.capture import FLOAT32, Captured, Variant, captured, has_experts
from harness.conformance.comparison import Ragged, agree, ragged
from harness.conformance.conventions import Seen, explained
from harness.conformance.conventions.dropping import find_drops
from harness.conformance.gradients import check_gradients
from harness.spec.architecture import Architecture

FACTORS = ("0.5", "1.2", "20.0")
"""Half of the slots at most, a few, and more places than there are tokens; of the ragged batch the first two
leave fractions on either side of a half."""


def crowded(case: Case) -> Iterator[tuple[Fraction, Captured]]:
    """Every MoE layer under three capacities and both policies, with its factor."""
    batch = ragged(case)
    single = Ragged(case.tokens(1, 1), torch.ones(1, 1, dtype=torch.bool))
    for factor in FACTORS:
        for policy in ("position", "probability"):
            made = case.twin(moe__router__capacity_factor=float(factor), moe__router__drop_policy=policy)
            variant = Variant(f"capacity {factor}, by {policy}", made, case.weights(made))
            model = case.model(made, variant.weights)
            for part in (batch, single):
                for layer in captured(model, variant, part):
                    yield Fraction(factor), layer


def places(layer: Captured, factor: Fraction) -> int:
    """C."""
    return math.ceil(Fraction(int(layer.real.sum()) * layer.moe.top_k, layer.moe.n_experts) * factor)


def kept_slots(layer: Captured, factor: Fraction) -> tuple[Tensor, Tensor, Tensor]:
    """Experts [T, K] of the real tokens before any drop, which slots must be kept, and which are clear.

    By position the first C tokens of an expert keep their place, by probability those with the highest
    weights. A token whose selection or rank rounding may change is not clear, nor is anything at its experts.
    """
    scores, logits = layer.scores(), layer.logits()
    keys = layer.keys(scores.value, logits)
    chosen, gap = stages.select(layer.moe, keys)
    weights = stages.combine_weights(layer.moe.router, scores, logits, chosen, FLOAT32)
    chosen, value, spread = chosen[layer.real], weights.value[layer.real], weights.bound[layer.real]
    vague = (gap <= 2 * scores.bound.amax(-1) + 2.0**-23 * keys.abs().amax(-1))[layer.real]
    limit, policy = places(layer, factor), layer.moe.router.drop_policy
    kept, clear = torch.zeros_like(chosen, dtype=torch.bool), torch.ones_like(chosen, dtype=torch.bool)
    for expert in range(layer.moe.n_experts):
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        rank = (
            token.argsort()
            if policy == "position"
            else value[token, slot].argsort(descending=True, stable=True)
        )
        kept[token[rank[:limit]], slot[rank[:limit]]] = True
        if policy == "probability" and 0 < limit < len(token):
            last, next_ = (value[token[rank[i]], slot[rank[i]]] for i in (limit - 1, limit))
            if last - next_ <= 2 * spread[token, slot].amax():
                clear[token, slot] = False
        if vague[token].any():
            clear[token, slot] = False
    return chosen, kept, clear & ~vague[:, None]


@conformance(
    "routing.capacity-keeps-the-right-tokens",
    clause="architecture.moe.router.capacity_factor",
    needs=("routing", "weights"),
    kills=(
        "drops-nothing",
        "drops-the-first",
        "padding-takes-places",
        "capacity-rounded-down",
        "capacity-below-the-tokens",
        "policy-misspelt",
    ),
    applies=has_experts,
    costly=True,
)
def test_capacity_keeps_the_right_tokens(case: Case) -> None:
    """An expert with more than C tokens keeps C, the earliest or the likeliest; others keep all."""
    dropped = 0
    seen = Seen(crowded(case))
    with explained(seen, find_drops):
        for factor, layer in seen:
            chosen, kept, clear = kept_slots(layer, factor)
            have = layer.trace.indices[layer.real]
            for token, (experts, keeps, sure) in enumerate(zip(chosen, kept, clear, strict=True)):
                if not sure.all():
                    continue
                want = sorted(experts[keeps].tolist())
                got = sorted(expert for expert in have[token].tolist() if expert >= 0)
                if got != want:
                    where = f"{layer.where}: of experts {sorted(experts.tolist())} real token {token}"
                    facts = {"what": where, "index": [token], "observed": got, "expected": want}
                    raise Violation(f"{where} keeps {got} in place of {want}", stage="drop", facts=facts)
            counts = torch.bincount(have[have >= 0], minlength=layer.moe.n_experts)
            limit = places(layer, factor)
            most = int(counts.max())
            require(
                most <= limit,
                f"{layer.where}: an expert keeps {most} tokens, and has {limit} places",
                stage="drop",
            )
            dropped += int((have < 0).sum())
    case.note("dropped_slots", dropped)


@conformance(
    "routing.dropped-slots-count-for-nothing",
    clause="architecture.moe.router.capacity_factor",
    needs=("routing", "weights"),
    kills=(
        "dropped-slots-keep-their-weight",
        "drops-renormalise",
        "dropped-rows-not-initialised",
    ),
    applies=has_experts,
    costly=True,
)
def test_dropped_slots_count_for_nothing(case: Case) -> None:
    """A dropped slot has weight 0 and adds nothing to the output, and the other slots keep their weight."""
    for _, layer in crowded(case):
        weights = layer.shown("weights")
        dropped = layer.trace.indices < 0
        leak = weights[layer.real][dropped[layer.real]]
        require(not bool(leak.any()), f"{layer.where}: a dropped slot has a weight", stage="drop")
        _check_kept_weights(layer)
        judged = stages.combine(
            layer.variant.architecture,
            layer.variant.weights,
            layer.trace.layer,
            layer.shown("hidden"),
            layer.trace.indices,
            stages.Judged(weights.double(), torch.zeros_like(weights, dtype=torch.float64)),
            FLOAT32,
        )
        what = f"{layer.where}: output"
        agree(layer.shown("output"), judged.value, judged.bound, what=what, stage="combine", where=layer.real)


def _check_kept_weights(layer: Captured) -> None:
    """The weight of a kept slot is the one it had: what is normalised is the selection, not what is left."""
    scores, logits = layer.scores(), layer.logits()
    chosen, gap = stages.select(layer.moe, layer.keys(scores.value, logits))
    full = stages.combine_weights(layer.moe.router, scores, logits, chosen, FLOAT32)
    clear = layer.real & (gap > 4 * scores.bound.amax(-1))
    value, bound = torch.zeros_like(scores.value), torch.zeros_like(scores.value)
    value.scatter_(-1, chosen, full.value)
    bound.scatter_(-1, chosen, full.bound)
    at = layer.trace.indices.clamp(min=0)
    compared = clear[:, None] & (layer.trace.indices >= 0)
    if compared.any():
        what = f"{layer.where}: combine weights of kept slots"
        kept = layer.shown("weights")
        agree(kept, value.gather(-1, at), bound.gather(-1, at), what=what, stage="drop", where=compared)


@conformance(
    "routing.gradients-survive-drops",
    clause="architecture.moe.router.capacity_factor",
    needs=("gradients", "weights", "forward"),
    kills=(
        "gradient-stops-at-the-first-drop",
        "dropped-slots-train-the-router",
    ),
    applies=has_experts,
    costly=True,
)
def test_gradients_survive_drops(case: Case) -> None:
    """With dropped tokens every gradient is still that of the reference."""
    architecture: Architecture = case.twin(moe__router__capacity_factor=0.5)
    check_gradients(case, architecture, case.weights(architecture), "capacity 0.5")
