"""Noise on routers: drawn as specified, in training alone, and felt by nothing but the router.

Letters: T tokens, D d_model, E experts, K top-k. The noise e of one element of the router's input x is what
multiplies it, less 1: with a router whose matrix is orthogonal, x (1 + e) follows from the logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from harness.conformance import Case, Void, balance, conformance, require, stages
from harness.conformance.capture import FLOAT32, traces
from harness.conformance.case import replaced
from harness.conformance.comparison import agree, ragged
from harness.conformance.narrowing import HALF_THE_DIGITS
from harness.conformance.training import FACTOR, alike, has_free_experts
from harness.implementations.protocols import Routing, Unsupported
from harness.spec.architecture import Architecture

NEEDS = ("train", "routing", "weights")
FALSE_ALARM = 1e-9


def noisy(case: Case) -> Architecture:
    """One MoE layer with noise on its router."""
    return replaced(case.one_layer(), {"moe__router__jitter": FACTOR})


def shown(trace: Routing, stage: str) -> Tensor:
    """What the implementation shows under `stage`; Unsupported if nothing."""
    value: Tensor | None = getattr(trace, stage)
    if value is None:
        raise Unsupported(f"the routing trace shows no {stage}")
    return value


def orthogonal(case: Case, architecture: Architecture) -> dict[str, Tensor]:
    """Weights whose routers are orthogonal matrices, as many experts as the stream is wide."""
    weights = case.weights(architecture)
    for name, value in weights.items():
        if name.endswith("router.weight"):
            random = torch.randn(value.shape, generator=case.generator(), dtype=torch.float64)
            weights[name] = case.drawn(torch.linalg.qr(random).Q.float().double())
    return weights


def drawn_noise(model: Any, tokens: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
    """Of each MoE layer, e of every element of the router's input that is not small, in one pass."""
    found = []
    for trace in traces(model, tokens):
        name = f"layers.{trace.layer}.moe.router"
        x, logits = shown(trace, "hidden").double(), shown(trace, "logits").double()
        if (bias := weights.get(f"{name}.bias")) is not None:
            logits = logits - bias
        noised = logits @ weights[f"{name}.weight"]
        large = x.abs() > 0.1 * x.square().mean().sqrt()
        found.append((noised / x - 1)[large])
    return found


@conformance(
    "training.noise-is-drawn-as-specified",
    clause="architecture.moe.router.jitter",
    needs=NEEDS,
    kills=(
        "jitter-never-drawn",
        "jitter-to-one-side",
        "jitter-drawn-once",
        "noise-added-in-place",
        "noise-in-the-first-layer-only",
    ),
    applies=has_free_experts,
)
def test_noise_is_drawn_as_specified(case: Case) -> None:
    """In training each element of a router's input is multiplied by a number drawn uniformly and anew."""
    shape = case.shape
    square = {"moe__n_experts": shape.d_model, "moe__expert__d_ff": 8}
    architecture = replaced(shape, square | {"moe__router__jitter": FACTOR})
    weights = orthogonal(case, architecture)
    model = case.model(architecture, weights)
    tokens = case.tokens(3, 13)
    # Elements are at least a tenth of their root mean square, and D roundings are of its order.
    rounding = 10 * shape.d_model * torch.finfo(FLOAT32).eps
    for quiet in drawn_noise(model, tokens, weights):
        require(float(quiet.abs().amax()) < rounding, "noise is drawn in eval mode", stage="noise")
    with model.training():
        first, second = (drawn_noise(model, tokens, weights) for _ in range(2))
    for noise in (*first, *second):
        check_uniform(case, noise, rounding)
    for one, other in zip(first, second, strict=True):
        # What is small in a pass is passed over: the same elements but for rounding.
        common = min(len(one), len(other))
        same = float(((one[:common] - other[:common]).abs() < rounding).double().mean())
        require(same < 0.5, f"{same:.0%} of the noise of a pass is that of the pass before", stage="noise")


def check_uniform(case: Case, noise: Tensor, rounding: float) -> None:
    """Raise Violation unless it is a sample of the uniform distribution on [-FACTOR, FACTOR]."""
    most = float(noise.abs().amax())
    require(
        most <= FACTOR + rounding,
        f"an element of a router's input moves by {most:.3g}, and at most {FACTOR} was asked for",
        stage="noise",
    )
    # Dvoretzky-Kiefer-Wolfowitz: the empirical distribution is so near to the true one.
    allowed = math.sqrt(math.log(2 / FALSE_ALARM) / (2 * len(noise)))
    ordered = ((noise.sort().values + FACTOR) / (2 * FACTOR)).clamp(0, 1)
    steps = torch.arange(len(noise) + 1, dtype=torch.float64) / len(noise)
    apart = float(torch.maximum((steps[1:] - ordered).abs(), (ordered - steps[:-1]).abs()).amax())
    case.note("distance_from_uniform", round(apart, 4))
    require(
        apart <= allowed,
        f"the distribution of noise is {apart:.2g} from uniform, and chance explains {allowed:.2g}",
        stage="noise",
    )


@conformance(
    "training.noise-reaches-routers-alone",
    clause="architecture.moe.router.jitter",
    needs=NEEDS,
    kills=("noise-reaches-the-experts",),
    applies=has_free_experts,
)
def test_noise_reaches_routers_alone(case: Case) -> None:
    """In training experts compute what they do in eval mode: no noise is in what they read or give."""
    architecture = noisy(case)
    weights = case.weights(architecture)
    model = case.model(architecture, weights)
    batch = ragged(case)
    real = batch.mask.flatten()
    (quiet,) = traces(model, batch.tokens, mask=batch.mask, architecture=architecture)
    with model.training():
        (noised,) = traces(model, batch.tokens, mask=batch.mask, architecture=architecture)
    hidden = shown(quiet, "hidden")
    tolerance = HALF_THE_DIGITS * float(hidden[real].abs().amax())
    what = "what the MoE layer reads in training"
    agree(shown(noised, "hidden"), hidden, tolerance, what=what, stage="noise", where=real)
    used = stages.Judged(shown(noised, "weights").double(), torch.zeros_like(noised.indices).double())
    judged = stages.combine(architecture, weights, 0, hidden, noised.indices, used, FLOAT32)
    # What is read may differ in its last digits: twice the bound, each of the two within it.
    what = "what the experts give in training"
    agree(shown(noised, "output"), judged.value, 2 * judged.bound, what=what, stage="noise", where=real)


@conformance(
    "training.losses-see-what-routers-see",
    clause="architecture.auxiliary_loss",
    needs=(*NEEDS, "auxiliary_loss"),
    kills=("z-loss-on-noised-logits",),
    applies=has_free_experts,
)
def test_losses_see_what_routers_see(case: Case) -> None:
    """In training the losses are those of the logits that are shown, with their noise and with no other."""
    architecture = noisy(case)
    batch = ragged(case)

    def shows(model: Any) -> Routing:
        return traces(model, batch.tokens, mask=batch.mask, architecture=architecture)[0]

    def loses(model: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(model.auxiliary_loss(batch.tokens, mask=batch.mask))

    one, two = (alike(case, architecture, shows) for _ in range(2))
    logits, scores = shown(one, "logits"), shown(one, "scores")
    if not torch.equal(logits, shown(two, "logits")):
        raise Void("its noise cannot be drawn a second time")
    expected = {"z": balance.z_loss([logits], batch.mask)}
    convention = architecture.auxiliary_loss.balance
    if convention != "none":
        expected["balance"] = balance.balance_loss(convention, [scores], [one.indices], batch.mask)
    for kind, value in alike(case, architecture, loses).items():
        tolerance = HALF_THE_DIGITS * float(expected[kind])
        agree(value, expected[kind], tolerance, what=f"{kind} loss in training", stage="noise")
