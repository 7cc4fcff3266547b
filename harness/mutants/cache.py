"""Defects of the cache: what is kept, where it stands, and who may see it.

Letters: B sequences, S new tokens, L = past + S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.mutants.attention import padding_is_attended, seen
from harness.mutants.defect import Method, anywhere, attentions, mutant, whole
from harness.reference.attention import Context
from harness.reference.trace import Cache, LayerCache


@mutant(whole, "extend", stage="cache", origin="TinyLLM#18", applies=anywhere)
def cached_prefill_sees_ahead(model: Any, extend: Method) -> Method:
    """A prefill that fills a cache has no causal mask."""

    def changed(tokens: Tensor, cache: Cache | None, **rest: Any) -> Any:
        made = [target.mask for target in attentions(model)]
        if cache is None:
            for target in attentions(model):
                target.mask = lambda context: context.real[:, None, :].expand(
                    -1, context.positions.shape[1], -1
                )
        try:
            return extend(tokens, cache, **rest)
        finally:
            for target, mask in zip(attentions(model), made, strict=True):
                target.mask = mask

    return changed


@seen(stage="cache", origin="open_flamingo 72f169a", applies=anywhere)
def decode_sees_one_less(seen: Tensor, _: Context, __: Any) -> Tensor:
    """With a cache its last token is masked."""
    if seen.shape[1] == seen.shape[2]:
        return seen
    return seen & ~(torch.arange(seen.shape[-1]) == seen.shape[2] - seen.shape[1] - 1)


@mutant(whole, "extend", stage="cache", origin="transformers#46084", applies=anywhere)
def chunk_starts_afresh(_: Any, extend: Method) -> Method:
    """A second chunk counts its positions from 0."""

    def changed(tokens: Tensor, cache: Cache | None, **rest: Any) -> Any:
        past = 0 if cache is None else cache.length
        if past and tokens.shape[1] > 1:
            rest["positions"] = torch.arange(tokens.shape[1]).expand_as(tokens)
        return extend(tokens, cache, **rest)

    return changed


@mutant(whole, "extend", stage="cache", origin="transformers#30042", applies=anywhere)
def decode_position_off_by_one(model: Any, extend: Method) -> Method:
    """Positions after a cache are one too high."""

    def changed(
        tokens: Tensor, cache: Cache | None, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Any:
        if cache is not None and positions is None:
            real = (
                torch.cat([cache.real, torch.ones_like(tokens, dtype=torch.bool)], 1)
                if mask is None
                else mask.bool()
            )
            positions = real.cumsum(1)[:, cache.length :].clamp(max=model.architecture.max_positions - 1)
        return extend(tokens, cache, mask=mask, positions=positions)

    return changed


@mutant(whole, "extend", stage="cache", applies=anywhere)
def cache_keeps_too_little(_: Any, extend: Method) -> Method:
    """Of a later chunk only the last token is cached."""

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


@mutant(whole, "extend", stage="cache", applies=anywhere)
def cache_shared_between_calls(_: Any, extend: Method) -> Method:
    """Going on from a cache changes it."""

    def changed(tokens: Tensor, cache: Cache | None, **rest: Any) -> Any:
        logits, after = extend(tokens, cache, **rest)
        if cache is not None:
            for old, new in zip(cache.layers, after.layers, strict=True):
                old.keys.copy_(new.keys[:, -old.keys.shape[1] :])
                old.values.copy_(new.values[:, -old.values.shape[1] :])
        return logits, after

    return changed


@mutant(whole, "extend", stage="compute", spec="deepseek-v3", applies=lambda a: a.attention.mla is not None)
def latent_decode_recomputes_the_past(model: Any, extend: Method) -> Method:
    """Each step of latent attention computes the whole prefix again."""
    changed: Method = decode_recomputes_the_past(model, extend)
    return changed


@mutant(whole, "extend", stage="compute", applies=anywhere)
def decode_recomputes_the_past(model: Any, extend: Method) -> Method:
    """Each step computes the whole prefix again."""

    def changed(tokens: Tensor, cache: Any, **rest: Any) -> Any:
        past = getattr(cache, "tokens", tokens[:, :0])
        if past.shape[1]:
            model.run(past, None, None, None)
        logits, after = extend(tokens, cache, **rest)
        object.__setattr__(after, "tokens", torch.cat([past, tokens], dim=1))
        return logits, after

    return changed


@seen(stage="cache", origin="unsloth#3699", applies=anywhere)
def cache_forgets_padding(seen: Tensor, context: Context, target: Any) -> Tensor:
    """Padding in the cache is attended to."""
    if seen.shape[1] == seen.shape[2]:
        return seen
    return padding_is_attended(seen, context, target)
