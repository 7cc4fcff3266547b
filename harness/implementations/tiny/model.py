"""A tiny random model of a spec: its shrunken twin at sizes that servers take, and drawn weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.implementations.protocols import Unsupported
from harness.implementations.registry import AdapterError
from harness.reference import weights
from harness.spec import twin
from harness.spec.architecture import Architecture
from harness.spec.twin import SERVED

STD = 0.2
"""Of the drawn weights: logits then have a standard deviation near 3, where a sampled token is neither
certain nor any."""


@dataclass(frozen=True)
class TinyModel:
    """What is written, whatever the format."""

    name: str
    architecture: Architecture
    family: str
    """Of transformers."""
    weights: Mapping[str, Tensor]
    """float32, by canonical names."""


def tiny(
    name: str, architecture: Architecture, *, seed: int = 0, vocab_size: int = 128, noise: float = 0.0
) -> TinyModel:
    """The twin of `architecture` with the weights that `seed` gives.

    `noise` adds to every weight a normal deviate of so many times its tensor's standard deviation: a draft
    that resembles the model of the same seed. Raises AdapterError if no mapped family is such a model.
    """
    small = twin(architecture, vocab_size=vocab_size, sizes=SERVED)
    drawn = weights.draw(small, torch.Generator().manual_seed(seed), std=STD)
    blur = torch.Generator().manual_seed(seed + 1)
    noisy = {
        key: x + noise * x.std(correction=0) * torch.randn(x.shape, generator=blur, dtype=x.dtype)
        for key, x in drawn.items()
    }
    return TinyModel(name, small, _family(small), {key: x.float() for key, x in noisy.items()})


def _family(architecture: Architecture) -> str:
    from harness.implementations.transformers import export
    from harness.implementations.transformers.weights import FamilyMap

    reasons = []
    for family in export.EXPORTS:
        try:
            export.config(architecture, family)
            FamilyMap.of(architecture, family)
        except Unsupported as lacking:
            reasons.append(str(lacking))
        else:
            return family
    raise AdapterError(f"no family of transformers is this architecture: {'; '.join(reasons)}")
