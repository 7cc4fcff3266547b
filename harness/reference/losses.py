"""Auxiliary losses of the routers, each under its named convention: pure functions, no coefficients.

Letters: N MoE layers, B sequences, S tokens per sequence, E experts, K top-k.
scores [N, B, S, E] (probabilities or sigmoid scores), logits [N, B, S, E], selected [N, B, S, K] int64 (the
choice before any drop), real [B, S] bool: False at padding, which no mean and no count includes.
Counts carry no gradient: it flows through the scores alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Balance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(scores, selected, real) -> scalar."""


def assignments(selected: Tensor, scores: Tensor) -> Tensor:
    """Choices [..., K] among scores [..., E] -> [..., E]: 1 where the token chose the expert, else 0."""
    return torch.zeros_like(scores).scatter(-1, selected, 1.0)


def switch_balance(scores: Tensor, selected: Tensor, real: Tensor) -> Tensor:
    """E sum_i f_i P_i with f_i = c_i / (T K), P_i the mean score; summed over layers.

    Switch Transformer (arXiv 2101.03961, eq. 4-6: the loss of every layer is added), with K > 1 as in
    Megatron-LM: 1 per layer under uniform routing.
    """
    n_experts, top_k = scores.shape[-1], selected.shape[-1]
    fraction = _mean(assignments(selected, scores), real) / top_k
    return n_experts * (fraction * _mean(scores, real)).sum()


def huggingface_balance(scores: Tensor, selected: Tensor, real: Tensor) -> Tensor:
    """As in transformers' load_balancing_loss_func: f_i = c_i / T, f and P pooled over layers before the
    product. K under uniform routing; opposite imbalances of two layers cancel."""
    n_experts = scores.shape[-1]
    fraction = _mean(assignments(selected, scores), real).mean(0)
    return n_experts * (fraction * _mean(scores, real).mean(0)).sum()


def sequence_balance(scores: Tensor, selected: Tensor, real: Tensor) -> Tensor:
    """DeepSeek-V3 (arXiv 2412.19437, eq. 17-20): per sequence sum_i f_i P_i with f_i = E / (K S) c_i and P_i
    the mean of s_i / sum_j s_j; mean over sequences with a real token, summed over layers."""
    n_experts, top_k = scores.shape[-1], selected.shape[-1]
    keep = real.to(scores.dtype)[None, :, :, None]
    length = keep.sum(2)
    share = scores / scores.sum(-1, keepdim=True)
    fraction = (assignments(selected, scores) * keep).sum(2) * (n_experts / top_k)
    # Empty sequences have zero sums: dividing them by 1 leaves them zero.
    product = fraction * (share * keep).sum(2) / length.clamp(min=1).square()
    return product.sum() / (length > 0).sum()


def z_loss(logits: Tensor, real: Tensor) -> Tensor:
    """Mean over real tokens of logsumexp(logits)^2, summed over layers (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return _mean(logits.logsumexp(-1, keepdim=True).square(), real).sum()


BALANCES: Mapping[str, Balance] = {
    "switch": switch_balance,
    "huggingface": huggingface_balance,
    "sequence": sequence_balance,
}


def _mean(values: Tensor, real: Tensor) -> Tensor:
    """[N, B, S, X] -> [N, X]: the mean over real tokens."""
    keep = real.to(values.dtype)[None, :, :, None]
    return (values * keep).sum((1, 2)) / keep.sum()
