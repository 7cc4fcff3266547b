"""Defects of attention, positions and the cache.

Letters: B sequences, S new tokens, L = past + S tokens, H query heads, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import Mutant, attentions, instead, rotaries, whole
from harness.reference import ReferenceModel
from harness.reference.attention import Context
from harness.reference.rope import frequencies
from harness.reference.trace import Cache, LayerCache
from harness.spec.architecture import Architecture

Method = Callable[..., Any]


def _anywhere(_: Architecture) -> bool:
    return True


def _grouped(a: Architecture) -> bool:
    return a.attention.mla is None and 1 < a.attention.n_kv_heads < a.attention.n_heads


def _window(a: Architecture) -> bool:
    return a.attention.window is not None


def _rope(a: Architecture) -> bool:
    return a.attention.rope is not None


def _scaled_rope(a: Architecture) -> bool:
    return a.attention.rope is not None and a.attention.rope.scaling is not None


def _yarn(a: Architecture) -> bool:
    return a.attention.rope is not None and a.attention.rope.scaling is not None and a.attention.rope.scaling.kind == "yarn"


def _own_scale(a: Architecture) -> bool:
    return a.attention.scale is not None or (_yarn(a) and a.attention.mla is not None)


def _tiled(target: Any, _: Method) -> Method:
    def changed(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        times = target.n_heads // k.shape[2]
        return k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1)

    return changed


def _windowed(by: int) -> Callable[[ReferenceModel], None]:
    def patch(model: ReferenceModel) -> None:
        for target in attentions(model):
            if target.window is not None:
                target.window += by

    return patch


def _window_ignored(model: ReferenceModel) -> None:
    for target in attentions(model):
        target.window = None


def _window_everywhere(model: ReferenceModel) -> None:
    for target in attentions(model):
        target.window = model.architecture.attention.window or 8


def _seen(change: Callable[[Tensor, Context, Any], Tensor]) -> Callable[[ReferenceModel], None]:
    """A patch of the mask: change(seen [B, S, L], context, attention)."""

    def make(target: Any, mask: Method) -> Method:
        return lambda context: change(mask(context), context, target)

    return instead(attentions, "mask", make)


def _next_too(seen: Tensor, context: Context, _: Any) -> Tensor:
    return seen | (seen.roll(1, -1) & context.real[:, None, :])


def _not_the_first(seen: Tensor, _: Context, __: Any) -> Tensor:
    first = torch.zeros_like(seen)
    first[..., 0] = True
    return seen & ~(first & (seen.sum(-1, keepdim=True) > 1))


def _padding_seen(seen: Tensor, context: Context, _: Any) -> Tensor:
    key = torch.arange(seen.shape[-1])
    query = key[-seen.shape[1] :, None]
    return seen | (~context.real[:, None, :] & (key <= query))


def _no_past_padding(seen: Tensor, context: Context, target: Any) -> Tensor:
    if seen.shape[1] == seen.shape[2]:
        return seen
    return _padding_seen(seen, context, target)


def _prefill_ahead(model: Any, extend: Method) -> Method:
    """With a cache at hand the causal mask is left out."""

    def changed(tokens: Tensor, cache: Cache | None, **rest: Any) -> Any:
        made = [target.mask for target in attentions(model)]
        if cache is None:
            for target in attentions(model):
                target.mask = lambda context: context.real[:, None, :].expand(-1, context.positions.shape[1], -1)
        try:
            return extend(tokens, cache, **rest)
        finally:
            for target, mask in zip(attentions(model), made, strict=True):
                target.mask = mask

    return changed


def _one_less(seen: Tensor, _: Context, __: Any) -> Tensor:
    if seen.shape[1] == seen.shape[2]:
        return seen
    return seen & ~(torch.arange(seen.shape[-1]) == seen.shape[2] - seen.shape[1] - 1)


def _afresh(_: Any, extend: Method) -> Method:
    def changed(tokens: Tensor, cache: Cache | None, **rest: Any) -> Any:
        past = 0 if cache is None else cache.length
        if past and tokens.shape[1] > 1:
            rest["positions"] = torch.arange(tokens.shape[1]).expand_as(tokens)
        return extend(tokens, cache, **rest)

    return changed


def _off_by_one(model: Any, extend: Method) -> Method:
    def changed(tokens: Tensor, cache: Cache | None, *, mask: Tensor | None = None, positions: Tensor | None = None) -> Any:
        if cache is not None and positions is None:
            real = torch.cat([cache.real, torch.ones_like(tokens, dtype=torch.bool)], 1) if mask is None else mask.bool()
            positions = real.cumsum(1)[:, cache.length :].clamp(max=model.architecture.max_positions - 1)
        return extend(tokens, cache, mask=mask, positions=positions)

    return changed


def _keeps_too_little(_: Any, extend: Method) -> Method:
    def changed(tokens: Tensor, cache: Cache | None, **rest: Any) -> Any:
        logits, after = extend(tokens, cache, **rest)
        if tokens.shape[1] == 1 or cache is None:
            return logits, after
        # Of a chunk after the first, only the last token's keys and values are written.
        blank = slice(cache.length, after.length - 1)
        layers = []
        for layer in after.layers:
            keys, values = layer.keys.clone(), layer.values.clone()
            keys[:, blank], values[:, blank] = 0, 0
            layers.append(LayerCache(keys, values))
        return logits, Cache(tuple(layers), after.real)

    return changed


def _shared_cache(_: Any, extend: Method) -> Method:
    def changed(tokens: Tensor, cache: Cache | None, **rest: Any) -> Any:
        logits, after = extend(tokens, cache, **rest)
        if cache is not None:
            for old, new in zip(cache.layers, after.layers, strict=True):
                old.keys.copy_(new.keys[:, -old.keys.shape[1] :])
                old.values.copy_(new.values[:, -old.values.shape[1] :])
        return logits, after

    return changed


def _recomputes(model: Any, extend: Method) -> Method:
    def changed(tokens: Tensor, cache: Any, **rest: Any) -> Any:
        past = getattr(cache, "tokens", tokens[:, :0])
        if past.shape[1]:
            model.run(past, None, None, None)
        logits, after = extend(tokens, cache, **rest)
        object.__setattr__(after, "tokens", torch.cat([past, tokens], dim=1))
        return logits, after

    return changed


def _count_padding(_: Any, run: Method) -> Method:
    def changed(tokens: Tensor, cache: Cache | None, mask: Tensor | None, positions: Tensor | None) -> Any:
        if positions is None:
            past = 0 if cache is None else cache.length
            positions = torch.arange(past, past + tokens.shape[1]).expand_as(tokens)
        return run(tokens, cache, mask, positions)

    return changed


def _poison(target: Any, scores: Method) -> Method:
    def changed(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        alone = seen.sum(-1) == 1
        weights: Tensor = scores(q, k, seen)
        # The softmax of a row in which everything is masked: NaN, which the next layer spreads by 0 * NaN.
        fully_masked = alone & (torch.arange(seen.shape[1]) > 0)
        fully_masked[:, 0] = alone.sum(-1) > 1
        return weights.masked_fill(fully_masked[:, None, :, None], torch.nan)

    return changed


def _overwrites_mask(_: Any, run: Method) -> Method:
    def changed(tokens: Tensor, cache: Any, mask: Tensor | None, positions: Any) -> Any:
        out = run(tokens, cache, mask, positions)
        if mask is not None:
            mask[:, 0] = True
        return out

    return changed


def _layout_swapped(model: ReferenceModel) -> None:
    for rotary in rotaries(model):
        rotary.layout = "half" if rotary.layout == "interleaved" else "interleaved"


def _theta_default(model: ReferenceModel) -> None:
    rope = model.architecture.attention.rope
    assert rope is not None
    other = rope.model_copy(update={"theta": 10000.0 if rope.theta != 10000.0 else 500000.0})
    for rotary in rotaries(model):
        rotary.frequencies, _ = frequencies(other, rotary.dim, model.architecture.max_positions)


def _scaling_ignored(model: ReferenceModel) -> None:
    rope = model.architecture.attention.rope
    assert rope is not None
    for rotary in rotaries(model):
        plain = rope.model_copy(update={"scaling": None})
        rotary.frequencies, _ = frequencies(plain, rotary.dim, model.architecture.max_positions)


def _mscale_ignored(model: ReferenceModel) -> None:
    for rotary in rotaries(model):
        rotary.factor = 1.0 if rotary.factor != 1.0 else 1.1
    if model.architecture.attention.mla is not None:
        _scale_default(model)


def _scale_default(model: ReferenceModel) -> None:
    for target in attentions(model):
        target.scale = target.head_dim**-0.5


def _history(rotary: Any, angles: Method) -> Method:
    longest = 0

    def changed(positions: Tensor) -> Any:
        nonlocal longest
        longest = max(longest, int(positions.max()))
        return angles(positions * (1 + max(0, longest - 31) / 64))

    return changed


def _rotates_values(target: Any, rotate: Method) -> Method:
    def changed(q: Tensor, k: Tensor, positions: Tensor) -> Any:
        q, k = rotate(q, k, positions)
        return q, k * (1 + positions[..., None, None] / 1000)

    return changed


def _positions_added(model: Any, embed: Method) -> Method:
    def changed(tokens: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = embed(tokens, positions)
        return x + 0.1 * torch.sin(positions[..., None] / 10.0 + torch.arange(x.shape[-1])).to(x.dtype)

    return changed


def _sinks_dropped(model: ReferenceModel) -> None:
    for target in attentions(model):
        target.scores = _without_sinks(target)


def _without_sinks(target: Any) -> Method:
    def changed(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        logits = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * target.scale
        return logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)

    return changed


def _no_qk_norm(_: Any, __: Method) -> Method:
    return lambda q, k: (q, k)


def _final_norm_dropped(model: Any, _: Method) -> Method:
    def changed(x: Tensor) -> Tensor:
        matrix = model.embedding if model.unembedding is None else model.unembedding
        return x @ matrix.weight.T  # type: ignore[no-any-return]

    return changed


def _unembeds_twice(_: Any, unembed: Method) -> Method:
    def changed(x: Tensor) -> Tensor:
        unembed(x[:, -1:])
        return unembed(x)  # type: ignore[no-any-return]

    return changed


M = "mixtral-8x7b"
MUTANTS = (
    Mutant("kv-heads-tiled", instead(attentions, "expand_kv", _tiled), "expand_kv", "axlearn#842", "key/value heads are tiled, not repeated", M, _grouped),
    Mutant("window-one-more", _windowed(1), "mask", "transformers#26792", "the window sees one token too many", "gpt-oss-20b", _window),
    Mutant("window-one-less", _windowed(-1), "mask", "mlx-lm#390", "the window sees one token too few", "gpt-oss-20b", _window),
    Mutant("window-ignored", _window_ignored, "mask", "transformers#33586", "window layers see everything", "gpt-oss-20b", _window),
    Mutant("window-everywhere", _window_everywhere, "mask", "transformers#39408", "full layers see a window only", "gpt-oss-20b", _anywhere),
    Mutant("sees-the-next-token", _seen(_next_too), "mask", "TinyLLM#18", "the causal mask is off by one", M, _anywhere),
    Mutant("blind-to-the-first", _seen(_not_the_first), "mask", "Megatron-Bridge#2656", "the first token is not seen", M, _anywhere),
    Mutant("padding-is-attended", _seen(_padding_seen), "mask", "unsloth#9848", "padding is attended to", M, _anywhere),
    Mutant("padding-poisons", instead(attentions, "scores", _poison), "mask", "pytorch#103749", "rows that see nothing become NaN and spread", M, _anywhere),
    Mutant("positions-count-padding", instead(whole, "run", _count_padding), "rotate", "transformers#22161", "positions count the padding on the left", "gpt3-175b", lambda a: a.positions == "learned"),
    Mutant("input-overwritten", instead(whole, "run", _overwrites_mask), "state", "vllm#28939", "a call writes into the caller's mask", M, _anywhere),
    Mutant("history-in-rope", instead(rotaries, "angles", _history), "state", "transformers#27227", "a long sequence stretches the positions of later calls", M, _rope),
    Mutant("rope-layout-swapped", _layout_swapped, "rotate", "transformers#25199", "interleaved and half layout change places", M, _rope),
    Mutant("rope-theta-default", _theta_default, "rotate", "gpt-fast 8922741", "the base of the frequencies is the default", M, _rope),
    Mutant("rope-scaling-ignored", _scaling_ignored, "rotate", "mlx-vlm#1710", "frequencies are not stretched", "gpt-oss-20b", _scaled_rope),
    Mutant("rope-mscale-ignored", _mscale_ignored, "rotate", "exllamav3#259", "yarn's factor is lost", "gpt-oss-20b", _yarn),
    Mutant("rotates-values", instead(attentions, "rotate", _rotates_values), "rotate", "Megatron-LM#3900", "keys depend on absolute positions", M, _rope),
    Mutant("positions-also-added", instead(whole, "embed", _positions_added), "rotate", "LLMs-from-scratch#747", "absolute positions are added beside rotary ones", M, _rope),
    Mutant("scale-default", _scale_default, "scores", "torchtitan#2173", "the scale of the scores is 1 / sqrt(head_dim) whatever was given", "deepseek-v3", _own_scale),
    Mutant("sinks-dropped", _sinks_dropped, "scores", "torchtitan#2319", "sinks are loaded and take no weight", "gpt-oss-20b", lambda a: a.attention.sinks),
    Mutant("qk-norm-dropped", instead(attentions, "normalise", _no_qk_norm), "project", "NeMo-RL#2802", "queries and keys are not normalised", "qwen3-30b-a3b", lambda a: a.attention.qk_norm != "none"),
    Mutant("cached-prefill-sees-ahead", instead(whole, "extend", _prefill_ahead), "cache", "TinyLLM#18", "a prefill that fills a cache has no causal mask", M, _anywhere),
    Mutant("chunk-starts-afresh", instead(whole, "extend", _afresh), "cache", "transformers#46084", "a second chunk counts its positions from 0", M, _anywhere),
    Mutant("decode-position-off-by-one", instead(whole, "extend", _off_by_one), "cache", "open_flamingo 72f169a", "positions after a cache are one too high", M, _anywhere),
    Mutant("cache-keeps-too-little", instead(whole, "extend", _keeps_too_little), "cache", "xinfer#329", "of a later chunk only the last token is cached", M, _anywhere),
    Mutant("decode-sees-one-less", _seen(_one_less), "cache", "open_flamingo 72f169a", "with a cache its last token is masked", M, _anywhere),
    Mutant("cache-forgets-padding", _seen(_no_past_padding), "cache", "unsloth#3699", "padding in the cache is attended to", M, _anywhere),
    Mutant("cache-shared-between-calls", instead(whole, "extend", _shared_cache), "cache", "mlx-lm#1553", "going on from a cache changes it", M, _anywhere),
    Mutant("decode-recomputes-the-past", instead(whole, "extend", _recomputes), "compute", "prime-rl#778", "each step computes the whole prefix again", M, _anywhere),
    Mutant("final-norm-dropped", instead(whole, "unembed", _final_norm_dropped), "unembed", "made for this", "the last norm is left out", M, _anywhere),
    Mutant("unembeds-twice", instead(whole, "unembed", _unembeds_twice), "compute", "made for this", "the last token's logits are computed twice", M, _anywhere),
)
