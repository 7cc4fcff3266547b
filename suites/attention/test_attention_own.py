"""What must not matter to attention, at every place: what comes later, a mask that says nothing, empty rows.

Black-box: the implementation is compared with itself, within what rounding explains twice.
Letters: B sequences, S tokens per sequence, W attention window.
"""

from __future__ import annotations

import torch

from harness.conformance import Case, conformance
from harness.conformance.comparison import agree, finite, margin, note_share
from harness.conformance.passes import forward, in_pieces, independent


@conformance(
    "attention.what-comes-later-is-not-felt",
    clause="architecture.attention",
    needs=("forward",),
    kills=("sees-the-next-token", "scale-by-the-length-of-the-call"),
    applies=independent,
    costly=True,
)
def test_what_comes_later_is_not_felt(case: Case) -> None:
    """Every beginning of a sequence, of each length, gives alone the logits that it gives in the whole."""
    model = case.model()
    for batch, length in ((2, 19), (1, 6)):
        tokens = case.tokens(batch, length)
        bound = margin(case, model, tokens)
        note_share(case, bound.comparable)
        whole = forward(model, tokens)
        for upto in range(1, length):
            own = bound.pick((slice(None), slice(0, upto)))
            if not own.comparable.any():
                continue
            what = f"logits of the first {upto} of {length} tokens"
            alone = forward(model, tokens[:, :upto])
            agree(alone, whole[:, :upto], 2 * own.radius, what=what, where=own.comparable, stage="mask")


@conformance(
    "attention.a-later-token-is-not-felt",
    clause="architecture.attention",
    needs=("forward",),
    kills=("sees-the-next-token",),
    applies=independent,
    costly=True,
)
def test_a_later_token_is_not_felt(case: Case) -> None:
    """With one token changed, at any place, every logit before that place stays."""
    model = case.model()
    tokens = case.tokens(1, 21)
    other = tokens + case.drawn(torch.randint(1, case.vocab_size, tokens.shape, generator=case.generator()))
    length = tokens.shape[1]
    at = torch.eye(length, dtype=torch.bool)
    changed = torch.where(at, other % case.vocab_size, tokens)
    bound = margin(case, model, tokens)
    note_share(case, bound.comparable)
    before = forward(model, tokens)
    for place in range(1, length):
        own = bound.pick((slice(None), slice(0, place)))
        if not own.comparable.any():
            continue
        what = f"logits before place {place}, where alone the token changed,"
        after = forward(model, changed[place : place + 1])[:, :place]
        agree(after, before[:, :place], 2 * own.radius, what=what, where=own.comparable, stage="mask")


@conformance(
    "attention.a-mask-without-padding-changes-nothing",
    clause="architecture.attention",
    needs=("forward", "cache"),
    kills=("window-dropped-without-padding",),
    applies=independent,
    costly=True,
)
def test_a_mask_without_padding_changes_nothing(case: Case) -> None:
    """A mask that is true everywhere gives what no mask gives, and what it gives beside a padded sequence."""
    model = case.model()
    tokens = case.tokens(2, 23)
    every = torch.ones_like(tokens, dtype=torch.bool)
    bound = margin(case, model, tokens)
    note_share(case, bound.comparable)
    whole = forward(model, tokens)
    compare = {
        "with a mask that is true everywhere": forward(model, tokens, mask=every),
        "in pieces without a mask": in_pieces(model, tokens, (13, 1, 9)),
        "in pieces with a mask that is true everywhere": in_pieces(model, tokens, (13, 1, 9), every),
    }
    # Where nothing is padded an implementation may leave the mask out altogether.
    beside = torch.cat([tokens, tokens[:1]])
    padded = torch.cat([every, every[:1]])
    padded[-1, :3] = False
    compare["beside a padded sequence"] = forward(model, beside, mask=padded)[:-1]
    compare["in pieces beside a padded sequence"] = in_pieces(model, beside, (13, 1, 9), padded)[:-1]
    for label, logits in compare.items():
        what = f"logits {label}"
        agree(logits, whole, 2 * bound.radius, what=what, where=bound.comparable, stage="mask")


@conformance(
    "attention.rows-that-see-nothing-are-harmless",
    clause="architecture.attention",
    needs=("forward",),
    kills=("padding-poisons",),
    applies=independent,
)
def test_rows_that_see_nothing_are_harmless(case: Case) -> None:
    """Rows of padding alone, before a sequence or for all of it, are finite, and no real token feels them."""
    model = case.model()
    tokens = case.tokens(3, 17)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0] = False
    mask[1, :11] = False
    bound = margin(case, model, tokens[1:], mask=mask[1:])
    note_share(case, bound.comparable[mask[1:]])
    together = forward(model, tokens, mask=mask)
    finite(together, "logits, those of padding too,", stage="mask")
    for row in (1, 2):
        real = mask[row]
        own = bound.pick((row - 1, real))
        if not own.comparable.any():
            continue  # not all of them: note_share has seen to that
        alone = forward(model, tokens[row][real][None])[0]
        what = f"logits of sequence {row}, beside one of padding alone,"
        agree(together[row][real], alone, 2 * own.radius, what=what, where=own.comparable, stage="mask")


@conformance(
    "attention.long-steps-on-a-filled-cache",
    clause="architecture.attention",
    needs=("forward", "cache"),
    kills=(
        "decode-has-a-scale-of-its-own",
        "cached-prefill-sees-ahead",
        "cache-keeps-too-little",
        "cache-forgets-padding",
        "chunk-starts-afresh",
    ),
    applies=independent,
    costly=True,
)
def test_long_steps_on_a_filled_cache(case: Case) -> None:
    """Steps of many tokens on a cache of many, longer and shorter than a window, give what one pass gives.

    So they do for sequences with padding on the left, of more tokens than a window too.
    """
    model = case.model()
    window = None if case.architecture is None else case.architecture.attention.window
    length = 31 if window is None else max(31, 3 * window + 1)
    tokens = case.tokens(3, length)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :11], mask[2, :1] = False, False
    rest = length - 21
    for rows, seen in ((slice(0, 1), None), (slice(0, 3), mask)):
        some = tokens[rows]
        real = torch.ones_like(some, dtype=torch.bool) if seen is None else seen
        bound = margin(case, model, some, mask=seen)
        note_share(case, bound.comparable[real])
        whole = forward(model, some, mask=seen)
        for sizes in ((12, 9, rest), (15, 2, 1, 3, rest), (20, 1, *(2,) * (rest // 2), *(1,) * (rest % 2))):
            pieces = in_pieces(model, some, sizes, seen)
            what = f"logits of {len(some)} sequences in pieces of {list(sizes)}"
            compared = bound.comparable & real
            agree(pieces, whole, 2 * bound.radius, what=what, where=compared, stage="cache")
