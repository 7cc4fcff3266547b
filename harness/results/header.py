"""What a run was, on what: the first line of its file."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import harness
from harness.results.record import Header
from harness.results.runfile import now

LIBRARIES = ("torch", "transformers", "numpy")


def header(
    *, seed: int, implementations: Sequence[str], specs: Mapping[str, str | None], options: Mapping[str, Any]
) -> Header:
    """The header of a run that starts now."""
    from harness.telemetry import machine

    return Header(
        harness=harness.__version__,
        versions=versions(),
        machine=machine(),
        started=now(),
        seed=seed,
        implementations=tuple(implementations),
        specs=dict(specs),
        options=dict(options),
    )


def versions() -> dict[str, str | None]:
    """Of Python and the libraries that decide numbers; None where one is not installed."""
    return {"python": platform.python_version()} | {name: installed(name) for name in LIBRARIES}


def installed(distribution: str) -> str | None:
    """The version of a distribution, or None where it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
