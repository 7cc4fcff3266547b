"""Noise of a router in training: it is for the choice of experts, and for nothing else.

Letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.conformance import Case, conformance
from harness.conformance.capture import may_have_experts, scaled, traces
from harness.conformance.comparison import agree
from harness.conformance.passes import independent
from harness.implementations.protocols import Routing, Unsupported
from harness.spec.architecture import Architecture

JITTER = 0.2


def noisy(architecture: Architecture | None) -> bool:
    """Applies to MoE without a capacity limit, under which noise may change what is dropped."""
    return may_have_experts(architecture) and independent(architecture)


def with_noise(case: Case, *, silent: bool) -> Any:
    """A model whose routers draw noise in training; silent, with router weights 0: whatever noise multiplies
    their input, all experts have equal logits."""
    if case.architecture is not None:
        architecture = case.twin(moe__router__jitter=JITTER)
        weights = case.weights(architecture)
        if silent:
            weights = scaled(weights, "router.weight", 0.0)
        return case.model(architecture, weights)
    model = case.model()
    if silent:
        case.need(model, "parameters", "gradients")
        tensors = model.parameters()
        with torch.no_grad():
            for name in model.router_names():
                tensors[name].zero_()
    return model


def traced(case: Case, model: Any, tokens: Tensor, *, train: bool) -> tuple[list[Routing], Tensor]:
    """Routing of tokens [B, S], and the logits [B, S, V] of a pass of its own."""
    with torch.no_grad():
        if not train:
            return traces(model, tokens), model.forward(tokens)
        # Some draw from torch's global generator: it is seeded here, and put back as it was.
        with torch.random.fork_rng(devices=[]), model.training():
            torch.default_generator.manual_seed(case.generator().initial_seed())
            return traces(model, tokens), model.forward(tokens)


@conformance(
    "routing.noise-is-for-the-choice-alone",
    clause="architecture.moe.router.jitter",
    needs=("train", "routing", "forward"),
    kills=("noise-reaches-the-experts",),
    applies=noisy,
)
def test_noise_is_for_the_choice_alone(case: Case) -> None:
    """Where noise in training changes no choice and no weight, outputs are those of eval mode.

    Experts, a shared expert and the residual stream have the input without the router's noise.
    """
    loud, tokens = with_noise(case, silent=False), case.tokens(3, 13)
    quiet = traced(case, loud, tokens, train=False)[0][0]
    drawn = traced(case, loud, tokens, train=True)[0][0]
    if quiet.logits is None or drawn.logits is None:
        raise Unsupported("the routing trace shows no logits")
    if torch.equal(quiet.logits, drawn.logits):
        raise Unsupported("its routers draw no noise in training")
    model = with_noise(case, silent=True)
    expected, whole = traced(case, model, tokens, train=False)
    size = float(whole.abs().amax())
    for _ in range(2):
        found, logits = traced(case, model, tokens, train=True)
        for after, before in zip(found, expected, strict=True):
            where = f"layer {before.layer}"
            same = torch.equal(after.indices, before.indices)
            if not same or (after.weights is not None and not _near(after.weights, before.weights)):
                raise Unsupported(f"{where}: a router without weights still chooses by noise")
            if after.hidden is not None and not _near(after.hidden, before.hidden):
                raise Unsupported(
                    f"{where}: its input is random in training before any router of it was asked"
                )
            if after.output is not None and before.output is not None:
                largest = 1e-3 * float(before.output.abs().amax())
                what = f"{where}: output in training, with the choice and weights of eval,"
                agree(after.output, before.output, largest, what=what, stage="noise")
        # A thousandth of the largest: the noise itself is a tenth or more, and rounding 1e-6.
        what = "logits in training, with the choices and weights of eval,"
        agree(logits, whole, 1e-3 * size, what=what, stage="noise")


def _near(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
