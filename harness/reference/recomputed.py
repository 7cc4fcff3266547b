"""Activation checkpointing: what a layer computed is forgotten, and computed again for its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from harness.reference.router import Router


def recomputed(layer: nn.Module) -> Callable[..., Any]:
    """The layer, keeping no activations of a pass. The second time it draws the first one's noise, and counts
    no load."""
    routers = [module for module in layer.modules() if isinstance(module, Router)]
    return partial(_run, layer, routers)


def _run(layer: nn.Module, routers: list[Router], *arguments: Any) -> Any:
    states = [router.generator and router.generator.get_state() for router in routers]

    @contextmanager
    def again() -> Iterator[None]:
        now = [router.generator and router.generator.get_state() for router in routers]
        _each(routers, states, recomputing=True)
        try:
            yield
        finally:
            _each(routers, now, recomputing=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), again()

    return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _each(routers: list[Router], states: list[Any], *, recomputing: bool) -> None:
    for router, state in zip(routers, states, strict=True):
        router.recomputing = recomputing
        if router.generator is not None:
            router.generator.set_state(state)
