"""Rotary embeddings as config.json files state them, old style and new.

Up to transformers 4: `rope_theta`, `rope_scaling` and `partial_rotary_factor` stand side by side.
From transformers 5: one object `rope_parameters` holds all three. Both are read; if both are there
they must agree. Kinds and their keys: transformers 5.23.0, modeling_rope_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from harness.spec.architecture import Rope, RopeScaling
from harness.spec.families.fields import Fields, same

ROPE: Mapping[str, Any] = {"rope_theta": None, "rope_scaling": None, "rope_parameters": None}
"""Keys of every family with rotary embeddings; absent ones fall back on the arguments of `rope`."""
KINDS = {"default": "default", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
LAYER_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")


def rope(
    fields: Fields,
    head_dim: int,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    layout: Literal["half", "interleaved"] = "half",
    absent: Mapping[str, Any] | None = None,
) -> Rope:
    """The rotary embedding of a family.

    head_dim: dimensions that can be rotated. theta: the family's base, if the file gives none. partial: the
    share of the dimensions that the family rotates, if the file gives none; None: all, and any other share
    is refused. absent: what the absence of a rope object means, if not plain rotation.
    """
    inner = _inner(fields, absent)
    for key in LAYER_KINDS:
        if key in inner.given:
            raise inner.refuse(
                key, "each kind of layer has a rope of its own", "a spec has one for all layers"
            )
    kind = _kind(inner)
    theta = _one_of(fields, inner, "rope_theta", theta)
    if theta <= 1:
        raise fields.refuse("rope_theta", f"got {theta:g}", "it must be a number above 1")
    dim = _rotated(fields, inner, head_dim, partial)
    scaling = _scaling(inner, kind, fields.count("max_position_embeddings"))
    for key in inner.leftovers(()):
        raise inner.refuse(key, f'a spec knows no such key for rope type "{kind}"', "remove it")
    return Rope(theta=theta, dim=dim, layout=layout, scaling=scaling)


def _inner(fields: Fields, absent: Mapping[str, Any] | None) -> Fields:
    """The one rope object, whichever of the two names it has."""
    old, new = fields.table("rope_scaling"), fields.table("rope_parameters")
    if old is not None and new is not None and not same(old, new):
        raise fields.refuse("rope_scaling", "it differs from rope_parameters", "keep one of the two")
    defaults = {"rope_type": None, "type": None, "rope_theta": None, "partial_rotary_factor": None}
    prefix = "rope_parameters." if old is None else "rope_scaling."
    return Fields(old or new or absent or {}, defaults, prefix=prefix)


def _kind(inner: Fields) -> str:
    new, old = inner.value("rope_type"), inner.value("type")
    if new is not None and old is not None and new != old:
        raise inner.refuse("type", f"{old!r} contradicts rope_type = {new!r}", "keep one of the two")
    if new is None and old is None:
        return "default"
    return inner.word("rope_type" if new is not None else "type", KINDS)


def _one_of(fields: Fields, inner: Fields, key: str, default: float) -> float:
    """A number that may stand beside the rope object, inside it, or (agreeing) in both."""
    for part in (fields, inner):
        if key in part.given and part.given[key] is None:
            # transformers passes a null on where it would fill in the default of an absent key.
            raise part.refuse(key, "null is not what its absence means", "leave it out or give a number")
    beside, inside = fields.number_or_none(key), inner.number_or_none(key)
    if beside is not None and inside is not None and beside != inside:
        raise fields.refuse(
            key, f"{beside:g} contradicts {inside:g} in the rope object", "keep one of the two"
        )
    return next((number for number in (inside, beside) if number is not None), default)


def _rotated(fields: Fields, inner: Fields, head_dim: int, partial: float | None) -> int | None:
    """How many dimensions of each head are rotated; None: all."""
    if head_dim % 2:
        raise fields.refuse(
            "head_dim", f"heads of {head_dim} dimensions cannot be rotated in pairs", "make it even"
        )
    if partial is None:
        inner.only("partial_rotary_factor", (None, 1.0), "this family rotates whole heads")
        return None
    factor = _one_of(fields, inner, "partial_rotary_factor", partial)
    dim = int(head_dim * factor)
    if factor > 1 or dim % 2 or dim == 0:
        wrong = f"{factor:g} of {head_dim} dimensions are {dim}"
        raise fields.refuse(
            "partial_rotary_factor", wrong, "an even number of them, at least 2, must be rotated"
        )
    return None if dim == head_dim else dim


def _scaling(inner: Fields, kind: str, max_positions: int) -> RopeScaling | None:
    if kind == "default":
        return None
    factor = inner.number("factor", least=1.0)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind == "llama3":
        original = inner.count("original_max_position_embeddings")
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if high <= low:
            raise inner.refuse(
                "high_freq_factor", f"{high:g} is not above low_freq_factor {low:g}", "raise it"
            )
        return RopeScaling(
            kind="llama3",
            factor=factor,
            original_max_positions=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return _yarn(inner, factor, max_positions)


def _yarn(inner: Fields, factor: float, max_positions: int) -> RopeScaling:
    inner.defaults = dict(inner.defaults) | {
        "original_max_position_embeddings": max_positions,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": None,
        "mscale_all_dim": None,
        "attention_factor": None,
        "truncate": True,
    }
    fast, slow = inner.number("beta_fast"), inner.number("beta_slow")
    if fast < slow:
        raise inner.refuse("beta_fast", f"{fast:g} is below beta_slow {slow:g}", "it must be at least that")
    mscale, all_dim = inner.weight("mscale"), inner.weight("mscale_all_dim")
    if bool(mscale) != bool(all_dim):
        # transformers drops a lone mscale, DeepSeek's own code applies it.
        lone = "mscale" if mscale else "mscale_all_dim"
        raise inner.refuse(lone, "one of mscale and mscale_all_dim alone is ambiguous", "give both or none")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=inner.count("original_max_position_embeddings"),
        beta_fast=fast,
        beta_slow=slow,
        mscale=mscale,
        mscale_all_dim=all_dim,
        attention_factor=inner.number_or_none("attention_factor"),
        truncate=inner.flag("truncate"),
    )
