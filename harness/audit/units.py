"""Units that sources print, and what a slip between two of them would make of a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A figure in this unit is `factor` times as many of `dimension`."""

    dimension: str
    factor: float = 1.0


_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}

UNITS: Mapping[str, Unit] = {
    **{f"{prefix}FLOP": Unit("FLOP", factor) for prefix, factor in _PREFIXES.items()},
    **{f"{prefix}FLOP/s": Unit("FLOP/s", factor) for prefix, factor in _PREFIXES.items()},
    **{f"{prefix}B": Unit("B", factor) for prefix, factor in _PREFIXES.items()},
    "FLOP/byte": Unit("FLOP/byte"),
    "USD": Unit("USD"),
    "US cents": Unit("USD", 0.01),
    "$ cents": Unit("USD", 0.01),  # the sign says dollars, the word says cents: taken at its word
    "x": Unit("x"),
    "%": Unit("x", 0.01),
    "parameters": Unit("parameters"),
    "tokens": Unit("tokens"),
    "Ki tokens": Unit("tokens", 1024.0),
    "tokens each of two": Unit("tokens", 2.0),
    "tokens/s": Unit("tokens/s"),
    "days": Unit("days"),
    "GPUs": Unit("GPUs"),
    "layers": Unit("layers"),
    "experts": Unit("experts"),
    "heads": Unit("heads"),
    "ways": Unit("ways"),
    "epochs": Unit("epochs"),
    "stages": Unit("stages"),
}
"""Bytes are decimal, as data sheets print them: 1 GB is 1e9 B."""

COUNTED = frozenset({"layers", "experts", "heads", "ways", "epochs"})
"""Whole things that are few enough to be counted: a figure is only itself, never a rounding."""

_EXCHANGED: Mapping[str, tuple[str, ...]] = {
    "FLOP": ("FLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"),
    "FLOP/s": ("FLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"),
    "B": ("MB", "GB", "TB"),
    "USD": ("USD", "US cents"),
    "x": ("x", "%"),
}


def slips(printed: str, dimension: str) -> tuple[tuple[str, Unit], ...]:
    """Units of `dimension` that a writer may have meant in place of the `printed` one, with their names.

    Within FLOP, bytes and money these are the units in use; elsewhere a thousand times more or less.
    """
    unit = UNITS[printed]
    names = _EXCHANGED.get(unit.dimension)
    if names is None:
        return tuple(
            (f"{label} {printed}", Unit(dimension, unit.factor * factor))
            for label, factor in (("thousand", 1e3), ("thousandths of", 1e-3))
        )
    meant = [(name, UNITS[name]) for name in names if UNITS[name].dimension == dimension]
    return tuple((name, one) for name, one in meant if one != unit)
