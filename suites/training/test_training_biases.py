"""Balance without a loss: correction biases that follow the load of the experts (arXiv 2408.15664).

Letters: T tokens, E experts, K top-k, N MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.conformance import Case, Void, conformance, require
from harness.conformance.capture import moe_of, traces
from harness.conformance.case import replaced
from harness.conformance.comparison import Ragged, agree, ragged, same_experts
from harness.conformance.training import has_correction_bias, recomputing, summed_loss
from harness.implementations.protocols import Unsupported
from harness.spec.architecture import Architecture

NEEDS = ("train", "bias_update", "weights", "routing")
RATE = 1e-3
"""Of DeepSeek-V3 (arXiv 2412.19437, section 4.2)."""


def bias_name(layer: int) -> str:
    """The canonical name of a layer's correction bias."""
    return f"layers.{layer}.moe.router.correction_bias"


def biases(model: Any, architecture: Architecture) -> dict[int, Tensor]:
    """Layer -> correction bias [E] as saved, float64; Unsupported where it goes by another name."""
    saved: Mapping[str, Tensor] = model.saved()
    layers = [i for i in range(architecture.n_layers) if architecture.is_moe_layer(i)]
    lacking = [bias_name(i) for i in layers if bias_name(i) not in saved]
    if lacking:
        raise Unsupported(f"what it saves has no {lacking[0]}")
    return {i: saved[bias_name(i)].detach().double().clone() for i in layers}


def loads(model: Any, architecture: Architecture, batches: Sequence[Ragged]) -> dict[int, Tensor]:
    """Layer -> choices [E] of real tokens in all batches, from passes in eval mode, which count nothing."""
    n_experts, total = moe_of(architecture).n_experts, dict[int, Tensor]()
    for batch in batches:
        real = batch.mask.flatten()
        for trace in traces(model, batch.tokens, mask=batch.mask, architecture=architecture):
            counted = torch.bincount(trace.indices[real].flatten(), minlength=n_experts)
            total[trace.layer] = total.get(trace.layer, 0) + counted
    return total


def train_on(model: Any, batch: Ragged, *, again: bool = False) -> None:
    """A pass in training, and its gradient."""
    with model.training(), recomputing(model, again):
        loss = summed_loss(model.forward(batch.tokens, mask=batch.mask), batch)
        if "gradients" in model.capabilities:
            model.gradients(loss)


def below(load: Tensor) -> Tensor:
    """1 where a load [E] is below its mean, -1 where it is above, 0 where it is the mean."""
    return (load.double().mean() - load.double()).sign()


def check_step(
    before: Mapping[int, Tensor], after: Mapping[int, Tensor], load: Mapping[int, Tensor], *, stage: str
) -> None:
    """Raise Violation unless every layer's bias moved by RATE towards the experts with less than the mean."""
    for layer, old in before.items():
        # One rounding of the bias and one of the rate, in float32.
        allowed = 2 * torch.finfo(torch.float32).eps * (old.abs() + RATE)
        what = f"the step of the correction bias of layer {layer}"
        agree(after[layer] - old, RATE * below(load[layer]), allowed, what=what, stage=stage)


def check_update(model: Any, architecture: Architecture, *batches: Ragged) -> None:
    """Raise Violation unless an update after passes over these batches follows their load, and that alone."""
    before, load = biases(model, architecture), loads(model, architecture, batches)
    for batch in batches:
        train_on(model, batch)
    model.update_biases(RATE)
    check_step(before, biases(model, architecture), load, stage="balance")


def mixed(case: Case) -> Iterator[Architecture]:
    """The twin; and one in which dense layers stand before, between and after MoE layers."""
    yield case.shape
    dense = case.shape.ffn or moe_of(case.shape).expert.model_copy(update={"d_ff": 136})
    more = {"n_layers": 6, "ffn": dense.model_dump()}
    yield replaced(case.shape, more | {"moe__first_dense": 1, "moe__period": 2, "moe__offset": 0})


@conformance(
    "training.every-bias-takes-one-step",
    clause="architecture.moe.router.correction_bias",
    needs=NEEDS,
    kills=(
        "bias-update-ends-at-a-dense-layer",
        "bias-update-not-registered",
        "bias-update-of-the-last-layer-only",
        "bias-update-reversed",
        "bias-update-in-proportion",
        "loads-count-padding",
        "loads-count-first-choices",
        "loads-counted-in-eval",
        "loads-of-the-last-pass-only",
        "updated-bias-not-saved",
        "every-second-update-is-lost",
        "loads-in-a-byte",
    ),
    applies=has_correction_bias,
)
def test_every_bias_takes_one_step(case: Case) -> None:
    """An update moves each correction bias of each layer by the rate: up below the mean load, else down."""
    for architecture in mixed(case):
        model = case.model(architecture, case.weights(architecture))
        # Much padding of one id, and many tokens of one in eval mode: if they counted, most steps would turn.
        first, second = ragged(case, 17, pads=((0, 9), (8, 0), (5, 4))), ragged(case, 9)
        first.tokens[~first.mask] = 0
        idle = constant(case, 100)
        # As many as a byte cannot hold.
        many = constant(case, 128, sequences=2)
        for batches in ((first, second), (many,), (second,)):
            loads(model, architecture, (idle,))
            check_update(model, architecture, *batches)


@conformance(
    "training.a-load-is-used-once",
    clause="architecture.moe.router.correction_bias",
    needs=NEEDS,
    kills=("loads-never-start-anew",),
    applies=has_correction_bias,
)
def test_a_load_is_used_once(case: Case) -> None:
    """An update without a pass since the last changes nothing, and the next follows its own passes alone."""
    architecture = case.shape
    model = case.model()
    first, second = ragged(case, 17), ragged(case, 7)
    train_on(model, first)
    model.update_biases(RATE)
    before = biases(model, architecture)
    model.update_biases(RATE)
    for layer, bias in biases(model, architecture).items():
        moved = float((bias - before[layer]).abs().amax())
        require(moved == 0, f"a bias of layer {layer} moves by {moved:.2g} without a pass", stage="balance")
    check_update(model, architecture, second)


@conformance(
    "training.small-steps-survive-in-bfloat16",
    clause="architecture.moe.router.dtype",
    needs=NEEDS,
    kills=("bias-in-model-dtype",),
    applies=lambda a: has_correction_bias(a) and a is not None and moe_of(a).router.dtype == "float32",
)
def test_small_steps_survive_in_bfloat16(case: Case) -> None:
    """In a bfloat16 model a bias of 0.5 to 2 still takes steps of a thousandth."""
    architecture = case.shape
    weights = {
        name: (value.sign() * (0.5 + value.abs().clamp(max=1.5))).to(torch.bfloat16).double()
        if name.endswith("correction_bias")
        else value
        for name, value in case.weights().items()
    }
    model = case.model(architecture, weights, dtype=torch.bfloat16)
    check_update(model, architecture, ragged(case))


@conformance(
    "training.what-is-saved-selects",
    clause="architecture.moe.router.correction_bias",
    needs=NEEDS,
    kills=("updated-bias-not-saved", "bias-update-not-registered"),
    applies=has_correction_bias,
)
def test_what_is_saved_selects(case: Case) -> None:
    """After updates a model that loads what was saved sends every token to the same experts."""
    architecture = case.shape
    model = case.model()
    batch = ragged(case)
    biases(model, architecture)
    before = traces(model, batch.tokens, mask=batch.mask)
    for _ in range(3):
        train_on(model, batch)
        model.update_biases(0.25)  # of the order of the scores, so that other experts are selected
    restored = case.model(architecture, {n: x.detach().clone() for n, x in model.saved().items()})
    after, again = (traces(one, batch.tokens, mask=batch.mask) for one in (model, restored))
    real = batch.mask.flatten()
    moved = any(
        (old.indices.sort(-1).values != new.indices.sort(-1).values)[real].any()
        for old, new in zip(before, after, strict=True)
    )
    require(moved, "three updates of 0.25 change no token's experts", stage="balance")
    for old, new in zip(after, again, strict=True):
        what = f"layer {old.layer} of what was saved"
        same_experts(new.indices, old.indices, what=what, stage="balance", where=real)


@conformance(
    "training.recomputation-counts-once",
    clause="architecture.moe.router.correction_bias",
    needs=(*NEEDS, "recompute", "gradients"),
    kills=("loads-counted-again",),
    applies=has_correction_bias,
)
def test_recomputation_counts_once(case: Case) -> None:
    """A token counts once in the load, whether or not its activations are computed a second time."""
    architecture, moe = case.shape, moe_of(case.shape)
    model = case.model()
    # One token over and over goes to K experts: those of the second batch are below the mean, and would be
    # above it if they counted twice, where it is between half and all of K / (E - K) times as long.
    lengths = (32, round(0.75 * 32 * moe.top_k / (moe.n_experts - moe.top_k)))
    for _ in range(10):
        once, twice = (constant(case, length) for length in lengths)
        plain, repeated = (loads(model, architecture, (batch,)) for batch in (once, twice))
        load = {layer: counted + repeated[layer] for layer, counted in plain.items()}
        # Only a step that a second count would turn tells: a load counted twice throughout has the same mean.
        if all((below(counted) != below(counted + repeated[i])).any() for i, counted in load.items()):
            break
    else:
        raise Void("ten batches in a row have a load that a second count does not turn")
    before = biases(model, architecture)
    train_on(model, once)
    train_on(model, twice, again=True)
    model.update_biases(RATE)
    check_step(before, biases(model, architecture), load, stage="recompute")


def constant(case: Case, length: int, *, sequences: int = 1) -> Ragged:
    """Sequences of one token, over and over."""
    tokens = case.tokens(1, 1).repeat(sequences, length)
    return Ragged(tokens, torch.ones_like(tokens, dtype=torch.bool))
