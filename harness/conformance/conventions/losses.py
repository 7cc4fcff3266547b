"""Conventions of the auxiliary losses: what is counted, over what it is pooled, and by what it is divided.

Letters: f share of the choices that are an expert's, P its mean score, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.conformance.comparison import Ragged
from harness.conformance.conventions.formulas import Auxiliary, balance, routed, under, z
from harness.conformance.conventions.search import Convention, Finding, Fit, does, finding, says
from harness.reference import ReferenceModel


@dataclass(frozen=True)
class Lost:
    """One auxiliary loss of the model under test, and what the property compared it with."""

    kind: str
    """Of the loss, "balance" or "z"."""
    label: str
    reference: ReferenceModel
    batch: Ragged
    found: Mapping[str, Tensor]
    """By name what was found, the scalar "value" or its gradients; and what the formula gives."""
    expected: Mapping[str, Tensor]
    radii: Mapping[str, float]
    """The tolerance on each."""


def find_loss(found: list[Lost]) -> Finding:
    """The finder for the value or the gradients of a loss."""
    conventions = BALANCE if found[0].kind == "balance" else Z
    own: dict[int, tuple[Auxiliary, dict[str, Tensor]]] = {}

    def fit(change: Callable[[Auxiliary], Auxiliary], one: Lost) -> Fit:
        if id(one) not in own:
            given = _specified(one)
            own[id(one)] = given, _computed(one, given)
        given, spec = own[id(one)]
        other = _computed(one, change(given))
        agrees, differs = True, False
        for name, radius in one.radii.items():
            value = one.found[name].detach().double()
            # Relative to the largest entry the tolerance is the property's.
            size = float(other[name].abs().amax() / spec[name].abs().amax().clamp(min=1e-300))
            agrees &= bool(((value - other[name]).abs() <= radius * max(1.0, size)).all())
            differs |= bool(((other[name] - spec[name]).abs() > 2 * radius * max(1.0, size)).any())
        return Fit(agrees, differs)

    return finding(conventions, found, fit, lambda one: one.reference.architecture)


def _specified(one: Lost) -> Auxiliary:
    with torch.set_grad_enabled("value" not in one.radii):
        given = routed(one.reference, one.batch)
    if one.kind == "balance":
        return under(given, one.reference.architecture.auxiliary_loss.balance)
    return given


def _computed(one: Lost, given: Auxiliary) -> dict[str, Tensor]:
    value = balance(given) if one.kind == "balance" else z(given)
    if "value" in one.radii:
        return {"value": value.detach()}
    found = one.reference.gradients(value)
    return {name: found[name] for name in one.radii}


def _all(given: Auxiliary, *fields: str) -> Auxiliary:
    """With padding among the tokens of these fields."""
    everything = torch.ones_like(given.real)
    counted: dict[str, Any] = dict.fromkeys(fields, everything)
    return replace(given, **counted)


def _coefficient(given: Auxiliary, kind: str) -> Auxiliary:
    loss = given.architecture.auxiliary_loss
    return replace(given, factor=loss.balance_coefficient if kind == "balance" else loss.z_coefficient)


LOSS = "auxiliary_loss."
REAL = does("counts real tokens alone")
BALANCE: tuple[Convention[Auxiliary], ...] = (
    *(
        Convention(
            f"balance-{name}",
            "formula",
            f"the balance loss of {name}",
            says(LOSS + "balance"),
            partial(under, convention=name),
        )
        for name in ("switch", "huggingface", "sequence")
    ),
    Convention(
        "balance-divides-by-k-twice",
        "minimum",
        "the load f is divided by K once more (minimum 1 where K was specified)",
        says(LOSS + "balance"),
        lambda a: replace(a, k_power=a.k_power + 1),
    ),
    Convention(
        "balance-divides-by-k-once-less",
        "minimum",
        "the load f is divided by K once less (minimum K where 1 was specified)",
        says(LOSS + "balance"),
        lambda a: replace(a, k_power=a.k_power - 1),
    ),
    Convention(
        "balance-first-choice-only",
        "choice",
        "only the first choice counts as load",
        does("counts all K"),
        lambda a: replace(a, selected=a.selected[..., :1].expand_as(a.selected)),
    ),
    Convention(
        "balance-counts-what-is-kept",
        "choice",
        "a dropped slot does not count as load",
        does("counts what was chosen"),
        lambda a: replace(a, selected=a.kept),
    ),
    Convention(
        "balance-pooled-over-layers",
        "layers",
        "f and P are pooled over layers before the product",
        says(LOSS + "balance"),
        lambda a: replace(a, layers="pooled"),
    ),
    Convention(
        "balance-summed-over-layers",
        "layers",
        "the losses of the layers are summed",
        says(LOSS + "balance"),
        lambda a: replace(a, layers="sum"),
    ),
    Convention(
        "balance-mean-over-layers",
        "layers",
        "the losses of the layers are averaged",
        says(LOSS + "balance"),
        lambda a: replace(a, layers="mean"),
    ),
    Convention(
        "balance-counts-padding",
        "padding",
        "padding counts in f and in P",
        REAL,
        lambda a: _all(a, "in_load", "in_mean", "per_load", "per_mean", "real"),
    ),
    Convention(
        "balance-counts-padding-in-the-load",
        "padding",
        "padding counts in f",
        REAL,
        lambda a: _all(a, "in_load", "per_load"),
    ),
    Convention(
        "balance-counts-padding-in-the-mean",
        "padding",
        "padding counts in P",
        REAL,
        lambda a: _all(a, "in_mean", "per_mean"),
    ),
    Convention(
        "balance-divides-by-all-tokens",
        "padding",
        "one of f and P, summed over real tokens, is divided by the number of all tokens",
        REAL,
        lambda a: _all(a, "per_mean"),
    ),
    Convention(
        "balance-divides-both-by-all-tokens",
        "padding",
        "f and P, summed over real tokens, are divided by the number of all tokens",
        REAL,
        lambda a: _all(a, "per_load", "per_mean"),
    ),
    Convention(
        "balance-on-raw-logits",
        "scores",
        "P is the mean of the logits",
        does("takes the scores"),
        lambda a: replace(a, scores=a.logits),
    ),
    Convention(
        "balance-on-logits",
        "scores",
        "P is the mean of the scores' logarithms",
        does("takes the scores"),
        lambda a: replace(a, scores=a.scores.log()),
    ),
    Convention(
        "balance-double-softmax",
        "scores",
        "P is the mean of a softmax of the scores",
        does("takes the scores"),
        lambda a: replace(a, scores=a.scores.softmax(-1)),
    ),
    Convention(
        "balance-on-shares",
        "scores",
        "P is the mean of scores that were divided by their sum",
        does("takes the scores"),
        lambda a: replace(a, scores=a.scores / a.scores.sum(-1, keepdim=True)),
    ),
    Convention(
        "balance-scrambles-tokens",
        "scores",
        "scores are transposed and read in the wrong order",
        does("has each token's"),
        lambda a: replace(a, scores=a.scores.transpose(-1, -2).reshape(a.scores.shape)),
    ),
    Convention(
        "balance-grows-with-the-batch",
        "batch",
        "the loss is multiplied by the number of sequences",
        does("averages over them"),
        lambda a: replace(a, factor=a.factor * len(a.real)),
    ),
    Convention(
        "balance-with-its-coefficient",
        "coefficient",
        "the loss is multiplied by its coefficient",
        does("has it without"),
        lambda a: _coefficient(a, "balance"),
    ),
    Convention(
        "balance-detached",
        "gradient",
        "the loss gives the router no gradient",
        does("trains it"),
        lambda a: replace(a, attached=False),
    ),
)
Z: tuple[Convention[Auxiliary], ...] = (
    Convention(
        "z-not-squared",
        "square",
        "the z-loss is the mean of logsumexp, not of its square",
        does("squares it"),
        lambda a: replace(a, inside=1),
    ),
    Convention(
        "z-squares-the-mean",
        "square",
        "the z-loss is the square of the mean of logsumexp",
        does("squares each token's"),
        lambda a: replace(a, inside=1, outside=2),
    ),
    Convention(
        "z-on-probabilities",
        "logits",
        "the z-loss is taken on probabilities",
        does("takes logits"),
        lambda a: replace(a, logits=a.logits.softmax(-1)),
    ),
    Convention(
        "z-mean-over-layers",
        "layers",
        "the z-losses of the layers are averaged",
        does("sums them"),
        lambda a: replace(a, layers="mean"),
    ),
    Convention(
        "z-counts-padding",
        "padding",
        "padding counts in the z-loss",
        REAL,
        lambda a: _all(a, "in_mean", "per_mean"),
    ),
    Convention(
        "z-divides-by-all-tokens",
        "padding",
        "the z-loss, summed over real tokens, is divided by the number of all tokens",
        REAL,
        lambda a: _all(a, "per_mean"),
    ),
    Convention(
        "z-with-its-coefficient",
        "coefficient",
        "the z-loss is multiplied by its coefficient",
        does("has it without"),
        lambda a: _coefficient(a, "z"),
    ),
)
