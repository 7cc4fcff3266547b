"""Weights of a family's own shape in which everything is felt: what starts constant is moved.

A gate, a bias or a sink of zeros, a scale of ones, is a feature that no output shows; defects hide there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

SPREAD = 0.2
"""Standard deviation of what replaces zeros, and of the relative change of other constants: enough to be
felt far above rounding, and too little to turn a sign or to saturate a gate."""


@contextmanager
def forgotten_are_nan() -> Iterator[None]:
    """Within it memory that nothing writes holds NaN: so a parameter that a model leaves as it is shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def enliven(tensors: Mapping[str, Tensor], seed: int) -> None:
    """Move in place each tensor whose entries are all equal; a scalar only if it is 0 or 1; none on meta.

    A tensor of NaN, which the model never initialised, is drawn anew like zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        if tensor.device.type == "meta" or not tensor.is_floating_point() or not tensor.numel():
            continue
        if bool(tensor.isnan().all()):
            with torch.no_grad():
                tensor.zero_()
        constant = float(tensor.detach().flatten()[0])
        if bool((tensor != constant).any()) or (tensor.numel() == 1 and constant not in (0.0, 1.0)):
            continue
        noise = SPREAD * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            tensor.copy_(noise if constant == 0 else constant * (1 + noise))
