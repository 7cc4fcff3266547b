"""Defects under a capacity factor: who is dropped, and what a dropped slot leaves behind.

Letters: T tokens, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import Method, mutant, routers


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
