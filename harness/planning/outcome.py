"""What a simulated server is measured by, under the names of `moe-harness bench serve`.

Seconds throughout; percentiles are over requests, all of them, from an empty server to an empty one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.planning.constraints import known, number, pairs
from harness.planning.scheduling import Batching, Floats, Policy
from harness.planning.simulation import Record, simulate
from harness.planning.workload import workload
from harness.spec.errors import SpecError
from harness.theory.batching import EXAMPLE_ITERATIONS, EXAMPLE_OUTPUTS, EXAMPLE_SLOTS
from harness.theory.describe import Table
from harness.theory.serving import cost_per_1k_tokens

QUANTILES = (50, 90, 99)
PER_REQUEST = {
    "ttft": "first token - arrival",
    "tpot": "(last token - first token) / (tokens - 1), of requests with 2 tokens or more",
    "e2e": "last token - arrival",
    "queue": "admission to a slot - arrival",
}
"""Name -> definition, in seconds."""
OVERALL = {
    "completed": "requests that were answered",
    "duration_s": "last token of the last request - arrival of the first",
    "request_throughput": "completed / duration, per second",
    "output_throughput": "their tokens / duration, per second",
    "output_throughput_per_gpu": "the same for each GPU",
    "goodput": "completed requests that meet every bound of the SLO / duration, per second",
    "slo_attainment": "share of requests that meet every bound of the SLO",
    "accept_length": "tokens / passes of the target that decided them",
    "occupancy": "mean over iterations of running requests / slots",
    "cache_utilisation": "share of the room for keys and values that they fill, mean over the duration",
    "cache_reserved_peak": "largest share of that room that was promised to admitted requests",
    "busy": "share of the duration in iterations",
    "usd_per_1k_input": "rent of seconds that prompts add to iterations, for 1,000 of their tokens",
    "usd_per_1k_output": "rent of all GPUs over the duration for 1,000 output tokens, prompts included",
    "usd_prompts": "of it, seconds that prompts add to iterations",
    "usd_decode": "of it, seconds that decoding takes",
    "usd_idle": "of it, seconds without any request",
    "iterations": "passes of the model",
}
"""Name -> definition."""
SHARES = ("slo_attainment", "occupancy", "cache_utilisation", "cache_reserved_peak", "busy")
COLUMNS = ("mean", *(f"p{q}" for q in QUANTILES))


@dataclass(frozen=True)
class Slo:
    """Upper bounds in seconds by the names of PER_REQUEST; a name that is absent does not bind."""

    bounds: Mapping[str, float]

    def met(self, figures: Mapping[str, Floats]) -> NDArray[np.bool_]:
        """[N] whether each request keeps every bound; a TPOT that it does not have (NaN) does."""
        kept = np.full(len(figures["e2e"]), True)
        for name, bound in self.bounds.items():
            kept &= ~(figures[name] > bound)
        return kept


def slo(texts: Sequence[str]) -> Slo:
    """Bounds out of NAME=SECONDS. Raises SpecError."""
    bounds = {}
    for name, text in pairs(texts, "--slo").items():
        known(name, PER_REQUEST)
        bounds[name] = number(text, name)
        if bounds[name] <= 0:
            raise SpecError(f"an SLO of {name}={text} can never be kept; give seconds above 0")
    return Slo(bounds)


def of_requests(record: Record) -> dict[str, Floats]:
    """[N] seconds by the names of PER_REQUEST; the TPOT of one token is NaN."""
    outputs = record.load.outputs
    decoding = np.where(outputs > 1, record.ended - record.first, np.nan)
    return {
        "ttft": record.first - record.sent,
        "tpot": decoding / np.maximum(outputs - 1, 1),
        "e2e": record.ended - record.sent,
        "queue": record.admitted - record.sent,
    }


@dataclass(frozen=True, eq=False)
class Outcome:
    """The figures of one simulation."""

    title: str
    taken: float
    """Seconds of processor time that simulating took."""
    overall: Mapping[str, float]
    """By the names of OVERALL."""
    spread: Mapping[str, Mapping[str, float]]
    """By the names of PER_REQUEST, then COLUMNS; empty where no request has the figure."""

    def tables(self) -> list[Table]:
        """For people: latencies in ms."""
        overall = tuple((name, _shown(name, self.overall[name]), OVERALL[name]) for name in OVERALL)
        spread = tuple(
            (name, *(f"{1e3 * found[one]:,.2f}" if found else "none" for one in COLUMNS), PER_REQUEST[name])
            for name, found in self.spread.items()
        )
        return [
            Table(self.title, ("figure", "value", "definition"), overall),
            Table("Latency, ms", ("figure", *COLUMNS, "definition"), spread),
            Table(
                "The simulator itself",
                ("processor time, s", "simulated seconds in one", "iterations in one"),
                ((f"{self.taken:.3f}", *(f"{value:,.0f}" for value in self._speed().values())),),
            ),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything that the tables show, in seconds, and unrounded."""
        return {
            "title": self.title,
            "overall": dict(self.overall),
            "seconds": {name: dict(found) for name, found in self.spread.items()},
            "simulator": {"processor_s": self.taken} | self._speed(),
        }

    def _speed(self) -> dict[str, float]:
        names = {"simulated_s_per_s": "duration_s", "iterations_per_s": "iterations"}
        taken = max(self.taken, 1e-9)  # a clock may not have ticked
        return {name: self.overall[of] / taken for name, of in names.items()}


def outcome(
    record: Record, *, title: str, bounds: Slo, gpus: int, gpu_hour_usd: float, taken: float = math.nan
) -> Outcome:
    """The figures of a record, on `gpus` devices at a price each; `taken`: what simulating it took."""
    figures = of_requests(record)
    count, tokens = len(record.load), int(record.load.outputs.sum())
    duration = float(record.ended.max() - record.sent.min())
    met = int(bounds.met(figures).sum())
    rent = cost_per_1k_tokens(gpus, gpu_hour_usd, tokens)
    overall = {
        "completed": count,
        "duration_s": duration,
        "request_throughput": count / duration,
        "output_throughput": tokens / duration,
        "output_throughput_per_gpu": tokens / duration / gpus,
        "goodput": met / duration,
        "slo_attainment": met / count,
        "accept_length": tokens / float((1 + record.rounds).sum()),
        "occupancy": record.running / record.iterations / record.policy.slots,
        "cache_utilisation": record.written / duration,
        "cache_reserved_peak": record.reserved,
        "busy": record.busy / duration,
        "usd_per_1k_input": cost_per_1k_tokens(gpus, gpu_hour_usd, int(record.load.prompts.sum()))
        * record.filling,
        "usd_per_1k_output": rent * duration,
        "usd_prompts": rent * record.filling,
        "usd_decode": rent * (record.busy - record.filling),
        "usd_idle": rent * (duration - record.busy),
        "iterations": record.iterations,
    }
    return Outcome(title, taken, overall, {name: _spread(values) for name, values in figures.items()})


def _spread(values: Floats) -> dict[str, float]:
    there = values[~np.isnan(values)]
    if not len(there):
        return {}
    quantiles = np.percentile(there, QUANTILES).tolist()
    return {"mean": float(there.mean())} | dict(zip(COLUMNS[1:], quantiles, strict=True))


def _shown(name: str, value: float) -> str:
    if name in SHARES:
        return f"{value:.1%}"
    if name.startswith("usd"):
        return f"{value:.4g}"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"


class _Unit:
    """A server whose iterations take one second, whatever is in them."""

    window = None

    def seconds(self, *_: float) -> float:
        """1."""
        return 1.0


def example() -> Table:
    """Requests of unequal length in the same slots: what static and continuous batching finish in a time.

    Whoever ends early leaves a slot empty under static batching until the longest of the batch has ended.
    """
    listed = ",".join(map(str, EXAMPLE_OUTPUTS))
    load = workload(len(EXAMPLE_OUTPUTS), "1", listed, rate=math.inf)
    rows = []
    policies: tuple[Batching, ...] = ("static", "continuous")
    for batching in policies:
        record = simulate(load, _Unit(), Policy(EXAMPLE_SLOTS, batching))
        done = int((record.ended <= EXAMPLE_ITERATIONS).sum())
        share = record.running / record.iterations / EXAMPLE_SLOTS
        rows.append((batching, done, record.iterations, f"{share:.1%}"))
    return Table(
        f"{len(EXAMPLE_OUTPUTS)} requests of {listed.replace(',', ', ')} tokens in {EXAMPLE_SLOTS} slots",
        ("batching", f"ended after {EXAMPLE_ITERATIONS} iterations", "iterations in all", "occupancy"),
        tuple(rows),
    )
