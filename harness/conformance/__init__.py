"""What a property is, what it sees and how it compares: the vocabulary of the suites."""

from harness.conformance.case import Case
from harness.conformance.property import (
    Level,
    Outcome,
    Property,
    Violation,
    Void,
    always,
    conformance,
    require,
)

__all__ = [
    "Case",
    "Level",
    "Outcome",
    "Property",
    "Violation",
    "Void",
    "always",
    "conformance",
    "require",
]
