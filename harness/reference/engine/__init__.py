"""The reference engine: sampling, speculative decoding and continuous batching over the reference model."""

from __future__ import annotations

from harness.reference.engine.values import (
    Arrival,
    Completion,
    Grammar,
    Iteration,
    Limits,
    Request,
    Sampling,
    Served,
    Speculation,
    Streamed,
)

__all__ = [
    "Arrival",
    "Completion",
    "Grammar",
    "Iteration",
    "Limits",
    "Request",
    "Sampling",
    "Served",
    "Speculation",
    "Streamed",
]
