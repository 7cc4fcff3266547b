"""Passes whose logits can be compared: in one call, and in pieces on a cache.

Letters: B sequences, S tokens per sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.spec.architecture import Architecture


def independent(architecture: Architecture | None) -> bool:
    """Applies where no capacity makes tokens compete for experts: attention is the only way from one token
    to another. To an implementation's own shape too."""
    moe = None if architecture is None else architecture.moe
    return moe is None or moe.router.capacity_factor is None


def has_rope(architecture: Architecture | None) -> bool:
    """Applies to rotary positions, where attention is the only way from one token to another."""
    return architecture is not None and architecture.attention.rope is not None and independent(architecture)


def forward(model: Any, tokens: Tensor, **options: Tensor | None) -> Tensor:
    """Logits [B, S, V] without gradients."""
    with torch.no_grad():
        logits: Tensor = model.forward(tokens, **options)
    return logits


def in_pieces(
    model: Any,
    tokens: Tensor,
    sizes: Sequence[int],
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits [B, S, V] of tokens [B, S], computed in pieces of the given sizes with a cache."""
    cache, done, logits = None, 0, []
    with torch.no_grad():
        for size in sizes:
            upto = done + size
            seen = None if mask is None else mask[:, :upto]
            at = None if positions is None else positions[:, done:upto]
            part, cache = model.extend(tokens[:, done:upto], cache, mask=seen, positions=at)
            logits.append(part)
            done = upto
    return torch.cat(logits, dim=1)
