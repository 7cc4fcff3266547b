"""Routing by repeated maxima, experts by one batch of products over gathered weights, and the losses.

Letters: T tokens, D d_model, F d_ff of an expert, E experts, K top-k, N MoE layers, B sequences, S tokens.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor

from harness.implementations.independent.arithmetic import (
    Weights,
    feed_forward,
    hidden,
    linear,
    product,
    sigmoid,
    softmax,
    total,
)
from harness.implementations.protocols import Routing
from harness.spec.architecture import Moe


def best(keys: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the largest of keys [..., E], k times the largest left; of equal ones the first."""
    left, at = -keys.detach(), torch.arange(keys.shape[-1])
    found = []
    for _ in range(k):
        least = left.amin(-1, keepdim=True)
        one = at.where(left == least, len(at)).amin(-1, keepdim=True).clamp(max=len(at) - 1)
        found.append(one)
        left = left.scatter(-1, one, torch.inf)
    return torch.cat(found, -1)


def mixture(moe: Moe, layer: int, w: Weights, x: Tensor, real: Tensor) -> tuple[Routing, Tensor]:
    """Tokens x [T, D], of which real [T] are no padding: the trace, and the choice [T, K] before any drop."""
    name, router = f"layers.{layer}.moe", moe.router
    logits = linear(x, w, f"{name}.router")
    scores = sigmoid(logits) if router.score == "sigmoid" else softmax(logits)
    keys = logits if router.order == "after_topk" else scores
    if router.correction_bias:
        keys = keys + w[f"{name}.router.correction_bias"]
    chosen = best(_candidates(moe, keys.detach()), moe.top_k)
    if router.order == "after_topk":
        weights = softmax(logits.gather(1, chosen))
    else:
        weights = scores.gather(1, chosen)
        weights = weights / total(weights)[:, None] if router.normalise else weights
    weights = router.scaling_factor * weights
    stays = _stays(moe, chosen, weights.detach(), real)
    indices, weights = chosen.where(stays, -1), weights * stays
    output = _experts(moe, w, f"{name}.experts", x, indices, weights)
    if moe.shared is not None:
        shared = feed_forward(moe.shared, x, w, f"{name}.shared")
        output = shared * (sigmoid(linear(x, w, f"{name}.shared_gate")) if moe.shared_gate else 1) + output
    return Routing(layer, indices, weights, logits, scores, x, output), chosen


def _candidates(moe: Moe, keys: Tensor) -> Tensor:
    """keys [T, E], minus infinity outside of the best groups (arXiv 2412.19437, section 2.1.2)."""
    router = moe.router
    if router.n_groups == 1:
        return keys
    members = keys.unflatten(-1, (router.n_groups, -1))
    pair = members.gather(-1, best(members, min(2, members.shape[-1])))
    worth = pair[..., 0] if router.group_score == "max" else total(pair)
    open_ = (best(worth, router.topk_groups)[..., None] == torch.arange(router.n_groups)).any(-2)
    left: Tensor = members.masked_fill(~open_[..., None], -torch.inf)
    return left.flatten(-2)


def _stays(moe: Moe, chosen: Tensor, weights: Tensor, real: Tensor) -> Tensor:
    """[T, K] bool: the slots that find a place, by counting those of its expert that come before each."""
    router = moe.router
    if router.capacity_factor is None:
        return torch.ones_like(chosen, dtype=torch.bool)
    slots = Decimal(int(real.sum()) * moe.top_k) * Decimal(repr(router.capacity_factor))
    places = int((slots / moe.n_experts).to_integral_value(ROUND_CEILING))
    expert, counts = chosen.flatten(), real.repeat_interleave(moe.top_k)
    order = torch.arange(len(expert))
    before = order[None, :] < order[:, None]
    if router.drop_policy == "probability":
        weight = weights.flatten()
        heavier, equal = weight[None, :] > weight[:, None], weight[None, :] == weight[:, None]
        before = heavier | (equal & before)
    rank = (before & (expert[None, :] == expert[:, None]) & counts[None, :]).sum(-1)
    return (counts & (rank < places)).view_as(chosen)


def _experts(moe: Moe, w: Weights, name: str, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """[T, D] through the experts of indices [T, K] (-1: none), the last slot first, -> [T, D]."""
    token, slot = (indices >= 0).nonzero(as_tuple=True)
    expert = indices[token, slot]

    def layer(part: str, rows: Tensor) -> Tensor:
        y = product(rows, w[f"{name}.{part}"][expert].transpose(1, 2))
        if moe.expert.bias:
            y = y + w[f"{name}.{part}_bias"][expert, None]
        return y

    rows = x[token, None]
    gate = layer("gate", rows) if moe.expert.gated else None
    out = layer("down", hidden(moe.expert, gate, layer("up", rows)))[:, 0] * weights[token, slot, None]
    table = torch.zeros((*indices.shape, x.shape[1]), dtype=x.dtype).index_put((token, slot), out)
    return table.flip(1).sum(1)


def z_loss(logits: Tensor, real: Tensor) -> Tensor:
    """Logits [N, B, S, E]: mean square of the log of the sum of exponentials, summed over layers (arXiv
    2202.08906, eq. 5)."""
    top = logits.detach().amax(-1)
    log = top + torch.exp(logits - top[..., None]).sum(-1).log()
    return (log * log)[:, real].mean(-1).sum()


def balance_loss(kind: str, scores: Tensor, chosen: Tensor, real: Tensor) -> Tensor:
    """Scores [N, B, S, E] and choices [N, B, S, K] under a convention of `harness.spec.AuxiliaryLoss`."""
    n_layers, n_experts, top_k = len(scores), scores.shape[-1], chosen.shape[-1]
    hits = (chosen[..., None] == torch.arange(n_experts)).any(-2).to(scores.dtype)
    if kind == "sequence":
        share = scores / total(scores)[..., None]
        losses = []
        for b in real.any(1).nonzero()[:, 0]:
            f = hits[:, b, real[b]].mean(1) * n_experts / top_k
            losses.append((f * share[:, b, real[b]].mean(1)).sum())
        return torch.stack(losses).mean()
    f, p = hits[:, real].mean(1), scores[:, real].mean(1)
    if kind == "huggingface":
        return n_experts * (f.sum(0) * p.sum(0)).sum() / n_layers**2
    return n_experts / top_k * (f * p).sum()
