"""Where chance enters: every random draw of the engine is one of these two calls."""

from __future__ import annotations

import torch
from torch import Tensor


class Draws:
    """Draws from one generator. A certain outcome draws nothing, so that greedy decoding uses no chance."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    def choose(self, probabilities: Tensor) -> int:
        """A token id by its probability; probabilities [V] sum to 1."""
        possible = probabilities.nonzero()
        if len(possible) == 1:
            return int(possible)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def uniform(self) -> Tensor:
        """A float64 scalar, uniform on [0, 1)."""
        return torch.rand((), dtype=torch.float64, generator=self.generator)
