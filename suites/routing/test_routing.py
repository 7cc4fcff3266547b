"""Which experts a token goes to.

Letters: B sequences, S tokens per sequence, T = B * S tokens, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.conformance import Case, Violation, Void, conformance, require, stages
from harness.conformance.capture import (
    FLOAT32,
    Captured,
    Variant,
    captured,
    has_experts,
    may_have_experts,
    moe_of,
    traces,
)
from harness.conformance.comparison import Clearance, ragged, same_experts
from harness.conformance.conventions import Seen, explained
from harness.conformance.conventions.selecting import find_selection_of_input
from harness.implementations.protocols import Routing
from harness.spec.architecture import Architecture


def check_distinct(trace: Routing, real: Tensor, n_experts: int | None, *, dropless: bool = True) -> None:
    """Raise Violation unless every real token has K different experts that exist."""
    chosen = trace.indices[real]
    lowest = 0 if dropless else -1
    for token, row in enumerate(chosen.tolist()):
        kept = [expert for expert in row if expert >= 0]
        if len(set(kept)) != len(kept):
            raise Violation(
                f"layer {trace.layer}: token {token} goes to experts {row}, not all different",
                stage="select",
                facts={"index": [trace.layer, token], "observed": row},
            )
        if min(row) < lowest or (n_experts is not None and max(row) >= n_experts):
            raise Violation(
                f"layer {trace.layer}: token {token} goes to experts {row} of {n_experts}",
                stage="select",
                facts={"index": [trace.layer, token], "observed": row},
            )


@conformance(
    "routing.selects-k-distinct",
    clause="architecture.moe.top_k",
    needs=("routing",),
    kills=("canary", "duplicate-experts"),
    applies=may_have_experts,
)
def test_selects_k_distinct(case: Case) -> None:
    """Every token goes to K different experts, all of which exist."""
    model = case.model()
    batch = ragged(case)
    moe = None if case.architecture is None else moe_of(case.architecture)
    for trace in traces(model, batch.tokens, mask=batch.mask, architecture=case.architecture):
        n_experts = moe.n_experts if moe else None if trace.logits is None else trace.logits.shape[-1]
        dropless = moe is None or moe.router.capacity_factor is None
        check_distinct(trace, batch.mask.flatten(), n_experts, dropless=dropless)


@conformance(
    "routing.honours-top-k",
    clause="architecture.moe.top_k",
    needs=("routing", "weights"),
    kills=("top-k-constant",),
    applies=has_experts,
)
def test_honours_top_k(case: Case) -> None:
    """K and E are those of the architecture for K = 1, 2, 3 and another number of experts."""
    batch = ragged(case)
    for top_k, n_experts in ((1, 12), (2, 16), (3, 12)):
        architecture = case.twin(top_k=top_k, n_experts=n_experts)
        model = case.model(architecture, case.weights(architecture))
        for trace in traces(model, batch.tokens, mask=batch.mask, architecture=architecture):
            check_distinct(trace, batch.mask.flatten(), n_experts)
            used = trace.indices[batch.mask.flatten()].max()
            case.note(f"largest_index_top_{top_k}_of_{n_experts}", int(used))


def paired_rows(case: Case, architecture: Architecture, apart: float) -> dict[str, Tensor]:
    """Weights in which experts 2i and 2i + 1 have router rows `apart` (relatively) and equal biases."""
    weights = case.weights(architecture)
    generator = case.generator()
    for name, value in weights.items():
        if ".router." not in name:
            continue
        paired = value.clone()
        noise = torch.randn(value[0::2].shape, generator=generator, dtype=value.dtype)
        spread = apart * value.std() if name.endswith("weight") else 0.0
        paired[1::2] = value[0::2] + spread * noise
        weights[name] = case.drawn(paired.float().double())
    return weights


def near_tie_architectures(case: Case) -> list[Architecture]:
    """Twins whose last selected expert has its twin just outside: K odd, experts in pairs."""
    return [case.twin(top_k=1), case.twin(top_k=3)]


def float32_router(architecture: Architecture | None) -> bool:
    """Applies where the spec says that the router computes in float32."""
    moe = None if architecture is None else architecture.moe
    return moe is not None and moe.router.dtype == "float32"


@conformance(
    "routing.near-ties-need-the-router-dtype",
    clause="architecture.moe.router.dtype",
    needs=("routing", "weights"),
    kills=("router-in-bfloat16", "selection-in-bfloat16", "scores-in-bfloat16"),
    applies=float32_router,
)
def test_near_ties_need_the_router_dtype(case: Case) -> None:
    """Experts whose logits differ by less than bfloat16 shows are told apart, as float32 can."""
    batch = ragged(case)
    compared = total = 0
    for architecture in near_tie_architectures(case):
        # 2^-10 of a logit is a quarter of what bfloat16 resolves, and 2^14 times what float32 does.
        variant = Variant("near ties", architecture, paired_rows(case, architecture, 2.0**-10))
        model = case.model(architecture, variant.weights)
        layers = Seen(captured(model, variant, batch))
        with explained(layers, find_selection_of_input):
            for layer in layers:
                judged = stages.logits(variant.weights, layer.trace.layer, layer.shown("hidden"), FLOAT32)
                scores = stages.scores(layer.moe.router, judged.value, FLOAT32)
                expected, gap = stages.select(layer.moe, layer.keys(scores.value, judged.value))
                by = Clearance(gap, 2 * _key_bound(layer, judged, scores))
                clear = layer.real & (gap > by.bound)
                compared, total = compared + int(clear.sum()), total + int(layer.real.sum())
                if clear.any():  # where every score is saturated none is
                    same_experts(layer.trace.indices, expected, what=layer.where, where=clear, clearance=by)
    if not compared:
        raise Void("no token's selection was comparable")
    case.note("comparable_share", round(compared / total, 4))


def _key_bound(layer: Captured, logits: stages.Judged, scores: stages.Judged) -> Tensor:
    """[T]: how far rounding of the logits can move a key of the selection."""
    if layer.moe.router.order == "after_topk":
        return logits.bound.amax(-1)
    # Softmax and sigmoid move by at most their own value times twice the logits' error.
    return (scores.bound + 2 * scores.value * logits.bound.amax(-1, keepdim=True)).amax(-1)


@conformance(
    "routing.ties-are-broken-once",
    clause="architecture.moe.top_k",
    needs=("routing", "weights"),
    kills=("ties-at-random", "ties-select-one"),
    applies=has_experts,
    costly=True,
)
def test_ties_are_broken_once(case: Case) -> None:
    """With duplicated router rows a token still has K different experts, all among the best, on every run."""
    batch = ragged(case)
    for architecture in (case.shape, *near_tie_architectures(case)):
        variant = Variant("ties", architecture, paired_rows(case, architecture, 0.0))
        model = case.model(architecture, variant.weights)
        first = captured(model, variant, batch)
        for layer in first:
            check_distinct(layer.trace, layer.real, layer.moe.n_experts)
            if layer.moe.router.n_groups == 1:
                _check_best(layer)
        for _ in range(2):
            for before, again in zip(first, captured(model, variant, batch), strict=True):
                same_experts(
                    again.trace.indices, before.trace.indices, what="the same call again", where=layer.real
                )


def _check_best(layer: Captured) -> None:
    """Raise Violation if an expert that was left out beats one that was selected."""
    scores, logits = layer.scores(), layer.logits()
    keys = layer.keys(scores.value, logits)[layer.real]
    chosen = layer.trace.indices[layer.real]
    selected = torch.zeros_like(keys, dtype=torch.bool).scatter(-1, chosen, True)
    worst_in = keys.masked_fill(~selected, torch.inf).amin(-1)
    best_out = keys.masked_fill(selected, -torch.inf).amax(-1)
    slack = 2 * torch.finfo(FLOAT32).eps * keys.abs().amax(-1) + 2 * scores.bound[layer.real].amax(-1)
    beaten = best_out > worst_in + slack
    require(
        not bool(beaten.any()),
        f"{layer.where}: {int(beaten.sum())} tokens leave out an expert that beats a selected one",
        stage="select",
    )
