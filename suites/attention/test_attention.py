"""What a token attends to, in one pass.

Letters: B sequences, S tokens per sequence, W attention window, H query heads, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from harness.conformance import Case, conformance, require
from harness.conformance.comparison import agree, finite, margin, note_share, ragged
from harness.conformance.conventions import Seen, explained
from harness.conformance.conventions.models import Pass, find_model
from harness.conformance.narrowing import located, narrowed
from harness.conformance.passes import forward, independent
from harness.spec.architecture import Architecture


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

    def without_attention(aside: Case) -> None:
        none = weights | {f"{name}.o.weight": torch.zeros_like(weights[f"{name}.o.weight"])}
        check_first(aside, none, "")

    def one_value_head(aside: Case) -> None:
        # A token that sees itself alone, and values that all heads share: only they are projected.
        shared = dict(weights)
        for end in ("weight", "bias"):
            if f"{name}.v.{end}" in weights:
                value = weights[f"{name}.v.{end}"]
                shared[f"{name}.v.{end}"] = value[:width].repeat(
                    attention.n_kv_heads, *[1] * (value.dim() - 1)
                )
        check_first(aside, shared, "project")

    def check_first(aside: Case, held: Mapping[str, Tensor], stage: str) -> None:
        model, first = aside.model(architecture, held), tokens[:, :1]
        own = margin(aside, model, first, architecture=architecture, weights=held)
        assert own.logits is not None
        found = forward(model, first)
        agree(found, own.logits, own.radius, what="logits", where=own.comparable, stage=stage)

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
                with narrowed(case, without_attention, one_value_head, otherwise="expand_kv"):
                    if group != head // per_group:
                        what = f"logits of query head {head} after a change of key/value head {group}"
                        agree(after, before, 2 * bound.radius, what=what, where=bound.comparable)
                        continue
                    moved = ((after - before).abs().amax(-1).double() > 2 * bound.radius).any()
                    require(bool(moved), f"query head {head} does not read key/value head {group}")


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
                one = Pass(architecture, weights, batch.tokens, logits, bound, batch.mask)
                seen.add(one)
                finite(logits, "logits at real tokens", where=batch.mask)
                what = f"logits of one {kind} layer at std {std}"
                with located(case, model, one):
                    agree(logits, bound.logits, bound.radius, what=what, where=compared)
