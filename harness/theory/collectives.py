"""How long collectives take on a hierarchical network: alpha-beta times.

Letters: n ranks, S payload in bytes, a latency of one message in seconds, B bytes/s of one rank in one
direction. The payload is the whole buffer: what each rank holds before an all-reduce, reduce-scatter or
all-to-all (its own part included), and after an all-gather; what is sent point to point.

                  ring                          tree                            in-network
  all-reduce      2 (n-1) a + 2 (n-1)/n S/B     2 log2(n) a + 2 S/B             2 a + S/B
  all-gather      (n-1) a + (n-1)/n S/B         log2(n) a + (n-1)/n S/B         a + (n-1)/n S/B
  reduce-scatter  the same                      the same                        the same
  all-to-all      the same, pairwise            log2(n) (a + S / (2 B))         -

with log2 rounded up. Ring: Patarasuk and Yuan 2009 (doi 10.1016/j.jpdc.2008.09.002). Tree: the double binary
tree of Sanders, Speck and Traeff 2009 (doi 10.1016/j.parco.2009.09.001), pipelined; recursive doubling and
halving for gather and scatter (exact where n is a power of two) and Bruck's all-to-all: Thakur, Rabenseifner
and Gropp 2005 (doi 10.1177/1094342005051521), sections 3 and 4. In-network: switches add and multiply
messages (SHARP, Graham et al. 2016), so that a rank sends its buffer once and receives the sum once.

Numbers may be arrays that broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from harness.spec.hardware import Hardware

Collective = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "point-to-point"]
Algorithm = Literal["ring", "tree", "in-network"]


class Joins(Protocol):
    """What a link is to a collective: `harness.spec.hardware.Link`, or a `Wire`."""

    @property
    def bandwidth(self) -> float:
        """Bytes/s of one rank in one direction."""

    @property
    def latency(self) -> float:
        """Seconds before the first byte."""


@dataclass(frozen=True)
class Wire:
    """A link of one's own figures."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other, and how many of them an island joins."""

    ranks: Any
    local: Any

    @property
    def islands(self) -> Any:
        """Islands that the ranks lie on."""
        return -(-self.ranks // self.local)


def place(ranks: Any, stride: Any, island: Any) -> Group:
    """The group of every `stride`-th device, on islands of `island` devices that are filled in order."""
    inside = np.maximum(island // np.asarray(stride), 1)
    return Group(ranks, np.minimum(ranks, inside))


def sent_bytes(kind: Collective, ranks: Any, payload: Any) -> Any:
    """Bytes that one rank has to send where nothing but ranks adds: no algorithm of theirs sends fewer.

    Point to point: the payload. Else (n-1)/n of it, and twice that for an all-reduce, which is a
    reduce-scatter and an all-gather (Patarasuk and Yuan 2009, theorem 1).
    """
    if kind == "point-to-point":
        return payload * (np.asarray(ranks) > 1)
    share = (ranks - 1) / ranks
    return (2 if kind == "all-reduce" else 1) * share * payload


def seconds(kind: Collective, ranks: Any, payload: Any, link: Joins, algorithm: Algorithm = "ring") -> Any:
    """Time of one collective over one link by one algorithm; 0 for a single rank.

    Raises ValueError where there is no such algorithm: no switch adds in an all-to-all.
    """
    alone = np.asarray(ranks) <= 1
    rounds = np.ceil(np.log2(np.maximum(ranks, 1)))
    wire, latency = payload / link.bandwidth, link.latency
    through = (ranks - 1) / ranks * wire
    passes = 2 if kind == "all-reduce" else 1
    if kind == "point-to-point":
        found = latency + wire
    elif algorithm == "ring":
        found = passes * ((ranks - 1) * latency + through)
    elif algorithm == "tree" and kind == "all-to-all":
        found = rounds * (latency + wire / 2)
    elif algorithm == "tree":
        found = passes * rounds * latency + (2 * wire if kind == "all-reduce" else through)
    elif algorithm == "in-network" and kind != "all-to-all":
        found = passes * latency + (wire if kind == "all-reduce" else through)
    else:
        raise ValueError(f"no {algorithm} algorithm for {kind}")
    return np.where(alone, 0.0, found)[()]


def fastest(kind: Collective, ranks: Any, payload: Any, link: Joins, in_network: bool = False) -> Any:
    """Time of one collective over one link by its fastest algorithm."""
    found = seconds(kind, ranks, payload, link, "ring")
    if kind == "point-to-point":
        return found
    found = np.minimum(found, seconds(kind, ranks, payload, link, "tree"))
    if in_network and kind != "all-to-all":
        found = np.minimum(found, seconds(kind, ranks, payload, link, "in-network"))
    return found


def on_islands(kind: Collective, group: Group, payload: Any, hardware: Hardware, share: float = 1.0) -> Any:
    """Time of one collective of a group on this hardware, each link at `share` of its bytes/s.

    Inside one island by the fastest algorithm. Over several, each rank takes 1/local of the payload to its
    peers on the other islands over its own network link: an all-reduce is a reduce-scatter inside, an
    all-reduce of the parts between, an all-gather inside (as BlueConnect, Cho et al. 2019). An all-to-all
    goes straight, both kinds of link busy at once, or first between and then inside, whichever is faster.
    Point to point between islands takes the network.
    """
    inside = Wire(hardware.island_link.bandwidth * share, hardware.island_link.latency)
    between = Wire(hardware.network_link.bandwidth * share, hardware.network_link.latency)
    local, islands, reduces = group.local, group.islands, hardware.in_network
    one = np.asarray(islands) <= 1
    if kind == "point-to-point":
        near, far = seconds(kind, group.ranks, payload, inside), seconds(kind, group.ranks, payload, between)
        return np.where(one, near, far)[()]
    near = fastest(kind, local, payload, inside, reduces)
    if np.all(one):
        return near
    if kind == "all-to-all":
        part = payload / group.ranks
        straight = np.maximum(
            fastest(kind, local, part * local, inside),
            (group.ranks - local) * (between.latency + part / between.bandwidth),
        )
        far = np.minimum(straight, fastest(kind, islands, payload, between) + near)
    else:
        far = fastest(kind, islands, payload / local, between)
        if kind == "all-reduce":
            far = far + fastest("reduce-scatter", local, payload, inside, reduces)
            far = far + fastest("all-gather", local, payload, inside, reduces)
        else:
            far = far + near
    return np.where(one, near, far)[()]


def between_share(group: Group) -> Any:
    """Of what a rank sends evenly to all ranks, itself among them, the share that leaves its island."""
    return 1 - group.local / group.ranks


def away_share(group: Group) -> Any:
    """Of what a rank sends evenly to all ranks, itself among them, the share that leaves the rank."""
    return 1 - 1 / group.ranks
