"""Where the routers of a family are, and how what they selected is seen.

Letters: E experts, K top-k, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.implementations import trace


def _sigmoid_of_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = logits.topk(k, dim=-1)
    return indices, values.sigmoid()


def _softmax_of_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = logits.topk(k, dim=-1)
    return indices, values.softmax(dim=-1)


SHIMS = {"llama4_text": _sigmoid_of_top_k, "jetmoe": _softmax_of_top_k}
"""Families whose selection is not to be seen from outside: logits [T, E] and K to indices and weights, as
their block's code says. Scores and selection of these are therefore not under test, only what follows."""


def _one_hot(output: Any) -> tuple[Tensor, Tensor]:
    """Of a router that returns one hot row [.., E] per token, none if it is dropped, and its probability."""
    hot, probability = (x.reshape(-1, x.shape[-1]) for x in output[:2])
    kept = hot.bool().any(-1, keepdim=True)
    return hot.argmax(-1, keepdim=True).where(kept, -1), probability.where(kept, 0)


def _two_gates(output: Any) -> tuple[Tensor, Tensor]:
    """Of a router that returns each token's combine weights over all experts [T, E], two of them not 0."""
    weights, indices = output[1].reshape(-1, output[1].shape[-1]).topk(2, dim=-1)
    return indices.where(weights > 0, -1), weights


READERS = {"nllb-moe": _two_gates, "switch_transformers": _one_hot}
"""Families whose routers return masks: the router's output to indices and weights [T, K]."""

ELSEWHERE = ("attn", "attention", "encoder.")
"""In the name of a router that is not under test: attention may route too (jetmoe), and is no mixture of
feed-forwards; an encoder sees other tokens than those under test."""


def sites(family: str, module: nn.Module) -> tuple[trace.Site, ...]:
    """Every router of the feed-forwards that the family announces, in the order of layers."""
    recorded = _recorded_routers(module)
    shim, k = SHIMS.get(family), _top_k(module)
    derive = None if shim is None or k is None else lambda logits: shim(logits, k)

    def is_router(name: str, candidate: nn.Module) -> bool:
        if any(word in name for word in ELSEWHERE):
            return False
        return id(candidate) in inner or (
            isinstance(candidate, tuple(recorded)) and not _routers_of(candidate)
        )

    def logits_at(router: nn.Module) -> int | None:
        return next((at for cls, at in recorded.items() if isinstance(router, cls)), None)

    # What is recorded may be the whole block, with a router in it.
    blocks = [part for part in module.modules() if isinstance(part, tuple(recorded))]
    inner = {id(router) for block in blocks for router in _routers_of(block)}
    found = trace.sites(module, is_router, logits_at=logits_at, derive=derive)
    return tuple(replace(site, read=READERS.get(family)) for site in found)


def _routers_of(block: nn.Module) -> list[nn.Module]:
    return [part for part in block.modules() if part is not block and type(part).__name__.endswith("Router")]


def called(module: nn.Module, found: tuple[trace.Site, ...], call: Any) -> tuple[trace.Site, ...]:
    """Those sites whose router runs during `call()`: a model that sees has others, which no text reaches."""
    seen: set[str] = set()

    def watch(site: trace.Site) -> Any:
        router = module.get_submodule(site.router)
        return router.register_forward_hook(lambda *_: seen.add(site.router))

    handles = [watch(site) for site in found]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(site for site in found if site.router in seen)


def _recorded_routers(module: nn.Module) -> dict[type[nn.Module], int]:
    """Classes that the model says its router logits come from, and at which place of their output."""
    found: dict[type[nn.Module], int] = {}
    for part in module.modules():
        recorders = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, (list, tuple)) else (recorders,):
            cls = getattr(recorder, "target_class", recorder)
            # A bare class stands for place 1, as in transformers.utils.output_capturing.
            if isinstance(cls, type) and not cls.__name__.endswith("Attention"):
                found[cls] = getattr(recorder, "index", 1)
    return found


def _top_k(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    k = getattr(config, "num_experts_per_tok", None)
    return k if isinstance(k, int) else None
