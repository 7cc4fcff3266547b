"""What one property sees: an architecture at test size, seeded inputs and the model under test.

Letters: B sequences, S tokens per sequence, V vocabulary.
Every input is drawn here, from one seed, so that every implementation gets the same ones; the digest
of what was drawn goes into the run file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.implementations.protocols import Implementation, Model
from harness.spec.architecture import Architecture


@dataclass
class Case:
    """One property, one implementation, one spec, one seed."""

    implementation: Implementation
    slug: str
    seed: int
    spec_name: str
    full: Architecture | None
    """The architecture at full size; None for an implementation's own shape."""
    architecture: Architecture | None
    """Its shrunken twin; None for an implementation's own shape."""
    facts: dict[str, Any] = field(default_factory=dict)
    _digest: Any = field(default_factory=hashlib.sha256)
    _draws: int = 0
