"""Defects of the experts: dispatch, activation, combine, shared experts, idle experts.

Letters: T tokens, E experts, K top-k, F d_ff of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.mutants.defect import Mutant, experts, instead, moes, whole
from harness.reference.experts import Dispatch
from harness.reference.trace import RoutingTrace
from harness.spec.architecture import Architecture

Method = Callable[..., Any]


def _shared(architecture: Architecture) -> bool:
    return architecture.moe is not None and architecture.moe.shared is not None


def _gated(architecture: Architecture) -> bool:
    return architecture.moe is not None and architecture.moe.expert.gated


def _silu(architecture: Architecture) -> bool:
    return _gated(architecture) and architecture.moe is not None and architecture.moe.expert.activation == "silu"


def _biased(architecture: Architecture) -> bool:
    return architecture.moe is not None and architecture.moe.expert.bias


def _unweighted(_: Any, combine: Method) -> Method:
    return lambda outputs, plan, weights: combine(outputs, plan, (weights != 0).to(weights.dtype))


def _weight_on_input(target: Any, _: Method) -> Method:
    def changed(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for slot in range(indices.shape[1]):
            one = indices[:, slot : slot + 1]
            out = out + type(target).forward(target, x * weights[:, slot, None], one, (one >= 0).to(x.dtype))
        return out

    return changed


def _activation_outside(_: Any, __: Method) -> Method:
    return lambda gate, up: F.silu(gate * up)


def _swapped(_: Any, activate: Method) -> Method:
    return lambda gate, up: activate(up, gate)


def _slots_exchanged(_: Any, combine: Method) -> Method:
    return lambda outputs, plan, weights: combine(outputs, plan, weights.flip(-1))


def _one_sequence(target: Any, dispatch: Method) -> Method:
    def changed(x: Tensor, indices: Tensor) -> Dispatch:
        plan: Dispatch = dispatch(x, indices)
        # Slot numbers are taken to be within the first 8 tokens: right for one short sequence.
        order = torch.empty_like(plan.place)
        order[plan.place] = torch.arange(len(order))
        return Dispatch(x.index_select(0, order // indices.shape[1] % 8), plan.counts, plan.place)

    return changed


def _token_order_matters(_: Any, combine: Method) -> Method:
    def changed(outputs: Tensor, plan: Dispatch, weights: Tensor) -> Tensor:
        # An expert's rows are shifted by one: each token gets its neighbour's result.
        return combine(outputs.roll(1, 0), plan, weights)  # type: ignore[no-any-return]

    return changed


def _combines_over_the_batch(_: Any, combine: Method) -> Method:
    def changed(outputs: Tensor, plan: Dispatch, weights: Tensor) -> Tensor:
        out: Tensor = combine(outputs, plan, weights)
        return out + 0.01 * out.mean(0)

    return changed


def _idle_answer(target: Any, _: Method) -> Method:
    def changed(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = type(target).forward(target, x, indices, weights)
        idle = set(range(target.n_experts)) - set(indices.unique().tolist())
        for expert in sorted(idle):
            out = out + 0.1 * target.compute(expert, x)
        return out

    return changed


def _idle_poison(target: Any, _: Method) -> Method:
    def changed(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = type(target).forward(target, x, indices, weights)
        counts = torch.bincount(indices[indices >= 0], minlength=target.n_experts)
        return out + 0 * (1 / counts).amax() * out

    return changed


def _idle_gradient(target: Any, _: Method) -> Method:
    def changed(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = type(target).forward(target, x, indices, weights)
        counts = torch.bincount(indices[indices >= 0], minlength=target.n_experts).to(x.dtype)
        # sqrt has an infinite slope at 0, and 0 times infinity is NaN.
        return out + 0 * (counts[:, None] * target.down.flatten(1)).abs().sum(-1).sqrt().sum()

    return changed


def _computes_every_expert(target: Any, _: Method) -> Method:
    def changed(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        everything = torch.zeros(len(x), target.n_experts + 1, dtype=weights.dtype)
        full = everything.scatter(-1, indices.where(indices >= 0, target.n_experts), weights)[:, :-1]
        return sum(full[:, e, None] * target.compute(e, x) for e in range(target.n_experts))  # type: ignore[return-value]

    return changed


def _gradient_doubled(_: Any, compute: Method) -> Method:
    def changed(expert: int, rows: Tensor) -> Tensor:
        out: Tensor = compute(expert, rows)
        return 2 * out - out.detach()

    return changed


def _bias_dropped(target: Any, _: Method) -> Method:
    def changed(expert: int, rows: Tensor) -> Tensor:
        gate = None if target.gate is None else F.linear(rows, target.gate[expert])
        return F.linear(target.activate(gate, F.linear(rows, target.up[expert])), target.down[expert])

    return changed


def _shared_dropped(_: Any, __: Method) -> Method:
    return lambda x: None


def _shared_gate_dropped(moe: Any, _: Method) -> Method:
    return lambda x: None if moe.shared is None else moe.shared(x)


def _overwritten(moe: Any, _: Method) -> Method:
    def changed(x: Tensor, real: Tensor, layer: int = 0) -> RoutingTrace:
        routed = moe.router(x, real)
        output = moe.experts(x, routed.indices, routed.weights)
        shared = moe.share(output)  # the buffer of x now holds the routed experts' output
        total = output if shared is None else output + shared
        return RoutingTrace(
            layer, x, routed.logits, routed.scores, routed.selected, routed.indices, routed.weights, total
        )

    return changed


def _string_order(model: Any, load: Method) -> Method:
    def changed(values: Any) -> None:
        count = model.architecture.moe.n_experts
        order = sorted(range(count), key=str)
        load({n: v[order] if ".experts." in n and v.shape[0] == count else v for n, v in values.items()})

    return changed


def _transposed_if_square(model: Any, load: Method) -> Method:
    def changed(values: Any) -> None:
        def turned(name: str, value: Tensor) -> Tensor:
            square = ".experts." in name and value.dim() == 3 and value.shape[1] == value.shape[2]
            return value.transpose(1, 2).contiguous() if square else value

        load({name: turned(name, value) for name, value in values.items()})

    return changed


def _half_square(model: Any, load: Method) -> Method:
    def changed(values: Any) -> None:
        wide = model.architecture.moe.expert.d_ff * 2 == model.architecture.d_model
        names = {n: n.replace(".gate", ".up") for n in values if n.endswith("experts.gate")}
        swap = names | {up: gate for gate, up in names.items()}
        load({name: values[swap.get(name, name)] if wide else value for name, value in values.items()})

    return changed


MUTANTS = (
    Mutant("unweighted-sum", instead(experts, "combine", _unweighted), "combine", "jlama#201", "experts are added without their weights", "mixtral-8x7b"),
    Mutant("weight-on-the-input", instead(experts, "forward", _weight_on_input), "combine", "vllm#16744", "the weight multiplies the expert's input", "mixtral-8x7b"),
    Mutant("activation-outside", instead(experts, "activate", _activation_outside), "combine", "tutel#245", "the activation is applied to the product", "mixtral-8x7b", _silu),
    Mutant("gate-and-up-swapped", instead(experts, "activate", _swapped), "combine", "transformers#43201", "gate and up change places", "mixtral-8x7b", _gated),
    Mutant("weights-of-another-slot", instead(experts, "combine", _slots_exchanged), "combine", "Megatron-LM b6ce193888", "weights are not permuted as the tokens are", "mixtral-8x7b"),
    Mutant("rows-right-for-one-sequence", instead(experts, "dispatch", _one_sequence), "combine", "torchtitan#3604", "rows are fetched as if the batch were its first tokens", "mixtral-8x7b"),
    Mutant("token-order-matters", instead(experts, "combine", _token_order_matters), "combine", "Megatron-LM a98c5ba19c", "a token gets its neighbour's result", "mixtral-8x7b"),
    Mutant("combines-over-the-batch", instead(experts, "combine", _combines_over_the_batch), "combine", "transformers#40609", "the other tokens' results leak in", "mixtral-8x7b"),
    Mutant("idle-experts-answer", instead(experts, "forward", _idle_answer), "combine", "torchtitan#1718", "an expert without tokens computes all of them", "mixtral-8x7b"),
    Mutant("idle-experts-poison", instead(experts, "forward", _idle_poison), "combine", "torchtitan#1237", "an expert without tokens makes the output NaN", "mixtral-8x7b"),
    Mutant("idle-gradient-poisoned", instead(experts, "forward", _idle_gradient), "gradient", "pytorch#193633", "an expert without tokens gets NaN gradients", "mixtral-8x7b"),
    Mutant("computes-every-expert", instead(experts, "forward", _computes_every_expert), "compute", "maxtext#4017", "all experts are computed, most with weight 0", "mixtral-8x7b"),
    Mutant("expert-gradient-doubled", instead(experts, "compute", _gradient_doubled), "gradient", "DeepSpeed#6546", "gradients of experts are scaled wrongly", "mixtral-8x7b"),
    Mutant("expert-bias-dropped", instead(experts, "compute", _bias_dropped), "combine", "torchtitan#2319", "the experts' biases are loaded and not added", "gpt-oss-20b", _biased),
    Mutant("shared-expert-dropped", instead(moes, "share", _shared_dropped), "combine", "llm-compressor#1907", "the shared expert is not added", "deepseek-v3", _shared),
    Mutant("shared-gate-dropped", instead(moes, "share", _shared_gate_dropped), "combine", "lmdeploy#3491", "the shared expert is added without its gate", "mixtral-8x7b"),
    Mutant("shared-expert-reads-overwritten-input", instead(moes, "forward", _overwritten), "combine", "vllm#28939", "the routed experts write over what the shared one reads", "deepseek-v3", _shared),
    Mutant("experts-in-string-order", instead(whole, "load_weights", _string_order), "combine", "torchtitan#1918", "experts are loaded in the order 0, 1, 10, 11, 2", "mixtral-8x7b"),
    Mutant("transposed-if-square", instead(whole, "load_weights", _transposed_if_square), "combine", "transformers#47031", "square expert matrices are taken for transposed ones", "mixtral-8x7b"),
    Mutant("swapped-if-half-square", instead(whole, "load_weights", _half_square), "combine", "unsloth-zoo#849", "gate and up change places where 2 d_ff = d_model", "mixtral-8x7b", _gated),
)
