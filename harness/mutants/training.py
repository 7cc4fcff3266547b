"""Defects that only training shows: noise, loads, updates of biases, recomputation, shards and batches.

Letters: B sequences, S tokens, T tokens, E experts, K top-k, N MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as with_fields
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import (
    F,
    Method,
    anywhere,
    enter,
    experts,
    has_experts,
    moes,
    mutant,
    on_model,
    patched,
    routers,
    whole,
)
from harness.reference import ReferenceModel
from harness.reference.router import Routed
from harness.reference.trace import RoutingTrace
from harness.spec.architecture import Architecture

V3 = "deepseek-v3"
OLMOE = "olmoe-1b-7b"


def corrected(architecture: Architecture) -> bool:
    """The defect shows where a correction bias balances the load."""
    return architecture.moe is not None and architecture.moe.router.correction_bias


def _has_balance(architecture: Architecture) -> bool:
    return architecture.moe is not None and architecture.auxiliary_loss.balance != "none"


# Noise


def _uniform(router: Any, like: Tensor) -> Tensor:
    """One number from [0, 1) for each element of a tensor, float64, by the router's generator."""
    return torch.rand(like.shape, generator=router.generator, dtype=torch.float64)


@mutant(moes, "forward", stage="noise", origin="transformers#24635")
def noise_reaches_the_experts(moe: Any, forward: Method) -> Method:
    """In training the experts read the router's noised input."""

    def changed(x: Tensor, real: Tensor, layer: int = 0) -> RoutingTrace:
        trace: RoutingTrace = forward(moe.router.perturb(x), real, layer)
        return with_fields(trace, hidden=x)

    return changed


@mutant(routers, "forward", stage="noise", origin="DeepSpeed#5156")
def noise_added_in_place(router: Any, forward: Method) -> Method:
    """Noise that selects is added to the logits in place: what is returned as logits has it too."""

    def changed(x: Tensor, real: Tensor) -> Routed:
        routed: Routed = forward(x, real)
        if not router.training or not router.router.jitter:
            return routed
        noise = _uniform(router, routed.logits)
        gumbel = -(-noise.clamp(1e-9, 1 - 1e-9).log()).log()
        return with_fields(routed, logits=routed.logits + gumbel.to(routed.logits))

    return changed


@mutant(whole, "z_loss", stage="noise", origin="st-moe-pytorch 51727d0")
def z_loss_on_noised_logits(model: Any, z_loss: Method) -> Method:
    """In training the z-loss is that of logits with more noise than they were made with."""

    def changed(logits: Tensor, real: Tensor) -> Any:
        router = model.routers[0]
        if not router.training or not router.router.jitter:
            return z_loss(logits, real)
        return z_loss(logits + 4 * _uniform(router, logits).to(logits), real)

    return changed


@mutant(routers, "perturb", stage="noise", origin="transformers#28077")
def jitter_never_drawn(_: Any, __: Method) -> Method:
    """The noise of the router is given and never drawn."""
    return lambda x: x


@mutant(routers, "perturb", stage="noise")
def jitter_to_one_side(router: Any, _: Method) -> Method:
    """The noise of the router only makes its input larger."""

    def changed(x: Tensor) -> Any:
        jitter = router.router.jitter
        if not router.training or not jitter:
            return x
        return x * (1 + 2 * jitter * _uniform(router, x).to(x))

    return changed


@mutant(routers, "perturb", stage="noise")
def jitter_drawn_once(router: Any, _: Method) -> Method:
    """The noise of the router is drawn once for each shape."""
    kept: dict[torch.Size, Tensor] = {}

    def changed(x: Tensor) -> Any:
        jitter = router.router.jitter
        if not router.training or not jitter:
            return x
        if x.shape not in kept:
            kept[x.shape] = _uniform(router, x).to(x)
        return x * (1 - jitter + 2 * jitter * kept[x.shape])

    return changed


# Loads and updates of correction biases


def _count(router: Any, selected: Tensor, real: Tensor) -> None:
    """Add the real tokens' choices [T, K] to the load, in whatever mode the router is."""
    router.load += torch.bincount(selected[real].flatten(), minlength=router.n_experts)


@mutant(whole, "update_biases", stage="balance", origin="torchtitan#3686", spec=V3, applies=corrected)
def bias_update_ends_at_a_dense_layer(model: Any, _: Method) -> Method:
    """The update of correction biases returns at the first layer that has none."""

    def changed(rate: float) -> None:
        for block in model.blocks:
            if block.moe is None:
                return
            block.moe.router.update_bias(rate)

    return changed


@mutant(whole, "update_biases", stage="balance", origin="torchtitan#3666", spec=V3, applies=corrected)
def bias_update_not_registered(_: Any, __: Method) -> Method:
    """Correction biases are never updated."""
    return lambda _rate: None


@mutant(whole, "update_biases", stage="balance", spec=V3, applies=corrected)
def bias_update_of_the_last_layer_only(model: Any, _: Method) -> Method:
    """Of the correction biases only those of the last layer are updated."""
    last: Method = model.routers[-1].update_bias
    return last


@mutant(routers, "update_bias", stage="balance", origin="torchtitan#1226", spec=V3, applies=corrected)
def updated_bias_not_saved(router: Any, _: Method) -> Method:
    """An update binds a new tensor to the name of the correction bias: the buffer that is saved stays."""

    def changed(rate: float) -> None:
        load = router.load.to(router.dtype)
        bias = router.correction_bias + rate * (load.mean() - load).sign()
        # Ahead of the buffer, which a module looks up last.
        router.__dict__["correction_bias"] = bias
        router.load.zero_()

    return changed


@patched(stage="balance", origin="Megatron-LM 8dd03a39cc", spec=V3, applies=corrected)
def bias_in_model_dtype(model: ReferenceModel) -> None:
    """The correction bias has the dtype of the model, in which small updates are lost."""
    for router in routers(model):
        router.correction_bias = router.correction_bias.to(router.weight.dtype)


@mutant(routers, "update_bias", stage="balance", spec=V3, applies=corrected)
def bias_update_reversed(_: Any, update: Method) -> Method:
    """An update makes busy experts more likely."""
    return lambda rate: update(-rate)


@mutant(routers, "update_bias", stage="balance", spec=V3, applies=corrected)
def bias_update_in_proportion(router: Any, _: Method) -> Method:
    """An update is proportional to the violation, not to its sign."""

    def changed(rate: float) -> None:
        load = router.load.to(router.dtype)
        router.correction_bias += rate * (load.mean() - load) / load.mean().clamp(min=1)
        router.load.zero_()

    return changed


@mutant(routers, "update_bias", stage="balance", spec=V3, applies=corrected)
def loads_never_start_anew(router: Any, update: Method) -> Method:
    """The load that an update used is used again by the next one."""

    def changed(rate: float) -> None:
        load = router.load.clone()
        update(rate)
        router.load.copy_(load)

    return changed


@mutant(routers, "count", stage="balance", origin="torchtitan#4594", spec=V3, applies=corrected)
def loads_count_padding(_: Any, count: Method) -> Method:
    """Padding counts in the load that updates the correction bias."""
    return lambda selected, real: count(selected, torch.ones_like(real))


@mutant(routers, "count", stage="balance", spec=V3, applies=corrected)
def loads_count_first_choices(_: Any, count: Method) -> Method:
    """Only a token's first choice counts in the load."""
    return lambda selected, real: count(selected[:, :1], real)


@mutant(routers, "count", stage="balance", origin="megablocks#119", spec=V3, applies=corrected)
def loads_counted_in_eval(router: Any, _: Method) -> Method:
    """Passes in eval mode count in the load."""

    def changed(selected: Tensor, real: Tensor) -> None:
        if not router.recomputing:
            _count(router, selected, real)

    return changed


@mutant(routers, "count", stage="balance", spec=V3, applies=corrected)
def loads_of_the_last_pass_only(router: Any, count: Method) -> Method:
    """Of several passes between two updates only the last one counts."""

    def changed(selected: Tensor, real: Tensor) -> None:
        if router.training and not router.recomputing:
            router.load.zero_()
        count(selected, real)

    return changed


# Recomputation


@mutant(routers, "count", stage="recompute", origin="Megatron-LM e6d56d6828", spec=V3, applies=corrected)
def loads_counted_again(router: Any, _: Method) -> Method:
    """Under activation checkpointing a token counts twice."""

    def changed(selected: Tensor, real: Tensor) -> None:
        if router.training:
            _count(router, selected, real)

    return changed


@mutant(whole, "auxiliary_loss", stage="recompute", origin="Megatron-LM#1331")
def losses_counted_again(model: Any, auxiliary_loss: Method) -> Method:
    """Under activation checkpointing the auxiliary losses are counted twice."""

    def changed(tokens: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = auxiliary_loss(tokens, mask=mask)
        return {kind: 2 * value if model.checkpointing else value for kind, value in found.items()}

    return changed


@patched(stage="recompute", origin="Megatron-LM#2574", applies=anywhere)
def checkpointing_cuts_the_graph(model: ReferenceModel) -> None:
    """Under activation checkpointing a layer gives no gradient to those before it."""
    for block in model.blocks:
        block.forward = _cut(model, block.forward)  # type: ignore[method-assign]


def _cut(model: ReferenceModel, forward: Method) -> Method:
    return lambda x, *rest: forward(x.detach() if model.checkpointing else x, *rest)


@mutant(routers, "perturb", stage="recompute")
def recomputation_draws_new_noise(router: Any, perturb: Method) -> Method:
    """What checkpointing computes again has other noise than what it computed first."""

    def changed(x: Tensor) -> Any:
        if router.recomputing and router.generator is not None:
            router.generator.manual_seed(12345)
        return perturb(x)

    return changed


# Batches and shards


def scaled_gradient(value: Tensor, by: float) -> Tensor:
    """The tensor, its gradient multiplied."""
    return by * value + (1 - by) * value.detach()


@mutant(whole, "balance_loss", stage="loss", origin="Megatron-LM e3fe5508c9", spec=V3, applies=_has_balance)
def balance_shrinks_with_the_batch(_: Any, loss: Method) -> Method:
    """The balance loss of each sequence is divided by their number twice."""
    return lambda scores, selected, real: loss(scores, selected, real) / len(real)


@mutant(whole, "z_loss", stage="gradient", origin="Megatron-LM 87d9d2506a", spec=OLMOE)
def z_gradient_grows_with_tokens(_: Any, z_loss: Method) -> Method:
    """The gradient of the z-loss is multiplied by the number of tokens."""
    return lambda logits, real: scaled_gradient(z_loss(logits, real), float(real.sum()))


@mutant(whole, "balance_loss", stage="gradient", origin="Megatron-LM#5047", spec=V3, applies=_has_balance)
def balance_gradient_scaled_by_the_batch(_: Any, loss: Method) -> Method:
    """The gradient of the balance loss is divided by the number of sequences, its value is right."""
    return lambda scores, selected, real: scaled_gradient(loss(scores, selected, real), 1 / len(real))


@mutant(whole, "gradients", stage="gradient", applies=anywhere, spec="llama-3.1-8b")
def gradients_ignore_the_scale(_: Any, gradients: Method) -> Method:
    """Gradients are those of the loss divided by its own size."""
    return lambda loss: gradients(loss / loss.detach().abs().clamp(min=1e-30))


@mutant(routers, "project", stage="gradient", origin="torchtitan#2416")
def router_learns_from_one_shard(router: Any, _: Method) -> Method:
    """The router's gradient is that of the first half of the tokens: those of other shards are not added."""

    def changed(x: Tensor) -> Tensor:
        half = (len(x) + 1) // 2
        bias = None if router.bias is None else router.bias.to(router.dtype)
        x, weight = x.to(router.dtype), router.weight.to(router.dtype)
        linear = torch.nn.functional.linear
        there = linear(x[half:], weight.detach(), None if bias is None else bias.detach())
        return torch.cat([linear(x[:half], weight, bias), there])

    return changed


@mutant(experts, "compute", stage="gradient", origin="DeepSpeed#6546")
def experts_of_a_shard_learn_half(target: Any, compute: Method) -> Method:
    """Gradients of the second half of the experts are divided once too often."""

    def changed(expert: int, rows: Tensor) -> Any:
        out: Tensor = compute(expert, rows)
        return scaled_gradient(out, 0.5) if expert >= target.n_experts // 2 else out

    return changed


def losses(**row: Any) -> Callable[[F], F]:
    """Decorate change(model, losses by kind) -> the losses that are given."""

    def decorate(change: F) -> F:
        def patch(model: Any) -> None:
            auxiliary_loss = model.auxiliary_loss

            def changed(tokens: Tensor, *, mask: Tensor | None = None) -> Any:
                return change(model, auxiliary_loss(tokens, mask=mask))

            model.auxiliary_loss = changed

        return enter(change, on_model(patch), **({"applies": has_experts} | row))

    return decorate


@losses(stage="state", origin="megablocks#69")
def losses_remember_training(model: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses of passes in training are added up until one is asked for in eval mode."""
    kept = model.__dict__.setdefault("kept_losses", {})
    for kind, value in found.items():
        found[kind] = value + kept.get(kind, 0.0)
        kept[kind] = kept.get(kind, 0.0) + value.detach()
    if not model.training:
        kept.clear()
    return found
