"""What an implementation's routers did, on inputs that hide no defect, checked for shape before use.

Letters: T = B * S tokens, D d_model, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.conformance import stages
from harness.conformance.case import Case, replaced, seeded
from harness.conformance.comparison import Ragged, ragged
from harness.conformance.property import Violation, Void, require
from harness.implementations.protocols import Routing, Unsupported
from harness.spec.architecture import Architecture, Moe

FLOAT32 = torch.float32
GATED = "gated shared expert"
Weights = Mapping[str, Tensor]


def has_experts(architecture: Architecture | None) -> bool:
    """Applies to architectures with experts."""
    return architecture is not None and architecture.moe is not None


def may_have_experts(architecture: Architecture | None) -> bool:
    """Applies to those, and to an implementation's own shape."""
    return architecture is None or architecture.moe is not None


def moe_of(architecture: Architecture) -> Moe:
    """Its experts, for properties that apply only where there are some."""
    assert architecture.moe is not None
    return architecture.moe


@dataclass(frozen=True)
class Variant:
    """One architecture and its weights, near the twin, that shows what the twin alone may hide."""

    label: str
    architecture: Architecture
    weights: Mapping[str, Tensor]


def variants(case: Case) -> Iterator[Variant]:
    """The twin; then what a defect could be hiding behind.

    The first is always there. A property passes over the others where the implementation cannot express them
    (`capture` does). Of a case that is shrunk to one variant, only that one is made; in the fast profile two
    are, the twin and one that the seed decides.
    """
    makers = dict(_variants(case))
    labels = list(makers)
    if case.shrink.variant:
        labels = [label for label in labels if label == case.shrink.variant]
    elif case.fast:
        other = torch.randint(1, len(labels), (), generator=seeded(case.seed, "variant"))
        labels = [labels[0], labels[int(other)]]
    for label in labels:
        architecture, weights = makers[label]()
        yield Variant(label, architecture, weights)


Maker = Callable[[], tuple[Architecture, Mapping[str, Tensor]]]


def _variants(case: Case) -> Iterator[tuple[str, Maker]]:
    """What makes each, by label: only what is looked at is drawn."""
    twin = case.shape
    moe = moe_of(twin)

    def drawn(architecture: Architecture) -> Maker:
        return lambda: (architecture, case.weights(architecture))

    def changed(change: Callable[[Weights], Weights]) -> Maker:
        return lambda: (twin, change(case.weights(twin)))

    yield "twin", drawn(twin)
    # Nearly equal scores: the sum of the selected ones is far from 1, and every expert is selected.
    yield "quiet router", changed(lambda plain: scaled(plain, "router.weight", 0.1))
    if moe.router.correction_bias:
        # All biased scores negative: an excluded expert at 0 would win.
        yield "negative correction bias", changed(lambda plain: shifted(plain, "correction_bias", -2.0))
    for top_k in {1, 3} - {moe.top_k}:
        made = case.twin(top_k=top_k)
        yield f"top {top_k}", drawn(made)
    # Of weights that are normalised and of weights that are not, each in a spec of either kind.
    both = (False, True) if moe.router.order == "before_topk" else (moe.router.normalise,)
    for normalise in both:
        fields = {"moe__router__scaling_factor": 1.7, "moe__router__normalise": normalise}
        made = replaced(twin, fields)
        label = "scaled sums" if normalise and len(both) > 1 else "scaled weights"
        yield label, drawn(made)
    if not moe.shared_gate:
        yield GATED, drawn(gated(case))
    for label, d_ff in (("square experts", twin.d_model), ("half-square experts", twin.d_model // 2)):
        made = replaced(twin, {"moe__expert__d_ff": d_ff})
        yield label, drawn(made)
    # More experts than a byte can number, more of them than the twin's K, and a router that is square.
    many: tuple[tuple[str, int | None, int], ...] = (
        ("top 8 of 260", 8, 260),
        ("square router", None, twin.d_model),
    )
    for label, k, n_experts in many:
        layers = moe.first_dense + 1
        made = case.twin(top_k=k, n_experts=n_experts, n_layers=layers, moe__expert__d_ff=8)
        yield label, drawn(made)
    # Each token's logits are all high or all low: sigmoid scores of 1e-4 and less have a sum that counts.
    yield "leaning router", changed(leaning)
    if moe.expert.clamp is not None:
        made = replaced(twin, {"moe__expert__clamp": 5.0})
        yield "another clamp", drawn(made)
        # The gate is cut off above and not below: visible only where nothing larger is added.
        yield (
            "low gates",
            changed(lambda plain: shifted(scaled(plain, "experts.gate", 0.1), "experts.gate_bias", -9.0)),
        )


def gated_shared(case: Case) -> Variant:
    """The twin with a shared expert behind a gate."""
    made = gated(case)
    return Variant(GATED, made, case.weights(made))


def gated(case: Case) -> Architecture:
    """Its architecture."""
    moe = moe_of(case.shape)
    shared = moe.shared or moe.expert.model_copy(update={"d_ff": 44})
    return replaced(case.shape, {"moe__shared": shared.model_dump(), "moe__shared_gate": True})


def scaled(weights: Mapping[str, Tensor], ending: str, factor: float) -> dict[str, Tensor]:
    """The weights, with those whose names end so multiplied."""
    return {name: value * factor if name.endswith(ending) else value for name, value in weights.items()}


def shifted(weights: Mapping[str, Tensor], ending: str, by: float) -> dict[str, Tensor]:
    """The weights, with `by` added to those whose names end so."""
    moved = {name: value + by if name.endswith(ending) else value for name, value in weights.items()}
    return {name: value.float().double() for name, value in moved.items()}


def leaning(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with one row, twice as long as each, added to all rows of a router."""
    return {
        name: (value + 2 * value[:1]).float().double() if name.endswith("router.weight") else value
        for name, value in weights.items()
    }


@dataclass(frozen=True)
class Captured:
    """One MoE layer of one variant."""

    variant: Variant
    trace: Routing
    real: Tensor
    """[T] bool: not padding, and of finite input where that is shown."""

    @property
    def moe(self) -> Moe:
        """Its experts."""
        return moe_of(self.variant.architecture)

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.variant.label}, layer {self.trace.layer}"

    def shown(self, stage: str) -> Tensor:
        """What the implementation shows under `stage`, a field of Routing; Unsupported if nothing."""
        value: Tensor | None = getattr(self.trace, stage)
        if value is None:
            raise Unsupported(f"the routing trace shows no {stage}")
        return value

    def logits(self) -> Tensor:
        """[T, E]: the implementation's own, or those of its captured input."""
        if self.trace.logits is not None:
            return self.trace.logits
        return stages.logits(self.variant.weights, self.trace.layer, self.shown("hidden"), FLOAT32).value

    def scores(self) -> stages.Judged:
        """[T, E]: the implementation's own with the rounding they carry, or those of its logits."""
        judged = stages.scores(self.moe.router, self.logits(), FLOAT32)
        if self.trace.scores is None:
            return judged
        return stages.Judged(self.trace.scores.double(), judged.bound)

    def correction(self) -> Tensor | None:
        """[E]: the correction bias, where there is one."""
        return self.variant.weights.get(f"layers.{self.trace.layer}.moe.router.correction_bias")

    def keys(self, scores: Tensor, logits: Tensor) -> Tensor:
        """[T, E]: what the selection maximises."""
        return stages.keys(self.moe.router, scores, logits, self.correction())

    def combine_weights(self) -> stages.Judged:
        """[T, K]: what they must be, given the implementation's scores and selection."""
        return stages.combine_weights(
            self.moe.router, self.scores(), self.logits(), self.trace.indices, FLOAT32
        )

    def output(self) -> stages.Judged:
        """[T, D]: what it must be, given the implementation's input, selection and combine weights."""
        weights = self.combine_weights()
        if self.trace.weights is not None:
            weights = stages.Judged(self.trace.weights.double(), weights.bound)
        return stages.combine(
            self.variant.architecture,
            self.variant.weights,
            self.trace.layer,
            self.shown("hidden"),
            self.trace.indices,
            weights,
            FLOAT32,
        )


def capture(case: Case, *, length: int = 13) -> Iterator[Captured]:
    """Every MoE layer of every variant that the implementation can express, on a ragged batch."""
    batch = ragged(case, length)
    passed_over = []
    seen = 0
    for number, variant in enumerate(list(variants(case))):
        try:
            model = case.model(variant.architecture, variant.weights)
        except Unsupported:
            if number == 0:
                raise
            passed_over.append(variant.label)
            continue
        for layer in captured(model, variant, batch):
            # What is not finite went wrong before this layer.
            if layer.real.any():
                seen += 1
                case.looked_at[variant.label] = case.shapes()
                yield layer
    if passed_over:
        case.note("not_expressible", passed_over)
    if not seen:
        raise Void("no MoE layer has a finite input")


def captured(model: Any, variant: Variant, batch: Ragged) -> list[Captured]:
    """Every MoE layer of one forward pass."""
    found = traces(model, batch.tokens, mask=batch.mask, architecture=variant.architecture)
    real = batch.mask.flatten()
    return [
        Captured(variant, trace, real if trace.hidden is None else real & trace.hidden.isfinite().all(-1))
        for trace in found
    ]


def traces(
    model: Any,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    architecture: Architecture | None = None,
) -> list[Routing]:
    """The routing of tokens [B, S], one trace for each MoE layer. Raises Violation on a misshapen one."""
    with torch.no_grad():
        found = list(model.routing(tokens, mask=mask))
    require(bool(found), "the model declares routing and shows no MoE layer")
    if architecture is not None:
        expected = [i for i in range(architecture.n_layers) if architecture.is_moe_layer(i)]
        have = [trace.layer for trace in found]
        require(have == expected, f"routing is shown of layers {have} in place of {expected}")
    for trace in found:
        _check_shapes(trace, tokens.numel(), architecture)
    return found


def _check_shapes(trace: Routing, n_tokens: int, architecture: Architecture | None) -> None:
    if trace.indices.dim() != 2 or trace.indices.dtype != torch.int64:
        have = f"{trace.indices.dtype} {tuple(trace.indices.shape)}"
        raise Violation(f"indices of layer {trace.layer} are {have} in place of int64 [T, K]", stage="select")
    top_k = trace.indices.shape[1]
    n_experts = next((x.shape[-1] for x in (trace.logits, trace.scores) if x is not None), None)
    if architecture is not None:
        moe = moe_of(architecture)
        n_experts, top_k = moe.n_experts, moe.top_k
    shapes: dict[str, tuple[Tensor | None, tuple[int | None, ...]]] = {
        "select": (trace.indices, (n_tokens, top_k)),
        "weigh": (trace.weights, (n_tokens, top_k)),
        "proj": (trace.logits, (n_tokens, n_experts)),
        "score": (trace.scores, (n_tokens, n_experts)),
    }
    for stage, (value, wanted) in shapes.items():
        if value is not None and tuple(value.shape) != wanted:
            what = f"{stage} of layer {trace.layer} has shape {tuple(value.shape)}"
            raise Violation(f"{what} in place of {wanted}", stage=stage)
