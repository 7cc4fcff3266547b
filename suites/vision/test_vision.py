"""Gated cross-attention: what text that looks at images must compute.

Letters: B sequences, S tokens per sequence, N images of a sequence, M frames of one, P features of a frame,
W their width, R latents of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from harness.conformance import Case, conformance, require
from harness.conformance.comparison import agree, finite, longest_product, note_share
from harness.conformance.gradients import radii
from harness.conformance.narrowing import Call, narrowed, same_logits
from harness.conformance.passes import forward, independent
from harness.conformance.property import Void
from harness.conformance.vision import (
    Illustrated,
    Looker,
    any_images,
    expected_gradients,
    felt,
    last_images,
    looker,
    margin,
    padded,
)
from harness.implementations.protocols import Unsupported
from harness.implementations.reference import ReferenceUnderTest


def gates_times(by: float) -> Callable[[dict[str, Tensor]], None]:
    """A change of weights: all gates are multiplied."""

    def change(weights: dict[str, Tensor]) -> None:
        weights |= {name: by * gate for name, gate in weights.items() if name.endswith("_gate")}

    return change


def check(case: Case, looks: Looker, batch: Illustrated, what: str) -> None:
    """Raise Violation unless the logits are the reference's."""
    bound = margin(case, looks, batch)
    assert bound.logits is not None
    where = bound.comparable & batch.mask
    note_share(case, where[batch.mask])
    logits = looks.see(batch)
    assert looks.exact is not None
    text = Call(batch.tokens, batch.mask.flatten().nonzero()[:, 0], batch.mask)
    without = same_logits(looks.model, ReferenceUnderTest(looks.exact.text), text)
    with narrowed(case, without, otherwise="vision"):
        finite(logits, what, stage="", where=batch.mask)
        agree(logits, bound.logits, bound.radius, what=what, where=where, stage="")


@conformance(
    "vision.logits-are-the-references",
    clause="vision",
    needs=("cross_attention", "weights"),
    kills=(
        "gate-tan",
        "gate-sigmoid",
        "gate-on-attention-only",
        "gate-on-feed-forward-only",
        "one-gate-for-both",
        "gated-feed-forward-missing",
        "blind-feed-forward-runs",
        "earlier-images-leak",
        "next-image-for-last",
        "image-seen-too-early",
        "image-not-seen-by-its-token",
        "blind-rows-are-uniform",
        "video-without-time",
        "last-frame-without-time",
        "frames-timed-one-late",
        "only-the-first-frame",
        "resampler-skipped",
        "latents-do-not-attend-themselves",
        "features-are-not-normed",
        "cross-attention-not-scaled",
        "one-block-for-all",
        "blocks-one-layer-late",
        "image-order-reversed",
        "padding-images-attended",
        "cross-keys-of-the-first-sequence",
    ),
    applies=independent,
    costly=True,
)
def test_logits(case: Case) -> None:
    """With gates beyond 1, where tanh is like nothing it may be taken for, the logits are the reference's."""
    looks = looker(case)
    for what, batch in (
        ("last images", last_images(case, looks.sight)),
        ("any images", any_images(case, looks.sight)),
        ("any images, padded text", padded(any_images(case, looks.sight))),
    ):
        check(case, looks, batch, f"logits with {what}")


@conformance(
    "vision.gates-at-zero-leave-the-text",
    clause="vision.gates",
    needs=("cross_attention", "forward", "weights"),
    kills=("gate-sigmoid", "gate-on-attention-only", "gate-on-feed-forward-only"),
    applies=independent,
)
def test_gates_at_zero(case: Case) -> None:
    """With all gates at 0, as training starts, the logits are those of the text model alone."""
    looks = looker(case, gates_times(0))
    batch = any_images(case, looks.sight)
    bound = margin(case, looks, batch)
    note_share(case, bound.comparable)
    text = forward(looks.model, batch.tokens)
    what = "logits with all gates at 0"
    agree(looks.see(batch), text, 2 * bound.radius, what=what, where=bound.comparable, stage="vision")


@conformance(
    "vision.blind-tokens-are-text",
    clause="vision.visible",
    needs=("cross_attention", "forward", "weights"),
    kills=("blind-rows-are-uniform", "blind-feed-forward-runs", "image-seen-too-early"),
    applies=independent,
    costly=True,
)
def test_blind_tokens_are_text(case: Case) -> None:
    """A token that sees no image, and none before it that does, has the logits of the text model alone."""
    looks = looker(case)
    for batch in (last_images(case, looks.sight), any_images(case, looks.sight)):
        bound = margin(case, looks, batch)
        where = bound.comparable & ~batch.open
        note_share(case, where[~batch.open])
        text = forward(looks.model, batch.tokens)
        logits = looks.see(batch)
        what = "logits of tokens that see no image"
        finite(logits, what, stage="vision", where=~batch.open)
        agree(logits, text, 2 * bound.radius, what=what, where=where, stage="vision")


@conformance(
    "vision.an-image-is-a-video-of-one-frame",
    clause="vision.resampler",
    needs=("cross_attention",),
    kills=("embeddings-bypass-the-resampler", "single-images-without-time"),
    applies=independent,
    costly=True,
)
def test_an_image_is_a_video_of_one_frame(case: Case) -> None:
    """Features given as those of single images take the path of a video of one frame."""
    looks = looker(case)
    batch = any_images(case, looks.sight)
    video = replace(batch, features=batch.features[:, :, :1])
    image = replace(batch, features=batch.features[:, :, 0])
    bound = margin(case, looks, video)
    note_share(case, bound.comparable)
    single, whole = looks.see(image), looks.see(video)
    what = "logits with single images"
    agree(single, whole, 2 * bound.radius, what=what, where=bound.comparable, stage="vision")


@conformance(
    "vision.frames-have-an-order",
    clause="vision.resampler",
    needs=("cross_attention",),
    kills=("video-without-time", "only-the-first-frame", "last-frames-share-a-time"),
    applies=independent,
    costly=True,
)
def test_frames_have_an_order(case: Case) -> None:
    """Two frames of a video that change places change what the text makes of it."""
    looks = looker(case)
    frames = looks.sight.frames
    if frames < 2:
        raise Unsupported("it takes images, no videos")
    batch = last_images(case, looks.sight)
    bound = margin(case, looks, batch)
    where = bound.comparable & batch.open
    if not where.any():
        raise Void("no token that sees an image is comparable")
    note_share(case, bound.comparable)
    before = looks.see(batch)
    for frame in range(frames - 1):
        order = list(range(frames))
        order[frame : frame + 2] = frame + 1, frame
        after = looks.see(replace(batch, features=batch.features[:, :, order]))
        what = f"frames {frame} and {frame + 1} change places, and no logit does"
        require(bool((felt(after, before, bound) & where).any()), what, stage="vision")


@conformance(
    "vision.latents-are-a-set",
    clause="vision.resampler",
    needs=("cross_attention", "weights"),
    kills=("only-the-first-latents",),
    applies=independent,
    costly=True,
)
def test_latents_are_a_set(case: Case) -> None:
    """The order of the resampler's latents does not matter: text looks at all of them."""
    name = "vision.resampler.latents"
    looks = looker(case)
    batch = any_images(case, looks.sight)
    bound = margin(case, looks, batch)
    note_share(case, bound.comparable)
    before = looks.see(batch)

    def turned(weights: dict[str, Tensor]) -> None:
        weights[name] = weights[name].roll(1, 0)

    after = looker(case, turned).see(batch)
    what = "logits with the latents in another order"
    agree(after, before, 2 * bound.radius, what=what, where=bound.comparable, stage="vision")


def toward(case: Case, batch: Illustrated) -> Callable[[Tensor], Tensor]:
    """A loss of logits: the mean product with a random direction [V] of those of real tokens."""
    direction = torch.randn(case.vocab_size, generator=case.generator(), dtype=torch.float64)
    return lambda logits: (logits.double() @ direction)[batch.mask].mean()


@conformance(
    "vision.gradients-pass-through-visible-images",
    clause="vision.visible",
    needs=("cross_attention",),
    kills=("images-detached", "padding-images-attended", "earlier-images-leak"),
    applies=independent,
)
def test_gradients_pass_through_visible_images(case: Case) -> None:
    """Logits depend on the features of every image that a token sees, and of no other."""
    looks = looker(case)
    for batch in (last_images(case, looks.sight), any_images(case, looks.sight)):
        asked = replace(batch, features=batch.features.clone().requires_grad_())
        logits = looks.forward(asked)
        require(logits.requires_grad, "no gradient comes from the logits", stage="gradient")
        value = toward(case, asked)(logits)
        (found,) = torch.autograd.grad(value, asked.features, allow_unused=True)
        require(found is not None, "no gradient reaches the features of any image", stage="gradient")
        assert found is not None
        finite(found, "gradients of features", stage="gradient")
        size = found.abs().flatten(2).amax(-1)
        for row, image in torch.cartesian_prod(*map(torch.arange, size.shape)).tolist():
            seen, which = bool(batch.visible[row, :, image].any()), f"image {image} of sequence {row}"
            reached = float(size[row, image])
            if seen:
                require(reached > 0, f"no gradient reaches {which}, which is seen", stage="gradient")
            else:
                require(reached == 0, f"a gradient of {reached:.2g} reaches {which}, unseen", stage="vision")


@conformance(
    "vision.gradients-are-the-references",
    clause="vision",
    needs=("cross_attention", "gradients", "weights"),
    kills=("images-detached", "gates-detached", "gate-tan"),
    applies=independent,
    costly=True,
)
def test_gradients(case: Case) -> None:
    """Gradients of gates, blocks and resampler are the reference's, with gates open and with gates at 0."""
    for opened in (1, 0):
        looks = looker(case, gates_times(opened))
        assert looks.exact is not None
        for _ in range(10):
            batch = last_images(case, looks.sight)
            if bool(margin(case, looks, batch).comparable.all()):
                break
        else:
            raise Void("ten batches in a row have a token whose experts rounding may change")
        loss = toward(case, batch)
        wanted = expected_gradients(case, looks.exact, batch, loss)
        found = looks.model.gradients(loss(looks.forward(batch)))
        missing = sorted(wanted.keys() - found.keys())
        require(not missing, f"there is no gradient of {', '.join(missing[:3])}", stage="gradient")
        for name, radius in radii(wanted, longest_product(looks.exact.text.architecture)).items():
            what = f"gradient of {name} with gates times {opened}"
            agree(found[name], wanted[name].centre, radius, what=what, stage="gradient")
