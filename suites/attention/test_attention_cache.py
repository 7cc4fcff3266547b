"""The cache: any split of a sequence into calls gives what one call gives.

Letters: B sequences, S tokens per sequence, W attention window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.conformance import Case, conformance
from harness.conformance.comparison import agree, finite, margin, note_share
from harness.conformance.narrowing import narrowed
from harness.conformance.passes import forward, in_pieces, independent
from harness.implementations.protocols import Unsupported


def splits(length: int) -> list[tuple[int, ...]]:
    """Ways to cut a sequence: whole, all but the last, token by token, halves, and three uneven pieces."""
    some = [(length,), (length - 1, 1), (1,) * length, (length - length // 3, length // 3)]
    if length == 16:
        # Whatever a call leaves in the cache is read by a later one: chunks come before chunks and steps.
        some += [(10, 6), (7, 1, 8), (4, 6, 1, 5), (3, 5, 5, 3)]
    return some


@conformance(
    "attention.any-split-equals-one-pass",
    clause="architecture.attention",
    needs=("forward", "cache"),
    kills=(
        "cached-prefill-sees-ahead",
        "chunk-starts-afresh",
        "decode-position-off-by-one",
        "cache-keeps-too-little",
        "decode-sees-one-less",
        "cache-block-lost",
        "chunk-forgets-the-past",
    ),
    applies=independent,
    costly=True,
)
def test_any_split_equals_one_pass(case: Case) -> None:
    """Prefill and decode in pieces of any sizes give the logits of one pass."""
    model = case.model()
    window = None if case.architecture is None else case.architecture.attention.window
    lengths = (16,) if window is None else (16, window - 1, window, window + 1)
    batches = [case.tokens(2, length) for length in lengths]
    # One sequence; and some beyond the usual blocks of 16, 32 and 64 tokens, of which rounding seldom makes
    # all go to other experts on the way.
    batches += [case.tokens(1, 16), case.tokens(4, 70)]
    for tokens in batches:
        bound = margin(case, model, tokens)
        note_share(case, bound.comparable)
        whole = forward(model, tokens)
        for sizes in splits(tokens.shape[1]):
            pieces = in_pieces(model, tokens, sizes)
            what = f"logits of {tokens.shape[1]} tokens in pieces of {list(sizes)}"
            agree(pieces, whole, 2 * bound.radius, what=what, where=bound.comparable, stage="cache")


@conformance(
    "attention.padding-before-a-cache-is-irrelevant",
    clause="architecture.attention",
    needs=("forward", "cache"),
    kills=("positions-count-padding", "cache-forgets-padding", "padding-poisons"),
    applies=independent,
    costly=True,
)
def test_padding_before_a_cache_is_irrelevant(case: Case) -> None:
    """Sequences padded on the left, prefilled and then decoded, give what each gives alone in one pass."""
    model = case.model()
    tokens = case.tokens(3, 16)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for row, pads in enumerate((5, 0, 2)):
        mask[row, :pads] = False
    bound = margin(case, model, tokens, mask=mask)
    note_share(case, bound.comparable[mask])
    alone = [forward(model, tokens[row][real][None])[0] for row, real in enumerate(mask)]

    def check(sizes: tuple[int, ...], positions: Tensor | None = None, stage: str = "") -> None:
        pieces = in_pieces(model, tokens, sizes, mask, positions)
        finite(pieces, "logits at real tokens", where=mask, stage=stage)
        for row, real in enumerate(mask):
            own = bound.pick((row, real))
            if not own.comparable.any():
                continue  # not all of them: note_share has seen to that
            what = f"logits of sequence {row}, padded on the left, in pieces of {list(sizes)}"
            agree(pieces[row][real], alone[row], 2 * own.radius, what=what, where=own.comparable, stage=stage)

    at = (mask.cumsum(1) - 1).clamp(min=0)
    for sizes in ((16,), (10, 6), (11, *(1,) * 5), (7, 1, 8), (6, 5, 2, 3)):
        stage = "mask" if len(sizes) == 1 else "cache"
        # Right where positions are given, it counts them wrongly.
        with narrowed(case, lambda _, sizes=sizes, stage=stage: check(sizes, at, stage), otherwise="rotate"):  # type: ignore[misc]
            check(sizes)


@conformance(
    "attention.positions-may-be-given",
    clause="architecture.positions",
    needs=("forward", "weights", "cache"),
    kills=("positions-argument-ignored", "positions-ignored-with-a-cache", "positions-wrap"),
    applies=lambda a: independent(a) and a is not None and a.positions != "none",
)
def test_positions_may_be_given(case: Case) -> None:
    """Positions that are given, far ones and with gaps, are used, in one pass and in pieces with a cache."""
    architecture, weights = case.shape, case.weights(std=0.2)
    model = case.model(weights=weights)
    tokens = case.tokens(2, 12)
    last = architecture.max_positions - 1
    steps = torch.tensor([0, 1, 2, 5, 9, 20, 21, 40, 63, 64, 90, 127]).clamp(max=last)
    at = torch.stack([steps, last - steps.flip(0)])
    # Said explicitly: without a mask some models take a jump in the positions for a new sequence.
    mask = torch.ones_like(tokens, dtype=torch.bool)
    bound = margin(case, model, tokens, mask=mask, positions=at, weights=weights)
    assert bound.logits is not None
    note_share(case, bound.comparable)
    with torch.no_grad():
        whole = model.forward(tokens, mask=mask, positions=at)
        start, cache = model.extend(tokens[:, :5], None, mask=mask[:, :5], positions=at[:, :5])
        rest, _ = model.extend(tokens[:, 5:], cache, mask=mask, positions=at[:, 5:])
    for what, logits in (("logits", whole), ("logits in pieces", torch.cat([start, rest], dim=1))):
        said = f"{what} at given positions"
        agree(logits, bound.logits, bound.radius, what=said, where=bound.comparable, stage="rotate")


@conformance(
    "attention.a-cache-may-be-used-twice",
    clause="architecture.attention",
    needs=("cache",),
    kills=("cache-shared-between-calls",),
    level="SHOULD",
    applies=independent,
)
def test_a_cache_may_be_used_twice(case: Case) -> None:
    """Going on from a cache leaves it as it was: another continuation gives what it gives afresh."""
    model = case.model()
    start, one, two = case.tokens(2, 9), case.tokens(2, 4), case.tokens(2, 4)
    if getattr(model, "copies_caches", False):
        raise Unsupported("its caches are written in place: the adapter copies each one before it is used")
    bound = margin(case, model, torch.cat([start, two], dim=1)).pick((slice(None), slice(9, None)))
    note_share(case, bound.comparable)
    with torch.no_grad():
        _, fresh = model.extend(start, None)
        expected, _ = model.extend(two, fresh)
        _, shared = model.extend(start, None)
        model.extend(one, shared)
        after, _ = model.extend(two, shared)
    agree(
        after,
        expected,
        2 * bound.radius,
        what="logits of a second continuation",
        where=bound.comparable,
        stage="cache",
    )
