"""Defects of the experts: dispatch, activation, combine, shared experts, idle experts.

Letters: T tokens, E experts, K top-k, F d_ff of an expert.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.mutants.defect import Method, experts, moes, mutant, sparse, whole
from harness.reference.experts import Dispatch
from harness.reference.layers import SWIGLU_ALPHA
from harness.reference.trace import RoutingTrace
from harness.spec.architecture import Architecture


def _shared(architecture: Architecture) -> bool:
    return architecture.moe is not None and architecture.moe.shared is not None


def _gated(architecture: Architecture) -> bool:
    return architecture.moe is not None and architecture.moe.expert.gated


def _silu(architecture: Architecture) -> bool:
    return (
        _gated(architecture) and architecture.moe is not None and architecture.moe.expert.activation == "silu"
    )


def _biased(architecture: Architecture) -> bool:
    return architecture.moe is not None and architecture.moe.expert.bias


@mutant(experts, "combine", stage="combine", origin="jlama#201")
def unweighted_sum(_: Any, combine: Method) -> Method:
    """Experts are added without their weights."""
    return lambda outputs, plan, weights: combine(outputs, plan, (weights != 0).to(weights.dtype))


@mutant(experts, "forward", stage="combine", origin="vllm#16744")
def weight_on_the_input(target: Any, _: Method) -> Method:
    """The weight multiplies the expert's input."""

    def changed(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for slot in range(indices.shape[1]):
            one = indices[:, slot : slot + 1]
            out = out + type(target).forward(target, x * weights[:, slot, None], one, (one >= 0).to(x.dtype))
        return out

    return changed


@mutant(experts, "activate", stage="combine", origin="tutel#245", applies=_silu)
def activation_outside(_: Any, __: Method) -> Method:
    """The activation is applied to the product."""
    return lambda gate, up: F.silu(gate * up)


@mutant(experts, "activate", stage="combine", origin="transformers#43201", applies=_gated)
def gate_and_up_swapped(_: Any, activate: Method) -> Method:
    """Gate and up change places."""
    return lambda gate, up: activate(up, gate)


@mutant(experts, "combine", stage="combine", origin="Megatron-LM b6ce193888")
def weights_of_another_slot(_: Any, combine: Method) -> Method:
    """Weights are not permuted as the tokens are."""
    return lambda outputs, plan, weights: combine(outputs, plan, weights.flip(-1))


@mutant(sparse, "feed_forward", stage="combine", origin="torchtitan#3604")
def rows_right_for_one_sequence(_: Any, feed_forward: Method) -> Method:
    """Tokens are split among two ranks by position, and results put at the local index and an offset: right
    for one sequence, and for no other number."""

    def changed(x: Tensor, context: Any) -> Any:
        out, trace = feed_forward(x, context)
        half = x.shape[1] // 2
        # Rank by rank, where they belong sequence by sequence.
        moved = torch.cat([out[:, :half].flatten(0, 1), out[:, half:].flatten(0, 1)])
        return moved.view_as(x), replace(trace, output=moved)

    return changed


@mutant(experts, "combine", stage="combine", origin="Megatron-LM a98c5ba19c")
def token_order_matters(_: Any, combine: Method) -> Method:
    """A token gets its neighbour's result."""

    def changed(outputs: Tensor, plan: Dispatch, weights: Tensor) -> Any:
        # An expert's rows are shifted by one: each token gets its neighbour's result.
        return combine(outputs.roll(1, 0), plan, weights)

    return changed


@mutant(experts, "combine", stage="combine")
def combines_over_the_batch(_: Any, combine: Method) -> Method:
    """The other tokens' results leak in."""

    def changed(outputs: Tensor, plan: Dispatch, weights: Tensor) -> Tensor:
        out: Tensor = combine(outputs, plan, weights)
        return out + 0.01 * out.mean(0)

    return changed


@mutant(experts, "forward", stage="combine", origin="torchtitan#1718")
def idle_experts_answer(target: Any, _: Method) -> Method:
    """An expert without tokens computes all of them."""

    def changed(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = type(target).forward(target, x, indices, weights)
        idle = set(range(target.n_experts)) - set(indices.unique().tolist())
        for expert in sorted(idle):
            out = out + 0.1 * target.compute(expert, x)
        return out

    return changed


@mutant(experts, "forward", stage="combine", origin="torchtitan#1237")
def idle_experts_poison(target: Any, _: Method) -> Method:
    """An expert without tokens makes the output NaN."""

    def changed(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = type(target).forward(target, x, indices, weights)
        counts = torch.bincount(indices[indices >= 0], minlength=target.n_experts)
        return out + 0 * (1 / counts).amax() * out

    return changed


@mutant(experts, "forward", stage="gradient", origin="pytorch#193633")
def idle_gradient_poisoned(target: Any, _: Method) -> Method:
    """An expert without tokens gets NaN gradients."""

    def changed(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = type(target).forward(target, x, indices, weights)
        counts = torch.bincount(indices[indices >= 0], minlength=target.n_experts).to(x.dtype)
        # sqrt has an infinite slope at 0, and 0 times infinity is NaN.
        size: Tensor = (counts[:, None] * target.down.flatten(1)).abs().sum(-1)
        return out + 0 * size.sqrt().sum()

    return changed


@mutant(experts, "forward", stage="compute", origin="maxtext#4017")
def computes_every_expert(target: Any, _: Method) -> Method:
    """All experts are computed, most with weight 0."""

    def changed(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        everything = torch.zeros(len(x), target.n_experts + 1, dtype=weights.dtype)
        full = everything.scatter(-1, indices.where(indices >= 0, target.n_experts), weights)[:, :-1]
        out = torch.zeros_like(x)
        for expert in range(target.n_experts):
            out = out + full[:, expert, None] * target.compute(expert, x)
        return out

    return changed


@mutant(experts, "compute", stage="gradient", origin="DeepSpeed#6546")
def expert_gradient_doubled(_: Any, compute: Method) -> Method:
    """Gradients of experts are scaled wrongly."""

    def changed(expert: int, rows: Tensor) -> Tensor:
        out: Tensor = compute(expert, rows)
        return 2 * out - out.detach()

    return changed


@mutant(experts, "compute", stage="combine", origin="torchtitan#2319", spec="gpt-oss-20b", applies=_biased)
def expert_bias_dropped(target: Any, _: Method) -> Method:
    """The experts' biases are loaded and not added."""

    def changed(expert: int, rows: Tensor) -> Tensor:
        gate = None if target.gate is None else F.linear(rows, target.gate[expert])
        hidden: Tensor = target.activate(gate, F.linear(rows, target.up[expert]))
        return F.linear(hidden, target.down[expert])

    return changed


def _clamped(architecture: Architecture) -> bool:
    return architecture.moe is not None and architecture.moe.expert.clamp is not None


@mutant(experts, "activate", stage="combine", spec="gpt-oss-20b", applies=_clamped)
def clamp_constant(_: Any, __: Method) -> Method:
    """The clamp is 7 whatever the configuration says."""

    def changed(gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.clamp(max=7.0)
        return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up.clamp(-7.0, 7.0) + 1)

    return changed


@mutant(experts, "activate", stage="combine", spec="gpt-oss-20b", applies=_clamped)
def gate_clamped_below(target: Any, activate: Method) -> Method:
    """The gate is cut off on both sides."""
    return lambda gate, up: activate(gate.clamp(min=-target.ff.clamp), up)


@mutant(moes, "share", stage="gradient")
def shared_gate_learns_nothing(moe: Any, share: Method) -> Method:
    """The gate of the shared expert gets no gradient."""

    def changed(x: Tensor) -> Any:
        if moe.shared_gate is None:
            return share(x)
        return moe.shared(x) * moe.shared_gate(x).sigmoid().detach()

    return changed


@mutant(moes, "share", stage="combine", spec="deepseek-v3", applies=_shared)
def shared_expert_dropped(_: Any, __: Method) -> Method:
    """The shared expert is not added."""
    return lambda _x: None


@mutant(moes, "share", stage="combine", origin="lmdeploy#3491")
def shared_gate_dropped(moe: Any, _: Method) -> Method:
    """The shared expert is added without its gate."""
    return lambda x: None if moe.shared is None else moe.shared(x)


@mutant(moes, "forward", stage="combine", origin="vllm#28939", spec="deepseek-v3", applies=_shared)
def shared_expert_reads_overwritten_input(moe: Any, _: Method) -> Method:
    """The routed experts write over what the shared one reads."""

    def changed(x: Tensor, real: Tensor, layer: int = 0) -> RoutingTrace:
        routed = moe.router(x, real)
        output = moe.experts(x, routed.indices, routed.weights)
        shared = moe.share(output)  # the buffer of x now holds the routed experts' output
        total = output if shared is None else output + shared
        return RoutingTrace(
            layer, x, routed.logits, routed.scores, routed.selected, routed.indices, routed.weights, total
        )

    return changed


@mutant(whole, "load_weights", stage="combine", origin="torchtitan#1918")
def experts_in_string_order(model: Any, load: Method) -> Method:
    """Experts are loaded in the order 0, 1, 10, 11, 2."""

    def changed(values: Any) -> None:
        count = model.architecture.moe.n_experts
        order = sorted(range(count), key=str)
        load({n: v[order] if ".experts." in n and v.shape[0] == count else v for n, v in values.items()})

    return changed


@mutant(whole, "load_weights", stage="combine", origin="transformers#47031")
def transposed_if_square(_: Any, load: Method) -> Method:
    """Square expert matrices are taken for transposed ones."""

    def changed(values: Any) -> None:
        def turned(name: str, value: Tensor) -> Tensor:
            square = ".experts." in name and value.dim() == 3 and value.shape[1] == value.shape[2]
            return value.transpose(1, 2).contiguous() if square else value

        load({name: turned(name, value) for name, value in values.items()})

    return changed


@mutant(whole, "load_weights", stage="combine", origin="unsloth-zoo#849", applies=_gated)
def swapped_if_half_square(model: Any, load: Method) -> Method:
    """Gate and up change places where 2 d_ff = d_model."""

    def changed(values: Any) -> None:
        wide = model.architecture.moe.expert.d_ff * 2 == model.architecture.d_model
        names = {n: n.replace(".gate", ".up") for n in values if n.endswith("experts.gate")}
        swap = names | {up: gate for gate, up in names.items()}
        load({name: values[swap.get(name, name)] if wide else value for name, value in values.items()})

    return changed


@mutant(experts, "compute", stage="combine", origin="Megatron-LM eef48ef31c")
def experts_numbered_among_the_busy(target: Any, compute: Method) -> Method:
    """Experts without tokens are left out of the numbering: the ones after them are taken for others."""
    forward, busy = target.forward, list[int]()

    def remembering(x: Tensor, indices: Tensor, weights: Tensor) -> Any:
        busy[:] = sorted(set(indices[indices >= 0].tolist()))
        return forward(x, indices, weights)

    target.forward = remembering
    return lambda expert, rows: compute(busy.index(expert), rows)


@mutant(experts, "combine", stage="combine", origin="transformers#40609")
def weights_not_transposed(_: Any, combine: Method) -> Method:
    """Weights are read as [K, T] though they are [T, K]."""
    return lambda outputs, plan, weights: combine(outputs, plan, weights.T.reshape(weights.shape))


@mutant(whole, "load_weights", stage="combine", origin="vllm#47874", applies=_gated)
def halves_taken_for_interleaved(_: Any, load: Method) -> Method:
    """Of a fused matrix the even rows are taken for the gate and the odd ones for up, not the two halves."""

    def changed(values: Any) -> None:
        made = dict(values)
        for name in [n for n in values if n.endswith("experts.gate")]:
            up = name.replace(".gate", ".up")
            fused = torch.cat([values[name], values[up]], dim=1)
            made[name], made[up] = fused[:, 0::2], fused[:, 1::2]
        load(made)

    return changed
