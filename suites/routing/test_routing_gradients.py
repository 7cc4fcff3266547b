"""Gradients of the language-model loss: that they arrive, and that they are right.

Letters: B sequences, S tokens per sequence, T real tokens, K top-k.
"""

from __future__ import annotations

import torch

from harness.conformance import Case, Void, conformance, require
from harness.conformance.capture import gated_shared, has_experts, may_have_experts, moe_of
from harness.conformance.comparison import Ragged, agree, finite, longest_product, margin, ragged
from harness.conformance.gradients import check_gradients, expected_gradients, language_model_loss, radii
from harness.implementations.protocols import Unsupported


@conformance(
    "routing.gradients-equal-reference",
    clause="architecture.moe",
    needs=("gradients", "weights", "forward"),
    kills=(
        "router-gradient-lost",
        "expert-gradient-doubled",
        "experts-of-a-shard-learn-half",
        "router-learns-from-one-shard",
        "normaliser-without-gradient",
        "top-1-normalised",
        "softmax-of-the-selected",
        "shared-gate-learns-nothing",
        "gradients-accumulate",
        "token-0-learns-nothing",
    ),
    applies=has_experts,
    costly=True,
)
def test_gradients_equal_reference(case: Case) -> None:
    """The gradient of the language-model loss in every weight is that of the reference, for K = 1, 2, 3."""
    for top_k in (1, 2, 3):
        architecture = case.twin(top_k=top_k)
        check_gradients(case, architecture, case.weights(architecture), f"top {top_k}")
    gated = gated_shared(case)
    try:
        check_gradients(case, gated.architecture, gated.weights, gated.label)
    except Unsupported:
        case.note("not_expressible", [gated.label])


@conformance(
    "routing.router-learns-from-the-loss",
    clause="architecture.moe.router",
    needs=("gradients", "forward", "routing"),
    kills=("router-gradient-lost",),
    applies=may_have_experts,
)
def test_router_learns_from_the_loss(case: Case) -> None:
    """The language-model loss alone moves every router."""
    model = case.model()
    batch = ragged(case)
    architecture = case.architecture
    if architecture is not None:
        moe = moe_of(architecture)
        if moe.top_k == 1 and (moe.router.normalise or moe.router.order == "after_topk"):
            raise Void("top 1, normalised: the combine weight is 1 whatever the router says")
    gradients = model.gradients(language_model_loss(model.forward(batch.tokens, mask=batch.mask), batch))
    names = list(model.router_names())
    require(bool(names), "the model declares gradients and names no router")
    sizes = [float(g.double().norm()) / g.numel() ** 0.5 for g in gradients.values()]
    typical = torch.tensor([s for s in sizes if s > 0]).median() if any(sizes) else torch.tensor(0.0)
    for name in names:
        require(name in gradients, f"there is no gradient of {name}", stage="gradient")
        finite(gradients[name], f"gradient of {name}", stage="gradient")
        size = float(gradients[name].double().norm()) / gradients[name].numel() ** 0.5
        # A gradient that is there is of the others' order; one that leaks through rounding is 1e-7 of it.
        require(
            size > 1e-5 * float(typical),
            f"gradient of {name} is {size:.2g}, where others are {float(typical):.2g}",
            stage="gradient",
        )


@conformance(
    "routing.idle-experts-learn-nothing",
    clause="architecture.moe.n_experts",
    needs=("gradients", "weights", "forward"),
    kills=("idle-gradient-poisoned",),
    applies=has_experts,
    costly=True,
)
def test_idle_experts_learn_nothing(case: Case) -> None:
    """With three tokens most experts are idle: their gradient is zero, and every other is the reference's."""
    architecture = case.twin(top_k=1)
    weights = case.weights(architecture)
    model = case.model(architecture, weights)
    batch = Ragged(tokens := case.tokens(1, 4), torch.ones_like(tokens, dtype=torch.bool))
    bound = margin(case, model, tokens, architecture=architecture, weights=weights)
    if not bool(bound.comparable.all()):
        raise Void("rounding may change a token's experts")
    expected = expected_gradients(case, case.reference(architecture, weights), batch)
    found = model.gradients(language_model_loss(model.forward(tokens), batch))
    tolerances = radii(expected, longest_product(architecture))
    for name, spread in expected.items():
        if ".experts." not in name:
            continue
        finite(found[name], f"gradient of {name}", stage="gradient")
        idle = ~spread.centre.flatten(1).any(-1)
        require(bool(idle.any()), f"no expert of {name} is idle")
        size = float(found[name][idle].abs().amax())
        require(
            size == 0, f"an idle expert's gradient in {name} is {size:.2g} in place of 0", stage="gradient"
        )
        agree(found[name], spread.centre, tolerances[name], what=f"gradient of {name}", stage="gradient")
