"""One number fitted to some rows, others predicted with it: no row is predicted with a number that saw it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

Model = Callable[[int, float], float]
"""The prediction of a row, by its place, at a value of the parameter; monotonic in the parameter."""
STEPS = 60
"""Halvings of the interval: more than double precision has."""


@dataclass(frozen=True)
class HeldOut:
    """Predictions of all rows."""

    predicted: tuple[float, ...]
    parameters: tuple[float, ...]
    """Each row's: fitted to the rows of the other folds."""


def fitted(
    model: Model, published: Sequence[float], rows: Sequence[int], between: tuple[float, float]
) -> float:
    """The parameter at which the mean of ln(predicted / published) over `rows` is 0, by bisection.

    That is the one parameter of least squared error if a model scales with it, and of little bias if not.
    Raises ValueError if the mean has the same sign at both ends of `between`, or there are no rows.
    """
    low, high = between

    def bias(parameter: float) -> float:
        return sum(log(model(row, parameter) / published[row]) for row in rows) / len(rows)

    if not rows:
        raise ValueError("no rows to fit a parameter to; give at least 1")
    rising = bias(high) > bias(low)
    if (bias(low) > 0) == (bias(high) > 0):
        wrong = (
            f"predictions are {bias(low):+.2f} at {low} and {bias(high):+.2f} at {high} off, in logarithms"
        )
        raise ValueError(f"{wrong}; give an interval over which they change sides")
    for _ in range(STEPS):
        middle = (low + high) / 2
        if (bias(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def held_out(
    model: Model, published: Sequence[float], folds: Sequence[Sequence[int]], between: tuple[float, float]
) -> HeldOut:
    """Each fold predicted with the parameter that is fitted to all others."""
    predicted, parameters = [0.0] * len(published), [0.0] * len(published)
    for fold in folds:
        others = [row for other in folds if other is not fold for row in other]
        parameter = fitted(model, published, others, between)
        for row in fold:
            predicted[row], parameters[row] = model(row, parameter), parameter
    return HeldOut(tuple(predicted), tuple(parameters))


def halves(rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Every other row, from the first, and from the second."""
    return tuple(range(0, rows, 2)), tuple(range(1, rows, 2))


def singles(rows: int) -> tuple[tuple[int, ...], ...]:
    """Each row alone: leave one out."""
    return tuple((row,) for row in range(rows))
