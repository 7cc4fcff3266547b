"""Serving simulated in time, iteration by iteration, on the step times of theory.

Letters: N requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.planning.scheduling import ENDLESS, Cache, Floats, Policy, StepTime
from harness.planning.server import Server
from harness.planning.workload import Workload
from harness.spec.errors import SpecError


@dataclass(frozen=True, eq=False)
class Record:
    """What happened to each request, and to the server as a whole."""

    load: Workload
    policy: Policy
    sent: Floats
    """[N] seconds, as the next three."""
    admitted: Floats
    first: Floats
    """The end of the iteration that gave the first token."""
    ended: Floats
    rounds: NDArray[np.int64]
    """[N] iterations in which it decoded, each by one pass of the target."""
    iterations: int
    running: int
    """Sum over iterations of requests that hold a slot and have not ended."""
    busy: float
    """Seconds in iterations."""
    filling: float
    """Of them, what iterations took longer for the prompts in them."""
    written: float
    """Integral over them of the share of the cache's room that keys and values fill."""
    reserved: float
    """The largest share of the room that was promised to requests."""


def simulate(
    load: Workload,
    step: StepTime,
    policy: Policy,
    cache: Cache = ENDLESS,
    *,
    seed: int = 0,
    stride: int | None = None,
    ended: Callable[[], object] = lambda: None,
) -> Record:
    """Serve all requests; `ended` is called after each.

    seed: of the drafts that stand. stride: so many iterations are computed together at most, with the same
    result whatever it is. Raises SpecError where a request fits into no cache, however empty.
    """
    need = cache.held(load.prompts + load.outputs)
    if (most := float(need.max())) > cache.room:
        worst = int((load.prompts + load.outputs)[need.argmax()])
        raise SpecError(
            f"a request of {worst:,} tokens takes {most / 1e9:,.3g} GB of cache, and there is room for "
            f"{max(cache.room, 0) / 1e9:,.3g} GB; give shorter requests, or more devices"
        )
    server = Server(load, step, policy, cache, seed, stride or 2**62, ended)
    server.serve()
    return Record(
        load=load,
        policy=policy,
        sent=np.array(server.sent),
        admitted=np.array(server.admitted),
        first=np.array(server.first),
        ended=np.array(server.ended),
        rounds=np.array(server.rounds),
        iterations=server.iterations,
        running=server.running,
        busy=server.busy,
        filling=server.filling,
        written=server.written / cache.room,
        reserved=server.peak / cache.room,
    )
