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
    experts: float = 1.0
    """Of `compute`, the share that the grouped matrix products of routed experts reach: few tokens for each
    expert, an uneven load, gathering and scattering."""
    cache: float = 1.0
    """Of `memory`, the share that reading keys and values reaches: many short pieces, not one long one.
    Inference alone, as the seconds per kernel, launch and sequence."""
    latency: float = 1.0
    """Of a link's latency, what a collective waits for."""
    kernel_seconds: float = 0.0
    """Per kernel of `harness.theory.kernels`: draining the last one, starting, filling the chip again."""
    launch_seconds: float = 0.0
    """More per kernel of a pass that holds prompts: decode passes are replayed as one captured graph, others
    are launched by the host kernel by kernel."""
    sequence_seconds: float = 0.0
    """Per token that a data-parallel rank samples: what the host does for it."""
    layer_seconds: float = 0.0
    """Per layer and pass, at any size: what launches and synchronisation cost a training step, whose kernels
    are not counted, and inference beyond `kernel_seconds`."""
    pass_seconds: float = 0.0
    """Per pass: scheduling, sampling, what runs on the host."""


IDEAL = Efficiency()
"""The data sheet's own rates: no time here can be beaten."""
