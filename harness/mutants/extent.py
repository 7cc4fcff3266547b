"""Defects that small shapes and first calls hide: limits, blocks, numbers of two digits, what is kept.

Letters: B sequences, S new tokens, L = past + S tokens, T tokens, E experts, K top-k, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.mutants.attention import seen
from harness.mutants.defect import (
    Method,
    anywhere,
    attentions,
    experts,
    mutant,
    patched,
    routers,
    whole,
)
from harness.reference import ReferenceModel
from harness.reference.attention import Context
from harness.reference.experts import Dispatch
from harness.reference.trace import Cache, LayerCache
from harness.spec.architecture import Architecture

BLOCK = 32
"""Tokens or rows: a usual size of a kernel's tile and of a page of the cache."""


def _dense_layers(a: Architecture) -> bool:
    return a.ffn is not None


def _normalised(a: Architecture) -> bool:
    return a.moe is not None and a.moe.router.normalise and a.moe.router.order == "before_topk"


@mutant(experts, "dispatch", stage="combine")
def rows_beyond_a_block_lost(_: Any, dispatch: Method) -> Method:
    """An expert computes the rows of one block only."""

    def changed(x: Tensor, indices: Tensor) -> Dispatch:
        plan: Dispatch = dispatch(x, indices)
        rows, at = plan.rows.clone(), 0
        for count in plan.counts:
            rows[at + 2 * BLOCK : at + max(count, 2 * BLOCK)] = 0
            at += count
        return Dispatch(rows, plan.counts, plan.place)

    return changed


@mutant(experts, "forward", stage="combine")
def expert_ids_in_a_byte(_: Any, forward: Method) -> Method:
    """Expert 256 is taken for expert 0."""
    return lambda x, indices, weights: forward(x, indices.where(indices < 0, indices % 256), weights)


@mutant(experts, "combine", stage="combine", origin="MoLE#7")
def combines_four_at_most(_: Any, combine: Method) -> Method:
    """Of more than four experts only four are added."""

    def changed(outputs: Tensor, plan: Dispatch, weights: Tensor) -> Any:
        slot = torch.arange(weights.shape[-1])
        return combine(outputs, plan, weights * (slot < 4))

    return changed


@mutant(whole, "run", stage="weigh", applies=_normalised)
def single_token_not_normalised(model: Any, run: Method) -> Method:
    """A call with one token takes a path of its own, which does not normalise."""

    def changed(tokens: Tensor, cache: Any, mask: Any, positions: Any) -> Any:
        if tokens.numel() > 1:
            return run(tokens, cache, mask, positions)
        for router in routers(model):
            router.weigh = lambda scores, _logits, selected: scores.gather(-1, selected)
        try:
            return run(tokens, cache, mask, positions)
        finally:
            for router in routers(model):
                del router.weigh

    return changed


@mutant(whole, "embed", stage="embed", applies=anywhere)
def token_0_is_padding(_: Any, embed: Method) -> Method:
    """Token 0 has no embedding, as if it were padding."""
    return lambda tokens, positions: embed(tokens, positions) * (tokens != 0)[..., None]


@mutant(whole, "embed", stage="gradient", applies=anywhere)
def token_0_learns_nothing(_: Any, embed: Method) -> Method:
    """The embedding of token 0 gets no gradient, as if it were padding."""

    def changed(tokens: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = embed(tokens, positions)
        return torch.where((tokens == 0)[..., None], x.detach(), x)

    return changed


@mutant(whole, "embed", stage="embed", applies=anywhere)
def last_token_id_unknown(model: Any, embed: Method) -> Method:
    """The last id of the vocabulary is taken for the one before it."""
    last: int = model.architecture.vocab_size - 2
    return lambda tokens, positions: embed(tokens.clamp(max=last), positions)


@seen(stage="mask", applies=anywhere)
def sees_few_tokens(seen: Tensor, _: Context, __: Any) -> Tensor:
    """A full layer sees no further than one block."""
    key = torch.arange(seen.shape[-1])
    return seen & (key[-seen.shape[1] :, None] - key < BLOCK)


@mutant(whole, "extend", stage="cache", applies=anywhere)
def cache_block_lost(_: Any, extend: Method) -> Method:
    """The last place of the cache's first block is never written."""

    def changed(tokens: Tensor, cache: Cache | None, **rest: Any) -> Any:
        logits, after = extend(tokens, cache, **rest)
        if after.length <= BLOCK:
            return logits, after
        layers = []
        for layer in after.layers:
            keys, values = layer.keys.clone(), layer.values.clone()
            keys[:, BLOCK - 1], values[:, BLOCK - 1] = 0, 0
            layers.append(LayerCache(keys, values))
        return logits, Cache(tuple(layers), after.real)

    return changed


@patched(stage="state", applies=anywhere)
def mask_kept_by_shape(model: ReferenceModel) -> None:
    """A mask is kept for later calls of the same shape."""
    for target in attentions(model):
        target.mask = _kept(target.mask)


def _kept(mask: Method) -> Method:
    made: dict[torch.Size, Tensor] = {}
    return lambda context: made.setdefault(context.real.shape, mask(context))


@mutant(whole, "run", stage="state", applies=anywhere)
def reseeds_the_global_generator(_: Any, run: Method) -> Method:
    """Each call seeds torch's global generator."""

    def changed(*arguments: Any) -> Any:
        torch.default_generator.manual_seed(0)
        return run(*arguments)

    return changed


@mutant(whole, "gradients", stage="gradient", applies=anywhere)
def gradients_accumulate(_: Any, gradients: Method) -> Method:
    """Gradients are added to those of the calls before."""
    total: dict[str, Tensor] = {}

    def changed(loss: Tensor) -> dict[str, Tensor]:
        for name, value in gradients(loss).items():
            total[name] = total.get(name, torch.zeros_like(value)) + value
        return dict(total)

    return changed


@mutant(whole, "unembed", stage="unembed", applies=anywhere)
def logits_clipped(_: Any, unembed: Method) -> Method:
    """Logits are cut off at 50."""
    return lambda x: unembed(x).clamp(-50, 50)


@mutant(whole, "load_weights", stage="param", origin="torchtitan#1918", applies=anywhere)
def layers_in_string_order(model: Any, load: Method) -> Method:
    """Layers are loaded in the order 0, 1, 10, 11, 2."""
    order = sorted(range(model.architecture.n_layers), key=str)

    def source(name: str) -> str:
        first, _, rest = name.partition(".")
        number, _, end = rest.partition(".")
        return f"layers.{order[int(number)]}.{end}" if first == "layers" else name

    return lambda values: load({n: values.get(source(n), x) for n, x in values.items()})


def _transposing(load: Method, chosen: Callable[[str], bool]) -> Method:
    def turned(name: str, value: Tensor) -> Tensor:
        square = value.dim() == 2 and value.shape[0] == value.shape[1]
        return value.T.contiguous() if square and chosen(name) else value

    return lambda values: load({name: turned(name, value) for name, value in values.items()})


@mutant(whole, "load_weights", stage="proj", origin="transformers#47031")
def router_transposed_if_square(_: Any, load: Method) -> Method:
    """A router with as many experts as the stream is wide is taken for a transposed one."""
    return _transposing(load, lambda name: name.endswith("router.weight"))


@mutant(
    whole,
    "load_weights",
    stage="param",
    origin="transformers#47031",
    spec="llama-3.1-8b",
    applies=_dense_layers,
)
def dense_transposed_if_square(_: Any, load: Method) -> Method:
    """Square matrices of a dense feed-forward are taken for transposed ones."""
    return _transposing(load, lambda name: ".ffn." in name)
