"""What a pass of inference sends between ranks, and how long that takes.

Letters: T tokens of a pass, D d_model, K top_k; t, p, d, c, e, w the ways of tensor, pipeline, data, context
and expert parallelism, and those that share an expert in width. Shapes: [T, D] activations.

  all-reduce  after attention and after the feed-forward network (once with a parallel block), [T / (d c), D]
              over t (Shoeybi et al. 2019, arXiv 1909.08053, section 3), by the fastest algorithm of its size
  exchange    where e w reaches beyond the t ranks: each rank sends its share of the tokens to every rank that
              holds one of its experts, e (1 - (1 - 1/e)^K) of them on average (experts taken as drawn
              with replacement: up to 3 % too few), and gets as much back
              (GShard, arXiv 2006.16668, section 3.1), then the t ranks gather the whole: in place of the
              feed-forward's all-reduce, where no shared expert needs that too. A token goes to a rank once,
              whoever wants it there, and the messages to all ranks are under way at the same time
  hand-over   [T / (d c), D] / t from stage to stage, p - 1 times
  ring        keys and values of T / (d c) tokens go round the c ranks (Liu et al. 2023, arXiv 2310.01889),
              key/value heads divided over t

Each is a line in T: seconds at no size, and seconds for each token. T is as `passes.Pass.spread` has it, so
that T / (d c) is what the busiest rank sends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.spec.architecture import Architecture
from harness.spec.hardware import Hardware
from harness.theory import parameters
from harness.theory.collectives import Algorithm, Collective, Wire, place, seconds
from harness.theory.efficiency import Efficiency
from harness.theory.layout import Layout
from harness.theory.memory import cached_width
from harness.theory.precision import Precision, stored_bytes
from harness.theory.sharding import group_ways, most

Line = tuple[Any, Any]
"""Seconds at no size, and for each token of the pass."""


@dataclass(frozen=True)
class Links:
    """Seconds of communication of a pass, all layers together."""

    reductions: tuple[Line, ...]
    """All all-reduces, by each algorithm: the fastest is taken."""
    others: Line
    """Exchanges and rings."""
    handovers: Line
    arrays: bool

    def inside(self, tokens: Any, smaller: Callable[..., Any]) -> Any:
        """Seconds inside of stages; `smaller` is min or np.minimum."""
        (fixed, slope), *others = self.reductions
        fastest = fixed + tokens * slope
        for fixed, slope in others:
            fastest = smaller(fastest, fixed + tokens * slope)
        return fastest + self.others[0] + tokens * self.others[1]

    def seconds(self, tokens: Any, smaller: Callable[..., Any]) -> Any:
        """The same with the hand-overs between stages."""
        return self.inside(tokens, smaller) + self.handovers[0] + tokens * self.handovers[1]


def links(
    architecture: Architecture,
    hardware: Hardware,
    layout: Layout,
    precision: Precision,
    efficiency: Efficiency,
) -> Links:
    """What a layout sends; numbers of the layout may be arrays."""
    ways, stages, contexts = layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel
    shares = layout.data_parallel * contexts
    layers, routed = architecture.n_layers, parameters.n_moe_layers(architecture)
    token = architecture.d_model * stored_bytes(precision.activations)
    fast = hardware.island_link.bandwidth * efficiency.network
    slow = hardware.network_link.bandwidth * efficiency.network
    near, far = (link.latency * efficiency.latency for link in (hardware.island_link, hardware.network_link))

    exchanged: Any = 0
    fixed: Any = 0.0
    slope: Any = 0.0
    if architecture.moe is not None:
        ranks, group = layout.expert_parallel, layout.expert_parallel * layout.expert_width_ways
        exchanged = 1 * (group > ways)
        outside = most(1 - hardware.island / group, 0)
        reached = ranks * (1 - (1 - 1 / ranks) ** architecture.moe.top_k) * layout.expert_width_ways
        mine = token / (layout.expert_copies * contexts * group) * reached * (group - 1) / group
        exchange = 2 * mine * most((1 - outside) / fast, outside / slow)
        gather = (ways - 1) / ways * token / shares / fast
        fixed = fixed + routed * exchanged * (2 * _hop(outside > 0, near, far) + near * (ways > 1))
        slope = slope + routed * exchanged * (exchange + gather)
    heads = 1 if architecture.attention.mla is not None else group_ways(architecture, layout)
    entry = cached_width(architecture) * stored_bytes(precision.cache) / (heads * shares)
    around = (contexts - 1) * layers
    inside = ways * contexts <= hardware.island
    fixed = fixed + around * _hop(1 - inside, near, far)
    slope = slope + around * entry * _hop(1 - inside, 1 / fast, 1 / slow)

    spared = architecture.moe is not None and architecture.moe.shared is None
    count = layers * (2 - architecture.parallel_block)
    count = count - routed * exchanged * spared * (1 - architecture.parallel_block)
    reductions = tuple(
        (_plain(count * at_once), _plain(count * token / shares * each))
        for at_once, each in _all_reduces(hardware, ways, efficiency)
    )
    together = most(hardware.island // (ways * shares), 1)  # stages of one island
    leaving = -(-stages // together) - 1
    handovers = (
        _plain((stages - 1 - leaving) * near + leaving * far),
        _plain(token / (ways * shares) * ((stages - 1 - leaving) / fast + leaving / slow)),
    )
    others = (_plain(fixed), _plain(slope))
    numbers = [one for line in (*reductions, others, handovers) for one in line]
    return Links(reductions, others, handovers, any(isinstance(one, np.ndarray) for one in numbers))


def _all_reduces(hardware: Hardware, ways: Any, efficiency: Efficiency) -> list[Line]:
    """Seconds at no size and for each byte of an all-reduce over t ranks, by algorithm of `collectives`.

    Beyond an island: reduce-scatter inside, all-reduce between, all-gather inside. And in one shot, for small
    buffers inside of one: each rank reads those of all others at once, a + (t - 1) S/B.
    """
    group = place(ways, 1, hardware)
    inside, between = (
        Wire(link.bandwidth * efficiency.network, link.latency * efficiency.latency)
        for link in (hardware.island_link, hardware.network_link)
    )
    one = group.islands <= 1
    never = np.where(one, 0.0, np.inf)
    lines: list[Line] = [(inside.latency * (ways > 1) + never, (ways - 1) / inside.bandwidth)]
    # A tree scatters and gathers at the bandwidth of a ring and with less latency; a switch with less still.
    quickest: Algorithm = "in-network" if hardware.in_network else "tree"
    scatter = _line("reduce-scatter", group.local, inside, quickest)
    gather = _line("all-gather", group.local, inside, quickest)
    algorithms: tuple[Algorithm, ...] = ("ring", "tree")
    for algorithm in algorithms:
        near = _line("all-reduce", group.local, inside, algorithm)
        over = _line("all-reduce", group.islands, between, algorithm)
        far = (scatter[0] + over[0] + gather[0], scatter[1] + over[1] / group.local + gather[1])
        lines.append((np.where(one, near[0], far[0]), np.where(one, near[1], far[1])))
    if hardware.in_network:
        fixed, slope = _line("all-reduce", group.local, inside, "in-network")
        lines.append((fixed + never, slope))
    return lines


def _line(kind: Collective, ranks: Any, link: Wire, algorithm: Algorithm = "ring") -> Line:
    """The alpha-beta time of one algorithm as a line in bytes."""
    size = 1e9  # large enough for a slope beside the latency
    fixed = seconds(kind, ranks, 0.0, link, algorithm)
    return fixed, (seconds(kind, ranks, size, link, algorithm) - fixed) / size


def _hop(outside: Any, near: float, far: float) -> Any:
    """One of two numbers, by whether a link leaves the island."""
    return near + (far - near) * outside


def _plain(value: Any) -> Any:
    """A Python float for a scalar of numpy, whose arithmetic is ten times as slow."""
    return value if isinstance(value, np.ndarray) and value.ndim else float(value)
