"""Each stage of a MoE layer against float64, on the implementation's own input to that stage.

The bounds are those of harness.conformance.stages: theorems about float32, not fitted tolerances.
Letters: T tokens, D d_model, E experts, K top-k.
"""

from __future__ import annotations

from harness.conformance import Case, conformance, stages
from harness.conformance.capture import FLOAT32, capture, has_experts
from harness.conformance.comparison import Clearance, agree, same_experts
from harness.conformance.conventions import Seen, explained
from harness.conformance.conventions.combining import find_output
from harness.conformance.conventions.scoring import find_projection, find_scores
from harness.conformance.conventions.selecting import find_selection
from harness.conformance.conventions.weighing import find_weights
from harness.conformance.property import Void


@conformance(
    "routing.projects-the-input",
    clause="architecture.moe.router.bias",
    needs=("routing", "weights"),
    kills=(
        "router-bias-unused",
        "router-in-bfloat16",
        "router-reports-probabilities",
        "z-on-noised-logits",
        "router-transposed-if-square",
    ),
    applies=has_experts,
)
def test_projects_the_input(case: Case) -> None:
    """Router logits are W x + b of the layer's input (stage proj)."""
    layers = Seen(capture(case))
    with explained(layers, find_projection):
        for layer in layers:
            judged = stages.logits(layer.variant.weights, layer.trace.layer, layer.shown("hidden"), FLOAT32)
            what = f"{layer.where}: logits"
            agree(
                layer.shown("logits"), judged.value, judged.bound, what=what, stage="proj", where=layer.real
            )


@conformance(
    "routing.scores-the-logits",
    clause="architecture.moe.router.score",
    needs=("routing", "weights"),
    kills=(
        "scores-in-bfloat16",
        "softmax-over-tokens",
        "double-softmax",
        "weights-written-over-scores",
    ),
    applies=has_experts,
)
def test_scores_the_logits(case: Case) -> None:
    """Scores are the softmax over all experts, or the sigmoid of each logit (stage score)."""
    layers = Seen(capture(case))
    with explained(layers, find_scores):
        for layer in layers:
            judged = stages.scores(layer.moe.router, layer.shown("logits"), FLOAT32)
            what = f"{layer.where}: scores"
            agree(
                layer.shown("scores"), judged.value, judged.bound, what=what, stage="score", where=layer.real
            )


@conformance(
    "routing.selects-the-best",
    clause="architecture.moe.router",
    needs=("routing", "weights"),
    kills=(
        "canary",
        "masked-groups-at-zero",
        "group-score-max",
        "groups-ignored",
        "correction-bias-ignored",
        "selects-the-worst",
    ),
    applies=has_experts,
)
def test_selects_the_best(case: Case) -> None:
    """The experts of a token are the K best, biased and group-limited as the spec says (stage select)."""
    compared = total = 0
    layers = Seen(capture(case))
    with explained(layers, find_selection):
        for layer in layers:
            scores, logits = layer.scores(), layer.logits()
            keys = layer.keys(scores.value, logits)
            expected, gap = stages.select(layer.moe, keys)
            # Two keys may each be off by their rounding, that of adding the correction bias included.
            bound = scores.bound.amax(-1) + FLOAT32_EPS * keys.abs().amax(-1)
            clear = layer.real & (gap > 2 * bound)
            compared, total = compared + int(clear.sum()), total + int(layer.real.sum())
            if clear.any():
                by = Clearance(gap, 2 * bound)
                same_experts(layer.trace.indices, expected, what=layer.where, where=clear, clearance=by)
    case.note("comparable_share", round(compared / total, 4))
    if not compared:
        raise Void("no token's selection is clear of rounding")


FLOAT32_EPS = 2.0**-23


@conformance(
    "routing.weighs-the-selected",
    clause="architecture.moe.router.normalise",
    needs=("routing", "weights"),
    kills=(
        "always-normalised",
        "never-normalised",
        "softmax-before-topk",
        "correction-bias-in-weights",
        "scaling-twice",
        "scaling-only-if-normalised",
        "softmax-of-the-selected",
        "top-1-normalised",
        "small-sums-not-normalised",
    ),
    applies=has_experts,
)
def test_weighs_the_selected(case: Case) -> None:
    """Combine weights follow from the unbiased scores of the selected experts (stage weigh)."""
    layers = Seen(capture(case))
    with explained(layers, find_weights):
        for layer in layers:
            judged = layer.combine_weights()
            what = f"{layer.where}: combine weights"
            agree(
                layer.shown("weights"), judged.value, judged.bound, what=what, stage="weigh", where=layer.real
            )


@conformance(
    "routing.combines-the-experts",
    clause="architecture.moe.expert",
    needs=("routing", "weights"),
    kills=(
        "unweighted-sum",
        "weight-on-the-input",
        "activation-outside",
        "gate-and-up-swapped",
        "experts-in-string-order",
        "transposed-if-square",
        "swapped-if-half-square",
        "shared-gate-dropped",
        "shared-expert-reads-overwritten-input",
        "weights-of-another-slot",
        "rows-right-for-one-sequence",
        "expert-bias-dropped",
        "expert-ids-in-a-byte",
        "combines-four-at-most",
        "clamp-constant",
        "gate-clamped-below",
        "shared-expert-dropped",
        "experts-numbered-among-the-busy",
        "halves-taken-for-interleaved",
        "weights-not-transposed",
    ),
    applies=has_experts,
)
def test_combines_the_experts(case: Case) -> None:
    """The layer's output is the weighted sum of its experts, plus the shared ones (stage combine)."""
    layers = Seen(capture(case))
    with explained(layers, find_output):
        for layer in layers:
            judged = layer.output()
            what = f"{layer.where}: output"
            agree(
                layer.shown("output"),
                judged.value,
                judged.bound,
                what=what,
                stage="combine",
                where=layer.real,
            )
