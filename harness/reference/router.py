"""From hidden states to top-k experts and combine weights, stage by stage.

Letters: T tokens (B sequences x S, flattened), D d_model, E experts, K top-k.
Stages: (perturb, in training) -> project -> score -> select -> weigh -> drop; each is a method that may be
replaced on an instance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.reference.layers import Options, empty
from harness.spec import architecture as spec


@dataclass(frozen=True)
class Routed:
    """What the router says of T tokens; fields as in `harness.reference.trace.RoutingTrace`."""

    logits: Tensor
    scores: Tensor
    selected: Tensor
    indices: Tensor
    weights: Tensor


def top(values: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest, largest first; of equal ones the lowest index first.

    torch.topk promises no order among equals, and differs between devices.
    """
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def capacity(tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    """ceil(tokens * top_k / n_experts * factor), exactly for the factor as printed (1.1 means 11/10)."""
    return math.ceil(Fraction(tokens * top_k, n_experts) * Fraction(repr(factor)))


class Router(nn.Module):
    """Top-k routing with softmax or sigmoid scores, optional groups, biases, scaling and capacity."""

    def __init__(self, moe: spec.Moe, d_model: int, *, options: Options) -> None:
        super().__init__()
        self.router, self.n_experts, self.top_k = moe.router, moe.n_experts, moe.top_k
        # Router arithmetic is never narrower than the spec says, nor than the model itself.
        self.dtype = torch.promote_types(options["dtype"], getattr(torch, moe.router.dtype))
        self.weight = empty(moe.n_experts, d_model, options=options)
        self.bias = empty(moe.n_experts, options=options) if moe.router.bias else None
        self.correction_bias: Tensor | None
        if moe.router.correction_bias:
            # A buffer, since no gradient reaches it; in router precision, since its updates are small.
            bias = torch.empty(moe.n_experts, device=options["device"], dtype=self.dtype)
            self.register_buffer("correction_bias", bias)
        else:
            self.correction_bias = None
        # No part of a checkpoint: a load is used up by the update that it causes.
        load = torch.zeros(moe.n_experts, device=options["device"], dtype=torch.int64)
        self.load: Tensor
        self.register_buffer("load", load, persistent=False)
        self.generator: torch.Generator | None = None
        self.recomputing = False

    def perturb(self, x: Tensor) -> Tensor:
        """[T, D], in training times noise from `generator`, uniform in [1 - jitter, 1 + jitter].

        Switch, arXiv 2101.03961, section 2.2. Raises ValueError where noise is due and there is no generator.
        """
        jitter = self.router.jitter
        if not self.training or not jitter:
            return x
        if self.generator is None:
            raise ValueError("moe.router.jitter needs a generator to draw the noise of training from")
        noise = torch.rand(x.shape, generator=self.generator, dtype=torch.float64).to(x)
        return x * (1 - jitter + 2 * jitter * noise)

    def project(self, x: Tensor) -> Tensor:
        """[T, D] -> logits [T, E] in router precision."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return functional.linear(x.to(self.dtype), self.weight.to(self.dtype), bias)

    def score(self, logits: Tensor) -> Tensor:
        """[T, E] -> scores [T, E]: softmax over all experts (also where weights are taken after top-k),
        or the sigmoid of each."""
        return logits.sigmoid() if self.router.score == "sigmoid" else logits.softmax(-1)

    def select(self, scores: Tensor, logits: Tensor) -> Tensor:
        """The chosen experts [T, K], best first, ties to the lowest index.

        The correction bias joins here and nowhere else (arXiv 2412.19437, eq. 16). With groups, experts
        outside the best topk_groups groups are out of the running: -inf, not 0, which would win
        against negative biased scores.
        """
        choice = logits if self.router.order == "after_topk" else scores
        if self.correction_bias is not None:
            choice = choice + self.correction_bias
        if self.router.n_groups > 1:
            choice = choice.masked_fill(~self.in_best_groups(choice), -torch.inf)
        return top(choice, self.top_k)

    def in_best_groups(self, choice: Tensor) -> Tensor:
        """[T, E] bool: whether the expert's group is among the best topk_groups (DeepSeek-V3 model code:
        by the sum of a group's two best; DeepSeek-V2: by its best)."""
        r = self.router
        grouped = torch.unflatten(choice, -1, (r.n_groups, -1))
        best = grouped.sort(dim=-1, descending=True).values
        value = best[..., 0] if r.group_score == "max" else best[..., :2].sum(-1)
        chosen = torch.zeros_like(value, dtype=torch.bool).scatter(-1, top(value, r.topk_groups), True)
        return chosen[..., None].expand_as(grouped).flatten(-2)

    def weigh(self, scores: Tensor, logits: Tensor, selected: Tensor) -> Tensor:
        """Combine weights [T, K] of the selected experts.

        From unbiased scores, or by a softmax over the selected logits alone (order = "after_topk"); divided
        by their sum if `normalise`; times scaling_factor.
        """
        if self.router.order == "after_topk":
            weights = logits.gather(-1, selected).softmax(-1)
        else:
            weights = scores.gather(-1, selected)
            if self.router.normalise:
                weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.router.scaling_factor

    def drop(self, selected: Tensor, weights: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and weights [T, K] after capacity: -1 and 0 in the slots that found no place.

        real [T] bool: padding takes no place and does not count in the capacity. Without a capacity factor
        nothing is dropped. What remains is not renormalised.
        """
        factor = self.router.capacity_factor
        if factor is None or selected.device.type == "meta":  # which slots drop depends on values
            return selected, weights
        limit = capacity(int(real.sum()), self.top_k, self.n_experts, factor)
        real_slot = real[:, None].expand_as(selected).flatten()
        expert = torch.where(real_slot, selected.flatten(), self.n_experts)
        order = torch.arange(len(expert), device=expert.device)
        if self.router.drop_policy == "probability":
            order = weights.flatten().argsort(descending=True, stable=True)
        order = order[expert[order].argsort(stable=True)]
        counts = torch.bincount(expert, minlength=self.n_experts + 1)
        first = counts.cumsum(0) - counts
        place = torch.empty_like(expert)
        place[order] = torch.arange(len(expert), device=expert.device) - first[expert[order]]
        kept = (real_slot & (place < limit)).view_as(selected)
        return selected.where(kept, -1), weights.where(kept, 0)

    def count(self, selected: Tensor, real: Tensor) -> None:
        """Add the real tokens' choices [T, K] to the load: in training only, and not in a repeated pass."""
        if self.training and not self.recomputing:
            self.load += torch.bincount(selected[real].flatten(), minlength=self.n_experts)

    def update_bias(self, rate: float) -> None:
        """b_e += rate sign(mean load - load_e), and the load starts anew (arXiv 2408.15664, algorithm 1)."""
        if self.correction_bias is not None:
            load = self.load.to(self.dtype)
            self.correction_bias += rate * (load.mean() - load).sign()
        self.load.zero_()

    def forward(self, x: Tensor, real: Tensor) -> Routed:
        """Route tokens x [T, D]; real [T] bool is False at padding."""
        logits = self.project(self.perturb(x))
        scores = self.score(logits)
        selected = self.select(scores, logits)
        weights = self.weigh(scores, logits, selected)
        self.count(selected, real)
        indices, weights = self.drop(selected, weights, real)
        return Routed(logits, scores, selected, indices, weights)
