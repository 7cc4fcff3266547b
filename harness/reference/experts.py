"""The mixture of experts: dispatch by sorting, one matmul per expert and matrix, a deterministic combine.

Letters: T tokens, D d_model, F d_ff of an expert, E experts, K top-k, R <= T K rows that compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.reference.layers import FeedForward, Linear, Options, activate, at_least_float32, empty
from harness.reference.router import Router
from harness.reference.trace import RoutingTrace
from harness.spec import architecture as spec

BLOCK = 256
"""Tokens that are combined at a time: their widened copies stay in cache, and allocate no new pages."""


@dataclass(frozen=True)
class Dispatch:
    """Which rows each expert computes."""

    rows: Tensor
    """[T K, D]: hidden states sorted by expert (stable, so by token within one); dropped slots last."""
    counts: list[int]
    """Rows of each expert: E numbers with sum R."""
    place: Tensor
    """[T K] int64: where slot t K + j went in `rows`."""


class Experts(nn.Module):
    """E feed-forward networks of one shape, their matrices grouped as [E, out, in]."""

    def __init__(self, expert: spec.FeedForward, n_experts: int, d_model: int, *, options: Options) -> None:
        super().__init__()
        e, f, d = n_experts, expert.d_ff, d_model
        self.ff, self.n_experts = expert, n_experts
        self.gate = empty(e, f, d, options=options) if expert.gated else None
        self.up = empty(e, f, d, options=options)
        self.down = empty(e, d, f, options=options)
        self.gate_bias = empty(e, f, options=options) if expert.gated and expert.bias else None
        self.up_bias = empty(e, f, options=options) if expert.bias else None
        self.down_bias = empty(e, d, options=options) if expert.bias else None

    def dispatch(self, x: Tensor, indices: Tensor) -> Dispatch:
        """Sort the T K slots of indices [T, K] by expert and fetch their tokens' rows of x [T, D]."""
        slots, top_k = indices.numel(), indices.shape[1]
        if x.device.type == "meta":  # no values: shapes and FLOPs are those of any other routing
            place = torch.empty(slots, dtype=torch.int64, device=x.device)
            return Dispatch(x.repeat_interleave(top_k, 0), [slots] + [0] * (self.n_experts - 1), place)
        expert = indices.flatten()
        expert = expert.where(expert >= 0, self.n_experts)
        order = expert.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(slots, device=order.device)
        counts: list[int] = torch.bincount(expert, minlength=self.n_experts + 1).tolist()
        return Dispatch(x.index_select(0, order // top_k), counts[: self.n_experts], place)

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """[rows, F] pre-activations -> [rows, F]."""
        return activate(self.ff, gate, up)

    def compute(self, expert: int, rows: Tensor) -> Tensor:
        """Expert `expert` on its rows, [rows, D] -> [rows, D]."""

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return functional.linear(x, weight[expert], None if bias is None else bias[expert])

        gate = None if self.gate is None else linear(rows, self.gate, self.gate_bias)
        return linear(self.activate(gate, linear(rows, self.up, self.up_bias)), self.down, self.down_bias)

    def combine(self, outputs: Tensor, plan: Dispatch, weights: Tensor) -> Tensor:
        """Weighted sum over each token's slots: outputs [T K, D], weights [T, K] -> [T, D].

        Rows go back to their slots and are summed over K in slot order, in at least float32: the same
        bits on every run, which a scatter-add does not promise.
        """
        slots = outputs.index_select(0, plan.place).view(*weights.shape, -1)
        dtype = torch.promote_types(at_least_float32(outputs.dtype), weights.dtype)
        blocks = zip(torch.split(slots, BLOCK), torch.split(weights, BLOCK), strict=True)
        sums = [(slot.to(dtype) * weight[..., None]).sum(1).to(outputs.dtype) for slot, weight in blocks]
        return torch.cat(sums)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Tokens x [T, D] through experts indices [T, K] (-1: none), combined by weights [T, K] -> [T, D]."""
        plan = self.dispatch(x, indices)
        dropped = len(plan.rows) - sum(plan.counts)
        parts = torch.split(plan.rows, [*plan.counts, dropped])
        outputs = [self.compute(e, rows) for e, rows in enumerate(parts[:-1]) if len(rows)]
        return self.combine(torch.cat([*outputs, torch.zeros_like(parts[-1])]), plan, weights)


class Moe(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, moe: spec.Moe, d_model: int, *, options: Options) -> None:
        super().__init__()
        self.router = Router(moe, d_model, options=options)
        self.experts = Experts(moe.expert, moe.n_experts, d_model, options=options)
        self.shared = None if moe.shared is None else FeedForward(moe.shared, d_model, options=options)
        self.shared_gate = Linear(d_model, 1, options=options) if moe.shared_gate else None

    def share(self, x: Tensor) -> Tensor | None:
        """The shared experts' part [T, D], gated where the architecture says so; None without them."""
        if self.shared is None:
            return None
        out: Tensor = self.shared(x)
        return out if self.shared_gate is None else out * self.shared_gate(x).sigmoid()

    def forward(self, x: Tensor, real: Tensor, layer: int = 0) -> RoutingTrace:
        """Tokens x [T, D], of which real [T] bool are not padding; the result is the trace's `output`."""
        routed = self.router(x, real)
        output = self.experts(x, routed.indices, routed.weights)
        shared = self.share(x)
        return RoutingTrace(
            layer=layer,
            hidden=x,
            logits=routed.logits,
            scores=routed.scores,
            selected=routed.selected,
            indices=routed.indices,
            weights=routed.weights,
            output=output if shared is None else output + shared,
        )
