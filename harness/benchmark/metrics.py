"""What a serving run is measured by, with the definition of every figure.

Times are those of the client, in seconds. ITL is no name here: vLLM's `bench serve` calls the gap between two
chunks of a stream so, AIPerf the mean time per token of a request; under speculation, where one chunk carries
several tokens, these differ. `chunk_gap` is the first, `tpot` the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from harness.reference.engine import Iteration, Streamed

QUANTILES = (50, 90, 99)
PER_REQUEST = {
    "ttft": "first chunk with a token - sent",
    "tpot": "(last chunk - first chunk) / (tokens - 1), of requests with 2 tokens or more",
    "chunk_gap": "chunk - the chunk before it, over all chunks of all requests",
    "e2e": "last byte - sent",
}
"""Name -> definition, in seconds."""
OVERALL = {
    "completed": "requests that were answered",
    "failed": "requests that ended in an error",
    "duration_s": "last byte of the last request - sending of the first",
    "request_throughput": "completed / duration, per second",
    "output_throughput": "tokens of completed requests / duration, per second",
    "goodput": "completed requests that meet every bound of the SLO / duration, per second",
    "accept_length": "tokens / passes of the target that decided them, over completed requests",
    "occupancy": "mean over iterations of running requests / slots",
    "preemptions": "times that a request lost its pages",
    "lateness_p99_s": "99th percentile of sent - due: above the TTFT it is the client that was measured",
}


@dataclass(frozen=True)
class Slo:
    """Upper bounds in seconds; None does not bind."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def met(self, figures: Mapping[str, float | None]) -> bool:
        """Whether a request keeps every bound; a figure that it does not have (TPOT of one token) does."""
        bounds = {"ttft": self.ttft, "tpot": self.tpot, "e2e": self.e2e}
        return all(
            bound is None or (value := figures[name]) is None or value <= bound
            for name, bound in bounds.items()
        )


@dataclass(frozen=True)
class Summary:
    """The figures of one run; None where there was nothing to take one of."""

    overall: Mapping[str, float | None]
    """By the names of OVERALL."""
    spread: Mapping[str, Mapping[str, float]]
    """By the names of PER_REQUEST: mean, std and the quantiles p50, p90, p99; empty where there is none."""


def of_request(one: Streamed) -> dict[str, float | None]:
    """ttft, tpot and e2e of one request."""
    times = [time for time, tokens in one.chunks if tokens]
    tokens = sum(count for _, count in one.chunks)
    first = times[0] if times else None
    return {
        "ttft": None if first is None else first - one.sent_at,
        "tpot": (times[-1] - times[0]) / (tokens - 1) if tokens > 1 else None,
        "e2e": one.ended_at - one.sent_at,
    }


def samples(answers: Sequence[Streamed]) -> dict[str, list[float]]:
    """Seconds by the names of PER_REQUEST, of the requests that were answered."""
    good = [one for one in answers if one.completion.finish_reason != "error"]
    each = [of_request(one) for one in good]
    found = {name: [v for one in each if (v := one[name]) is not None] for name in ("ttft", "tpot", "e2e")}
    found["chunk_gap"] = [
        later - earlier
        for one in good
        for (earlier, _), (later, _) in zip(one.chunks, one.chunks[1:], strict=False)
    ]
    return {name: found[name] for name in PER_REQUEST}


def summarise(
    answers: Sequence[Streamed],
    due: Sequence[float],
    *,
    slo: Slo,
    timeline: Sequence[Iteration] = (),
    slots: int | None = None,
) -> Summary:
    """The figures over all answers; `due`: when each should have been sent, by time.perf_counter."""
    good = [one for one in answers if one.completion.finish_reason != "error"]
    each = [of_request(one) for one in good]
    duration = max(one.ended_at for one in answers) - min(one.sent_at for one in answers)
    tokens = sum(len(one.completion.tokens) for one in good)
    rounds = sum(one.completion.rounds for one in good)
    running = [sum(1 for holder in step.running if holder >= 0) for step in timeline]
    lateness = [one.sent_at - at for one, at in zip(answers, due, strict=True)]
    overall: dict[str, float | None] = {
        "completed": len(good),
        "failed": len(answers) - len(good),
        "duration_s": duration,
        "request_throughput": len(good) / duration,
        "output_throughput": tokens / duration,
        "goodput": sum(slo.met(figures) for figures in each) / duration,
        "accept_length": tokens / rounds if rounds else None,
        "occupancy": fmean(running) / slots if running and slots else None,
        "preemptions": sum(one.completion.preemptions for one in good) if timeline else None,
        "lateness_p99_s": float(np.percentile(lateness, 99)),
    }
    return Summary(overall, {name: _spread(values) for name, values in samples(answers).items()})


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    quantiles = np.percentile(values, QUANTILES)
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values)),
        **{f"p{q}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
    }
