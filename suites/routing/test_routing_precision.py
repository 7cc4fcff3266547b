"""A bfloat16 model: what stays in float32, and that the rest errs no more than bfloat16 does.

Letters: T tokens, D d_model, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.conformance import Case, Void, conformance, stages
from harness.conformance.capture import FLOAT32, Captured, Variant, captured, scaled
from harness.conformance.comparison import Clearance, agree, ragged, same_experts
from harness.conformance.conventions import Seen, explained
from harness.conformance.conventions.scoring import find_scores
from harness.conformance.conventions.selecting import find_selection
from harness.spec.architecture import Architecture

BFLOAT16 = torch.bfloat16
FLOAT32_EPS = 2.0**-23


def float32_router(architecture: Architecture | None) -> bool:
    """Applies where the spec says that the router computes in float32."""
    moe = None if architecture is None else architecture.moe
    return moe is not None and moe.router.dtype == "float32" and moe.router.capacity_factor is None


@conformance(
    "routing.bfloat16-model-scores-in-float32",
    clause="architecture.moe.router.dtype",
    needs=("routing", "weights"),
    kills=("scores-in-model-dtype", "selection-in-model-dtype"),
    applies=float32_router,
)
def test_bfloat16_model_scores_in_float32(case: Case) -> None:
    """In a bfloat16 model the experts are the best by float32 scores; other stages err as bfloat16."""
    # Held exactly in both dtypes, so that the model under test has no other weights than these.
    plain = {name: value.to(BFLOAT16).double() for name, value in case.weights(std=0.25).items()}
    batch = ragged(case, 70)
    compared = total = 0
    # Of a quiet router the scores are near each other: some of them are one number in bfloat16.
    for label, weights in (("bfloat16", plain), ("quiet", scaled(plain, "router.weight", 2.0**-3))):
        model = case.model(case.shape, weights, dtype=BFLOAT16)
        layers = Seen(captured(model, Variant(label, case.shape, weights), batch))
        with explained(layers, {"score": find_scores, "select": find_selection}):
            for layer in layers:
                clear = _check(layer)
                compared, total = compared + int(clear.sum()), total + int(layer.real.sum())
    case.note("comparable_share", round(compared / total, 4))
    if not compared:
        raise Void("no token's selection is clear of rounding")


def _check(layer: Captured) -> Tensor:
    """Which tokens' selection was compared, [T]; raises Violation on a stage that errs more than it may."""
    logits = layer.logits().float()
    scores = stages.scores(layer.moe.router, logits, FLOAT32)
    shown, hidden, output = layer.trace.scores, layer.trace.hidden, layer.trace.output
    if shown is not None:
        what = f"{layer.where}: scores"
        agree(shown, scores.value, scores.bound, what=what, stage="score", where=layer.real)
    keys = layer.keys(scores.value, logits)
    expected, gap = stages.select(layer.moe, keys)
    by = Clearance(gap, 2 * (scores.bound.amax(-1) + FLOAT32_EPS * keys.abs().amax(-1)))
    clear = layer.real & (gap > by.bound)
    if clear.any():
        same_experts(layer.trace.indices, expected, what=layer.where, where=clear, clearance=by)
    combine = stages.combine_weights(layer.moe.router, scores, logits, layer.trace.indices, BFLOAT16)
    if layer.trace.weights is not None:
        what, used = f"{layer.where}: combine weights", layer.trace.weights
        agree(used, combine.value, combine.bound, what=what, stage="weigh", where=layer.real)
    if hidden is not None and output is not None:
        architecture, weights = layer.variant.architecture, layer.variant.weights
        args = (layer.trace.layer, hidden, layer.trace.indices, combine, BFLOAT16)
        judged = stages.combine(architecture, weights, *args)
        what = f"{layer.where}: output"
        agree(output, judged.value, judged.bound, what=what, stage="combine", where=layer.real)
    return clear
