"""The auxiliary losses with everything that conventions differ in as a field.

Letters: N MoE layers, B sequences, S tokens per sequence, T tokens that count, E experts, K top-k, f_i share
of the choices that are expert i's, P_i its mean score.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from harness.conformance.comparison import Ragged
from harness.reference import ReferenceModel
from harness.reference.losses import assignments
from harness.spec.architecture import Architecture

Layers = Literal["pooled", "sum", "mean"]


@dataclass(frozen=True)
class Auxiliary:
    """What an auxiliary loss is made of."""

    architecture: Architecture
    scores: Tensor
    """[N, B, S, E], as are logits."""
    logits: Tensor
    selected: Tensor
    """[N, B, S, K]: the choice, as is `kept`, which has -1 where a slot was dropped."""
    kept: Tensor
    real: Tensor
    """[B, S] bool, as are the next four: tokens counted in f and in P, and those that their sums are divided
    by the number of."""
    in_load: Tensor
    in_mean: Tensor
    per_load: Tensor
    per_mean: Tensor
    k_power: int = 1
    """f is divided by K this many times."""
    layers: Layers = "sum"
    per_sequence: bool = False
    factor: float = 1.0
    attached: bool = True
    inside: int = 2
    """Of the z-loss: the power of each token's logsumexp, and then of their mean."""
    outside: int = 1


def under(given: Auxiliary, convention: str) -> Auxiliary:
    """The balance loss by its named convention (harness.spec.architecture.AuxiliaryLoss)."""
    match convention:
        case "huggingface":
            return replace(given, k_power=0, layers="pooled", per_sequence=False)
        case "switch":
            return replace(given, k_power=1, layers="sum", per_sequence=False)
        case _:
            share = given.scores / given.scores.sum(-1, keepdim=True)
            return replace(given, k_power=1, layers="sum", per_sequence=True, scores=share)


def routed(model: ReferenceModel, batch: Ragged) -> Auxiliary:
    """What its routers do with a batch, counted as both formulas do."""
    _, _, found = model.run(batch.tokens, None, batch.mask, None)
    scores, logits, selected, kept = (
        torch.stack([getattr(trace, name) for trace in found]).view(len(found), *batch.tokens.shape, -1)
        for name in ("scores", "logits", "selected", "indices")
    )
    real = batch.mask
    return Auxiliary(model.architecture, scores, logits, selected, kept, real, real, real, real, real)


def balance(given: Auxiliary) -> Tensor:
    """E sum_i f_i P_i, by all that is given."""
    n_experts, top_k = given.scores.shape[-1], given.selected.shape[-1]
    over = (2,) if given.per_sequence else (1, 2)
    # A dropped slot is a choice of one expert more, which counts for nothing.
    wide = given.scores.new_zeros(*given.scores.shape[:-1], n_experts + 1)
    chosen = assignments(given.selected.where(given.selected >= 0, n_experts), wide)[..., :-1]
    load = (chosen * given.in_load[None, ..., None]).sum(over)
    mean = (given.scores * given.in_mean[None, ..., None]).sum(over)
    per_load, per_mean = (
        x.double().sum(-1 if given.per_sequence else (0, 1)) for x in (given.per_load, given.per_mean)
    )
    if given.per_sequence:
        per_load, per_mean = per_load[None, :, None], per_mean[None, :, None]
    load = load / per_load.clamp(min=1) / float(top_k) ** given.k_power
    mean = mean / per_mean.clamp(min=1)
    if given.layers == "pooled":
        load, mean = load.mean(0, keepdim=True), mean.mean(0, keepdim=True)
    value = n_experts * (load * mean).sum(-1)
    if given.per_sequence:
        value = value.sum(-1) / given.real.any(-1).sum()
    value = value.mean() if given.layers == "mean" else value.sum()
    value = value * given.factor
    return value if given.attached else value.detach() + 0 * given.scores.sum()


def z(given: Auxiliary) -> Tensor:
    """Mean of logsumexp(logits)^2, by all that is given."""
    size = given.logits.logsumexp(-1) ** given.inside
    mean = ((size * given.in_mean).sum((1, 2)) / given.per_mean.sum()) ** given.outside
    return (mean.mean() if given.layers == "mean" else mean.sum()) * given.factor
