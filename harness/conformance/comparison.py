"""How properties compare: with a tolerance that arithmetic explains, and a counterexample when it does not.

Letters: B sequences, S tokens per sequence, V vocabulary, T = B * S tokens, N MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.conformance import stages
from harness.conformance.case import Case
from harness.conformance.property import Violation, Void
from harness.evidence.margins import Rounding, comparable_tokens, monte_carlo, unit_roundoff
from harness.reference import ReferenceModel
from harness.reference.trace import RoutingTrace
from harness.spec.architecture import Architecture


@dataclass(frozen=True)
class Margin:
    """What correct logits are, and how far from them rounding may leave an implementation."""

    radius: Tensor
    """[B, S]: absolute tolerance on a logit of a token, against exact arithmetic."""
    comparable: Tensor
    """[B, S] bool: tokens whose experts, and those of all earlier tokens, no rounding can change."""
    logits: Tensor | None = None
    """[B, S, V] float64 of the reference; None where only the implementation itself can be asked."""

    def pick(self, index: object) -> Margin:
        """The margin of some sequences or tokens: `index` as for a tensor [B, S]."""
        exact = None if self.logits is None else self.logits[index]  # type: ignore[index]
        return Margin(self.radius[index], self.comparable[index], exact)  # type: ignore[index]


def margin(
    case: Case,
    model: object,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    architecture: Architecture | None = None,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Margin:
    """The margin of a forward pass of `model` over tokens [B, S].

    With known weights: by Monte Carlo arithmetic on the reference. Without: the square root of the unit
    roundoff, relative to the largest logit, that is half of the digits; a defect moves the first ones.
    """
    architecture = architecture or case.architecture
    if architecture is None or "weights" not in getattr(model, "capabilities", ()):
        with torch.no_grad():
            size = model.forward(tokens, mask=mask, positions=positions).double().abs().amax()  # type: ignore[attr-defined]
        radius = torch.full(tokens.shape, math.sqrt(unit_roundoff(dtype)) * float(size), dtype=torch.float64)
        return Margin(radius, torch.ones(tokens.shape, dtype=torch.bool))
    weights, generator = weights or case.weights(architecture), case.generator()
    given = {"tokens": tokens, "mask": mask, "positions": positions} | dict(weights)
    key = (architecture, dtype, generator.initial_seed(), _digest(given))
    if key not in _known:
        reference = case.reference(architecture, weights)
        _known[key] = monte_carlo_margin(
            case,
            reference,
            lambda at: reference.run(tokens, None, mask, at),
            tokens,
            mask=mask,
            positions=positions,
            dtype=dtype,
            generator=generator,
        )
        if len(_known) > KEPT:
            del _known[next(iter(_known))]
    return _known[key]


KEPT = 512
"""Margins of one pass that are remembered: every implementation under test needs the same ones."""
_known: dict[object, Margin] = {}


def _digest(tensors: Mapping[str, Tensor | None]) -> bytes:
    """Of names and bytes."""
    found = sha256()
    for name, value in tensors.items():
        found.update(name.encode())
        if value is not None:
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.digest()


def monte_carlo_margin(
    case: Case,
    reference: ReferenceModel,
    passed: Callable[[Tensor], tuple[Tensor, object, Sequence[RoutingTrace]]],
    tokens: Tensor,
    *,
    around: nn.Module | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Margin:
    """The margin of what `passed` gives of positions [B, S]: logits [B, S, V], anything, and the routing.

    It is a pass of the reference over tokens [B, S], within the module `around` where there is more than it.
    """
    architecture = reference.architecture
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    at = (real.cumsum(1) - 1).clamp(min=0) if positions is None else positions

    def run(err: Rounding) -> dict[str, Tensor]:
        # Learned positions are a table look-up; rotary ones are angles, computed and so rounded.
        where = at if architecture.positions == "learned" else err(at.double())
        with torch.no_grad():
            logits, _, traces = passed(where)
        chosen, gaps = (
            zip(*(_selection(reference, trace) for trace in traces), strict=True) if traces else ((), ())
        )
        out = {"logits": logits}
        if traces:
            shape = (len(traces), *tokens.shape)
            out["chosen"] = torch.stack(chosen).view(*shape, -1)
            out["gap"] = torch.stack(gaps).view(shape).clamp(max=1e30)
        return out

    spread = monte_carlo(around or reference, run, dtype=dtype, generator=generator or case.generator())
    inner = longest_product(architecture)
    radius = spread["logits"].radius(inner=inner).amax(-1)
    if "gap" not in spread:
        return Margin(radius, torch.ones_like(real), spread["logits"].centre)
    flips = spread["chosen"].deviation.any(-1) | (spread["gap"].centre <= spread["gap"].radius(inner=inner))
    flips = flips.any(0) & real
    return Margin(radius, comparable_tokens(flips), spread["logits"].centre)


def _selection(reference: ReferenceModel, trace: RoutingTrace) -> tuple[Tensor, Tensor]:
    moe = reference.architecture.moe
    assert moe is not None
    router = reference.blocks[trace.layer].moe.router  # type: ignore[union-attr]
    keys = stages.keys(moe.router, trace.scores, trace.logits, router.correction_bias)
    chosen, gap = stages.select(moe, keys)
    return chosen.sort(-1).values, gap


def longest_product(architecture: Architecture) -> int:
    """The largest inner dimension of a matrix product of one token."""
    attention = architecture.attention
    widths = [architecture.d_model, attention.n_heads * attention.head_dim]
    widths += [part.d_ff for part in (architecture.ffn,) if part is not None]
    if architecture.moe is not None:
        widths += [
            part.d_ff for part in (architecture.moe.expert, architecture.moe.shared) if part is not None
        ]
    return max(widths)


def agree(
    actual: Tensor,
    expected: Tensor,
    tolerance: Tensor | float,
    *,
    what: str,
    stage: str = "",
    where: Tensor | None = None,
) -> float:
    """Raise Violation unless |actual - expected| <= tolerance; gives the largest share of it that was used.

    tolerance broadcasts from the left: [B, S] bounds each of the V logits of a token. where, of a leading
    shape of actual, says which entries to compare; NaN never agrees. Raises Void if there are none.
    """
    if actual.shape != expected.shape:
        have, want = tuple(actual.shape), tuple(expected.shape)
        facts = {"what": what, "observed": have, "expected": want}
        raise Violation(f"{what} has shape {have} in place of {want}", stage=stage, facts=facts)
    error = (actual.detach().double() - expected.detach().double()).abs()
    allowed = torch.as_tensor(tolerance, dtype=torch.float64)
    while 0 < allowed.dim() < error.dim():
        allowed = allowed[..., None]
    allowed = allowed.expand_as(error)
    compared = torch.ones_like(error, dtype=torch.bool)
    if where is not None:
        compared = where.view(*where.shape, *[1] * (error.dim() - where.dim())).expand_as(error)
    if not compared.any():
        raise Void(f"{what}: nothing was comparable")
    used = torch.where(compared, error / allowed.clamp(min=1e-300), 0)
    used = used.where(~error.isnan() | ~compared, math.inf)
    worst = int(used.argmax())
    if not used.flatten()[worst] <= 1:
        index = np.unravel_index(worst, tuple(error.shape))  # torch's own imports sympy, for seconds
        at = tuple(int(i) for i in index)
        share, count = float((used > 1).sum() / compared.sum()), int(compared.sum())
        found, wanted, apart, most = (float(x[at]) for x in (actual, expected, error, allowed))
        raise Violation(
            f"{what} at {list(at)} is {found:.6g} in place of {wanted:.6g}: they differ by {apart:.2g}, and "
            f"rounding explains {most:.2g} ({share:.0%} of {count} compared values differ)",
            stage=stage,
            facts={
                "what": what,
                "index": list(at),
                "observed": found,
                "expected": wanted,
                "difference": apart,
                "tolerance": most,
                "share_differing": share,
                "compared": count,
            },
            values=(actual.detach(), expected.detach()),
        )
    return float(used.flatten()[worst])


@dataclass(frozen=True)
class Clearance:
    """By how much the experts of tokens were chosen over others."""

    gap: Tensor
    """[T]: the K-th largest key less the next one (with groups, as in `stages.select`)."""
    bound: Tensor
    """[T]: what rounding explains of it."""


def same_experts(
    actual: Tensor,
    expected: Tensor,
    *,
    what: str,
    stage: str = "select",
    where: Tensor | None = None,
    clearance: Clearance | None = None,
) -> None:
    """Raise Violation unless each token's experts are the same set; actual and expected [T, K], where [T].

    clearance of the token that is shown goes with the counterexample.
    """
    if actual.shape != expected.shape:
        have, want = tuple(actual.shape), tuple(expected.shape)
        shapes = {"what": what, "observed": have, "expected": want}
        raise Violation(f"{what}: experts have shape {have} in place of {want}", stage=stage, facts=shapes)
    where = torch.ones(len(actual), dtype=torch.bool) if where is None else where
    if not where.any():
        raise Void(f"{what}: no token's selection was comparable")
    differ = (actual.sort(-1).values != expected.sort(-1).values).any(-1) & where
    if differ.any():
        token, count, compared = int(differ.nonzero()[0, 0]), int(differ.sum()), int(where.sum())
        found, wanted = (sorted(x[token].tolist()) for x in (actual, expected))
        facts: dict[str, Any] = {
            "what": what,
            "index": [token],
            "observed": found,
            "expected": wanted,
            "share_differing": count / compared,
            "compared": compared,
        }
        if clearance is not None:
            gap, bound = float(clearance.gap[token]), float(clearance.bound[token])
            facts["boundary"] = {"gap": gap, "rounding_explains": bound}
        raise Violation(
            f"{what}: token {token} goes to experts {found} in place of {wanted} "
            f"({count} of {compared} compared tokens differ)",
            stage=stage,
            facts=facts,
        )


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths in one batch."""

    tokens: Tensor
    """[B, S], arbitrary at padding."""
    mask: Tensor
    """[B, S] bool: True at real tokens."""

    def solo(self, sequence: int) -> Tensor:
        """The real tokens of one sequence, [1, length]."""
        return self.tokens[sequence][self.mask[sequence]][None]


def ragged(
    case: Case, length: int = 13, *, pads: tuple[tuple[int, int], ...] = ((0, 4), (3, 0), (1, 2))
) -> Ragged:
    """A batch with (left, right) padding for each sequence: right only, left only and both."""
    tokens = case.tokens(len(pads), length)
    batch, length = tokens.shape
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for row, (left, right) in enumerate(pads[:batch]):
        after = min(right, length - 1)  # a real token is left of each sequence, however short
        mask[row, : min(left, length - 1 - after)] = False
        mask[row, length - after :] = False
    return Ragged(tokens, mask)


def note_share(case: Case, comparable: Tensor) -> None:
    """Report which share of the tokens could be compared; Void if none."""
    share = float(comparable.double().mean())
    case.note("comparable_share", round(share, 4))
    if share == 0:
        raise Void("no token is comparable: the experts of all of them may change by rounding alone")


def finite(value: Tensor, what: str, *, stage: str = "", where: Tensor | None = None) -> None:
    """Raise Violation unless every value (at `where`) is finite."""
    bad = ~value.isfinite()
    if where is not None:
        bad = bad & where.view(*where.shape, *[1] * (value.dim() - where.dim()))
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise Violation(
            f"{what} has {int(bad.sum())} values that are not finite",
            stage=stage,
            facts={
                "what": what,
                "index": at,
                "observed": float(value[tuple(at)]),
                "share_differing": float(bad.double().mean()),
            },
        )
