"""Conventions of a whole model, where only its logits are to be seen: the reference under a mutant's patch.

Letters: B sequences, S tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.comparison import Margin, longest_product
from harness.conformance.conventions.combining import COMBINE
from harness.conformance.conventions.dropping import DROP
from harness.conformance.conventions.scoring import PROJECT, SCORE
from harness.conformance.conventions.search import Convention, Finding, Fit, Says, does, finding, says
from harness.conformance.conventions.selecting import SELECT
from harness.conformance.conventions.weighing import WEIGH
from harness.evidence.margins import SAFETY, comparable_tokens, perturbed, unit_roundoff
from harness.implementations.reference import ReferenceUnderTest
from harness.mutants import CATALOGUE
from harness.reference import ReferenceModel
from harness.spec.architecture import Architecture

FLOAT32 = torch.float32
Patches = tuple[str, ...]
"""Mutants that are patched into one reference, by name."""


@dataclass(frozen=True)
class Pass:
    """One forward pass of the model under test, and what the property compared it with."""

    architecture: Architecture
    weights: Mapping[str, Tensor]
    tokens: Tensor
    """[B, S]."""
    logits: Tensor
    """[B, S, V], of the model under test."""
    margin: Margin
    mask: Tensor | None = None
    positions: Tensor | None = None

    @property
    def compared(self) -> Tensor:
        """[B, S] bool: tokens that the property compares."""
        return self.margin.comparable if self.mask is None else self.margin.comparable & self.mask


def find_model(case: Case) -> Callable[[list[Pass]], Finding | None]:
    """A finder for whole logits; it has nothing to say where the reference's are not known."""

    def find(passes: list[Pass]) -> Finding | None:
        if any(one.margin.logits is None for one in passes):
            return None
        plain: dict[int, ReferenceModel] = {}
        held: dict[tuple[int, Patches], Fit] = {}

        def fit(change: Callable[[Patches], Patches], one: Pass) -> Fit:
            # Where a convention has no place the spec's own is all there is.
            patches = tuple(name for name in change(()) if CATALOGUE[name].applies(one.architecture))
            key = id(one), patches
            if key not in held:
                if id(one) not in plain:
                    plain[id(one)] = case.reference(one.architecture, one.weights)
                held[key] = _fit(case, one, _patched(case, plain[id(one)], one, patches))
            return held[key]

        shapes = [one.architecture for one in passes]
        have = [row for row in MUTANTS if any(map(CATALOGUE[row.name].applies, shapes))]
        return finding(have, passes, fit, lambda one: one.architecture)

    return find


def _fit(case: Case, one: Pass, model: ReferenceModel) -> Fit:
    spec, compared = one.margin.logits, one.compared
    assert spec is not None
    with torch.no_grad():
        logits = model.run(one.tokens, None, one.mask, one.positions)[0]
    # Relative to the largest logit of a token the tolerance is the property's.
    louder = (logits.abs().amax(-1) / spec.abs().amax(-1).clamp(min=1e-300)).clamp(min=1)
    radius = (one.margin.radius * louder)[..., None]
    wrong = ~((one.logits.double() - logits).abs() <= radius).all(-1) & compared
    if 2 * int(wrong.sum()) > int(compared.sum()):
        return Fit(agrees=False, differs=False)
    if wrong.any():
        # A token whose experts rounding may change under this convention says nothing about it.
        settled = _settled(case, model, one)
        if (wrong & settled).any():
            return Fit(agrees=False, differs=False)
        compared = compared & settled
    apart = ((logits - spec).abs() > radius + one.margin.radius[..., None])[compared]
    return Fit(agrees=bool(compared.any()), differs=bool(apart.any()))


def _patched(case: Case, plain: ReferenceModel, one: Pass, patches: Patches) -> ReferenceModel:
    """The reference of a pass under patches; its weights are those of `plain`, which nothing writes to."""
    shared: dict[int, object] = {id(tensor): tensor for tensor in plain.parameters_by_name().values()}
    for module in plain.modules():
        shared |= {id(part): part for part in vars(module).values() if isinstance(part, BaseModel)}
    built = _under(patches, copy.deepcopy(plain, shared))
    if "load_weights" in vars(built):  # the patch is of the loading, which writes
        built = _under(patches, case.reference(one.architecture, one.weights))
        built.load_weights(one.weights)
    return built


def _under(patches: Patches, model: ReferenceModel) -> ReferenceModel:
    built = ReferenceUnderTest(model)
    for name in patches:
        CATALOGUE[name].patch(built)
    return built.model


def _settled(case: Case, model: ReferenceModel, one: Pass) -> Tensor:
    """[B, S] bool: tokens whose experts, and those of all before, no rounding of the size that the property
    allows for has changed in four runs of the patched reference."""
    if model.architecture.moe is None:
        return torch.ones_like(one.tokens, dtype=torch.bool)

    def chosen() -> Tensor:
        with torch.no_grad():
            traces = model.run(one.tokens, None, one.mask, one.positions)[2]
        return torch.stack([trace.indices.sort(-1).values for trace in traces])

    exact = chosen()
    flips = torch.zeros(one.tokens.numel(), dtype=torch.bool)
    size = SAFETY * longest_product(model.architecture) ** 0.5 * unit_roundoff(FLOAT32)
    for _ in range(4):
        with perturbed(model, size, case.generator()):
            flips |= (chosen() != exact).any(-1).any(0)
    flips = flips.view(one.tokens.shape)
    return comparable_tokens(flips if one.mask is None else flips & one.mask)


ROPE, WINDOW, HEADS = "attention.rope.", "attention.window", "attention.n_kv_heads"
ROWS: tuple[tuple[str, str, str, Says], ...] = (
    (
        "rope-layout-swapped",
        "layout",
        "rotary pairs in the other of the layouts half and interleaved",
        says(ROPE + "layout"),
    ),
    ("rope-theta-default", "theta", "the default base of the rotary frequencies", says(ROPE + "theta")),
    ("rope-scaling-ignored", "scaling", "rotary frequencies are not stretched", says(ROPE + "scaling.kind")),
    ("rope-mscale-ignored", "factor", "yarn's factor is lost", says(ROPE + "scaling.factor")),
    (
        "rope-trained-context-is-the-whole",
        "scaling",
        "rotary frequencies are stretched as if the whole context had been trained",
        says(ROPE + "scaling.original_max_positions"),
    ),
    ("rope-slowest-pair-kept", "slowest", "the slowest rotary pair is not rotated", does("rotates it")),
    ("rope-positions-in-bfloat16", "positions", "positions are bfloat16", does("counts them exactly")),
    ("positions-count-padding", "positions", "positions count padding", does("counts real tokens")),
    ("positions-argument-ignored", "positions", "positions that are given are not used", does("uses them")),
    ("positions-also-added", "added", "absolute positions are added beside rotary ones", does("has none")),
    ("rotates-values", "values", "keys depend on absolute positions", does("rotates them")),
    ("window-one-more", "window", "the window sees one token more", says(WINDOW)),
    ("window-one-less", "window", "the window sees one token less", says(WINDOW)),
    ("window-ignored", "window", "window layers see everything", says(WINDOW)),
    ("window-everywhere", "window", "full layers see a window only", says("attention.pattern")),
    ("sees-the-next-token", "causal", "the causal mask is off by one", does("sees no later token")),
    ("blind-to-the-first", "first", "the first token is not seen", does("sees it")),
    ("padding-is-attended", "padding", "padding is attended to", does("leaves it out")),
    ("kv-heads-tiled", "groups", "key/value heads are tiled, not repeated", says(HEADS)),
    ("scale-default", "scale", "scores are scaled by 1 / sqrt(head_dim)", does("has its own")),
    ("sinks-dropped", "sinks", "sinks take no weight", says("attention.sinks")),
    ("qk-norm-dropped", "norm", "queries and keys are not normalised", says("attention.qk_norm")),
    ("final-norm-dropped", "final", "the last norm is left out", does("has it")),
    ("norm-eps-default", "eps", "the epsilon of the norms is a default", says("norm.eps")),
    ("gate-clamped-below", "clamp", "the gate is clamped on both sides", does("clamps it from above")),
)
"""Mutants that only whole logits show, what each decides, and how they are said."""
STAGES: tuple[Convention[Any], ...] = (*PROJECT, *SCORE, *SELECT, *WEIGH, *COMBINE, *DROP)
HIDDEN = {"router-reports-probabilities", "softmax-of-the-selected"}
"""In logits the first is not seen; the second, of softmax scores, is the same as always-normalised."""


def _patch(name: str) -> Callable[[Patches], Patches]:
    return lambda patches: (*patches, name)


def _part(name: str) -> str:
    """The part of the model that a mutant is in, by its stage."""
    router = ("proj", "score", "select", "weigh", "drop")
    stage = CATALOGUE[name].stage
    return "router" if stage in router else "experts" if stage == "combine" else "attention"


MUTANTS: tuple[Convention[Patches], ...] = tuple(
    Convention(name, axis, variant, spec, _patch(name), _part(name))
    for name, axis, variant, spec in (
        *ROWS,
        # One axis may stand in several stages.
        *(
            (row.name, f"{CATALOGUE[row.name].stage} {row.axis}", row.variant, row.spec)
            for row in STAGES
            if row.name in CATALOGUE and row.name not in HIDDEN
        ),
    )
)
"""Mutants that are conventions: those of ROWS, and those of a stage."""
