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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from harness.spec.hardware import Hardware

Collective = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "point-to-point"]
Algorithm = Literal["ring", "tree", "in-network"]


class Joins(Protocol):
    """What a link is to a collective: `harness.spec.hardware.Link`, or a `Wire`."""

    @property
    def bandwidth(self) -> Any:
        """Bytes/s of one rank in one direction."""

    @property
    def latency(self) -> Any:
        """Seconds before the first byte."""


@dataclass(frozen=True)
class Wire:
    """A link of one's own figures."""

    bandwidth: Any
    latency: Any


Time = Callable[[Collective, Any], Any]
"""Seconds of a collective of so many bytes."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other, and how many of them an island joins, and a cluster."""

    ranks: Any
    local: Any
    clustered: Any = None
    """None: all of them."""

    @property
    def islands(self) -> Any:
        """Islands that the ranks lie on."""
        return -(-self.ranks // self.local)

    @property
    def clustered_islands(self) -> Any:
        """Islands of one cluster; None: all of them."""
        return None if self.clustered is None else -(-self.clustered // self.local)


def place(ranks: Any, stride: Any, hardware: Hardware) -> Group:
    """The group of every `stride`-th device, on islands and clusters of devices that are filled in order."""
    inside = [
        None if size is None else np.minimum(ranks, np.maximum(size // np.asarray(stride), 1))
        for size in (hardware.island, hardware.cluster)
    ]
    return Group(ranks, *inside)


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


def on_islands(
    kind: Collective,
    group: Group,
    payload: Any,
    hardware: Hardware,
    share: float = 1.0,
    latency: float = 1.0,
) -> Any:
    """Time of one collective of a group on this hardware, each link at `share` of its bytes/s, and waiting
    `latency` times its own.

    Inside one island by the fastest algorithm, over several as `_two_tiers` says. Where slower links join
    clusters of islands, the islands of one cluster are to the clusters what devices are to islands.
    """
    inside, between = (
        Wire(link.bandwidth * share, link.latency * latency)
        for link in (hardware.island_link, hardware.network_link)
    )
    islands, each, slowest = group.islands, group.clustered_islands, between

    def near(kind: Collective, payload: Any) -> Any:
        return fastest(kind, group.local, payload, inside, hardware.in_network)

    def far(kind: Collective, payload: Any) -> Any:
        return fastest(kind, islands, payload, between)

    if hardware.cluster_link is not None and each is not None:
        slow = Wire(hardware.cluster_link.bandwidth * share, hardware.cluster_link.latency * latency)
        beyond = islands > each
        slowest = Wire(
            np.where(beyond, slow.bandwidth, between.bandwidth),
            np.where(beyond, slow.latency, between.latency),
        )

        def far(kind: Collective, payload: Any) -> Any:
            return _two_tiers(
                kind,
                payload,
                islands,
                each,
                lambda kind, payload: fastest(kind, each, payload, between),
                lambda kind, payload: fastest(kind, -(-islands // each), payload, slow),
                slow,
                shared=True,
            )

    return _two_tiers(kind, payload, group.ranks, group.local, near, far, slowest)


def _two_tiers(
    kind: Collective,
    payload: Any,
    ranks: Any,
    inner: Any,
    near: Time,
    far: Time,
    wire: Joins,
    shared: bool = False,
) -> Any:
    """Time over ranks of which a fast tier joins `inner` at a time: `near` is its time, `far` that between
    its parts, over `wire`.

    Each rank takes 1/inner of the payload to its peers in the other parts: an all-reduce is a reduce-scatter
    inside, an all-reduce of the pieces between, an all-gather inside (as BlueConnect, Cho et al. 2019). An
    all-to-all goes straight, both kinds of link busy at once (in turns, where one port is `shared` by both),
    or first between and then inside, whichever is faster. Point to point between parts takes their link.
    """
    one, inside = np.asarray(ranks) <= inner, near(kind, payload)
    if np.all(one):
        return inside
    if kind == "point-to-point":
        beyond = far(kind, payload)
    elif kind == "all-to-all":
        part = payload / ranks
        straight = (ranks - inner) * (wire.latency + part / wire.bandwidth)
        local = near(kind, part * inner)
        at_once = local + straight if shared else np.maximum(local, straight)
        beyond = np.minimum(at_once, far(kind, payload) + inside)
    elif kind == "all-reduce":
        beyond = near("reduce-scatter", payload) + far(kind, payload / inner) + near("all-gather", payload)
    else:
        beyond = far(kind, payload / inner) + inside
    return np.asarray(np.where(one, inside, beyond))[()]
