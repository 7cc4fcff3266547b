"""Balance of the experts' load, from what the routers showed: the losses by their formulas, and metrics.

Letters: N MoE layers, B sequences, S tokens per sequence, T real tokens, E experts, K top-k, c_i assignments
of expert i, P_i its mean score.

Written with loops over layers and sequences, apart from the reference's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def balance_loss(
    convention: str, scores: Sequence[Tensor], indices: Sequence[Tensor], real: Tensor
) -> Tensor:
    """The balance loss by its named convention (harness.spec.architecture.AuxiliaryLoss), float64 scalar.

    One scores [B * S, E] and indices [B * S, K] for each MoE layer, real [B, S]. Differentiable in scores.
    Raises ValueError on another convention.
    """
    rows = real.flatten()
    if convention == "sequence":
        return torch.stack(
            [
                torch.stack(
                    [
                        _sequence(s.view(*real.shape, -1)[b][real[b]], i.view(*real.shape, -1)[b][real[b]])
                        for b in range(len(real))
                        if real[b].any()
                    ]
                ).mean()
                for s, i in zip(scores, indices, strict=True)
            ]
        ).sum()
    loads = torch.stack(
        [_counts(i[rows], s.shape[-1]) / rows.sum() for s, i in zip(scores, indices, strict=True)]
    )
    means = torch.stack([s[rows].double().mean(0) for s in scores])
    n_experts, top_k = means.shape[-1], indices[0].shape[-1]
    if convention == "huggingface":
        return n_experts * (loads.mean(0) * means.mean(0)).sum()
    if convention == "switch":
        return n_experts / top_k * (loads * means).sum()
    raise ValueError(f"no balance loss is called {convention!r}")


def z_loss(logits: Sequence[Tensor], real: Tensor) -> Tensor:
    """Sum over layers of mean logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5), float64 scalar."""
    rows = real.flatten()
    return torch.stack([x[rows].double().logsumexp(-1).square().mean() for x in logits]).sum()


def metrics(indices: Sequence[Tensor], n_experts: int, real: Tensor) -> dict[str, float]:
    """How uneven the load is, at worst over layers, under the names of the literature.

    max_violation: max_i c_i / mean c - 1 (arXiv 2408.15664, section 2); cv: standard deviation of c over its
    mean; entropy: of c / sum c over ln E, 1 if even; idle_experts: with c_i = 0; dropped: share of slots.
    """
    rows = real.flatten()
    out = {"max_violation": 0.0, "cv": 0.0, "entropy": 1.0, "idle_experts": 0.0, "dropped": 0.0}
    for chosen in indices:
        slots = chosen[rows]
        c = _counts(slots, n_experts)
        share = c / c.sum()
        entropy = float(-torch.special.xlogy(share, share).sum()) / math.log(n_experts)
        out["max_violation"] = max(out["max_violation"], float(c.max() / c.mean()) - 1)
        out["cv"] = max(out["cv"], float(c.std(correction=0) / c.mean()))
        out["entropy"] = min(out["entropy"], entropy)
        out["idle_experts"] = max(out["idle_experts"], float((c == 0).sum()))
        out["dropped"] = max(out["dropped"], float((slots < 0).double().mean()))
    return {name: round(value, 6) for name, value in out.items()}


def _sequence(scores: Tensor, indices: Tensor) -> Tensor:
    share = (scores.double() / scores.double().sum(-1, keepdim=True)).mean(0)
    n_experts, top_k = scores.shape[-1], indices.shape[-1]
    load = _counts(indices, n_experts) * n_experts / (top_k * len(indices))
    return (load * share).sum()


def _counts(indices: Tensor, n_experts: int) -> Tensor:
    return torch.bincount(indices[indices >= 0], minlength=n_experts).double()
