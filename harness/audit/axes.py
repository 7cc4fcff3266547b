"""What the completions of a spec range over: axes, and the grid that they span.

An axis is an unknown leaf of the architecture, a leaf that some claim states (so that no claim supports
itself), an entry of [training] or [serving] (a list holds the values that are tried), an assumption, or a
*link*: a count of the architecture (parameters in total, or active) in a block that takes it as given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from harness.spec import Leaf, Spec, SpecError
from harness.spec.errors import sentence

Numbers: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Axis:
    """The values of one variable: listed, or factors on another axis and literals beside them."""

    name: str
    """"architecture.d_model", "training.gpus", "parameters.total"."""
    values: tuple[float, ...]
    of: str | None = None
    also: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.values) + len(self.also)


@dataclass(frozen=True)
class Grid:
    """Arrays that broadcast to `shape`, one for each axis; `feasible` is False where no model exists."""

    shape: tuple[int, ...]
    values: Mapping[str, Numbers]
    feasible: NDArray[np.bool_]

    def at(self, index: NDArray[np.intp]) -> dict[str, Numbers]:
        """The values at flat positions: one array of len(index) for each axis."""
        if not self.shape:  # no axes: one completion, with nothing to say about it
            return {}
        where = np.unravel_index(index, self.shape)
        return {name: np.broadcast_to(array, self.shape)[where] for name, array in self.values.items()}


def leaf_axis(spec: Spec, leaf: Leaf, *, stated: bool) -> Axis:
    """The axis of a leaf: its domain if it is unknown or `stated` by a claim, else its one value.

    Raises SpecError if the leaf has to range over something that is not a number.
    """
    name = f"architecture.{leaf.path}"
    domain = leaf.domain
    if domain is None or not (stated or leaf.status == "unknown"):
        return Axis(name, _numbers(spec, leaf, [leaf.value]))
    values = _numbers(spec, leaf, domain.values)
    if domain.of is not None:
        return Axis(name, values, f"architecture.{domain.of}", _numbers(spec, leaf, domain.also))
    own = () if leaf.value is None else _numbers(spec, leaf, [leaf.value])
    return Axis(name, tuple(dict.fromkeys((*values, *own))))


def _numbers(spec: Spec, leaf: Leaf, values: Iterable[Any]) -> tuple[float, ...]:
    values = list(values)
    if not all(isinstance(value, (bool, int, float)) for value in values):
        wrong = "ranges over values that are not numbers, which the audit cannot compute with"
        raise SpecError(
            sentence(spec.path, leaf.line, f"architecture.{leaf.path}", wrong, "give it one value")
        )
    return tuple(float(value) for value in values)


SHARES = frozenset(
    f"assumptions.{name}" for name in ("acceptance", "cache_fill", "load", "matmul_efficiency")
)
"""Assumptions that are parts of a whole."""


def _assumed(spec: Spec, name: str) -> tuple[float, ...]:
    one = spec.assumptions[name.removeprefix("assumptions.")]
    beyond = [value for value in one.values if name in SHARES and not 0 <= value <= 1]
    if beyond:
        raise SpecError(sentence(spec.path, one.line, name, f"{beyond[0]:g} is no share", "give 0 to 1"))
    return one.values


def table_axis(spec: Spec, name: str) -> Axis | None:
    """The axis of an entry of [training], [serving] or [assumptions]; None if the spec has no such entry."""
    table, _, key = name.partition(".")
    if table == "assumptions":
        return Axis(name, _assumed(spec, name)) if key in spec.assumptions else None
    entry = {"training": spec.training, "serving": spec.serving}[table].get(key)
    if entry is None:
        return None
    values = entry if isinstance(entry, list) else [entry]
    return Axis(name, tuple(float(value) for value in values))


_TOGETHER = {"attention.n_heads", "attention.n_kv_heads", "moe.n_experts", "moe.top_k"}
"""Leaves that have to fit one another, so that one of them cannot be judged without the other."""


def _paths(axes: Iterable[Axis]) -> set[str]:
    return {axis.name.removeprefix("architecture.") for axis in axes}


def architecture_axes(spec: Spec, stated: frozenset[str]) -> tuple[Axis, ...]:
    """Axes of the unknown leaves and of those that claims state (by path), the longest free one first.

    Every axis comes after the one it is a factor of.
    """
    axes = [
        leaf_axis(spec, leaf, stated=leaf.path in stated)
        for leaf in spec.leaves.values()
        if leaf.status == "unknown" or leaf.path in stated
    ]
    known = {f"architecture.{path}": path for path in spec.leaves}
    named = {axis.name for axis in axes}
    axes += [
        leaf_axis(spec, spec.leaves[known[a.of]], stated=False) for a in axes if a.of and a.of not in named
    ]
    axes += [
        leaf_axis(spec, spec.leaves[path], stated=False)
        for path in _TOGETHER & set(spec.leaves) - _paths(axes)
    ]
    return ordered(axes)


def ordered(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """The longest free axis first, and every one after that which it is a factor of, which is among them."""
    waiting = {axis.name: axis for axis in axes}
    free = sorted((axis for axis in waiting.values() if axis.of is None), key=len, reverse=True)
    placed = {axis.name: axis for axis in free}
    while len(placed) < len(waiting):
        placed |= {name: one for name, one in waiting.items() if one.of in placed and name not in placed}
    return tuple(placed.values())


def chunks(axes: Sequence[Axis]) -> Iterable[Grid]:
    """The grid over all axes, in slices along the first one, so that each fits a processor's cache."""
    if not axes:
        yield Grid((), {}, np.array(True))
        return
    first, rest = axes[0], axes[1:]
    size = 1
    for axis in rest:
        size *= len(axis)
    step = max(1, 200_000 // size)
    for start in range(0, len(first), step):
        yield _grid([Axis(first.name, first.values[start : start + step]), *rest])


def _grid(axes: Sequence[Axis]) -> Grid:
    values: dict[str, Numbers] = {}
    feasible = np.array(True)
    for place, axis in enumerate(axes):
        shape = tuple(len(axis) if i == place else 1 for i in range(len(axes)))
        if axis.of is None:
            values[axis.name] = np.array(axis.values).reshape(shape)
            continue
        base = values[axis.of]
        options = [base * factor for factor in axis.values] + [np.full_like(base, also) for also in axis.also]
        values[axis.name] = np.concatenate(options, axis=place)
        # A fraction is no dimension, and a literal that equals a factor's value is the same completion twice.
        fit = [
            (one == np.floor(one)) & ~np.any([one == other for other in options[:i]], axis=0)
            for i, one in enumerate(options)
        ]
        feasible = feasible & np.concatenate(fit, axis=place)
    return Grid(tuple(len(axis) for axis in axes), values, feasible & _buildable(values))


def _buildable(values: Mapping[str, Numbers]) -> NDArray[np.bool_]:
    """What `Architecture` demands of leaves together."""
    fits = np.array(True)
    heads, groups = (
        values.get("architecture.attention.n_heads"),
        values.get("architecture.attention.n_kv_heads"),
    )
    if heads is not None and groups is not None:
        fits = fits & (np.mod(heads, groups) == 0)
    experts, top_k = values.get("architecture.moe.n_experts"), values.get("architecture.moe.top_k")
    if experts is not None and top_k is not None:
        fits = fits & (top_k <= experts)
    return fits
