"""The reference engine: sampling, speculative decoding and continuous batching over the reference model."""

from __future__ import annotations

from harness.reference.engine.engine import Engine
from harness.reference.engine.live import Live
from harness.reference.engine.values import (
    Arrival,
    Batching,
    Completion,
    Grammar,
    Iteration,
    Limits,
    Method,
    Request,
    Sampling,
    Served,
    Speculation,
    Streamed,
)

__all__ = [
    "Arrival",
    "Batching",
    "Completion",
    "Engine",
    "Grammar",
    "Iteration",
    "Limits",
    "Live",
    "Method",
    "Request",
    "Sampling",
    "Served",
    "Speculation",
    "Streamed",
]
