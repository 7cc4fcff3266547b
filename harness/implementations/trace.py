"""The stage trace of somebody else's model, by hooks on its routers: no code of the model is copied.

Letters: B sequences, S tokens per sequence, T = B * S tokens, D d_model, E experts, K top-k.

A router is a module that turns hidden states into logits [T, E], and possibly into indices [T, K] and
weights [T, K]. Its parent is the MoE block, whose input and output are the first and the last stage. A
child of the block called `experts` is what combines: if it is handed indices and weights, those are
what was really used, and they go before what the router returned. Tensors are told apart by dtype and
shape, not by their place, which differs between families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.implementations.protocols import Routing

Derive = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Logits [T, E] to indices and weights [T, K], for a model that shows neither."""


class TraceError(ValueError):
    """A router does not let the trace be seen: names the router and what is missing."""


@dataclass(frozen=True)
class Site:
    """Where one MoE layer routes: names of modules below the root."""

    layer: int
    router: str
    block: str
    experts: str | None = None
    logits_at: int | None = None
    """Place of the logits in the router's output; None: the widest float tensor."""
    derive: Derive | None = None
    read: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    """The router's output to indices and weights [T, K], where it returns masks in their place."""
    block_is_layer: bool = False
    """The router sits right in the transformer layer, so that there is no block around MoE alone."""


@dataclass
class _Seen:
    """What passed one site during one call."""

    router_in: Tensor | None = None
    router_out: Any = None
    block_in: Tensor | None = None
    block_out: Any = None
    experts_in: Any = field(default_factory=tuple)


def sites(
    root: nn.Module,
    is_router: Callable[[str, nn.Module], bool],
    *,
    logits_at: Callable[[nn.Module], int | None] = lambda _: None,
    derive: Derive | None = None,
) -> tuple[Site, ...]:
    """Every router of `root` for which is_router(name, module), in the order of their layers."""
    found = []
    for name, module in root.named_modules():
        if not is_router(name, module):
            continue
        block = name.rpartition(".")[0]
        children = dict(root.get_submodule(block).named_children())
        experts = f"{block}.experts" if "experts" in children else None
        beside_attention = any("attn" in child or "attention" in child for child in children)
        where = Site(_layer(name), name, block, experts, logits_at(module), derive)
        found.append(replace(where, block_is_layer=beside_attention))
    return tuple(sorted(found, key=lambda site: site.layer))


def record(root: nn.Module, where: Iterable[Site], call: Callable[[], Any]) -> list[Routing]:
    """The traces of one forward pass `call()`, in layer order.

    Raises TraceError if a router's output cannot be told apart, or a router was not called.
    """
    with torch.no_grad(), _watched(root, where) as seen:
        call()
    return [_routing(site, seen[site.router]) for site in where]


@contextmanager
def _watched(root: nn.Module, where: Iterable[Site]) -> Iterator[Mapping[str, _Seen]]:
    seen: dict[str, _Seen] = {}
    handles = []

    def watch(site: Site) -> None:
        """Hang the hooks of one site."""
        here = seen[site.router] = _Seen()

        def router(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            here.router_in, here.router_out = _first(args, kwargs), _copied(output)

        def block_in(_: nn.Module, args: Any, kwargs: Any) -> None:
            here.block_in = _copied(_first(args, kwargs))

        def block_out(_: nn.Module, __: Any, output: Any) -> None:
            here.block_out = _copied(output)

        def experts(_: nn.Module, args: Any, kwargs: Any) -> None:
            here.experts_in = _copied((*args, *kwargs.values()))

        handles.append(root.get_submodule(site.router).register_forward_hook(router, with_kwargs=True))
        block = root.get_submodule(site.block)
        handles.append(block.register_forward_pre_hook(block_in, with_kwargs=True))
        handles.append(block.register_forward_hook(block_out))
        if site.experts is not None:
            module = root.get_submodule(site.experts)
            handles.append(module.register_forward_pre_hook(experts, with_kwargs=True))

    try:
        for site in where:
            watch(site)
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _routing(site: Site, seen: _Seen) -> Routing:
    if seen.router_out is None or seen.router_in is None:
        raise TraceError(f"router {site.router} was not called during the forward pass")
    tokens = seen.router_in.numel() // seen.router_in.shape[-1]
    announced = _tensors(seen.router_out)
    floats = [x for x in announced if x.is_floating_point() and x.numel() % tokens == 0]
    logits: Any
    if site.logits_at is None:
        candidates = [x for x in floats if x.dim() > 1]
        logits = max(candidates, key=lambda x: x.numel(), default=None)
    elif isinstance(seen.router_out, Tensor):
        logits = seen.router_out
    else:
        logits = seen.router_out[site.logits_at]
    if not isinstance(logits, Tensor):
        raise TraceError(f"router {site.router} returned no logits")
    logits = logits.reshape(tokens, -1)
    weights: Tensor | None
    if site.derive is not None:
        indices, weights = site.derive(logits)
    elif site.read is not None:
        indices, weights = site.read(seen.router_out)
    else:
        indices, weights = _selected(site, seen, tokens, logits)
    hidden = seen.router_in if site.block_is_layer else seen.block_in
    output = None if site.block_is_layer else next(iter(_tensors(seen.block_out)), None)
    return Routing(
        layer=site.layer,
        indices=indices.long(),
        weights=weights,
        logits=logits,
        hidden=None if hidden is None else hidden.reshape(tokens, -1),
        output=None if output is None else output.reshape(tokens, -1),
    )


_Selection = tuple[Tensor, Tensor | None]


def _selected(site: Site, seen: _Seen, tokens: int, logits: Tensor) -> _Selection:
    """What the experts were handed, and what the router returned."""
    combining = _selection(_tensors(seen.experts_in), tokens, logits)
    routed = _selection(_tensors(seen.router_out), tokens, logits)
    if combining is None and routed is None:
        raise TraceError(f"router {site.router} shows no expert indices [T, K], nor do its experts")
    return _merged(combining, routed)


def _selection(tensors: list[Tensor], tokens: int, logits: Tensor) -> _Selection | None:
    """Indices [T, K] and the weights of the same shape among `tensors`; None without indices."""
    integers = [
        x
        for x in tensors
        if not x.is_floating_point() and x.dtype != torch.bool and x.dim() > 1 and x.numel() % tokens == 0
    ]
    if not integers:
        return None
    indices = integers[0].reshape(tokens, -1)
    weights = (
        x.reshape(tokens, -1)
        for x in tensors
        if x.is_floating_point() and x.numel() == indices.numel() and x.data_ptr() != logits.data_ptr()
    )
    return indices, next(weights, None)


def _merged(combining: _Selection | None, routed: _Selection | None) -> _Selection:
    first, second = (combining, routed) if combining is not None else (routed, None)
    assert first is not None  # the caller has at least one
    indices, weights = first
    if weights is None and second is not None and torch.equal(indices, second[0]):
        weights = second[1]
    return indices, weights


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((x for x in _tensors((*args, *kwargs.values())) if x.is_floating_point()), None)


def _copied(value: Any) -> Any:
    """Detached copies: some models go on to write into what they returned."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return tuple(_copied(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return value


def _layer(name: str) -> int:
    """The first number among the parts of a dotted name: model.layers.3.mlp.gate is in layer 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
