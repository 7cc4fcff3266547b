"""Conventions of the stage combine: the experts, their weighted sum, and the shared experts' part.

Letters: T tokens, D d_model, F d_ff of an expert, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.conformance import stages
from harness.conformance.capture import FLOAT32, Captured, moe_of
from harness.conformance.conventions.search import Convention, does, says
from harness.conformance.conventions.stagewise import exact, stage_finder
from harness.conformance.stages import Judged
from harness.evidence.margins import gamma
from harness.spec.architecture import Architecture, Moe

Matrices = Mapping[str, Tensor]


@dataclass(frozen=True)
class Combining:
    """What the output of a MoE layer is made of."""

    architecture: Architecture
    weights: Mapping[str, Tensor]
    """Of this layer's experts, by canonical name."""
    layer: int
    hidden: Tensor
    indices: Tensor
    combine: Judged
    on_input: bool = False
    outside: bool = False

    @property
    def moe(self) -> Moe:
        """Its experts."""
        return moe_of(self.architecture)


def _start(layer: Captured) -> Combining:
    combine = layer.combine_weights()
    if layer.trace.weights is not None:
        combine = Judged(layer.trace.weights.double(), combine.bound)
    at = f"layers.{layer.trace.layer}.moe."
    weights = {name: value for name, value in layer.variant.weights.items() if name.startswith(at)}
    hidden, indices = layer.shown("hidden"), layer.trace.indices
    return Combining(layer.variant.architecture, weights, layer.trace.layer, hidden, indices, combine)


def _rows(given: Combining, rows: Tensor) -> Combining:
    combine = Judged(given.combine.value[rows], given.combine.bound[rows])
    return replace(given, hidden=given.hidden[rows], indices=given.indices[rows], combine=combine)


def _compute(given: Combining) -> Judged:
    if not (given.on_input or given.outside):
        return _plain(given, given.indices)
    # The shared experts alone, and each routed one in its own way.
    out = _plain(given, torch.full_like(given.indices, -1))
    value, bound = out.value.clone(), out.bound.clone()
    for expert in range(given.moe.n_experts):
        tokens, slots = (given.indices == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        w = given.combine.value[tokens, slots, None]
        rows = given.hidden[tokens].double() * (w if given.on_input else 1)
        judged = _expert(given, expert, rows)
        w = torch.ones_like(w) if given.on_input else w
        value.index_add_(0, tokens, w * judged.value)
        growth = gamma(given.moe.top_k + 2, FLOAT32)
        bound.index_add_(0, tokens, w.abs() * (judged.bound + growth * judged.value.abs()))
    return Judged(value, bound)


def _plain(given: Combining, indices: Tensor) -> Judged:
    return stages.combine(
        given.architecture, given.weights, given.layer, given.hidden, indices, given.combine, FLOAT32
    )


def _expert(given: Combining, expert: int, rows: Tensor) -> Judged:
    ff, at = given.moe.expert, f"layers.{given.layer}.moe.experts."
    matrices = {
        name.removeprefix(at): value[expert] for name, value in given.weights.items() if name.startswith(at)
    }
    if not given.outside:
        return stages.feed_forward(ff, matrices, rows, FLOAT32)
    # act(gate * up): the product is what the up part of a network without a gate would give.
    gate, up = (
        stages.linear(matrices[name], matrices.get(f"{name}_bias"), rows, FLOAT32) for name in ("gate", "up")
    )
    product = gate.value * up.value
    spread = gate.bound * up.value.abs() + gate.value.abs() * up.bound
    slope = stages.LIPSCHITZ[ff.activation]
    curve = stages.curve(ff.activation, product)
    growth = gamma(stages.ELEMENTARY, FLOAT32)
    inner = Judged(curve, slope * spread + growth * (curve.abs() + slope * product.abs()))
    down, bias = matrices["down"], matrices.get("down_bias")
    out = stages.linear(down, bias, inner.value, FLOAT32)
    return Judged(out.value, out.bound + inner.bound @ down.double().abs().T)


def _moe(given: Combining, **fields: object) -> Combining:
    moe = given.moe.model_copy(update=fields)
    return replace(given, architecture=given.architecture.model_copy(update={"moe": moe}))


def _expert_fields(given: Combining, **fields: object) -> Combining:
    return _moe(given, expert=given.moe.expert.model_copy(update=fields))


def _renamed(given: Combining, rename: Callable[[str], str]) -> Combining:
    return replace(given, weights={rename(name): value for name, value in given.weights.items()})


def _swapped(given: Combining) -> Combining:
    if not given.moe.expert.gated:
        return given

    def rename(name: str) -> str:
        if ".experts.gate" in name:
            return name.replace(".experts.gate", ".experts.up")
        return name.replace(".experts.up", ".experts.gate")

    return _renamed(given, rename)


def _swapped_if_half_square(given: Combining) -> Combining:
    half = 2 * given.moe.expert.d_ff == given.architecture.d_model
    return _swapped(given) if half else given


def _fused(given: Combining, order: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Combining:
    """Gate and up read otherwise from one fused matrix: `order` of both, stacked [E, 2 F, ...]."""
    weights = dict(given.weights)
    for ending in ("", "_bias"):
        names = [f"layers.{given.layer}.moe.experts.{part}{ending}" for part in ("gate", "up")]
        if all(name in weights for name in names):
            fused = torch.cat([weights[name] for name in names], dim=1)
            weights[names[0]], weights[names[1]] = order(fused)
    return replace(given, weights=weights)


def _halves_as_pairs(fused: Tensor) -> tuple[Tensor, Tensor]:
    return fused[:, 0::2], fused[:, 1::2]


def _pairs_as_halves(fused: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = fused.chunk(2, dim=1)
    paired = torch.stack([gate, up], dim=2).flatten(1, 2)
    first, second = paired.chunk(2, dim=1)
    return first, second


def _turned(given: Combining) -> Combining:
    def turned(name: str, value: Tensor) -> Tensor:
        square = ".experts." in name and value.dim() == 3 and value.shape[1] == value.shape[2]
        return value.transpose(1, 2) if square else value

    return replace(given, weights={name: turned(name, value) for name, value in given.weights.items()})


def _times(given: Combining, power: int) -> Combining:
    factor = given.moe.router.scaling_factor**power
    return replace(given, combine=Judged(given.combine.value * factor, given.combine.bound * factor))


def _activation(name: str) -> Callable[[Combining], Combining]:
    def change(given: Combining) -> Combining:
        clamped = given.moe.expert.activation == "clamped_swiglu"
        return given if clamped else _expert_fields(given, activation=name)

    return change


def _outside(given: Combining) -> Combining:
    plain = given.moe.expert.gated and given.moe.expert.activation != "clamped_swiglu"
    return replace(given, outside=True) if plain else given


def _clamp(given: Combining, clamp: float) -> Combining:
    return given if given.moe.expert.clamp is None else _expert_fields(given, clamp=clamp)


COMBINE: tuple[Convention[Combining], ...] = (
    Convention(
        "unweighted-sum",
        "weights",
        "experts are added without their weights",
        does("weighs them"),
        lambda c: replace(c, combine=exact((c.indices >= 0).double())),
    ),
    Convention(
        "weight-on-the-input",
        "weights",
        "combine weights multiply the experts' input",
        does("weighs their output"),
        lambda c: replace(c, on_input=True),
    ),
    Convention(
        "outputs-scaled-again",
        "scale",
        "the scaling factor is applied to what the experts give, beside the weights that are shown",
        says("moe.router.scaling_factor"),
        lambda c: _times(c, 1),
    ),
    Convention(
        "outputs-not-scaled",
        "scale",
        "the scaling factor of the weights that are shown is not applied",
        says("moe.router.scaling_factor"),
        lambda c: _times(c, -1),
    ),
    Convention(
        "gate-and-up-swapped",
        "halves",
        "gate and up change places",
        does("activates the gate"),
        _swapped,
    ),
    Convention(
        "swapped-if-half-square",
        "halves",
        "gate and up change places where 2 d_ff = d_model",
        does("activates the gate"),
        _swapped_if_half_square,
    ),
    Convention(
        "fused-halves-read-as-pairs",
        "halves",
        "gate and up, stacked as halves, are read as alternating rows",
        does("stacks halves"),
        lambda c: _fused(c, _halves_as_pairs),
    ),
    Convention(
        "fused-pairs-read-as-halves",
        "halves",
        "gate and up, stacked as alternating rows, are read as halves",
        does("stacks pairs"),
        lambda c: _fused(c, _pairs_as_halves),
    ),
    Convention(
        "activation-outside",
        "activation",
        "the activation is applied to the product of gate and up",
        does("applies it to the gate"),
        _outside,
    ),
    *(
        Convention(
            f"activation-{name.replace('_', '-')}",
            "activation",
            f"the activation is {name}",
            says("moe.expert.activation"),
            _activation(name),
        )
        for name in ("silu", "gelu", "gelu_tanh", "relu")
    ),
    Convention(
        "expert-bias-dropped",
        "bias",
        "the experts' biases are not added",
        says("moe.expert.bias"),
        lambda c: _expert_fields(c, bias=False),
    ),
    Convention(
        "clamp-constant",
        "clamp",
        "the clamp is 7",
        says("moe.expert.clamp"),
        lambda c: _clamp(c, 7.0),
    ),
    Convention(
        "transposed-if-square",
        "layout",
        "square expert matrices are transposed",
        does("has them as [out, in]"),
        _turned,
    ),
    Convention(
        "shared-gate-dropped",
        "shared",
        "the shared expert is added without its gate",
        says("moe.shared_gate"),
        lambda c: _moe(c, shared_gate=False),
    ),
    Convention(
        "shared-expert-dropped",
        "shared",
        "the shared expert is not added",
        does("adds it"),
        lambda c: _moe(c, shared=None, shared_gate=False),
    ),
)

find_output = stage_finder(COMBINE, _start, _compute, lambda layer: layer.shown("output"), _rows)
