"""Defects of how things lie in memory: fused matrices, masks that are left out, tensors that are shared.

Letters: B sequences, S new tokens, L = past + S tokens, T tokens, E experts, K top-k, H query heads, G
key/value heads, h head_dim.
"""

from __future__ import annotations

from dataclasses import replace as with_fields
from typing import Any

import torch
from torch import Tensor

from harness.mutants.attention import seen
from harness.mutants.defect import Method, anywhere, attentions, mutant, routers, whole
from harness.reference.attention import Context
from harness.reference.router import Routed
from harness.spec.architecture import Architecture


def _window(a: Architecture) -> bool:
    return a.attention.window is not None


def _grouped(a: Architecture) -> bool:
    return a.attention.mla is None and a.attention.n_kv_heads < a.attention.n_heads


def _rope(a: Architecture) -> bool:
    return a.attention.rope is not None


def _normalised(a: Architecture) -> bool:
    return a.moe is not None and a.moe.router.normalise and a.moe.router.order == "before_topk"


@mutant(
    whole,
    "load_weights",
    stage="project",
    origin="NeMo-RL#2802",
    spec="llama-3.1-8b",
    applies=_grouped,
)
def fused_qkv_taken_for_grouped(model: Any, load: Method) -> Method:
    """A fused matrix of all queries, then keys, then values is read as one such block for each group."""
    attention = model.architecture.attention
    groups, per_group = attention.n_kv_heads, attention.n_heads // attention.n_kv_heads

    def changed(values: Any) -> None:
        made = dict(values)
        for name in [n for n in values if n.endswith(("attention.q.weight", "attention.q.bias"))]:
            key, value = (name.replace(".q.", f".{part}.") for part in "kv")
            fused = torch.cat([values[name], values[key], values[value]])
            blocks = fused.unflatten(0, (groups, per_group + 2, attention.head_dim))
            parts = (blocks[:, :per_group], blocks[:, per_group], blocks[:, per_group + 1])
            made[name], made[key], made[value] = (
                part.reshape(-1, *fused.shape[1:]).contiguous() for part in parts
            )
        load(made)

    return changed


@mutant(attentions, "mask", stage="mask", origin="transformers#34093", spec="gpt-oss-20b", applies=_window)
def window_ignored_without_padding(target: Any, mask: Method) -> Method:
    """Where no token is padding there is no mask but the causal one, and so no window."""

    def changed(context: Context) -> Tensor:
        if not bool(context.real.all()):
            return mask(context)  # type: ignore[no-any-return]
        window, target.window = target.window, None
        try:
            return mask(context)  # type: ignore[no-any-return]
        finally:
            target.window = window

    return changed


@seen(stage="cache", origin="transformers#46741", spec="llama-3.1-8b", applies=anywhere)
def chunk_forgets_the_past(seen: Tensor, _: Context, __: Any) -> Tensor:
    """A chunk of several tokens on a filled cache is taken for the beginning: the past is not seen."""
    new, length = seen.shape[1:]
    if new in (1, length):
        return seen
    return seen & (torch.arange(length) >= length - new)


@mutant(attentions, "rotate", stage="rotate", origin="torchtitan#2575", spec="llama-3.1-8b", applies=_rope)
def rope_in_model_dtype(target: Any, rotate: Method) -> Method:
    """Angles are computed in the dtype of the model."""
    rotary = target.rotary

    def changed(q: Tensor, k: Tensor, positions: Tensor) -> Any:
        def angles(at: Tensor) -> tuple[Tensor, Tensor]:
            angle = at.to(q.dtype)[..., None, None] * torch.tensor(rotary.frequencies, dtype=q.dtype)
            return angle.cos().double() * rotary.factor, angle.sin().double() * rotary.factor

        rotary.angles = angles
        try:
            return rotate(q, k, positions)
        finally:
            del rotary.angles

    return changed


@mutant(routers, "forward", stage="score", origin="mixture-of-experts 04201ee", applies=_normalised)
def weights_written_over_scores(_: Any, forward: Method) -> Method:
    """The selected scores are normalised in place, and the losses read what was written."""

    def changed(x: Tensor, real: Tensor) -> Routed:
        routed: Routed = forward(x, real)
        weights = routed.weights.to(routed.scores.dtype)
        return with_fields(routed, scores=routed.scores.scatter(-1, routed.selected, weights))

    return changed


@mutant(routers, "weigh", stage="gradient", origin="megablocks#70", applies=_normalised)
def normaliser_without_gradient(router: Any, _: Method) -> Method:
    """Weights are divided by their sum in place, behind the back of what takes the gradient."""

    def changed(scores: Tensor, _logits: Tensor, selected: Tensor) -> Any:
        weights = scores.gather(-1, selected)
        return weights / weights.sum(-1, keepdim=True).detach() * router.router.scaling_factor

    return changed
