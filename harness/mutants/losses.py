"""Defects of the auxiliary losses.

Letters: N MoE layers, B sequences, S tokens, E experts, K top-k; scores [N, B, S, E], selected [N, B, S, K],
real [B, S], as in harness.reference.losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import F, Method, enter, mutant, on_model, routers, whole
from harness.reference import ReferenceModel
from harness.reference.router import Routed
from harness.spec.architecture import Architecture


def _has_balance(architecture: Architecture) -> bool:
    return architecture.moe is not None and architecture.auxiliary_loss.balance != "none"


def _softmax(architecture: Architecture) -> bool:
    return (
        _has_balance(architecture)
        and architecture.moe is not None
        and architecture.moe.router.score == "softmax"
    )


def balance(**row: Any) -> Callable[[F], F]:
    """Decorate make(model, loss) -> defective loss(scores, selected, real)."""

    def decorate(make: F) -> F:
        def patch(model: ReferenceModel) -> None:
            if model.balance_loss is not None:
                model.balance_loss = make(model, model.balance_loss)

        return enter(make, on_model(patch), stage=row.pop("stage", "loss"), **row)

    return decorate


@balance(origin="transformers#28505", applies=_has_balance)
def balance_counts_padding(_: Any, loss: Method) -> Method:
    """Padding counts in the balance loss."""
    return lambda scores, selected, real: loss(scores, selected, torch.ones_like(real))


@balance(origin="transformers#29363", applies=_has_balance)
def balance_divides_by_all_tokens(_: Any, loss: Method) -> Method:
    """Sums over real tokens are divided by all."""
    return lambda scores, selected, real: loss(scores, selected, real) * real.double().mean()


@balance(origin="transformers#28255", applies=_has_balance)
def balance_over_the_wrong_axis(_: Any, loss: Method) -> Method:
    """The load does not depend on the routing."""

    def changed(scores: Tensor, selected: Tensor, real: Tensor) -> Any:
        # f is summed over experts in place of tokens: it is the same for every expert, whatever the routing.
        order = torch.arange(selected.numel()).reshape(selected.shape) % scores.shape[-1]
        return loss(scores, order, real)

    return changed


@balance(origin="Megatron-LM 5c8eb08f66", applies=_has_balance)
def balance_divides_by_k_twice(_: Any, loss: Method) -> Method:
    """The balance loss is divided by K once too often."""
    return lambda scores, selected, real: loss(scores, selected, real) / selected.shape[-1]


@balance(origin="transformers#45120", applies=_has_balance)
def balance_double_softmax(_: Any, loss: Method) -> Method:
    """The balance loss takes the softmax of probabilities."""
    return lambda scores, selected, real: loss(scores.softmax(-1), selected, real)


@balance(origin="NeMo Automodel#1559", applies=_softmax)
def balance_on_logits(_: Any, loss: Method) -> Method:
    """The balance loss takes logits for probabilities."""
    return lambda scores, selected, real: loss(scores.log(), selected, real)


@balance(origin="transformers#33463", applies=_has_balance)
def balance_scrambles_tokens(_: Any, loss: Method) -> Method:
    """Transpose and reshape mix tokens and experts."""

    def changed(scores: Tensor, selected: Tensor, real: Tensor) -> Any:
        return loss(scores.transpose(-1, -2).reshape(scores.shape), selected, real)

    return changed


@balance(origin="Megatron-LM#5798", spec="deepseek-v3", applies=_has_balance)
def balance_grows_with_the_batch(_: Any, loss: Method) -> Method:
    """The balance loss is proportional to the batch."""
    return lambda scores, selected, real: loss(scores, selected, real) * len(real)


@balance(applies=_has_balance)
def balance_first_choice_only(_: Any, loss: Method) -> Method:
    """Only the first choice counts as load."""
    return lambda scores, selected, real: loss(scores, selected[..., :1].expand_as(selected), real)


@balance(stage="gradient", origin="NeMo Automodel#1408", applies=_has_balance)
def balance_detached(_: Any, loss: Method) -> Method:
    """The balance loss gives the router no gradient."""

    def changed(scores: Tensor, selected: Tensor, real: Tensor) -> Tensor:
        value: Tensor = loss(scores.detach(), selected, real)
        return value + 0 * scores.sum()

    return changed


@mutant(whole, "auxiliary_loss", stage="state", origin="megablocks#69")
def losses_accumulate(_: Any, auxiliary_loss: Method) -> Method:
    """Eval calls add to the next call's losses."""
    seen: dict[str, Tensor] = {}

    def changed(tokens: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor]:
        for kind, value in auxiliary_loss(tokens, mask=mask).items():
            seen[kind] = seen.get(kind, torch.zeros(())) + value
        return dict(seen)

    return changed


@mutant(whole, "auxiliary_loss", stage="loss", applies=_has_balance)
def balance_counts_what_is_kept(model: Any, _: Method) -> Method:
    """A dropped slot does not count as load."""

    def changed(tokens: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor]:
        found = model.routing(tokens, mask=mask)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        scores, indices, logits = (
            torch.stack([getattr(trace, name) for trace in found]).view(len(found), *tokens.shape, -1)
            for name in ("scores", "indices", "logits")
        )
        n_experts = scores.shape[-1]
        # An expert more, with a score of 0, takes what was dropped; E is a factor of every convention.
        wider = torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)
        value = model.balance_loss(wider, indices.where(indices >= 0, n_experts), real)
        return {"z": model.z_loss(logits, real), "balance": value * n_experts / (n_experts + 1)}

    return changed


@mutant(whole, "z_loss", stage="loss", origin="st-moe-pytorch cfa0e51", spec="olmoe-1b-7b")
def z_not_squared(_: Any, __: Method) -> Method:
    """The z-loss is not squared."""
    return lambda logits, real: (logits.logsumexp(-1) * real).sum() / real.sum()


@mutant(whole, "z_loss", stage="loss", origin="Megatron-LM c656553315", spec="olmoe-1b-7b")
def z_on_probabilities(_: Any, z_loss: Method) -> Method:
    """The z-loss takes probabilities for logits."""
    return lambda logits, real: z_loss(logits.softmax(-1), real)


@mutant(whole, "z_loss", stage="loss", origin="st-moe-pytorch cfa0e51", spec="olmoe-1b-7b")
def z_squares_the_mean(_: Any, __: Method) -> Method:
    """The z-loss squares the mean, not each token."""
    return lambda logits, real: ((logits.logsumexp(-1) * real).sum((1, 2)) / real.sum()).square().sum()


@mutant(routers, "forward", stage="proj", origin="st-moe-pytorch 51727d0", spec="olmoe-1b-7b")
def z_on_noised_logits(_: Any, forward: Method) -> Method:
    """Losses see other logits than the routing."""

    def changed(x: Tensor, real: Tensor) -> Routed:
        r: Routed = forward(x, real)
        return Routed(r.logits * 1.01, r.scores, r.selected, r.indices, r.weights)

    return changed
