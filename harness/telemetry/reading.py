"""A measured number or the reason why there is none: never a zero that looks like a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reading:
    """A value with its unit in the key that holds it, or a reason in place of the value."""

    value: float | None
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) != bool(self.reason):
            raise ValueError("a reading has either a value or a reason")

    def as_json(self) -> float | dict[str, str]:
        """The number, or {"unavailable": reason}."""
        return self.value if self.value is not None else {"unavailable": self.reason}


def unavailable(reason: str) -> Reading:
    """A reading that could not be taken."""
    return Reading(None, reason)


def as_json(readings: Mapping[str, Reading]) -> dict[str, Any]:
    """Readings by name, ready for a run file."""
    return {name: reading.as_json() for name, reading in readings.items()}
