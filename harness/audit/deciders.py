"""Which unknown or assumption decides about a figure that holds in some completions only, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from harness.audit.axes import Numbers

Truths = NDArray[np.bool_]


@dataclass(frozen=True)
class Decider:
    """An axis and the values of it at which a figure holds, and at which it does not; both ascending."""

    axis: str
    holds: tuple[float, ...]
    fails: tuple[float, ...]

    @property
    def alone(self) -> bool:
        """Whether this axis alone decides: no value of it is on both sides."""
        return not set(self.holds) & set(self.fails)

    @property
    def turns(self) -> tuple[tuple[float, float], ...]:
        """Neighbouring values between which the figure turns, if the axis decides alone."""
        if not self.alone:
            return ()
        values = sorted((*self.holds, *self.fails))
        yes = set(self.holds)
        return tuple((a, b) for a, b in pairwise(values) if (a in yes) != (b in yes))


@dataclass(frozen=True)
class Pair:
    """Two axes that tell together what no single one does."""

    axis: str
    cases: tuple[tuple[float, Decider], ...]
    """A value of `axis`, and what the other one decides there."""
    share: float
    """Of the completions: those that the two values tell right, where each cell is given to its majority."""

    @property
    def alone(self) -> bool:
        """Whether the two decide: at no pair of values the figure both holds and fails."""
        return all(decider.alone for _, decider in self.cases)


@dataclass(frozen=True)
class Step:
    """One axis that alone, the others as they are, turns what a figure does at one completion."""

    axis: str
    values: tuple[float, ...]
    """Those at which the figure does the other, ascending."""


def steps(axes: Mapping[str, Numbers], holds: Truths, start: int) -> tuple[Step, ...]:
    """Every axis that turns what the figure does at the completion `start`, and at which values."""
    same = {name: array == array[start] for name, array in axes.items()}
    alike = np.sum(list(same.values()), axis=0)
    turned = (alike == len(axes) - 1) & (holds != holds[start])
    found = {name: np.unique(axes[name][turned & ~same[name]]).tolist() for name in axes}
    return tuple(Step(name, tuple(values)) for name, values in found.items() if values)


@dataclass(frozen=True)
class _Varied:
    """An axis that takes several values, and which of them each completion has."""

    name: str
    values: Numbers
    index: NDArray[np.intp]


def deciders(
    axes: Mapping[str, Numbers], holds: Truths, first: Sequence[str]
) -> tuple[Decider | None, Pair | None]:
    """The axis that tells best whether a figure holds, and, if it does not alone, the best pair of axes.

    Of equals those named `first`, then the first. None where nothing varies.
    """
    order = sorted(axes, key=lambda name: name not in first)
    varied = [_Varied(name, *np.unique(axes[name], return_inverse=True)) for name in order]
    varied = [one for one in varied if len(one.values) > 1]
    if not varied:
        return None, None
    best = min(varied, key=lambda one: _wrong(one.index, holds))
    decider = _decider(best, holds, np.ones_like(holds))
    if decider.alone or len(varied) < 2:
        return decider, None
    pairs = sorted(combinations(varied, 2), key=lambda pair: best not in pair)
    outer, inner = min(pairs, key=lambda pair: _wrong(_cells(*pair), holds))
    if len(outer.values) > len(inner.values):
        outer, inner = inner, outer
    wrong = _wrong(_cells(outer, inner), holds)
    cases = [
        (value, _decider(inner, holds, outer.index == i)) for i, value in enumerate(outer.values.tolist())
    ]
    return decider, Pair(outer.name, tuple(cases), 1 - wrong / len(holds))


def _cells(one: _Varied, other: _Varied) -> NDArray[np.intp]:
    return one.index * len(other.values) + other.index


def _wrong(index: NDArray[np.intp], holds: Truths) -> int:
    """Completions in the minority of their cell."""
    yes, all_ = np.bincount(index[holds], minlength=int(index.max()) + 1), np.bincount(index)
    return int(np.minimum(yes, all_ - yes).sum())


def _decider(one: _Varied, holds: Truths, among: Truths) -> Decider:
    yes, no = np.unique(one.index[among & holds]), np.unique(one.index[among & ~holds])
    return Decider(one.name, tuple(one.values[yes].tolist()), tuple(one.values[no].tolist()))
