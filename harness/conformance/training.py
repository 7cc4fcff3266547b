"""What the properties of training share: passes in training mode, and what they are compared by.

Letters: B sequences, S tokens per sequence, T tokens, E experts, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.conformance import Case
from harness.conformance.capture import has_experts, moe_of
from harness.conformance.case import global_draws
from harness.conformance.comparison import Ragged, agree
from harness.conformance.narrowing import HALF_THE_DIGITS
from harness.conformance.passes import independent
from harness.evidence.margins import SAFETY, unit_roundoff
from harness.spec.architecture import Architecture

Answer = TypeVar("Answer")
FACTOR = 0.1
"""The jitter that noise is drawn with: far above rounding."""


def has_free_experts(architecture: Architecture | None) -> bool:
    """Applies to architectures with experts that no capacity makes tokens compete for."""
    return has_experts(architecture) and independent(architecture)


def has_correction_bias(architecture: Architecture | None) -> bool:
    """Applies where correction biases balance the load."""
    return (
        has_free_experts(architecture)
        and architecture is not None
        and moe_of(architecture).router.correction_bias
    )


def summed_loss(logits: Tensor, batch: Ragged) -> Tensor:
    """Cross-entropy of every real token given the real tokens before it, summed."""
    follows = batch.mask[:, 1:] & batch.mask[:, :-1]
    return F.cross_entropy(logits[:, :-1][follows].double(), batch.tokens[:, 1:][follows], reduction="sum")


def alike(case: Case, architecture: Architecture, pass_: Callable[[Any], Answer]) -> Answer:
    """What `pass_` answers of a fresh model in training mode: with the same noise, where a seed fixes it."""
    model = case.model(architecture, case.weights(architecture))
    with global_draws(case.seed), model.training():
        return pass_(model)


@contextmanager
def recomputing(model: Any, again: bool) -> Iterator[None]:
    """Within it activations are computed a second time, if `again`."""
    if not again:
        yield
        return
    with model.recomputing():
        yield


def same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, stage: str) -> None:
    """Raise Violation unless every tensor agrees but for half of its digits.

    A gradient may cancel (that of a bias of keys, which no softmax feels): what is left is rounding of the
    size of its layer's other gradients.
    """
    largest: dict[str, float] = {}
    for name, value in expected.items():
        size = float(value.abs().amax()) * SAFETY * math.sqrt(max(value.shape)) * unit_roundoff(torch.float32)
        largest[_layer(name)] = max(largest.get(_layer(name), 0.0), size)
    for name, value in expected.items():
        tolerance = max(HALF_THE_DIGITS * float(value.abs().amax()), largest[_layer(name)]) + 1e-30
        agree(found[name], value, tolerance, what=f"{what} {name}", stage=stage)


def _layer(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
