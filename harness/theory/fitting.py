"""Whether a layout fits the memory of a device: the stage that needs most, and the largest batch there.

Numbers of a layout may be arrays that broadcast, or dimensions of the architecture, but not both. Layouts of
equal depth (stages and chunks) are evaluated together, a few stages of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from harness.spec.architecture import Architecture
from harness.spec.errors import SpecError
from harness.spec.hardware import Hardware
from harness.theory.layout import Layout
from harness.theory.memory import LatentCache
from harness.theory.precision import Precision
from harness.theory.sharding import Partition, least, telling_stages
from harness.theory.states import MIXED_ADAM, Memory, States, serving_memory, training_memory

_NUMBERS = tuple(part.name for part in fields(Layout) if part.type == "Any")
_PARTS = tuple(part.name for part in fields(Memory))
Parts = dict[str, Any]
"""Results by name: numbers, or arrays of one shape."""


def worst_training_memory(
    architecture: Architecture,
    layout: Layout,
    *,
    context: Any,
    microbatches: Any,
    states: States = MIXED_ADAM,
    partition: Partition = "middle",
    dropout: bool = False,
    width: Any = 2,
    gated_kept: int = 4,
) -> Memory:
    """`training_memory` of the stage that needs most, elementwise over arrays in the layout."""

    def at(one: Layout, stage: int, given: Mapping[str, Any]) -> Memory:
        return training_memory(
            architecture,
            one,
            stage=stage,
            states=states,
            partition=partition,
            dropout=dropout,
            width=width,
            gated_kept=gated_kept,
            **given,
        )

    given = {"context": context, "microbatches": microbatches}
    return _worst_of(architecture, layout, given, partition, at)


def worst_serving_memory(
    architecture: Architecture,
    layout: Layout,
    precision: Precision,
    *,
    batch: Any,
    context: Any,
    tokens: Any = None,
    partition: Partition = "middle",
    mla: LatentCache = "latent",
) -> Memory:
    """`serving_memory` of the stage that needs most, elementwise over arrays in the layout."""

    def at(one: Layout, stage: int, given: Mapping[str, Any]) -> Memory:
        return serving_memory(
            architecture, one, precision, stage=stage, partition=partition, mla=mla, **given
        )

    given = {"batch": batch, "context": context} | ({} if tokens is None else {"tokens": tokens})
    return _worst_of(architecture, layout, given, partition, at)


def _worst_of(
    architecture: Architecture,
    layout: Layout,
    given: Mapping[str, Any],
    partition: Partition,
    at: Callable[[Layout, int, Mapping[str, Any]], Memory],
) -> Memory:
    def worst(one: Layout, some: Mapping[str, Any]) -> Parts:
        first, *others = (at(one, stage, some) for stage in telling_stages(architecture, one, partition))
        found = {name: getattr(first, name) for name in _PARTS}
        for other in others:
            more = other.total > sum(found.values())
            for name in _PARTS:
                found[name] = _chosen(more, getattr(other, name), found[name])
        return found

    return Memory(**_by_depth(layout, given, worst))


def _chosen(whether: Any, then: Any, otherwise: Any) -> Any:
    if isinstance(whether, np.ndarray):
        return np.where(whether, then, otherwise)
    return then if whether else otherwise


def _by_depth(
    layout: Layout, given: Mapping[str, Any], at: Callable[[Layout, Mapping[str, Any]], Parts]
) -> Parts:
    """`at` for the elements of each pair of p and v in turn, put together again."""
    numbers = {name: getattr(layout, name) for name in _NUMBERS if getattr(layout, name) is not None}
    every = {**numbers, **given}
    if not any(isinstance(number, np.ndarray) for number in every.values()):
        return at(layout, given)
    arrays = dict(zip(every, np.broadcast_arrays(*every.values()), strict=True))
    shape = arrays["pipeline_parallel"].shape
    flat = {name: array.ravel() for name, array in arrays.items()}
    depths = np.stack([flat.pop("pipeline_parallel"), flat.pop("virtual_stages")])
    pairs, pair = np.unique(depths, axis=1, return_inverse=True)
    parts: Parts = {}
    for i, (stages, chunks) in enumerate(pairs.T):
        here = np.flatnonzero(pair.ravel() == i)
        some: dict[str, Any] = {name: array[here] for name, array in flat.items()}
        rest = {name: some.pop(name) for name in given}
        one = replace(layout, pipeline_parallel=int(stages), virtual_stages=int(chunks), **some)
        for name, part in at(one, rest).items():
            parts.setdefault(name, np.empty(depths.shape[1]))[here] = part
    return {name: array.reshape(shape) for name, array in parts.items()}


def largest_batch(
    architecture: Architecture,
    layout: Layout,
    precision: Precision,
    hardware: Hardware,
    *,
    context: Any,
    usable: float = 1.0,
    partition: Partition = "middle",
    mla: LatentCache = "latent",
) -> Any:
    """The most sequences of `context` tokens that one data-parallel rank can serve at once; 0: none fits.

    Memory grows by the same for each of them, so this is a quotient, the least of all stages.
    """
    room = usable * hardware.memory.value

    def least_of(one: Layout, given: Mapping[str, Any]) -> Parts:
        found: Any = np.inf
        for stage in telling_stages(architecture, one, partition):
            none, some = (
                serving_memory(
                    architecture, one, precision, batch=n, stage=stage, partition=partition, mla=mla, **given
                ).total
                for n in (0, 1)
            )
            found = least(found, np.floor((room - none) / (some - none)))
        return {"batch": np.maximum(found, 0)}

    batch = _by_depth(layout, {"context": context}, least_of)["batch"]
    return batch if isinstance(batch, np.ndarray) else int(batch)


def largest_microbatch(
    architecture: Architecture,
    layout: Layout,
    hardware: Hardware,
    *,
    context: Any,
    microbatches: Any,
    usable: float = 1.0,
    states: States = MIXED_ADAM,
    partition: Partition = "middle",
    dropout: bool = False,
    gated_kept: int = 4,
) -> Any:
    """The most sequences of a microbatch with which training fits; otherwise as `largest_batch`.

    The microbatch of `layout` itself is not read.
    """
    room = usable * hardware.memory.value

    def least_of(one: Layout, given: Mapping[str, Any]) -> Parts:
        found: Any = np.inf
        for stage in telling_stages(architecture, one, partition):
            none, some = (
                training_memory(
                    architecture,
                    replace(one, microbatch=n),
                    stage=stage,
                    states=states,
                    partition=partition,
                    dropout=dropout,
                    gated_kept=gated_kept,
                    **given,
                ).total
                for n in (0, 1)
            )
            found = least(found, np.floor((room - none) / (some - none)))
        return {"microbatch": np.maximum(found, 0)}

    given = {"context": context, "microbatches": microbatches}
    found = _by_depth(replace(layout, microbatch=1), given, least_of)["microbatch"]
    return found if isinstance(found, np.ndarray) else int(found)


def refuse(need: Memory, hardware: Hardware, usable: float = 1.0) -> None:
    """Raise SpecError, with the numbers of one layout, where a rank's memory does not fit a device.

    `usable`: the share of the device's memory that is there for what `Memory` counts.
    """
    room = usable * hardware.memory.value
    if need.total <= room:
        return
    parts = sorted(((getattr(need, name), name) for name in _PARTS), reverse=True)
    listed = ", ".join(f"{name} {size / 1e9:,.1f} GB" for size, name in parts if size > 0)
    wrong = (
        f"one rank needs {need.total / 1e9:,.1f} GB ({listed}), and {hardware.name} has {room / 1e9:,.1f} GB"
    )
    raise SpecError(f"{wrong} for it; {_advice(parts[0][1], trains=need.gradients > 0)}")


def _advice(part: str, *, trains: bool) -> str:
    """What makes the largest part smaller."""
    return {
        "weights": "give more tensor, pipeline or expert ways, or a smaller format",
        "gradients": "give more tensor or pipeline ways, or ZeRO stage 2",
        "optimizer": "give ZeRO stage 1, or more data-parallel ranks to shard over",
        "activations": "give a smaller microbatch, or recompute more"
        if trains
        else "give a smaller chunk of prompts, or fewer sequences at once",
        "cache": "give a smaller batch or context, or more ways that divide the cache",
        "transient": "gather fewer blocks at once, or give more tensor ways",
    }[part]
