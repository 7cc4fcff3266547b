"""Auxiliary losses of the routers: value, bounds, gradient, and what they must not depend on.

Letters: B sequences, S tokens per sequence, T real tokens, N MoE layers, E experts, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from harness.conformance import Case, Void, balance, conformance, require
from harness.conformance.capture import moe_of, scaled, traces
from harness.conformance.comparison import Ragged, agree, longest_product, margin, ragged
from harness.conformance.conventions import Seen, explained
from harness.conformance.conventions.losses import Lost, find_loss
from harness.conformance.narrowing import narrowed
from harness.evidence.margins import Rounding, Spread, monte_carlo, unit_roundoff
from harness.implementations.protocols import Unsupported
from harness.reference import ReferenceModel
from harness.spec.architecture import Architecture
from harness.theory.routing import balance_loss_at_collapse, balance_loss_at_uniform

FLOAT32 = torch.float32
NEEDS = ("auxiliary_loss", "weights")


def has_balance(architecture: Architecture | None) -> bool:
    """Applies where the spec names a balance loss."""
    return (
        architecture is not None
        and architecture.moe is not None
        and architecture.auxiliary_loss.balance != "none"
    )


def has_z(architecture: Architecture | None) -> bool:
    """Applies where the spec gives the z-loss a coefficient."""
    return (
        architecture is not None
        and architecture.moe is not None
        and architecture.auxiliary_loss.z_coefficient > 0
    )


def loss_of(model: Any, kind: str, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """One auxiliary loss, a scalar; Unsupported if the implementation does not give it."""
    found: Mapping[str, Tensor] = model.auxiliary_loss(tokens, mask=mask)
    if kind not in found:
        raise Unsupported(f"auxiliary_loss gives {', '.join(found) or 'nothing'} and no {kind!r}")
    value = found[kind]
    require(value.numel() == 1, f"the {kind} loss has shape {tuple(value.shape)} in place of a scalar")
    return value.reshape(())


def settled(
    case: Case, model: Any, weights: Mapping[str, Tensor], architecture: Architecture | None = None
) -> Ragged:
    """A ragged batch of which rounding can change no token's experts; Void if ten draws give none."""
    for _ in range(10):
        batch = ragged(case)
        bound = margin(case, model, batch.tokens, mask=batch.mask, architecture=architecture, weights=weights)
        if bool(bound.comparable[batch.mask].all()):
            return batch
    raise Void("ten batches in a row have a token whose experts rounding may change")


def expected_losses(reference: ReferenceModel, batch: Ragged) -> dict[str, Tensor]:
    """Both losses by their formulas on what the reference's routers do, differentiable."""
    _, _, found = reference.run(batch.tokens, None, batch.mask, None)
    out = {"z": balance.z_loss([t.logits for t in found], batch.mask)}
    convention = reference.architecture.auxiliary_loss.balance
    if convention != "none":
        out["balance"] = balance.balance_loss(
            convention, [t.scores for t in found], [t.selected for t in found], batch.mask
        )
    return out


def spread_of(case: Case, reference: ReferenceModel, batch: Ragged, kind: str) -> dict[str, Spread]:
    """Loss "value" and its gradient by router weight, with how far float32 may move them."""
    names = reference.router_names()

    def run(_: Rounding) -> dict[str, Tensor]:
        value = expected_losses(reference, batch)[kind]
        gradients = reference.gradients(value)
        return {"value": value, **{name: gradients[name] for name in names}}

    return monte_carlo(reference, run, dtype=FLOAT32, generator=case.generator())


def values(case: Case, kind: str, model: Any, batch: Ragged) -> Iterator[Lost]:
    """The loss with padding, without, and under a capacity: the choice counts there, not what found a place
    (arXiv 2101.03961, eq. 5)."""
    reference = case.reference(case.shape, case.weights())
    # Another number of sequences too, which nothing may depend on.
    plain = Ragged(batch.tokens[:2, 4:9], torch.ones_like(batch.mask[:2, 4:9]))
    yield lost(case, kind, model, reference, batch, "padded batch")
    yield lost(case, kind, model, reference, plain, "unpadded batch")
    if kind == "balance" and case.shape.auxiliary_loss.balance == "sequence":
        # The mean is over sequences with a real token.
        mask = batch.mask.clone()
        mask[0] = False
        yield lost(case, kind, model, reference, Ragged(batch.tokens, mask), "batch with an empty sequence")
    architecture = case.twin(moe__router__capacity_factor=0.5)
    weights = case.weights(architecture)
    crowd = settled(case, model, weights, architecture)
    try:
        crowded = case.model(architecture, weights)
    except Unsupported:
        case.note("not_expressible", ["capacity"])
        return
    yield lost(case, kind, crowded, case.reference(architecture, weights), crowd, "batch under a capacity")


def lost(case: Case, kind: str, model: Any, reference: ReferenceModel, batch: Ragged, label: str) -> Lost:
    """One loss of the model under test, and what its formula gives."""
    spread = spread_of(case, reference, batch, kind)["value"]
    radius = float(spread.radius(inner=longest_product(reference.architecture)))
    with torch.no_grad():
        value = loss_of(model, kind, batch.tokens, None if batch.mask.all() else batch.mask)
    return Lost(kind, label, reference, batch, {"value": value}, {"value": spread.centre}, {"value": radius})


def check_value(case: Case, kind: str) -> None:
    """Raise Violation unless the loss is what its formula gives, with and without padding."""
    architecture, weights = case.shape, case.weights()
    model = case.model(weights=weights)
    batch = settled(case, model, weights)
    seen = Seen(values(case, kind, model, batch))
    with explained(seen, find_loss):
        for one in seen:
            what = f"{kind} loss, {one.label}"
            used = agree(
                one.found["value"], one.expected["value"], one.radii["value"], what=what, stage="loss"
            )
            case.note(f"{one.label.split()[0]}_share_of_tolerance", round(used, 4))
    moe = moe_of(architecture)
    found = traces(model, batch.tokens, mask=batch.mask, architecture=architecture)
    case.note("load", balance.metrics([t.indices for t in found], moe.n_experts, batch.mask))


@conformance(
    "routing.balance-loss-follows-its-convention",
    clause="architecture.auxiliary_loss.balance",
    needs=(*NEEDS, "routing"),
    kills=(
        "balance-counts-padding",
        "balance-divides-by-all-tokens",
        "balance-over-the-wrong-axis",
        "balance-divides-by-k-twice",
        "balance-double-softmax",
        "balance-on-logits",
        "balance-scrambles-tokens",
        "balance-grows-with-the-batch",
        "balance-first-choice-only",
        "balance-counts-what-is-kept",
        "weights-written-over-scores",
        "balance-counts-empty-sequences",
    ),
    applies=has_balance,
    costly=True,
)
def test_balance_loss_follows_its_convention(case: Case) -> None:
    """The balance loss is what the named convention gives, padding left out."""
    check_value(case, "balance")


@conformance(
    "routing.z-loss-follows-its-formula",
    clause="architecture.auxiliary_loss.z_coefficient",
    needs=(*NEEDS, "routing"),
    kills=("z-not-squared", "z-on-probabilities", "z-squares-the-mean", "z-on-noised-logits"),
    applies=has_z,
)
def test_z_loss_follows_its_formula(case: Case) -> None:
    """The z-loss is the mean over real tokens of logsumexp(logits)^2, summed over layers."""
    check_value(case, "z")


@conformance(
    "routing.balance-loss-is-bounded",
    clause="architecture.auxiliary_loss.balance",
    needs=NEEDS,
    kills=("balance-on-logits", "balance-divides-by-k-twice", "balance-grows-with-the-batch"),
    applies=has_balance,
)
def test_balance_loss_is_bounded(case: Case) -> None:
    """The balance loss is positive, at most its value at collapse, and known when all scores are equal."""
    architecture, weights = case.shape, case.weights()
    moe, convention = moe_of(architecture), architecture.auxiliary_loss.balance
    assert convention != "none"
    batch = ragged(case)
    # "switch" and "sequence" add the layers up, "huggingface" pools them.
    layers = 1 if convention == "huggingface" else architecture.n_moe_layers
    most = layers * balance_loss_at_collapse(moe.n_experts, moe.top_k, convention)
    uniform = layers * balance_loss_at_uniform(moe.top_k, convention)
    score_sum = moe.n_experts / 2 if moe.router.score == "sigmoid" and convention != "sequence" else 1.0
    for label, factor in (("usual", 1.0), ("loud", 10.0), ("silent", 0.0)):
        quiet = scaled(scaled(weights, "router.weight", factor), "router.bias", factor)
        model = case.model(weights=quiet)
        with torch.no_grad():
            value = float(loss_of(model, "balance", batch.tokens, batch.mask))
        case.note(f"{label}_router", round(value, 6))
        if factor == 0.0:
            # Sums of at most T K terms in float32: 1e-4 is above their rounding for T K < 1000.
            expected = torch.tensor(uniform * score_sum)
            agree(
                torch.tensor(value),
                expected,
                1e-4 * uniform * score_sum,
                what="balance loss of a silent router",
                stage="loss",
            )
        elif moe.router.score == "softmax" or convention == "sequence":
            require(
                0 < value <= most * (1 + 1e-4),
                f"the balance loss of a {label} router is {value:.6g}, not in (0, {most:.6g}]",
                stage="loss",
            )


@conformance(
    "routing.balance-loss-ignores-batch-size",
    clause="architecture.auxiliary_loss.balance",
    needs=("auxiliary_loss",),
    kills=("balance-grows-with-the-batch", "balance-counts-padding"),
    applies=lambda a: a is None or has_balance(a),
)
def test_balance_loss_ignores_batch_size(case: Case) -> None:
    """The balance loss of a batch is that of the batch twice over, and of the batch with more padding."""
    model = case.model()
    tokens, extra = case.tokens(3, 11), case.tokens(3, 4)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        once = loss_of(model, "balance", tokens, mask)
        twice = loss_of(model, "balance", tokens.repeat(2, 1), mask.repeat(2, 1))
        padded = loss_of(
            model,
            "balance",
            torch.cat([extra[:, :3], tokens, extra[:, 3:]], dim=1),
            torch.nn.functional.pad(mask, (3, 1)),
        )
    # Half of the digits, as wherever the weights may be unknown: a defect moves the first ones.
    tolerance = math.sqrt(unit_roundoff(FLOAT32)) * float(once)
    agree(twice, once, tolerance, what="balance loss of the batch twice over", stage="loss")
    agree(padded, once, tolerance, what="balance loss with padding added", stage="loss")


def check_gradient(case: Case, kind: str) -> None:
    """Raise Violation unless the loss alone moves every router, as its formula says."""
    architecture, weights = case.shape, case.weights()
    model = case.model(weights=weights)
    case.need(model, "gradients")
    batch = settled(case, model, weights)
    reference = case.reference(architecture, weights)
    expected = spread_of(case, reference, batch, kind)
    value = loss_of(model, kind, batch.tokens, batch.mask)
    require(value.requires_grad, f"the {kind} loss does not depend on the weights", stage="gradient")
    found = model.gradients(value)
    inner = longest_product(architecture)
    centre, most = expected["value"].centre, float(expected["value"].radius(inner=inner))

    def its_value(_: Case) -> None:
        agree(value.detach(), centre, most, what=f"{kind} loss", stage="loss")

    names = sorted(expected.keys() - {"value"})
    radii = {name: float(expected[name].radius(inner=inner).amax()) for name in names}
    centres = {name: expected[name].centre for name in names}
    seen = Seen[Lost]()
    with explained(seen, find_loss), narrowed(case, its_value, otherwise="gradient"):
        seen.add(Lost(kind, "gradients", reference, batch, found, centres, radii))
        for name in names:
            what = f"gradient of the {kind} loss in {name}"
            agree(found[name], centres[name], radii[name], what=what)


@conformance(
    "routing.balance-loss-trains-the-router",
    clause="architecture.auxiliary_loss.balance",
    needs=(*NEEDS, "gradients"),
    kills=("balance-detached", "balance-over-the-wrong-axis", "balance-double-softmax"),
    applies=has_balance,
    costly=True,
)
def test_balance_loss_trains_the_router(case: Case) -> None:
    """The balance loss alone gives every router the gradient that its convention has."""
    check_gradient(case, "balance")


@conformance(
    "routing.z-loss-trains-the-router",
    clause="architecture.auxiliary_loss.z_coefficient",
    needs=(*NEEDS, "gradients"),
    kills=("z-on-probabilities", "z-not-squared"),
    applies=has_z,
)
def test_z_loss_trains_the_router(case: Case) -> None:
    """The z-loss alone gives every router the gradient that its formula has."""
    check_gradient(case, "z")
