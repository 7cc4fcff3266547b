"""Conventions of a whole model, where only its logits are to be seen: the reference under a mutant's patch.

Letters: B sequences, S tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from pydantic import BaseModel
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.comparison import Margin, longest_product
from harness.conformance.conventions.search import Convention, Finding, Fit, Says, does, says, search
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
        have = [row for row in _conventions() if any(map(CATALOGUE[row.name].applies, shapes))]
        found = search(have, passes, fit)
        return Finding(found, passes[0].architecture)  # type: ignore[arg-type]

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


Row = tuple[str, str, str, Says]
ROPE, WINDOW, HEADS = "attention.rope.", "attention.window", "attention.n_kv_heads"
MUTANTS: tuple[Row, ...] = (
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
    ("router-bias-unused", "bias", "the router's bias is not added", says("moe.router.bias")),
    ("double-softmax", "score", "the score function is applied twice", does("applies it once")),
    ("softmax-over-tokens", "score", "the softmax is over the tokens", does("takes it over the experts")),
    (
        "softmax-before-topk",
        "weigh",
        "combine weights are the selected scores of a softmax over all experts",
        says("moe.router.order"),
    ),
    (
        "always-normalised",
        "weigh",
        "combine weights renormalised over the selected experts (norm_topk_prob = true)",
        says("moe.router.normalise"),
    ),
    (
        "never-normalised",
        "weigh",
        "combine weights not renormalised over the selected experts (norm_topk_prob = false)",
        says("moe.router.normalise"),
    ),
    (
        "top-1-normalised",
        "weigh",
        "combine weights divided by themselves at K = 1",
        says("moe.router.normalise"),
    ),
    (
        "correction-bias-in-weights",
        "biased",
        "the correction bias is in the combine weights",
        does("adds it for the selection alone"),
    ),
    ("scaling-twice", "scaled", "combine weights are scaled twice", says("moe.router.scaling_factor")),
    (
        "scaling-only-if-normalised",
        "scaled",
        "combine weights are scaled only where they are normalised",
        says("moe.router.scaling_factor"),
    ),
    (
        "correction-bias-ignored",
        "corrected",
        "the correction bias is not in the selection",
        says("moe.router.correction_bias"),
    ),
    ("group-score-max", "best", "a group is worth its best expert", says("moe.router.group_score")),
    ("groups-ignored", "best", "every group is allowed", says("moe.router.topk_groups")),
    (
        "masked-groups-at-zero",
        "mask",
        "experts of excluded groups stay in the running with 0",
        does("leaves them out"),
    ),
    ("unweighted-sum", "sum", "experts are added without their weights", does("weighs them")),
    (
        "weight-on-the-input",
        "sum",
        "combine weights multiply the experts' input",
        does("weighs their output"),
    ),
    ("gate-and-up-swapped", "activation", "gate and up change places", does("activates the gate")),
    (
        "activation-outside",
        "activation",
        "the activation is applied to the product of gate and up",
        does("applies it to the gate"),
    ),
    ("expert-bias-dropped", "biases", "the experts' biases are not added", says("moe.expert.bias")),
    ("clamp-constant", "clamp", "the clamp is 7", says("moe.expert.clamp")),
    ("gate-clamped-below", "clamp", "the gate is clamped on both sides", does("clamps it from above")),
    ("shared-expert-dropped", "shared", "the shared expert is not added", does("adds it")),
    (
        "shared-gate-dropped",
        "shared",
        "the shared expert is added without its gate",
        says("moe.shared_gate"),
    ),
    (
        "transposed-if-square",
        "turned",
        "square expert matrices are transposed",
        does("has them as [out, in]"),
    ),
    (
        "swapped-if-half-square",
        "activation",
        "gate and up change places where 2 d_ff = d_model",
        does("activates the gate"),
    ),
    (
        "router-transposed-if-square",
        "turned",
        "a square router matrix is transposed",
        does("has it as [experts, d_model]"),
    ),
    ("drops-nothing", "capacity", "no token is ever dropped", says("moe.router.capacity_factor")),
    ("capacity-rounded-down", "capacity", "capacity is rounded down", does("rounds it up")),
    ("padding-takes-places", "capacity", "padding fills the experts' capacity", does("counts real tokens")),
)
"""Mutants that are conventions, what each decides, and how they are said."""


def _patch(name: str) -> Callable[[Patches], Patches]:
    return lambda patches: (*patches, name)


def _part(name: str) -> str:
    """The part of the model that a mutant is in, by its stage."""
    router = ("proj", "score", "select", "weigh", "drop")
    stage = CATALOGUE[name].stage
    return "router" if stage in router else "experts" if stage == "combine" else "attention"


@lru_cache(maxsize=1)
def _conventions() -> tuple[Convention[Patches], ...]:
    return tuple(
        Convention(name, axis, variant, spec, _patch(name), _part(name))
        for name, axis, variant, spec in MUTANTS
    )
