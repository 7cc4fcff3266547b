"""Defects under a capacity factor: who is dropped, and what a dropped slot leaves behind.

Letters: T tokens, K top-k.
"""

from __future__ import annotations

from dataclasses import replace as with_fields
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import Method, experts, mutant, routers
from harness.reference.experts import Dispatch
from harness.reference.router import Routed


@mutant(routers, "drop", stage="drop", origin="transformers#48293")
def drops_nothing(_: Any, __: Method) -> Method:
    """No token is ever dropped."""
    return lambda selected, weights, _real: (selected, weights)


@mutant(routers, "drop", stage="drop")
def drops_the_first(_: Any, drop: Method) -> Method:
    """The latest tokens keep their place in place of the earliest."""

    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        indices, kept = drop(selected.flip(0), weights.flip(0), real.flip(0))
        return indices.flip(0), kept.flip(0)

    return changed


@mutant(routers, "drop", stage="drop", origin="transformers#28505")
def padding_takes_places(_: Any, drop: Method) -> Method:
    """Padding fills the experts' capacity."""
    return lambda selected, weights, real: drop(selected, weights, torch.ones_like(real))


@mutant(routers, "drop", stage="drop", origin="DeepSpeed#1827")
def capacity_rounded_down(router: Any, drop: Method) -> Method:
    """Capacity is rounded down, to none for few tokens."""

    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> Any:
        if router.router.capacity_factor is None:
            return drop(selected, weights, real)
        limit = int(real.sum() * router.top_k * router.router.capacity_factor / router.n_experts)
        hot = torch.zeros(len(selected), router.n_experts, dtype=torch.int64)
        hot = hot.scatter(-1, selected, 1) * real[:, None]
        place = (hot.cumsum(0) - 1).gather(-1, selected)
        kept = (place < limit) & real[:, None]
        return selected.where(kept, -1), weights.where(kept, 0)

    return changed


@mutant(routers, "drop", stage="drop", origin="transformers#48689")
def dropped_slots_keep_their_weight(_: Any, drop: Method) -> Method:
    """A dropped slot keeps its weight."""

    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        return drop(selected, weights, real)[0], weights

    return changed


@mutant(routers, "drop", stage="drop")
def drops_renormalise(_: Any, drop: Method) -> Method:
    """What is left after drops is normalised again."""

    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        indices, kept = drop(selected, weights, real)
        total = kept.sum(-1, keepdim=True)
        return indices, kept * weights.sum(-1, keepdim=True) / total.where(total > 0, 1)

    return changed


@mutant(routers, "drop", stage="gradient", origin="tutel#127", spec="olmoe-1b-7b")
def gradient_stops_at_the_first_drop(_: Any, drop: Method) -> Method:
    """Tokens after the first dropped one give the router no gradient."""

    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        indices, kept = drop(selected, weights, real)
        after = ((indices < 0).any(-1) & real).cumsum(0) > 0
        return indices, torch.where(after[:, None], kept.detach(), kept)

    return changed


@mutant(routers, "drop", stage="select", origin="DeepSpeed#7163")
def places_kept_without_drops(router: Any, drop: Method) -> Method:
    """Where nothing is dropped a token keeps the slots of the call before."""
    before: dict[torch.Size, Tensor] = {}

    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        if router.router.capacity_factor is not None:
            return drop(selected, weights, real)  # type: ignore[no-any-return]
        kept = before.setdefault(selected.shape, selected.clone())
        return kept, weights

    return changed


@mutant(routers, "drop", stage="drop", origin="DeepSpeed#5353")
def capacity_below_the_tokens(router: Any, drop: Method) -> Method:
    """An expert has fewer places than there are tokens, however large the factor: the top-k over tokens that
    finds who stays cannot be asked for all of them."""

    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> Any:
        indices, kept = drop(selected, weights, real)
        if router.router.capacity_factor is None:
            return indices, kept
        hot = torch.zeros(len(selected), router.n_experts + 1, dtype=torch.int64)
        hot = hot.scatter(-1, indices.where(indices >= 0, router.n_experts), 1) * real[:, None]
        place = (hot.cumsum(0) - 1).gather(-1, indices.clamp(min=0))
        fits = place < real.sum() - 1
        return indices.where(fits, -1), kept.where(fits, 0)

    return changed


@mutant(routers, "drop", stage="drop", origin="Megatron-LM 7968fd6532")
def policy_misspelt(router: Any, drop: Method) -> Method:
    """One of the two policies is not recognised, and nothing is dropped."""

    def changed(selected: Tensor, weights: Tensor, real: Tensor) -> Any:
        known = router.router.drop_policy == "position"
        return drop(selected, weights, real) if known else (selected, weights)

    return changed


@mutant(experts, "combine", stage="combine", origin="torchtitan#1237")
def dropped_rows_not_initialised(_: Any, combine: Method) -> Method:
    """The rows of dropped slots hold what was in memory, and 0 times that may be NaN."""

    def changed(outputs: Tensor, plan: Dispatch, weights: Tensor) -> Any:
        computed = torch.arange(len(outputs)) < sum(plan.counts)
        return combine(outputs.where(computed[:, None], torch.nan), plan, weights)

    return changed


@mutant(routers, "forward", stage="gradient", origin="transformers#48689", spec="olmoe-1b-7b")
def dropped_slots_train_the_router(_: Any, forward: Method) -> Method:
    """The weight of a dropped slot is 0, and its gradient is not."""

    def changed(x: Tensor, real: Tensor) -> Routed:
        routed: Routed = forward(x, real)
        full = routed.scores.gather(-1, routed.selected)
        leak = (full - full.detach()).where(routed.indices < 0, 0)
        # What multiplies the slot's weight is some expert's output: here, of the order of the others'.
        return with_fields(routed, weights=routed.weights + leak.sum(-1, keepdim=True))

    return changed
