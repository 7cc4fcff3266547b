"""Defects that an implementation shows when it is compared with itself alone.

Letters: B sequences, S new tokens, L = past + S tokens, T tokens, E experts, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.mutants.attention import seen
from harness.mutants.defect import Method, anywhere, attentions, mutant, routers, whole
from harness.reference.attention import Context
from harness.reference.router import Routed
from harness.spec.architecture import Architecture


def _balanced(a: Architecture) -> bool:
    return a.moe is not None and a.auxiliary_loss.balance != "none"


@mutant(attentions, "scores", stage="mask", applies=anywhere)
def scale_by_the_length_of_the_call(_: Any, scores: Method) -> Method:
    """Queries are scaled by the length of the call, as if it were their position."""

    def changed(q: Tensor, k: Tensor, seen: Tensor) -> Any:
        return scores(q * (1 + seen.shape[-1] / 64), k, seen)

    return changed


@seen(
    stage="mask",
    origin="transformers#33586",
    spec="gpt-oss-20b",
    applies=lambda a: a.attention.window is not None,
)
def window_dropped_without_padding(seen: Tensor, context: Context, _: Any) -> Tensor:
    """Where nothing is padded a plain causal mask takes the place of the window's."""
    if not bool(context.real.all()):
        return seen
    key = torch.arange(seen.shape[-1])
    return (key <= key[-seen.shape[1] :, None]).expand_as(seen)


@mutant(routers, "select", stage="select", origin="transformers#33463")
def selects_by_the_token_before(_: Any, select: Method) -> Method:
    """A token goes to the experts that the token before it chose."""
    return lambda scores, logits: select(scores, logits).roll(1, 0)


@mutant(routers, "forward", stage="weigh", origin="Megatron-LM b6ce193888")
def weights_in_ascending_order(_: Any, forward: Method) -> Method:
    """Weights are sorted, and their experts are not."""

    def changed(x: Tensor, real: Tensor) -> Routed:
        r: Routed = forward(x, real)
        return Routed(r.logits, r.scores, r.selected, r.indices, r.weights.sort(-1).values)

    return changed


@mutant(routers, "project", stage="state")
def training_wears_off_slowly(router: Any, project: Method) -> Method:
    """What a pass of training drew stays in the router of eval mode."""
    last: list[Tensor] = []

    def changed(x: Tensor) -> Tensor:
        logits: Tensor = project(x)
        if router.training:
            last[:] = [logits.detach().mean(0)]
        return logits - 0.1 * last[0] if last and not router.training else logits

    return changed


@mutant(attentions, "scores", stage="cache", origin="transformers#48989", applies=anywhere)
def decode_has_a_scale_of_its_own(_: Any, scores: Method) -> Method:
    """A call of one token computes with a scale that differs by half a percent from that of many tokens."""

    def changed(q: Tensor, k: Tensor, seen: Tensor) -> Any:
        return scores(q * 1.005 if q.shape[1] == 1 < k.shape[1] else q, k, seen)

    return changed


@mutant(whole, "auxiliary_loss", stage="loss", applies=_balanced)
def no_losses_if_every_layer_is_sparse(model: Any, auxiliary_loss: Method) -> Method:
    """Where no layer is dense the auxiliary losses are 0."""

    def changed(tokens: Tensor, *, mask: Tensor | None = None) -> Any:
        losses = auxiliary_loss(tokens, mask=mask)
        if all(block.moe is not None for block in model.blocks):
            return {kind: 0 * loss for kind, loss in losses.items()}
        return losses

    return changed
