"""The control specs at test size, and inputs that are not symmetric by accident.

Letters: B sequences, S tokens per sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.spec import Architecture, load, names, twin

CONTROLS = tuple(name for name in names() if not load(name).unknowns)
"""Specs whose every field has a value."""
MOE_CONTROLS = tuple(name for name in CONTROLS if load(name).architecture.moe is not None)
SEQUENCES, LENGTH = 3, 17


def small(name: str, **overrides: Any) -> Architecture:
    """The twin of a control; n_experts is 12: two digits, and no power of two."""
    return twin(load(name).architecture, **overrides)


def changed(architecture: Architecture, **parts: dict[str, Any]) -> Architecture:
    """The architecture with some fields of some of its parts changed: changed(a, moe={"top_k": 1}).

    A dict as a field's value changes fields of that field, one level down; it is validated again.
    """
    dump = architecture.model_dump()
    for part, fields in parts.items():
        for name, value in fields.items():
            both_are_parts = isinstance(value, dict) and isinstance(dump[part][name], dict)
            dump[part][name] = dump[part][name] | value if both_are_parts else value
    return Architecture.model_validate(dump)


def generator(seed: int) -> torch.Generator:
    """A generator of that seed."""
    return torch.Generator().manual_seed(seed)


def ragged(architecture: Architecture, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens [3, 17] and their mask: one full sequence, one padded on the left, one on the right."""
    tokens = torch.randint(architecture.vocab_size, (SEQUENCES, LENGTH), generator=generator(seed))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :5] = False
    mask[2, 13:] = False
    return tokens, mask


def relative(have: Tensor, want: Tensor) -> float:
    """|have - want| / |want| in the Euclidean norm."""
    return float((have.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))
