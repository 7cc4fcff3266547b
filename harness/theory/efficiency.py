"""What hardware reaches of its data sheet: the physical constants between a roofline and a clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet's rates, and times that no rate explains."""

    compute: float = 1.0
    """Share of peak FLOP/s that large matrix products reach."""
    memory: float = 1.0
    """Share of the memory's bytes/s that streaming weights and caches reaches."""
    network: float = 1.0
    """Share of a link's bytes/s that a collective reaches."""
    layer_seconds: float = 0.0
    """Per layer and pass, at any size: kernel launches and the synchronisation between them."""
    pass_seconds: float = 0.0
    """Per pass: scheduling, sampling, what runs on the host."""


IDEAL = Efficiency()
"""The data sheet's own rates: no time here can be beaten."""
