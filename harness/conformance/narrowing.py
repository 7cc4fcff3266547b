"""Where a counterexample in whole logits comes from: checks of less, made only once there is one.

Letters: B sequences, S tokens per sequence, T = B * S tokens, R of these tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.conformance.capture import Variant, captured, traces
from harness.conformance.case import Case
from harness.conformance.comparison import Ragged, agree
from harness.conformance.conventions import unexplained
from harness.conformance.conventions.models import Pass
from harness.conformance.property import Violation, Void
from harness.evidence.margins import unit_roundoff
from harness.implementations.protocols import Routing, Unsupported
from harness.implementations.reference import ReferenceUnderTest
from harness.spec.architecture import Architecture

Check = Callable[[Case], object]
HALF_THE_DIGITS = math.sqrt(unit_roundoff(torch.float32))
"""Relative to the largest value of a stage: rounding moves the last digits, and a defect the first ones."""
SLIGHT = 256 * unit_roundoff(torch.float32)
"""Likewise: more than the rounding of one layer, and less than most defects."""


@contextmanager
def narrowed(case: Case, *checks: Check, otherwise: str) -> Iterator[None]:
    """A Violation from within that names no stage is of that which the first failing check names.

    Each check leaves something out of what failed. Where all of them hold, it is what they leave out that is
    wrong: the stage `otherwise`. A check that cannot be made tells nothing, and no stage is named.
    """
    try:
        yield
    except Violation as violation:
        if not violation.stage:
            # What it draws and notes is not of the case that failed.
            aside = replace(case, facts={}, looked_at={}, _digest=hashlib.sha256())
            violation.stage = _first(aside, checks, otherwise)
        raise


def _first(case: Case, checks: Iterable[Check], otherwise: str) -> str:
    with unexplained():
        for check in checks:
            try:
                check(case)
            except Violation as smaller:
                return smaller.stage
            except (Unsupported, Void):
                return ""
    return otherwise


@dataclass(frozen=True)
class Call:
    """Tokens of one call, of which some are compared with those of another."""

    tokens: Tensor
    """[B, S]."""
    rows: Tensor
    """[R]: numbers of tokens, 0 to T - 1."""
    mask: Tensor | None = None


def parted(
    case: Case, model: Any, pairs: Iterable[tuple[Call, Call]], *, between: str = "", other: Any = None
) -> Check:
    """A check that the tokens of two calls are routed alike, for each pair; the second by the model `other`,
    where one is given.

    It names the first stage that differs, in the order of the layers. A layer's input that differs is of the
    stage `between`: attention, for tokens that are the same.
    """

    def routed(asked: Any, call: Call) -> list[Routing]:
        case.need(asked, "routing")
        return traces(asked, call.tokens, mask=call.mask, architecture=case.architecture)

    def check(_: Case) -> None:
        for one, two in pairs:
            for a, b in zip(routed(model, one), routed(other or model, two), strict=True):
                stage = _differing(a, one.rows, b, two.rows, between)
                if stage is not None:
                    raise Violation(f"layer {a.layer} differs", stage=stage)

    return check


def same_logits(model: Any, other: Any, call: Call) -> Check:
    """A check that two models say the same of what is compared of a call; it names no stage."""

    def check(aside: Case) -> None:
        aside.need(model, "forward")
        with torch.no_grad():
            a, b = (m.forward(call.tokens, mask=call.mask).flatten(0, 1) for m in (model, other))
        if _apart(a, call.rows, b, call.rows):
            raise Violation("logits differ", stage="")

    return check


def _differing(a: Routing, rows: Tensor, b: Routing, others: Tensor, between: str) -> str | None:
    if _apart(a.hidden, rows, b.hidden, others):
        return between
    for stage, name in (("proj", "logits"), ("score", "scores")):
        if _apart(getattr(a, name), rows, getattr(b, name), others):
            return stage
    # The order of a token's slots is free.
    (first, order), (second, reorder) = a.indices[rows].sort(-1), b.indices[others].sort(-1)
    if not torch.equal(first, second):
        return "drop" if bool(((first < 0) | (second < 0)).any()) else "select"
    if a.weights is not None and b.weights is not None:
        every = torch.arange(len(rows))
        if _apart(a.weights[rows].gather(-1, order), every, b.weights[others].gather(-1, reorder), every):
            return "weigh"
    return "combine" if _apart(a.output, rows, b.output, others) else None


def _apart(
    a: Tensor | None, rows: Tensor, b: Tensor | None, others: Tensor, share: float = HALF_THE_DIGITS
) -> bool:
    if a is None or b is None:
        return False
    x, y = a[rows].double(), b[others].double()
    return not bool(((x - y).abs() <= share * x.abs().amax()).all())


def located(case: Case, model: Any, one: Pass) -> AbstractContextManager[None]:
    """A Violation from within that names no stage is of that at which this pass leaves the reference's.

    Attention is looked at first, where it is all that lies between the tokens and what is seen of it; then
    every MoE layer. Where all of them are right, the logits are wrong for what comes after the last.
    """
    architecture = one.architecture

    def combined(aside: Case) -> None:
        # What rounding explains of each output is known here: it shows what all others would hide.
        aside.need(model, "routing")
        real = torch.ones_like(one.tokens, dtype=torch.bool) if one.mask is None else one.mask
        for layer in captured(model, Variant("", architecture, one.weights), Ragged(one.tokens, real)):
            if layer.trace.weights is not None and layer.real.any():
                right = layer.output()
                agree(
                    layer.shown("output"),
                    right.value,
                    right.bound,
                    what="output",
                    stage="combine",
                    where=layer.real,
                )

    def experts(aside: Case) -> None:
        call = Call(one.tokens, one.compared.flatten().nonzero()[:, 0], one.mask)
        reference = ReferenceUnderTest(aside.reference(architecture, one.weights))
        parted(replace(aside, architecture=architecture), model, [(call, call)], other=reference)(aside)

    # A norm hides how large the stream is, until the input of a later layer shows it.
    seen = architecture.n_moe_layers > 1 and architecture.is_moe_layer(architecture.n_layers - 1)
    return narrowed(case, attended(one), combined, experts, otherwise="unembed" if seen else "")


@dataclass(frozen=True)
class Step:
    """One thing more of attention than in the steps before it."""

    stage: str
    weights: Mapping[str, Tensor]
    tokens: Tensor
    """[B, S]."""
    mask: Tensor | None = None
    positions: Tensor | None = None
    like: Mapping[str, Tensor] | None = None
    """Weights with which the model itself must give the same; None where the reference must."""


def attended(one: Pass) -> Check:
    """A check of attention in steps: the first at which the model leaves the reference names the stage.

    It is seen in the input of the first MoE layer, and in the logits of an architecture without experts.
    """
    architecture = one.architecture

    def look(aside: Case, model: Any, step: Step) -> Tensor:
        with torch.no_grad():
            if architecture.moe is None:
                logits: Tensor = model.forward(step.tokens, mask=step.mask, positions=step.positions)
                return logits.flatten(0, 1)
            aside.need(model, "routing")
            first = model.routing(step.tokens, mask=step.mask, positions=step.positions)[0]
        hidden: Tensor | None = first.hidden
        if hidden is None:
            raise Unsupported("the routing trace shows no hidden")
        return hidden

    def check(aside: Case) -> None:
        for step in _steps(one):
            model = aside.model(architecture, step.weights)
            right = (
                ReferenceUnderTest(aside.reference(architecture, step.weights))
                if step.like is None
                else aside.model(architecture, step.like)
            )
            real = torch.ones_like(step.tokens, dtype=torch.bool) if step.mask is None else step.mask
            rows = real.flatten().nonzero()[:, 0]
            found, expected = look(aside, model, step), look(aside, right, step)
            # The epsilon of a norm tells weights of other sizes apart, slightly.
            if _apart(found, rows, expected, rows, SLIGHT if step.like is None else HALF_THE_DIGITS):
                # A slight difference may be of anything before, and it is what a later step would enlarge.
                large = _apart(found, rows, expected, rows)
                raise Violation("attention differs", stage=step.stage if large else "")

    return check


def _steps(one: Pass) -> Iterator[Step]:
    a, weights, tokens, mask = one.architecture, one.weights, one.tokens, one.mask
    t, full = a.attention, torch.ones_like(tokens, dtype=torch.bool)
    queries = ("q_b.weight",) if t.mla is not None and t.mla.q_lora_rank else ("q.weight", "q.bias")
    heads = "expand_kv" if t.mla is None else ""

    def alike(value: Tensor) -> Tensor:
        return value[: t.head_dim].repeat(t.n_kv_heads, *[1] * (value.dim() - 1))

    # Attention that adds nothing: embeddings, norms and all else that there is without it.
    yield Step("", _put(weights, torch.zeros_like, "o.weight", "o.bias"), tokens, mask)
    # Queries of 0 see all tokens alike, and a token that sees itself alone gets its own value.
    even = _put(weights, torch.zeros_like, *queries)
    plain = _put(even, lambda sinks: torch.full_like(sinks, -1e4), "sinks")
    first, same, still = tokens[:, :1], tokens[:, :1].expand_as(tokens), torch.zeros_like(tokens)
    yield Step("", _put(plain, alike, "v.weight", "v.bias"), first)
    yield Step(heads, plain, first)
    # The mean of values that are equal does not depend on which are seen.
    yield Step("scores", plain, same, full, still)
    yield Step("mask", plain, tokens, mask)
    yield Step("scores", even, tokens, mask)
    # The rest is of queries and keys: first all at one position, where nothing turns against anything.
    yield Step("", plain, tokens, full, still)
    for name in ("q", "k") if t.qk_norm != "none" else ():
        # Normalised, they do not show how large they were.
        louder = _put(weights, lambda value: 4 * value, f"{name}.weight", f"{name}.bias")
        yield Step("project", louder, tokens, full, still, like=weights)
    unbiased = _put(weights, torch.zeros_like, "q.bias", "k.bias")
    # Entries of a query are alike, and of a key: it does not matter which is which. A rotation that also
    # makes them larger does so at every position.
    turned = t.mla is None and t.rope is not None and t.rope.scaling is not None
    yield Step("" if turned else "scores", _flat(a, unbiased, queries[0]), tokens, full, still)
    yield Step("", _put(unbiased, alike, "k.weight"), tokens, full, still)
    yield Step("project", _put(weights, alike, "k.weight", "k.bias"), tokens, full, still)
    yield Step(heads, weights, tokens, full, still)
    yield Step("" if t.rope is None else "rotate", weights, tokens, mask)


def _flat(a: Architecture, weights: Mapping[str, Tensor], queries: str) -> dict[str, Tensor]:
    """Queries and keys whose entries are all alike, and faint, so that no softmax is one token's alone; where
    they are normalised, those of all heads. Of a part that is rotated and one that is not, only the latter.
    """
    mla = a.attention.mla
    if a.attention.qk_norm != "none":
        # A norm magnifies the rounding of one entry near 0, and not that of a head: all heads are alike.
        width = a.attention.head_dim
        return _put(weights, lambda value: value[:width].repeat(len(value) // width, 1), queries, "k.weight")
    out = _put(weights, lambda value: (value[:1] / 16).expand_as(value).clone(), queries)
    if mla is None:
        return _put(out, lambda value: value[:1].expand_as(value).clone(), "k.weight")
    nope, rope = mla.qk_nope_head_dim, mla.qk_rope_head_dim

    def unturned(value: Tensor) -> Tensor:
        return torch.cat([value[:-rope], torch.zeros_like(value[-rope:])])

    def own(value: Tensor) -> Tensor:
        of_heads: Tensor = value.unflatten(0, (a.attention.n_heads, -1)).clone()
        of_heads[:, :nope] = value[0]
        return of_heads.flatten(0, 1)

    return _put(_put(out, unturned, "kv_a.weight", "kv_a.bias"), own, "kv_b.weight")


def _put(weights: Mapping[str, Tensor], change: Callable[[Tensor], Tensor], *names: str) -> dict[str, Tensor]:
    """The weights, with those of these names in any attention changed."""
    return {
        name: change(value) if name.partition(".attention.")[2] in names else value
        for name, value in weights.items()
    }
