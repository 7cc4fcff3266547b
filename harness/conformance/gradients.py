"""Gradients of the language-model loss in every weight, in float64, and how far float32 may move them.

Letters: B sequences, S tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.conformance.case import Case
from harness.conformance.comparison import Ragged, agree, finite, longest_product, margin, ragged
from harness.conformance.property import Void, require
from harness.evidence.margins import SAFETY, Rounding, Spread, monte_carlo, unit_roundoff
from harness.reference import ReferenceModel
from harness.spec.architecture import Architecture

FLOAT32 = torch.float32


def language_model_loss(logits: Tensor, batch: Ragged) -> Tensor:
    """Mean cross-entropy of every real token given the real tokens before it."""
    follows = batch.mask[:, 1:] & batch.mask[:, :-1]
    return F.cross_entropy(logits[:, :-1][follows].double(), batch.tokens[:, 1:][follows])


def expected_gradients(case: Case, reference: ReferenceModel, batch: Ragged) -> dict[str, Spread]:
    """By canonical name, in float64, with how far float32 may move them."""

    def run(err: Rounding) -> dict[str, Tensor]:
        at = (batch.mask.cumsum(1) - 1).clamp(min=0)
        learned = reference.architecture.positions == "learned"
        logits = reference.forward(
            batch.tokens, mask=batch.mask, positions=at if learned else err(at.double())
        )
        return reference.gradients(language_model_loss(logits, batch))

    return monte_carlo(reference, run, dtype=FLOAT32, generator=case.generator())


def check_gradients(
    case: Case, architecture: Architecture, weights: Mapping[str, Tensor], label: str, *, length: int = 13
) -> None:
    """Raise Violation unless every weight's gradient is the reference's."""
    batches = (ragged(case, length) for _ in range(10))
    first = next(batches)  # before the model, which may be refused: what is drawn is the same for all
    model = case.model(architecture, weights)
    # Ids that an embedding may take for padding have a gradient too.
    rare = torch.tensor([0, 1, architecture.vocab_size - 1])
    for batch in chain((first,), batches):
        batch.tokens[:, length // 2] = rare
        bound = margin(case, model, batch.tokens, mask=batch.mask, architecture=architecture, weights=weights)
        if bool(bound.comparable[batch.mask].all()):
            break
    else:
        raise Void("ten batches in a row have a token whose experts rounding may change")
    expected = expected_gradients(case, case.reference(architecture, weights), batch)
    found = model.gradients(language_model_loss(model.forward(batch.tokens, mask=batch.mask), batch))
    # Asked for once more, it is no sum of both: what was found first is not added to.
    again = model.gradients(language_model_loss(model.forward(batch.tokens, mask=batch.mask), batch))
    missing = sorted(expected.keys() - found.keys())
    require(not missing, f"there is no gradient of {', '.join(missing[:3])}", stage="gradient")
    for name, radius in radii(expected, longest_product(architecture)).items():
        finite(found[name], f"{label}: gradient of {name}", stage="gradient")
        agree(
            found[name], expected[name].centre, radius, what=f"{label}: gradient of {name}", stage="gradient"
        )
        agree(
            again[name],
            expected[name].centre,
            radius,
            what=f"{label}: second gradient of {name}",
            stage="gradient",
        )


def radii(expected: Mapping[str, Spread], inner: int) -> dict[str, float]:
    """The tolerance on each gradient, one for a tensor, whose errors all come from the same vectors.

    A gradient may cancel inside a module (that of a router whose one weight is normalised to 1): what is
    left is rounding of the size of the layer's other gradients, so the bound is never below theirs.
    """
    unit = SAFETY * math.sqrt(inner) * unit_roundoff(FLOAT32)
    largest: dict[str, float] = {}
    for name, spread in expected.items():
        size = float(spread.centre.abs().amax())
        largest[_layer(name)] = max(largest.get(_layer(name), 0.0), size)
    return {
        name: max(float(spread.radius(inner=inner).amax()), unit * largest[_layer(name)])
        for name, spread in expected.items()
    }


def _layer(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "layers" else name
