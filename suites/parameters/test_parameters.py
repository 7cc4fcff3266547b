"""What an implementation learns: how much there is, and that loaded weights are all there and all used."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from harness.conformance import Case, Violation, conformance, require
from harness.conformance.comparison import margin, ragged
from harness.reference.weights import shapes
from harness.spec.architecture import Architecture
from harness.theory import parameters


def has_architecture(architecture: Architecture | None) -> bool:
    """Applies where there is a spec to compare with."""
    return architecture is not None


@conformance(
    "parameters.full-size-equals-theory",
    clause="architecture",
    needs=("parameters",),
    kills=("router-bias-dropped", "dense-layers-off-by-one", "head-beside-tied-table", "one-expert-short"),
    applies=has_architecture,
)
def test_full_size_equals_theory(case: Case) -> None:
    """At full size, on the meta device, there are as many parameters as theory says, to the parameter."""
    full = case.full
    assert full is not None
    model: Any = case.build(full, device="meta", dtype=torch.bfloat16)
    tensors = model.parameters()
    count = sum(tensor.numel() for tensor in tensors.values())
    expected = parameters.total(full) + sum(parameters.buffers(full).values())
    case.note("parameters", count)
    difference = f"{count} parameters in place of {expected} ({count - expected:+d})"
    canonical = shapes(full)
    if set(tensors) & set(canonical) and count != expected:
        named = _difference(tensors, canonical)
        raise Violation(f"{difference}: {named}", stage="param")
    require(count == expected, difference, stage="param")


def _difference(tensors: dict[str, Tensor], canonical: dict[str, tuple[int, ...]]) -> str:
    """The first parameters that are missing, unknown or misshapen, where the names are the canonical ones."""
    missing = [name for name in canonical if name not in tensors]
    unknown = [name for name in tensors if name not in canonical]
    misshapen = [
        name for name, x in tensors.items() if name in canonical and tuple(x.shape) != canonical[name]
    ]
    parts = (("missing", missing), ("unknown", unknown), ("misshapen", misshapen))
    return "; ".join(f"{what} {', '.join(names[:2])}" for what, names in parts if names)


@conformance(
    "parameters.twin-has-the-specified-shapes",
    clause="architecture",
    needs=("parameters", "weights"),
    kills=("expert-matrices-swapped", "router-bias-dropped"),
    applies=has_architecture,
)
def test_twin_has_the_specified_shapes(case: Case) -> None:
    """Under canonical names each parameter has its shape; under others their number is that of theory."""
    architecture = case.shape
    tensors, canonical = case.model().parameters(), shapes(architecture)
    if set(tensors) & set(canonical):
        difference = _difference(dict(tensors), canonical)
        require(not difference, difference, stage="param")
    count = sum(tensor.numel() for tensor in tensors.values())
    expected = sum(prod(shape) for shape in canonical.values())
    require(count == expected, f"{count} parameters in place of {expected}", stage="param")


@conformance(
    "parameters.loading-is-strict",
    clause="architecture",
    needs=("weights",),
    kills=("loads-what-it-finds", "one-row-for-all"),
    applies=has_architecture,
)
def test_loading_is_strict(case: Case) -> None:
    """A missing, an unknown and a misshapen tensor are each refused with KeyError or ValueError."""
    weights = case.weights()
    model = case.model(weights=weights)
    for name in (*sorted(weights, key=len)[-3:], "embedding.weight"):
        left_out = {key: value for key, value in weights.items() if key != name}
        _refuses(model, left_out, f"weights without {name}")
        value = weights[name]
        misshapen = torch.cat([value, value[:1]])
        _refuses(model, weights | {name: misshapen}, f"{name} of shape {tuple(misshapen.shape)}")
        # One row could be copied into all of them without an error.
        _refuses(model, weights | {name: value[:1]}, f"{name} of shape {tuple(value[:1].shape)}")
        if value.dim() == 2 and value.shape[0] != value.shape[1]:
            _refuses(model, weights | {name: value.T.contiguous()}, f"{name} transposed")
    _refuses(model, weights | {"layers.0.surplus.weight": weights["embedding.weight"]}, "an unknown tensor")


def _refuses(model: object, weights: dict[str, Tensor], what: str) -> None:
    try:
        model.load_weights(weights)  # type: ignore[attr-defined]
    except (KeyError, ValueError):
        return
    raise Violation(f"{what} is loaded without a word", stage="param")


@conformance(
    "parameters.loading-keeps-every-value",
    clause="architecture",
    needs=("weights", "parameters"),
    kills=("experts-not-loaded", "loads-in-bfloat16"),
    applies=has_architecture,
    costly=True,
)
def test_loading_keeps_every_value(case: Case) -> None:
    """After loading, the parameters hold exactly the values that were loaded, whatever their layout."""
    weights = case.weights()
    tensors = case.model(weights=weights).parameters()
    loaded = _sorted_values(weights.values())
    held = _sorted_values(tensors.values())
    require(
        len(held) == len(loaded),
        f"{len(held)} values other than 0 are held in place of {len(loaded)}",
        stage="param",
    )
    different = int((held != loaded).sum())
    require(
        different == 0, f"{different} of {len(loaded)} values are not those that were loaded", stage="param"
    )


def _sorted_values(tensors: object) -> Tensor:
    """All values but zeros, which padding of a layout may add, in float32."""
    values = torch.cat([tensor.detach().float().flatten() for tensor in tensors])  # type: ignore[attr-defined]
    return values[values != 0].sort().values


STAGES = (
    ("embed", ("embedding.weight", "positions.weight")),
    ("unembed", ("unembedding.weight", "final_norm.weight", "final_norm.bias")),
    ("norm", (".attention_norm.", ".ffn_norm.")),
    ("scores", (".sinks",)),
    ("project", (".attention.",)),
    ("select", (".correction_bias",)),
    ("proj", (".router.",)),
    ("combine", (".moe.", ".ffn.")),
)
"""The first stage of which a part stands in the name of a weight is the one that uses it."""


def stage_of(name: str) -> str:
    """The stage that a weight is for, by its canonical name."""
    stages = (stage for stage, parts in STAGES if any(part in f".{name}" for part in parts))
    return next(stages, "param")


@conformance(
    "parameters.every-weight-is-used",
    clause="architecture",
    needs=("weights", "forward"),
    kills=(
        "router-bias-dropped",
        "router-bias-unused",
        "final-norm-dropped",
        "shared-expert-dropped",
        "sinks-dropped",
        "qk-norm-dropped",
    ),
    applies=has_architecture,
    costly=True,
)
def test_every_weight_is_used(case: Case) -> None:
    """Another value of any tensor changes the logits wherever it changes those of the reference."""
    architecture, weights = case.shape, case.weights()
    batch = ragged(case)
    model = case.model(weights=weights)
    reference = case.reference(architecture, weights)
    bound = margin(case, model, batch.tokens, mask=batch.mask)
    unmoved = []
    with torch.no_grad():
        before = model.forward(batch.tokens, mask=batch.mask)
        exact = reference.forward(batch.tokens, mask=batch.mask)
        for name, value in weights.items():
            noise = torch.randn(value.shape, generator=case.generator(), dtype=value.dtype)
            changed = weights | {name: (value + noise).float().double()}
            reference.load_weights(changed)
            should = (reference.forward(batch.tokens, mask=batch.mask) - exact).abs().amax(-1)
            model.load_weights(changed)
            does = (model.forward(batch.tokens, mask=batch.mask) - before).abs().amax(-1).double()
            matters = batch.mask & (should > 10 * bound.radius)
            if matters.any() and not (does > 2 * bound.radius)[matters].any():
                unmoved.append(name)
    idle = {stage_of(name) for name in unmoved}
    stage = idle.pop() if len(idle) == 1 else "param"
    require(not unmoved, f"no logit depends on {', '.join(unmoved[:3])}", stage=stage)
