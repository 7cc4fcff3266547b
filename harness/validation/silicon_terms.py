"""What each measured row would take at the data sheet's rates, term by term, so that a fit is quick.

Letters: R rows, A algorithms of an all-reduce. Arrays of [R] or [A, R]; all seconds unless said.

A pass's time is linear in the reciprocals of the efficiencies but for maxima and minima between its terms,
so that the terms are taken once from `harness.theory.roofline` at ideal rates and put together for any
constants: what `Pricer.of` gives with those constants, for all rows at once (tested on every row).

TPOT. Clients keep C requests in flight, of which n run, as many as fit the memory. Each holds its place for N
passes, so that (n - 1) / N prompts of others join each pass on average: one prompt every N / (n - 1) passes,
or several in each. TPOT is the mean of the passes with and without. Data-parallel ranks read a prompt each
in the same pass, d times as seldom.

TTFT. A request is taken in, waits for some passes, then for prompts that came with it and its own. All C
clients begin at once and send 10 C requests in all (scripts of the serving benchmark), so that at least a
tenth of them wait for half of the others, 0.05 C prompts on average; more where an engine serves all waiting
prompts at once. Data-parallel ranks share those that wait, and no prompt is divided over them. Queues for
memory are left out: what a request of C - n waits for would be N / n passes, which the rows' times do not
show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.spec import load
from harness.spec.hardware import load_hardware
from harness.theory.kernels import kernels
from harness.theory.layout import Layout
from harness.theory.passes import Pass, decode, prefill
from harness.theory.roofline import pricer
from harness.theory.states import serving_memory
from harness.validation.silicon_constants import ENGINES, Constants
from harness.validation.silicon_rows import Row

Floats = NDArray[np.float64]
USABLE = 0.9
"""Share of a device's memory that engines give to weights and caches: vLLM's --gpu-memory-utilization in the
serving benchmark's own scripts (InferenceMAX), and near what the other engines are told."""
WIDTHS = tuple(
    f"{kind}_parallel" for kind in ("tensor", "pipeline", "data", "expert", "expert_tensor", "context")
)


@dataclass(frozen=True)
class Passes:
    """Terms of one kind of pass."""

    computing: tuple[Floats, ...]
    """Of matrices, experts, attention and logits."""
    reading: tuple[Floats, ...]
    tokens: Floats
    """Number of new tokens."""
    sampled: Floats
    """Number of tokens that one data-parallel rank samples."""
    prompts: Floats
    """1 where it holds prompts, else 0."""


@dataclass(frozen=True)
class Terms:
    """All rows."""

    decoding: Passes
    mixed: Passes
    """Decoding, and the prompts that join."""
    prompt: Passes
    """One prompt of each data-parallel rank alone."""
    mixing: Floats
    """Share of passes that prompts join."""
    reductions: tuple[tuple[Floats, Floats], ...]
    """Of each algorithm: at no size, and for each token."""
    others: tuple[Floats, Floats]
    kernels: Floats
    engine: NDArray[np.int_]
    running: Floats
    """Number of sequences that run at once."""
    ranks: Floats
    """Data-parallel ranks."""
    waiting: Floats
    """Number of requests in flight that do not fit the memory."""
    holds: NDArray[np.bool_]
    """Whether the stated layout holds the weights."""

    def seconds(self, passes: Passes, c: Constants) -> Floats:
        """One pass of each row."""
        computes = (c.compute, c.compute * c.experts, c.compute, c.compute)
        reads = (c.memory, c.memory, c.memory * c.cache, c.memory)
        kernel = np.array([getattr(c, f"kernel_{name}") for name in ENGINES])[self.engine]
        total = self.kernels * (kernel + passes.prompts * c.launch_seconds)
        total = total + passes.sampled * c.sequence_seconds
        for computing, reading, at, by in zip(passes.computing, passes.reading, computes, reads, strict=True):
            total = total + np.maximum(computing / at, reading / by)
        lines = [fixed * c.latency + passes.tokens * slope / c.network for fixed, slope in self.reductions]
        total = total + np.minimum.reduce(lines)
        total = total + self.others[0] * c.latency + passes.tokens * self.others[1] / c.network
        return np.asarray(total)

    def tpot(self, c: Constants) -> Floats:
        """Mean seconds of a pass, which is the time of an output token."""
        alone, joined = self.seconds(self.decoding, c), self.seconds(self.mixed, c)
        return alone + self.mixing * (joined - alone)

    def ttft(self, c: Constants, tpot: Floats, own: Floats) -> Floats:
        """Seconds to the first token, given those of an output token and of a pass of one prompt alone."""
        before = np.array([getattr(c, f"burst_{name}") for name in ENGINES])[self.engine] * self.running
        return np.asarray(c.request_seconds + c.passes * tpot + own * (1 + before / self.ranks))


def terms(rows: Sequence[Row]) -> Terms:
    """Of rows in any order."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row.spec, row.system, row.precision.name), []).append(index)
    parts = [_group([rows[i] for i in group]) for group in groups.values()]
    order = np.argsort(np.concatenate([np.array(group) for group in groups.values()]), kind="stable")
    joined: Terms = _joined(parts, order)
    return joined


def of_rows(all_rows: Terms, chosen: NDArray[np.int_]) -> Terms:
    """The terms of some rows by their indices."""
    some: Terms = _joined([all_rows], chosen)
    return some


def _group(rows: Sequence[Row]) -> Terms:
    """Of rows that share spec, hardware and formats."""
    one = rows[0]
    architecture, hardware = load(one.spec).architecture, load_hardware(one.system)
    widths: dict[str, Any] = {n: np.array([getattr(row.layout, n) for row in rows]) for n in WIDTHS}
    layout = Layout(**widths)
    priced = pricer(architecture, hardware, layout, one.precision)
    clients, prompt, output = (
        np.array([getattr(row, name) for row in rows]) for name in ("concurrency", "prompt", "output")
    )
    data = layout.data_parallel
    empty, full = (
        serving_memory(
            architecture, layout, one.precision, batch=batch, context=prompt + output / 2, tokens=1
        )
        for batch in (0, 1)
    )
    room = USABLE * hardware.memory.value - empty.total
    slots = np.floor(room / full.cache) * data
    holds = slots >= data
    running = np.where(holds, np.minimum(clients, slots), clients)
    like = running.shape
    share = np.maximum(running - 1, 0) / output
    joining = np.maximum(share, data)
    decoding = decode(architecture, running, prompt + output / 2).spread(running, data)
    joined = decoding + prefill(architecture, joining, prompt)

    def passes(of: Pass) -> Passes:
        classes = priced.classes(of)
        spread = [np.broadcast_to(np.asarray(x, dtype=float), like) for pair in classes for x in pair]
        prompts = 1.0 * (of.tokens > of.sequences)
        return Passes(tuple(spread[::2]), tuple(spread[1::2]), of.tokens, of.sequences / data, prompts)

    def wide(line: tuple[Any, Any]) -> tuple[Floats, Floats]:
        first, second = (np.broadcast_to(np.asarray(x, dtype=float), like) for x in line)
        return first, second

    return Terms(
        passes(decoding),
        passes(joined),
        passes(prefill(architecture, np.minimum(running, data), prompt).spread(running, data)),
        np.minimum(share / data, 1),
        tuple(wide(line) for line in priced.links.reductions),
        wide(priced.links.others),
        np.full(len(rows), float(kernels(architecture, one.precision))),
        np.array([ENGINES.index(row.engine) for row in rows]),
        running,
        data,
        clients - running,
        holds,
    )


def _joined(parts: Sequence[Any], order: NDArray[np.int_]) -> Any:
    """Arrays inside of equal tuples and dataclasses, concatenated and put in order."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)[order]
    if isinstance(first, tuple):
        return tuple(_joined(each, order) for each in zip(*parts, strict=True))
    return type(first)(*(_joined([getattr(p, f.name) for p in parts], order) for f in fields(first)))
