"""What a token attends to, in one pass.

Letters: B sequences, S tokens per sequence, W attention window, H query heads, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.conformance import Case, conformance, require
from harness.conformance.case import replaced
from harness.conformance.comparison import agree, finite, margin, note_share, ragged
from harness.conformance.conventions import Seen, explained
from harness.conformance.conventions.models import Pass, find_model
from harness.spec.architecture import Architecture


def forward(model: Any, tokens: Tensor, **arguments: Tensor | None) -> Tensor:
    """Logits [B, S, V] without gradients."""
    with torch.no_grad():
        logits: Tensor = model.forward(tokens, **arguments)
    return logits


def tokens_compete(architecture: Architecture | None) -> bool:
    """Whether a token's experts depend on other tokens, by design."""
    moe = None if architecture is None else architecture.moe
    return moe is not None and moe.router.capacity_factor is not None


def independent(architecture: Architecture | None) -> bool:
    """Applies where attention is the only way from one token to another."""
    return not tokens_compete(architecture)


def has_window(architecture: Architecture | None) -> bool:
    """Applies to sliding windows."""
    return (
        architecture is not None and architecture.attention.window is not None and independent(architecture)
    )


def has_full_layers(architecture: Architecture | None) -> bool:
    """Applies where some layer attends to everything before."""
    return architecture is not None and "full" in architecture.attention.pattern and independent(architecture)


def is_grouped(architecture: Architecture | None) -> bool:
    """Applies to grouped-query attention, several heads to each of several key/value heads."""
    if architecture is None or architecture.attention.mla is not None:
        return False
    return 1 < architecture.attention.n_kv_heads < architecture.attention.n_heads


def has_rope(architecture: Architecture | None) -> bool:
    """Applies to rotary positions."""
    return architecture is not None and architecture.attention.rope is not None and independent(architecture)


@conformance(
    "attention.is-causal",
    clause="architecture.attention",
    needs=("forward",),
    kills=("sees-the-next-token", "softmax-over-tokens"),
    applies=independent,
)
def test_is_causal(case: Case) -> None:
    """Another token at a place changes the logits there, and none before it."""
    model = case.model()
    tokens, other = case.tokens(3, 17), case.tokens(3, 17)
    bound = margin(case, model, tokens)
    note_share(case, bound.comparable)
    before = forward(model, tokens)
    for place in (1, 8, 16):
        changed = tokens.clone()
        changed[:, place:] = torch.where(other == tokens, (other + 1) % case.vocab_size, other)[:, place:]
        after = forward(model, changed)
        own = bound.pick((slice(None), slice(0, place)))
        what = f"logits before place {place}, where the tokens changed,"
        agree(
            after[:, :place], before[:, :place], 2 * own.radius, what=what, where=own.comparable, stage="mask"
        )
        moved = (after - before)[:, place].abs().amax(-1).double()
        require(
            bool((moved > 2 * bound.radius[:, place]).any()),
            f"the token at place {place} does not matter there",
        )


def reaching(case: Case, architecture: Architecture, lengths: Sequence[int]) -> Iterator[Pass]:
    """For each length S a pass over a sequence, and over each that differs from it in one token: [1 + S, S].

    One layer, so that influence is the attention mask; weights at std 0.2, where the softmax lets every
    token that is seen be felt.
    """
    weights = case.weights(architecture, std=0.2)
    for length in lengths:
        model = case.model(architecture, weights)
        tokens, other = case.tokens(1, length), case.tokens(1, length)
        other = torch.where(other == tokens, (other + 1) % architecture.vocab_size, other)
        changed = torch.where(torch.eye(length, dtype=torch.bool), other, tokens)
        batch = torch.cat([tokens, changed])
        bound = margin(case, model, batch, architecture=architecture, weights=weights)
        yield Pass(architecture, weights, batch, forward(model, batch), bound)


def influence(one: Pass) -> tuple[Tensor, Tensor]:
    """How far the logits at t move when token j changes, [S, S] by (j, t), over what rounding explains twice.

    Second: whether (j, t) is comparable.
    """
    logits, bound = one.logits.double(), one.margin
    moved = (logits[1:] - logits[:1]).abs().amax(-1)
    allowed = bound.radius[1:] + bound.radius[:1]
    return moved / allowed, bound.comparable[1:] & bound.comparable[:1]


FELT = 5.0
"""Times what rounding explains: from there on, a token is certainly felt."""


def check_reach(case: Case, architecture: Architecture, lengths: Sequence[int], reach: int) -> None:
    """Raise Violation unless exactly the last `reach` tokens are seen, the token itself among them."""
    passes = Seen(reaching(case, architecture, lengths))
    with explained(passes, find_model(case)):
        for one in passes:
            moved, comparable = influence(one)
            note_share(case, comparable)
            _check_reach(moved, comparable, reach)


def _check_reach(moved: Tensor, comparable: Tensor, reach: int) -> None:
    length = len(moved)
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    unseen = comparable & ((distance < 0) | (distance >= reach))
    if unseen.any():
        worst = float(moved[unseen].amax())
        far = sorted(set(distance[unseen & (moved > 1)].tolist()))
        message = f"tokens {far} back are felt ({worst:.2g} times what rounding explains)"
        told = {"observed": far, "expected": f"0 to {reach - 1} back", "difference": worst, "tolerance": 1}
        require(worst <= 1, f"{message}, where {reach} are seen", stage="mask", **told)
    for back in range(min(reach, length - 4)):
        most = float(moved[distance == back].amax())
        where = f"no token {back} back is felt ({most:.2g} times what rounding explains)"
        require(most > FELT, f"{where}, where {reach} are seen", stage="mask")
    for token in range(length - 4):
        most = float(moved[token, token + 1 : token + reach].amax()) if reach > 1 else FELT + 1
        where = f"no later token feels token {token} ({most:.2g} times what rounding explains)"
        require(most > FELT, f"{where}, where {reach} are seen", stage="mask")


@conformance(
    "attention.window-ends-where-it-should",
    clause="architecture.attention.window",
    needs=("forward", "weights"),
    kills=(
        "window-one-more",
        "window-one-less",
        "window-ignored",
        "window-ignored-without-padding",
    ),
    applies=has_window,
)
def test_window_ends_where_it_should(case: Case) -> None:
    """On a window layer a token sees itself and the W - 1 tokens before it: no more, no fewer."""
    architecture = case.one_layer("window")
    window = architecture.attention.window
    assert window is not None
    check_reach(case, architecture, (window - 1, window, window + 1, 3 * window - 1), window)


@conformance(
    "attention.full-layers-see-everything",
    clause="architecture.attention.pattern",
    needs=("forward", "weights"),
    kills=("window-everywhere", "sees-the-next-token", "blind-to-the-first"),
    applies=has_full_layers,
    costly=True,
)
def test_full_layers_see_everything(case: Case) -> None:
    """On a full layer a token sees itself and every token before it."""
    check_reach(case, case.one_layer("full"), (23,), 23)


@conformance(
    "attention.heads-share-keys-in-groups",
    clause="architecture.attention.n_kv_heads",
    needs=("forward", "weights"),
    kills=(
        "kv-heads-tiled",
        "fused-qkv-taken-for-grouped",
    ),
    applies=is_grouped,
    costly=True,
)
def test_heads_share_keys_in_groups(case: Case) -> None:
    """Query head i reads key/value head i // (H / G): other values elsewhere do not reach its output."""
    architecture = case.one_layer()
    attention = architecture.attention
    weights = case.weights(architecture, std=0.2)
    tokens = case.tokens(3, 11)
    name, width = "layers.0.attention", attention.head_dim
    per_group = attention.n_heads // attention.n_kv_heads
    noise = case.drawn(torch.randn(width, architecture.d_model, generator=case.generator()).double() * 0.2)
    seen = Seen[Pass]()
    with explained(seen, find_model(case)):
        for head in range(attention.n_heads):
            alone = torch.zeros_like(weights[f"{name}.o.weight"])
            mine = slice(head * width, (head + 1) * width)
            alone[:, mine] = weights[f"{name}.o.weight"][:, mine]
            only = weights | {f"{name}.o.weight": alone}
            model = case.model(architecture, only)
            bound = margin(case, model, tokens, architecture=architecture, weights=only)
            before = forward(model, tokens)
            seen.add(Pass(architecture, only, tokens, before, bound))
            for group in range(attention.n_kv_heads):
                values = weights[f"{name}.v.weight"].clone()
                values[group * width : (group + 1) * width] = noise
                after = forward(case.model(architecture, only | {f"{name}.v.weight": values}), tokens)
                if group != head // per_group:
                    what = f"logits of query head {head} after a change of key/value head {group}"
                    agree(
                        after, before, 2 * bound.radius, what=what, where=bound.comparable, stage="expand_kv"
                    )
                    continue
                moved = ((after - before).abs().amax(-1).double() > 2 * bound.radius).any()
                require(
                    bool(moved), f"query head {head} does not read key/value head {group}", stage="expand_kv"
                )


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
    agree(
        forward(model, tokens),
        before,
        2 * here.radius,
        what="logits without positions",
        where=here.comparable,
    )
    for by in (1, 17, 50):
        there = margin(case, model, tokens, positions=at + by)
        compared = here.comparable & there.comparable
        after = forward(model, tokens, positions=at + by)
        what = f"logits {by} positions on"
        agree(after, before, here.radius + there.radius, what=what, where=compared, stage="rotate")


def slow_pairs(architecture: Architecture, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one layer, with queries and keys 0 in all rotated pairs but the slowest."""
    attention = architecture.attention
    rope, mla = attention.rope, attention.mla
    assert rope is not None
    dim = rope.dim or (attention.head_dim if mla is None else mla.qk_rope_head_dim)
    pair = torch.arange(dim) % (dim // 2) if rope.layout == "half" else torch.arange(dim) // 2
    fast = (pair < dim // 2 - 1).nonzero()[:, 0]
    if mla is None:
        rows = {"q": (attention.n_heads, 0), "k": (attention.n_kv_heads, 0)}
    else:
        of_queries = "q" if mla.q_lora_rank is None else "q_b"
        rows = {of_queries: (attention.n_heads, mla.qk_nope_head_dim), "kv_a": (1, mla.kv_lora_rank)}
    out = dict(weights)
    for name, (heads, before) in rows.items():
        for part in ("weight", "bias"):
            at = f"layers.0.attention.{name}.{part}"
            if at in out:
                out[at] = out[at].unflatten(0, (heads, -1)).clone()
                out[at][:, before + fast] = 0
                out[at] = out[at].flatten(0, 1)
    return out


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
    # Said explicitly: without a mask some models take a jump in the positions for a new sequence.
    mask = torch.ones_like(tokens, dtype=torch.bool)
    steps = torch.tensor([0, 1, 2, 3, 5, 9, 14, 22, 33, 47, 66, 88, 109, 127])
    seen = Seen[Pass]()
    with explained(seen, find_model(case)):
        for label, architecture in (("near", near), ("far", far), ("far and slow", slow)):
            last = architecture.max_positions - 1
            weights = case.weights(architecture, std=0.2)
            at = torch.stack([steps, last - steps.flip(0)])
            if architecture is slow:
                weights, at = (
                    slow_pairs(architecture, weights),
                    at.new_tensor([steps.tolist()] * 2) * (last // 127),
                )
            model = case.model(architecture, weights)
            bound = margin(
                case, model, tokens, mask=mask, positions=at, architecture=architecture, weights=weights
            )
            assert bound.logits is not None
            note_share(case, bound.comparable)
            logits = forward(model, tokens, mask=mask, positions=at)
            seen.add(Pass(architecture, weights, tokens, logits, bound, mask, at))
            what = f"logits at {label} positions"
            used = agree(
                logits, bound.logits, bound.radius, what=what, where=bound.comparable, stage="rotate"
            )
            case.note(f"{label}_share_of_tolerance", round(used, 4))


@conformance(
    "attention.one-layer-equals-reference",
    clause="architecture.attention",
    needs=("forward", "weights"),
    kills=("kv-heads-tiled", "scale-default", "sinks-dropped", "qk-norm-dropped", "padding-is-attended"),
    applies=lambda architecture: architecture is not None and independent(architecture),
)
def test_one_layer_equals_reference(case: Case) -> None:
    """One layer of each kind gives the reference's logits on a ragged batch."""
    batch = ragged(case, 19, pads=((0, 5), (6, 0), (2, 3), (0, 0)))
    seen = Seen[Pass]()
    with explained(seen, find_model(case)):
        for kind in dict.fromkeys(case.shape.attention.pattern):
            architecture = case.one_layer(kind)
            for std in (0.2, 0.5):
                weights = case.weights(architecture, std=std)
                model = case.model(architecture, weights)
                bound = margin(
                    case, model, batch.tokens, mask=batch.mask, architecture=architecture, weights=weights
                )
                assert bound.logits is not None
                compared = bound.comparable & batch.mask
                note_share(case, compared[batch.mask])
                logits = forward(model, batch.tokens, mask=batch.mask)
                seen.add(Pass(architecture, weights, batch.tokens, logits, bound, batch.mask))
                finite(logits, "logits at real tokens", where=batch.mask)
                what = f"logits of one {kind} layer at std {std}"
                agree(logits, bound.logits, bound.radius, what=what, where=compared)
