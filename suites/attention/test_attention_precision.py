"""A bfloat16 model: angles stay in float32.

Letters: B sequences, S tokens per sequence.
"""

from __future__ import annotations

import torch

from harness.conformance import Case, conformance, require
from harness.conformance.case import replaced
from harness.conformance.comparison import finite
from harness.conformance.passes import forward, has_rope
from harness.evidence.margins import SAFETY, unit_roundoff

BFLOAT16 = torch.bfloat16


@conformance(
    "attention.bfloat16-model-turns-in-float32",
    clause="architecture.attention.rope",
    needs=("forward", "weights"),
    kills=("rope-in-model-dtype", "rope-positions-in-bfloat16"),
    applies=has_rope,
)
def test_bfloat16_model_turns_in_float32(case: Case) -> None:
    """A bfloat16 model errs no more at far positions, which bfloat16 cannot tell apart, than at near ones."""
    near = case.one_layer("full")
    architecture = replaced(near, {"max_positions": 2**12})
    weights = {n: x.to(BFLOAT16).double() for n, x in case.weights(architecture, std=0.2).items()}
    reference = case.reference(architecture, weights)
    model = case.model(architecture, weights, dtype=BFLOAT16)
    tokens = case.tokens(6, 14)
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def error(first: int) -> tuple[float, float]:
        """That of half of the tokens is below: a token whose experts rounding changes does not matter. And
        what an angle in float32 explains: it errs by u of itself, and moves a vector by as much."""
        at = torch.arange(first, first + 14).expand_as(tokens)
        exact, logits = (forward(one, tokens, mask=mask, positions=at) for one in (reference, model))
        finite(logits, f"logits at positions from {first}")
        size = exact.square().mean(-1).sqrt().median()
        angle = (first + 14) * unit_roundoff(torch.float32) * float(size)
        return float((logits.double() - exact).square().mean(-1).sqrt().median()), angle

    here, _ = error(0)
    for first in (500, 4000):
        there, angle = error(first)
        case.note(f"error_from_{first}", round(there / max(here, angle), 3))
        # Rounding of a rotation does not grow with its angle, but for that of the angle, which is all that is
        # seen of a model that is more exact than was asked for.
        require(
            there <= SAFETY * max(here, angle),
            f"logits at positions from {first} are off by {there:.2g}, and from 0 by {here:.2g}",
            stage="rotate",
        )
