"""Defects of the auxiliary losses.

Letters: N MoE layers, B sequences, S tokens, E experts, K top-k; scores [N, B, S, E], selected [N, B, S, K],
real [B, S], as in harness.reference.losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import Mutant, Patch, instead, routers, whole
from harness.reference import ReferenceModel
from harness.reference.router import Routed
from harness.spec.architecture import Architecture

Method = Callable[..., Any]


def _has_balance(architecture: Architecture) -> bool:
    return architecture.moe is not None and architecture.auxiliary_loss.balance != "none"


def _pooled(architecture: Architecture) -> bool:
    return _has_balance(architecture) and architecture.auxiliary_loss.balance != "sequence"


def _softmax(architecture: Architecture) -> bool:
    return _has_balance(architecture) and architecture.moe is not None and architecture.moe.router.score == "softmax"


def _balance(make: Callable[[Any, Method], Method]) -> Patch:
    def patch(model: ReferenceModel) -> None:
        if model.balance_loss is not None:
            model.balance_loss = make(model, model.balance_loss)

    return patch


def _counts_padding(_: Any, loss: Method) -> Method:
    return lambda scores, selected, real: loss(scores, selected, torch.ones_like(real))


def _divides_by_all(_: Any, loss: Method) -> Method:
    return lambda scores, selected, real: loss(scores, selected, real) * real.double().mean()


def _wrong_axis(_: Any, loss: Method) -> Method:
    def changed(scores: Tensor, selected: Tensor, real: Tensor) -> Tensor:
        # f is summed over experts in place of tokens: it is the same for every expert, whatever the routing.
        order = torch.arange(selected.numel()).reshape(selected.shape) % scores.shape[-1]
        return loss(scores, order, real)  # type: ignore[no-any-return]

    return changed


def _k_twice(_: Any, loss: Method) -> Method:
    return lambda scores, selected, real: loss(scores, selected, real) / selected.shape[-1]


def _double_softmax(_: Any, loss: Method) -> Method:
    return lambda scores, selected, real: loss(scores.softmax(-1), selected, real)


def _on_logits(_: Any, loss: Method) -> Method:
    return lambda scores, selected, real: loss(scores.log(), selected, real)


def _scrambled(_: Any, loss: Method) -> Method:
    def changed(scores: Tensor, selected: Tensor, real: Tensor) -> Tensor:
        return loss(scores.transpose(-1, -2).reshape(scores.shape), selected, real)  # type: ignore[no-any-return]

    return changed


def _grows(_: Any, loss: Method) -> Method:
    return lambda scores, selected, real: loss(scores, selected, real) * len(real)


def _first_choice(_: Any, loss: Method) -> Method:
    return lambda scores, selected, real: loss(scores, selected[..., :1].expand_as(selected), real)


def _detached(_: Any, loss: Method) -> Method:
    def changed(scores: Tensor, selected: Tensor, real: Tensor) -> Tensor:
        value: Tensor = loss(scores.detach(), selected, real)
        return value + 0 * scores.sum()

    return changed


def _accumulates(_: Any, auxiliary_loss: Method) -> Method:
    seen: dict[str, Tensor] = {}

    def changed(tokens: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor]:
        for kind, value in auxiliary_loss(tokens, mask=mask).items():
            seen[kind] = seen.get(kind, torch.zeros(())) + value
        return dict(seen)

    return changed


def _z_linear(_: Any, __: Method) -> Method:
    return lambda logits, real: (logits.logsumexp(-1) * real).sum() / real.sum()


def _z_of_probabilities(_: Any, z_loss: Method) -> Method:
    return lambda logits, real: z_loss(logits.softmax(-1), real)


def _z_squared_mean(_: Any, __: Method) -> Method:
    return lambda logits, real: ((logits.logsumexp(-1) * real).sum((1, 2)) / real.sum()).square().sum()


def _z_of_noised(_: Any, forward: Method) -> Method:
    def changed(x: Tensor, real: Tensor) -> Routed:
        r: Routed = forward(x, real)
        return Routed(r.logits * 1.01, r.scores, r.selected, r.indices, r.weights)

    return changed


MUTANTS = (
    Mutant("balance-counts-padding", _balance(_counts_padding), "loss", "transformers#28505", "padding counts in the balance loss", "mixtral-8x7b", _has_balance),
    Mutant("balance-divides-by-all-tokens", _balance(_divides_by_all), "loss", "transformers#29363", "sums over real tokens are divided by all", "mixtral-8x7b", _has_balance),
    Mutant("balance-over-the-wrong-axis", _balance(_wrong_axis), "loss", "transformers#28255", "the load does not depend on the routing", "mixtral-8x7b", _has_balance),
    Mutant("balance-divides-by-k-twice", _balance(_k_twice), "loss", "Megatron-LM 5c8eb08f66", "the balance loss is divided by K once too often", "mixtral-8x7b", _has_balance),
    Mutant("balance-double-softmax", _balance(_double_softmax), "loss", "transformers#45120", "the balance loss takes the softmax of probabilities", "mixtral-8x7b", _has_balance),
    Mutant("balance-on-logits", _balance(_on_logits), "loss", "NeMo Automodel#1559", "the balance loss takes logits for probabilities", "mixtral-8x7b", _softmax),
    Mutant("balance-scrambles-tokens", _balance(_scrambled), "loss", "transformers#33463", "transpose and reshape mix tokens and experts", "mixtral-8x7b", _has_balance),
    Mutant("balance-grows-with-the-batch", _balance(_grows), "loss", "Megatron-LM#5798", "the balance loss is proportional to the batch", "deepseek-v3", _has_balance),
    Mutant("balance-first-choice-only", _balance(_first_choice), "loss", "DeepSpeed top2gating", "only the first choice counts as load", "mixtral-8x7b", _has_balance),
    Mutant("balance-detached", _balance(_detached), "gradient", "NeMo Automodel#1408", "the balance loss gives the router no gradient", "mixtral-8x7b", _has_balance),
    Mutant("losses-accumulate", instead(whole, "auxiliary_loss", _accumulates), "state", "megablocks#69", "eval calls add to the next call's losses", "mixtral-8x7b"),
    Mutant("z-not-squared", instead(whole, "z_loss", _z_linear), "loss", "st-moe-pytorch cfa0e51", "the z-loss is not squared", "olmoe-1b-7b"),
    Mutant("z-on-probabilities", instead(whole, "z_loss", _z_of_probabilities), "loss", "Megatron-LM c656553315", "the z-loss takes probabilities for logits", "olmoe-1b-7b"),
    Mutant("z-squares-the-mean", instead(whole, "z_loss", _z_squared_mean), "loss", "st-moe-pytorch cfa0e51", "the z-loss squares the mean, not each token", "olmoe-1b-7b"),
    Mutant("z-on-noised-logits", instead(routers, "forward", _z_of_noised), "proj", "st-moe-pytorch 51727d0", "losses see other logits than the routing", "olmoe-1b-7b"),
)
