"""The table of quantities, and how a closed form gets into it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from harness.audit.quantity import Quantity, Side, argument, is_axis

QUANTITIES: dict[str, Quantity] = {}

Closed = Callable[..., Any]


def quantity(
    name: str, dimension: str, block: str, formula: str, *axes: str, side: Side = "exact"
) -> Callable[[Closed], Closed]:
    """Register a closed form; its arguments that are no axis are constants which a claim gives.

    A long formula has steps: lines `name = expression` before the last one (`harness.audit.formula`).
    """

    def _register(compute: Closed) -> Closed:
        if block == "architecture" and any(map(is_axis, axes)):
            raise ValueError(f"{name}: the block of the architecture has no other axes; name another block")
        named = {argument(axis) for axis in axes}
        wanted = [p for p in inspect.signature(compute).parameters.values() if p.name not in named]
        given = tuple(p.name for p in wanted if p.default is inspect.Parameter.empty)
        optional = tuple(p.name for p in wanted if p.name not in given)
        QUANTITIES[name] = Quantity(name, dimension, block, axes, given, optional, side, compute, formula)
        return compute

    return _register
