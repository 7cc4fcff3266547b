"""Defects of attention, positions and the cache.

Letters: B sequences, S new tokens, L = past + S tokens, H query heads, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import (
    F,
    Method,
    anywhere,
    attentions,
    enter,
    mutant,
    on_model,
    patched,
    rotaries,
    whole,
)
from harness.reference import ReferenceModel
from harness.reference.attention import Context
from harness.reference.rope import frequencies
from harness.reference.trace import Cache
from harness.spec.architecture import Architecture


def _grouped(a: Architecture) -> bool:
    return a.attention.mla is None and 1 < a.attention.n_kv_heads < a.attention.n_heads


def _window(a: Architecture) -> bool:
    return a.attention.window is not None


def _rope(a: Architecture) -> bool:
    return a.attention.rope is not None


def _scaled_rope(a: Architecture) -> bool:
    return a.attention.rope is not None and a.attention.rope.scaling is not None


def _yarn(a: Architecture) -> bool:
    return (
        a.attention.rope is not None
        and a.attention.rope.scaling is not None
        and a.attention.rope.scaling.kind == "yarn"
    )


def _own_scale(a: Architecture) -> bool:
    return a.attention.scale is not None or (_yarn(a) and a.attention.mla is not None)


@mutant(attentions, "expand_kv", stage="expand_kv", origin="axlearn#842", applies=_grouped)
def kv_heads_tiled(target: Any, _: Method) -> Method:
    """Key/value heads are tiled, not repeated."""

    def changed(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        times = target.n_heads // k.shape[2]
        return k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1)

    return changed


@patched(stage="mask", origin="transformers#26792", spec="gpt-oss-20b", applies=_window)
def window_one_more(model: ReferenceModel) -> None:
    """The window sees one token too many."""
    for target in attentions(model):
        target.window = target.window and target.window + 1


@patched(stage="mask", origin="mlx-lm#390", spec="gpt-oss-20b", applies=_window)
def window_one_less(model: ReferenceModel) -> None:
    """The window sees one token too few."""
    for target in attentions(model):
        target.window = target.window and target.window - 1


@patched(stage="mask", origin="transformers#33586", spec="gpt-oss-20b", applies=_window)
def window_ignored(model: ReferenceModel) -> None:
    """Window layers see everything."""
    for target in attentions(model):
        target.window = None


@patched(stage="mask", spec="gpt-oss-20b", applies=anywhere)
def window_everywhere(model: ReferenceModel) -> None:
    """Full layers see a window only."""
    for target in attentions(model):
        target.window = model.architecture.attention.window or 8


def seen(**row: Any) -> Callable[[F], F]:
    """Decorate change(seen [B, S, L], context, attention) -> the defective mask."""

    def decorate(change: F) -> F:
        def patch(model: ReferenceModel) -> None:
            for target in attentions(model):
                target.mask = _masked(target, target.mask, change)

        return enter(change, on_model(patch), **row)

    return decorate


def _masked(target: Any, mask: Method, change: Method) -> Method:
    return lambda context: change(mask(context), context, target)


@seen(stage="mask", origin="TinyLLM#18", applies=anywhere)
def sees_the_next_token(seen: Tensor, context: Context, _: Any) -> Tensor:
    """The causal mask is off by one."""
    return seen | (seen.roll(1, -1) & context.real[:, None, :])


@seen(stage="mask", applies=anywhere)
def blind_to_the_first(seen: Tensor, _: Context, __: Any) -> Tensor:
    """The first token is not seen."""
    first = torch.zeros_like(seen)
    first[..., 0] = True
    return seen & ~(first & (seen.sum(-1, keepdim=True) > 1))


@seen(stage="mask", origin="unsloth#3699", applies=anywhere)
def padding_is_attended(seen: Tensor, context: Context, _: Any) -> Tensor:
    """Padding is attended to."""
    key = torch.arange(seen.shape[-1])
    query = key[-seen.shape[1] :, None]
    return seen | (~context.real[:, None, :] & (key <= query))


@mutant(
    whole,
    "run",
    stage="rotate",
    origin="transformers#22161",
    spec="gpt3-175b",
    applies=lambda a: a.positions == "learned",
)
def positions_count_padding(_: Any, run: Method) -> Method:
    """Positions count the padding on the left."""

    def changed(tokens: Tensor, cache: Cache | None, mask: Tensor | None, positions: Tensor | None) -> Any:
        if positions is None:
            past = 0 if cache is None else cache.length
            positions = torch.arange(past, past + tokens.shape[1]).expand_as(tokens)
        return run(tokens, cache, mask, positions)

    return changed


@mutant(whole, "run", stage="rotate", spec="gpt3-175b", applies=anywhere)
def positions_argument_ignored(_: Any, run: Method) -> Method:
    """Positions that are given are not used."""
    return lambda tokens, cache, mask, _positions: run(tokens, cache, mask, None)


@mutant(whole, "extend", stage="rotate", spec="mixtral-8x7b", applies=anywhere)
def positions_ignored_with_a_cache(_: Any, extend: Method) -> Method:
    """Positions that are given beside a cache are not used."""

    def changed(tokens: Tensor, cache: Any, *, mask: Any = None, positions: Any = None) -> Any:
        return extend(tokens, cache, mask=mask, positions=None if cache is not None else positions)

    return changed


@mutant(whole, "embed", stage="rotate", spec="gpt3-175b", applies=lambda a: a.positions == "learned")
def positions_wrap(_: Any, embed: Method) -> Method:
    """Learned positions begin anew after 64."""
    return lambda tokens, positions: embed(tokens, positions % 64)


@mutant(attentions, "scores", stage="mask", origin="pytorch#103749", applies=anywhere)
def padding_poisons(_: Any, scores: Method) -> Method:
    """Rows that see nothing become NaN and spread."""

    def changed(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        alone = seen.sum(-1) == 1
        weights: Tensor = scores(q, k, seen)
        # The softmax of a row in which everything is masked: NaN, which the next layer spreads by 0 * NaN.
        fully_masked = alone & (torch.arange(seen.shape[1]) > 0)
        fully_masked[:, 0] = alone.sum(-1) > 1
        return weights.masked_fill(fully_masked[:, None, :, None], torch.nan)

    return changed


@mutant(whole, "run", stage="state", origin="vllm#28939", applies=anywhere)
def input_overwritten(_: Any, run: Method) -> Method:
    """A call writes into the caller's mask."""

    def changed(tokens: Tensor, cache: Any, mask: Tensor | None, positions: Any) -> Any:
        out = run(tokens, cache, mask, positions)
        if mask is not None:
            mask[:, 0] = True
        return out

    return changed


@patched(stage="rotate", origin="transformers#25199", applies=_rope)
def rope_layout_swapped(model: ReferenceModel) -> None:
    """Interleaved and half layout change places."""
    for rotary in rotaries(model):
        rotary.layout = "half" if rotary.layout == "interleaved" else "interleaved"


@patched(stage="rotate", origin="gpt-fast 8922741", applies=_rope)
def rope_theta_default(model: ReferenceModel) -> None:
    """The base of the frequencies is the default."""
    rope = model.architecture.attention.rope
    assert rope is not None
    other = rope.model_copy(update={"theta": 10000.0 if rope.theta != 10000.0 else 500000.0})
    for rotary in rotaries(model):
        rotary.frequencies, _ = frequencies(other, rotary.dim, model.architecture.max_positions)


@patched(stage="rotate", origin="mlx-vlm#1710", spec="gpt-oss-20b", applies=_scaled_rope)
def rope_scaling_ignored(model: ReferenceModel) -> None:
    """Frequencies are not stretched."""
    rope = model.architecture.attention.rope
    assert rope is not None
    for rotary in rotaries(model):
        plain = rope.model_copy(update={"scaling": None})
        rotary.frequencies, _ = frequencies(plain, rotary.dim, model.architecture.max_positions)


@patched(stage="rotate", spec="llama-3.1-8b", applies=_rope)
def rope_slowest_pair_kept(model: ReferenceModel) -> None:
    """The pair of the lowest frequency is not rotated."""
    for rotary in rotaries(model):
        rotary.frequencies = [*rotary.frequencies[:-1], 0.0]


@patched(stage="rotate", spec="deepseek-v3", applies=_scaled_rope)
def rope_trained_context_is_the_whole(model: ReferenceModel) -> None:
    """Frequencies are stretched as if the whole context had been trained."""
    rope, whole_context = model.architecture.attention.rope, model.architecture.max_positions
    assert rope is not None
    assert rope.scaling is not None
    scaling = rope.scaling.model_copy(update={"original_max_positions": whole_context})
    for rotary in rotaries(model):
        other = rope.model_copy(update={"scaling": scaling})
        rotary.frequencies, _ = frequencies(other, rotary.dim, whole_context)


@mutant(rotaries, "angles", stage="rotate", origin="torchtitan#2575", applies=_rope)
def rope_positions_in_bfloat16(_: Any, angles: Method) -> Method:
    """Positions are cast to bfloat16, which knows every whole number up to 256."""
    return lambda positions: angles(positions.to(torch.bfloat16).to(torch.float64))


@patched(stage="rotate", origin="exllamav3#259", spec="gpt-oss-20b", applies=_yarn)
def rope_mscale_ignored(model: ReferenceModel) -> None:
    """Yarn's factor is lost."""
    for rotary in rotaries(model):
        rotary.factor = 1.0 if rotary.factor != 1.0 else 1.1
    if model.architecture.attention.mla is not None:
        scale_default(model)


@patched(stage="scores", origin="torchtitan#2173", spec="deepseek-v3", applies=_own_scale)
def scale_default(model: ReferenceModel) -> None:
    """The scale of the scores is 1 / sqrt(head_dim) whatever was given."""
    for target in attentions(model):
        target.scale = target.head_dim**-0.5


@mutant(rotaries, "angles", stage="state", origin="transformers#27227", applies=_rope)
def history_in_rope(_: Any, angles: Method) -> Method:
    """A long sequence stretches the positions of later calls."""
    longest = 0

    def changed(positions: Tensor) -> Any:
        nonlocal longest
        longest = max(longest, int(positions.max()))
        return angles(positions * (1 + max(0, longest - 31) / 64))

    return changed


@mutant(attentions, "rotate", stage="rotate", applies=_rope)
def rotates_values(_: Any, rotate: Method) -> Method:
    """Keys depend on absolute positions."""

    def changed(q: Tensor, k: Tensor, positions: Tensor) -> Any:
        q, k = rotate(q, k, positions)
        return q, k * (1 + positions[..., None, None] / 1000)

    return changed


@mutant(whole, "embed", stage="rotate", applies=_rope)
def positions_also_added(_: Any, embed: Method) -> Method:
    """Absolute positions are added beside rotary ones."""

    def changed(tokens: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = embed(tokens, positions)
        return x + 0.1 * torch.sin(positions[..., None] / 10.0 + torch.arange(x.shape[-1])).to(x.dtype)

    return changed


@patched(stage="scores", spec="gpt-oss-20b", applies=lambda a: a.attention.sinks)
def sinks_dropped(model: ReferenceModel) -> None:
    """Sinks are loaded and take no weight."""
    for target in attentions(model):
        target.scores = _without_sinks(target)


def _without_sinks(target: Any) -> Method:
    def changed(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        logits: Tensor = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * target.scale
        return logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)

    return changed


@mutant(
    attentions,
    "normalise",
    stage="project",
    spec="qwen3-30b-a3b",
    applies=lambda a: a.attention.qk_norm != "none",
)
def qk_norm_dropped(_: Any, __: Method) -> Method:
    """Queries and keys are not normalised."""
    return lambda q, k: (q, k)


@mutant(whole, "unembed", stage="unembed", applies=anywhere)
def final_norm_dropped(model: Any, _: Method) -> Method:
    """The last norm is left out."""

    def changed(x: Tensor) -> Any:
        matrix = model.embedding if model.unembedding is None else model.unembedding
        return x @ matrix.weight.T

    return changed


@mutant(whole, "unembed", stage="compute", applies=anywhere)
def unembeds_twice(_: Any, unembed: Method) -> Method:
    """The last token's logits are computed twice."""

    def changed(x: Tensor) -> Any:
        unembed(x[:, -1:])
        return unembed(x)

    return changed


M = "mixtral-8x7b"
