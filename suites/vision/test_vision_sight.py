"""Which image a token sees: no other changes it, alone, in company and with a cache.

Letters: B sequences, S tokens per sequence, N images of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.conformance import Case, conformance, require
from harness.conformance.comparison import agree, finite, note_share
from harness.conformance.passes import independent
from harness.conformance.vision import (
    IMAGES,
    Illustrated,
    Looker,
    any_images,
    features,
    felt,
    last_images,
    looker,
    margin,
    padded,
)


@conformance(
    "vision.text-before-images-does-not-change",
    clause="vision.visible",
    needs=("cross_attention",),
    kills=("blind-rows-are-uniform", "image-seen-too-early"),
    applies=independent,
    costly=True,
)
def test_text_before_images(case: Case) -> None:
    """Logits of tokens before the first that sees an image are the same whatever the images show."""
    looks = looker(case)
    for batch in (last_images(case, looks.sight), any_images(case, looks.sight)):
        other = replace(batch, features=features(case, looks.sight, len(batch.tokens)))
        bound = margin(case, looks, batch)
        note_share(case, bound.comparable)
        before, after = looks.see(batch), looks.see(other)
        what = "logits of tokens that see no image, and none before them that does,"
        finite(before, what, stage="vision", where=~batch.open)
        where = bound.comparable & ~batch.open
        agree(after, before, 2 * bound.radius, what=what, where=where, stage="vision")
        moved = felt(after, before, bound) & batch.open
        seen = bool((batch.open & bound.comparable).any())
        require(not seen or bool(moved.any()), "no logit depends on any image", stage="vision")


@conformance(
    "vision.sees-the-visible-images-only",
    clause="vision.visible",
    needs=("cross_attention",),
    kills=(
        "earlier-images-leak",
        "next-image-for-last",
        "image-seen-too-early",
        "image-not-seen-by-its-token",
        "padding-images-attended",
        "image-order-reversed",
        "blind-rows-are-uniform",
        "visibility-of-the-first-sequence",
    ),
    applies=independent,
    costly=True,
)
def test_sees_the_visible_images_only(case: Case) -> None:
    """Another image in one place changes the first token that sees it, and no token before that one."""
    looks = looker(case)
    # The first token to see an image sees no other, and images come into sight out of their order.
    for order in ((2, 0, 1), (1, 2, 0), (0, 1)):
        batch = last_images(case, looks.sight)
        visible, firsts = torch.zeros_like(batch.visible), {}
        for turn, image in enumerate(order):
            firsts[image] = 2 + 3 * turn
            visible[:, firsts[image] : firsts[image] + 3] = False
            visible[:, firsts[image] : firsts[image] + 3, image] = True
        # The second sequence sees them one token later.
        visible[1:2] = visible[1:2].roll(1, 1)
        batch = replace(batch, visible=visible)
        bound = margin(case, looks, batch)
        note_share(case, bound.comparable)
        before = looks.see(batch)
        other = features(case, looks.sight, len(batch.tokens))
        for image in range(IMAGES):
            which = torch.zeros(visible.shape[0], IMAGES, dtype=torch.bool)
            which[:, image] = True
            after = looks.see(batch.with_images(other, which))
            reached = visible[:, :, image].cumsum(1) > 0
            what = f"logits of tokens that see no image {image}, and none before them that does,"
            where = bound.comparable & ~reached
            agree(after, before, 2 * bound.radius, what=what, where=where, stage="vision")
            first = visible[:, :, image] & (visible[:, :, image].cumsum(1) == 1) & bound.comparable
            what = f"a token that sees image {image} does not feel it"
            require(bool((felt(after, before, bound) | ~first).all()), what, stage="vision")


@conformance(
    "vision.images-may-be-listed-in-any-order",
    clause="vision.visible",
    needs=("cross_attention",),
    kills=("image-order-reversed", "next-image-for-last", "earlier-images-leak"),
    applies=independent,
    costly=True,
)
def test_images_in_any_order(case: Case) -> None:
    """Images listed in another order, with the same tokens seeing each, give the same logits."""
    looks = looker(case)
    batch = any_images(case, looks.sight)
    bound = margin(case, looks, batch)
    note_share(case, bound.comparable)
    before = looks.see(batch)
    for order in ((1, 2, 0), (0, 2, 1)):
        moved = replace(batch, features=batch.features[:, order], visible=batch.visible[..., order])
        what = f"logits with images listed as {list(order)}"
        agree(looks.see(moved), before, 2 * bound.radius, what=what, where=bound.comparable, stage="vision")


@conformance(
    "vision.company-does-not-matter",
    clause="vision.visible",
    needs=("cross_attention",),
    kills=("cross-keys-of-the-first-sequence", "visibility-of-the-first-sequence", "padding-images-attended"),
    applies=independent,
    costly=True,
)
def test_company(case: Case) -> None:
    """A sequence in a batch, with padding of text and of images, gives what it gives alone without them."""
    looks = looker(case)
    for batch in (
        last_images(case, looks.sight),
        any_images(case, looks.sight),
        padded(any_images(case, looks.sight)),
    ):
        bound = margin(case, looks, batch)
        note_share(case, bound.comparable[batch.mask])
        together = looks.see(batch)
        for row, real in enumerate(batch.mask):
            mine = bound.pick((row, real))
            if not mine.comparable.any():
                continue  # not all of them: note_share has seen to that
            used = batch.visible[row][real].any(0)
            used[0] |= ~used.any()  # at least one image is given
            own = Illustrated(
                batch.tokens[row][real][None],
                batch.features[row, used][None],
                batch.visible[row][real][:, used][None],
                real[real][None],
            )
            what = f"logits of sequence {row} in a batch"
            solo, where = looks.see(own)[0], mine.comparable
            agree(together[row][real], solo, 2 * mine.radius, what=what, where=where, stage="vision")


def in_pieces(looks: Looker, batch: Illustrated, sizes: Sequence[int]) -> Tensor:
    """Logits [B, S, V] computed in pieces of the given sizes; images are given with the first."""
    cache: Any = None
    done, logits = 0, []
    with torch.no_grad():
        for size in sizes:
            upto = done + size
            part, cache = looks.model.see_on(
                batch.tokens[:, done:upto],
                cache,
                batch.visible[:, :upto],
                features=None if done else batch.features,
                mask=batch.mask[:, :upto],
            )
            logits.append(part)
            done = upto
    return torch.cat(logits, dim=1)


def splits(length: int) -> list[tuple[int, ...]]:
    """Whole, a prefill and steps, steps only, two chunks, uneven chunks."""
    half = max(length // 2, 1)
    made = [(length,), (half, *(1,) * (length - half)), (1,) * length, (half, length - half)]
    return [*made, (3, 1, length - 6, 2)] if length > 6 else made


@conformance(
    "vision.any-split-equals-one-pass",
    clause="vision.cache",
    needs=("cross_attention", "cache"),
    kills=("decode-visibility-one-late", "later-chunks-are-blind", "steps-see-the-first-image"),
    applies=independent,
    costly=True,
)
def test_any_split(case: Case) -> None:
    """Text in pieces, with what is visible growing by each piece, gives the logits of one pass."""
    looks = looker(case)
    for batch in (last_images(case, looks.sight), any_images(case, looks.sight)):
        bound = margin(case, looks, batch)
        note_share(case, bound.comparable)
        whole = looks.see(batch)
        for sizes in splits(batch.tokens.shape[1]):
            pieces = in_pieces(looks, batch, sizes)
            what = f"logits in pieces of {list(sizes)}"
            agree(pieces, whole, 2 * bound.radius, what=what, where=bound.comparable, stage="cache")


@conformance(
    "vision.a-new-call-sees-its-own-images",
    clause="vision.cache",
    needs=("cross_attention", "cache"),
    kills=("cross-keys-of-another-call",),
    applies=independent,
    costly=True,
)
def test_a_new_call(case: Case) -> None:
    """A text that begins anew sees the images that it is given; two that take turns see their own."""
    looks = looker(case)
    one, two = any_images(case, looks.sight), any_images(case, looks.sight)
    bounds = [margin(case, looks, batch) for batch in (one, two)]
    # Of models that have seen nothing before.
    wholes = [looker(case).see(batch) for batch in (one, two)]
    half = one.tokens.shape[1] // 2
    caches: list[Any] = []
    for batch, bound, whole in zip((one, two), bounds, wholes, strict=True):
        begun = replace(
            batch, tokens=batch.tokens[:, :half], visible=batch.visible[:, :half], mask=batch.mask[:, :half]
        )
        with torch.no_grad():
            part, cache = looks.model.see_on(begun.tokens, None, begun.visible, features=begun.features)
        caches.append(cache)
        mine, where = bound.pick((slice(None), slice(0, half))), "a text that begins anew"
        for logits, what in ((part, f"first logits of {where}"), (looks.see(begun), f"logits of {where}")):
            agree(logits, whole[:, :half], 2 * mine.radius, what=what, where=mine.comparable, stage="cache")
    for batch, bound, whole, cache in zip((one, two), bounds, wholes, caches, strict=True):
        with torch.no_grad():
            part, _ = looks.model.see_on(batch.tokens[:, half:], cache, batch.visible)
        mine = bound.pick((slice(None), slice(half, None)))
        what = "logits of one of two texts that take turns"
        agree(part, whole[:, half:], 2 * mine.radius, what=what, where=mine.comparable, stage="cache")
