"""Where a token is: rotary positions, relative ones, near and far.

Letters: B sequences, S tokens per sequence, R rotated dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.conformance import Case, conformance
from harness.conformance.case import replaced
from harness.conformance.comparison import agree, margin, note_share
from harness.conformance.conventions import Seen, explained
from harness.conformance.conventions.models import Pass, find_model
from harness.conformance.narrowing import narrowed
from harness.conformance.passes import forward, has_rope
from harness.spec.architecture import Architecture


@conformance(
    "attention.rope-is-relative",
    clause="architecture.attention.rope",
    needs=("forward",),
    kills=("rotates-values", "positions-also-added"),
    applies=has_rope,
    costly=True,
)
def test_rope_is_relative(case: Case) -> None:
    """Moving all positions by the same number changes no logit."""
    model = case.model()
    tokens = case.tokens(3, 13)
    at = torch.arange(tokens.shape[1]).expand_as(tokens)
    here = margin(case, model, tokens, positions=at)
    before = forward(model, tokens, positions=at)
    unsaid, what = forward(model, tokens), "logits without positions"
    agree(unsaid, before, 2 * here.radius, what=what, where=here.comparable)
    for by in (1, 17, 50):
        there = margin(case, model, tokens, positions=at + by)
        compared = here.comparable & there.comparable
        after = forward(model, tokens, positions=at + by)
        what = f"logits {by} positions on"
        agree(after, before, here.radius + there.radius, what=what, where=compared, stage="rotate")


def pairs(architecture: Architecture) -> Tensor:
    """[R]: the rotary pair of each rotated dimension of a head, from the fastest to the slowest."""
    attention = architecture.attention
    rope, mla = attention.rope, attention.mla
    assert rope is not None
    dim = rope.dim or (attention.head_dim if mla is None else mla.qk_rope_head_dim)
    return torch.arange(dim) % (dim // 2) if rope.layout == "half" else torch.arange(dim) // 2


def silent(
    architecture: Architecture, weights: Mapping[str, Tensor], dims: Tensor | slice
) -> dict[str, Tensor]:
    """The weights of one layer, with queries and keys 0 in these of the rotated dimensions of every head."""
    attention, mla = architecture.attention, architecture.attention.mla
    if mla is None:
        rows = {"q": (attention.n_heads, 0), "k": (attention.n_kv_heads, 0)}
    else:
        rows = {
            _of_queries(architecture): (attention.n_heads, mla.qk_nope_head_dim),
            "kv_a": (1, mla.kv_lora_rank),
        }
    out = dict(weights)
    of_a_head = torch.arange(len(pairs(architecture)))[dims]
    for name, (heads, before) in rows.items():
        for part in ("weight", "bias"):
            at = f"layers.0.attention.{name}.{part}"
            if at in out:
                out[at] = out[at].unflatten(0, (heads, -1)).clone()
                out[at][:, before + of_a_head] = 0
                out[at] = out[at].flatten(0, 1)
    return out


def _of_queries(architecture: Architecture) -> str:
    mla = architecture.attention.mla
    return "q" if mla is None or mla.q_lora_rank is None else "q_b"


def without_queries(architecture: Architecture, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one layer, with queries 0: every token that is seen counts alike, wherever it is."""
    name = f"layers.0.attention.{_of_queries(architecture)}."
    return {n: torch.zeros_like(value) if n.startswith(name) else value for n, value in weights.items()}


@dataclass(frozen=True)
class Placed:
    """Tokens of one layer, far apart."""

    label: str
    architecture: Architecture
    weights: Mapping[str, Tensor]
    tokens: Tensor
    at: Tensor
    """[B, S]: their positions."""


def check_turns(case: Case, placed: Placed, seen: Seen[Pass]) -> None:
    """Raise Violation unless the logits are the reference's: of stage rotate where that alone is wrong."""
    a, weights = placed.architecture, placed.weights

    def elsewhere(aside: Case) -> None:
        check_at(aside, replace(placed, weights=without_queries(a, weights)))

    def still(aside: Case) -> None:
        check_at(aside, replace(placed, weights=silent(a, weights, slice(None))), stage="scores")

    with narrowed(case, elsewhere, still, otherwise="rotate"):
        check_at(case, placed, seen)


def check_at(case: Case, placed: Placed, seen: Seen[Pass] | None = None, *, stage: str = "") -> None:
    """Raise Violation unless the logits of one layer at these positions are the reference's."""
    architecture, weights, tokens, at = placed.architecture, placed.weights, placed.tokens, placed.at
    # Said explicitly: without a mask some models take a jump in the positions for a new sequence.
    mask = torch.ones_like(tokens, dtype=torch.bool)
    model = case.model(architecture, weights)
    bound = margin(case, model, tokens, mask=mask, positions=at, architecture=architecture, weights=weights)
    assert bound.logits is not None
    note_share(case, bound.comparable)
    logits = forward(model, tokens, mask=mask, positions=at)
    if seen is not None:
        seen.add(Pass(architecture, weights, tokens, logits, bound, mask, at))
    what = f"logits at {placed.label} positions"
    used = agree(logits, bound.logits, bound.radius, what=what, where=bound.comparable, stage=stage)
    case.note(f"{placed.label}_share_of_tolerance", round(used, 4))


@conformance(
    "attention.rope-turns-as-specified",
    clause="architecture.attention.rope",
    needs=("forward", "weights"),
    kills=(
        "rope-layout-swapped",
        "rope-theta-default",
        "rope-scaling-ignored",
        "rope-mscale-ignored",
        "scale-default",
        "rope-positions-in-bfloat16",
        "rope-trained-context-is-the-whole",
        "rope-slowest-pair-kept",
    ),
    applies=has_rope,
)
def test_rope_turns_as_specified(case: Case) -> None:
    """At near and far positions one layer gives the reference's logits: frequencies, scaling and factors."""
    near = case.one_layer("full")
    # Where bfloat16 shows every 16th position, and the trained context is a small part of the whole.
    far = replaced(near, {"max_positions": 2**12})
    # At 2^17 the angles of fast pairs are lost in float32, and those of slow ones only begin to show.
    slow = replaced(near, {"max_positions": 2**17})
    tokens = case.tokens(2, 14)
    steps = torch.tensor([0, 1, 2, 3, 5, 9, 14, 22, 33, 47, 66, 88, 109, 127])
    seen = Seen[Pass]()
    with explained(seen, find_model(case)):
        for label, architecture in (("near", near), ("far", far), ("far and slow", slow)):
            last = architecture.max_positions - 1
            weights = case.weights(architecture, std=0.2)
            at = torch.stack([steps, last - steps.flip(0)])
            if architecture is slow:
                of = pairs(architecture)
                weights = silent(architecture, weights, of < of.amax())
                at = at.new_tensor([steps.tolist()] * 2) * (last // 127)
            check_turns(case, Placed(label, architecture, weights, tokens, at), seen)
