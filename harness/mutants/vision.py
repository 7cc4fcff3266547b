"""Defects of cross-attention to images: gates, the resampler, what is visible, and what is kept.

Letters: B sequences, S new tokens, N images of a sequence, M frames of one, P features of a frame, W their
width, R latents of an image, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import F, Method, anywhere, enter, replace
from harness.reference.trace import LayerCache
from harness.reference.vision import SeeingModel

Parts = Callable[[SeeingModel], Iterable[Any]]
"""From a SeeingModel to those of its parts that have the defect."""

OF_VISION: dict[str, Any] = {"stage": "vision", "spec": "llama-3.1-8b", "applies": anywhere}
"""A dense text model unless a row says otherwise: no token's experts keep it from being compared."""


def entered(defect: F, make: Method, parts: Parts, method: str, **row: Any) -> F:
    """Enter the mutant that `defect` describes, and give it back: make(part, original method) is put in that
    method's place on every part of every cross-attention that is loaded."""

    def patch(built: Any) -> None:
        built.on_vision.append(lambda seeing: replace(make, parts(seeing), method))

    return enter(defect, patch, **(OF_VISION | row))


def vision_mutant(parts: Parts, method: str, **row: Any) -> Callable[[F], F]:
    """Decorate make(part, original method) -> defective method, as in `entered`."""
    return lambda make: entered(make, make, parts, method, **row)


def seeings(seeing: SeeingModel) -> Iterable[Any]:
    """The model itself."""
    return [seeing]


def resamplers(seeing: SeeingModel) -> Iterable[Any]:
    """Its resampler."""
    return [seeing.resampler]


def resampler_layers(seeing: SeeingModel) -> Iterable[Any]:
    """The resampler's layers."""
    return list(seeing.resampler.layers)


def blocks(seeing: SeeingModel) -> Iterable[Any]:
    """The gated blocks."""
    return seeing.blocks


def gazes(seeing: SeeingModel) -> Iterable[Any]:
    """The cross-attention of each gated block."""
    return [block.attention for block in seeing.blocks]


@vision_mutant(blocks, "gate", origin="flamingo-pytorch 55842c0")
def gate_tan(_: Any, __: Method) -> Method:
    """The gate is the tangent, which near 0 is the hyperbolic one."""
    return torch.tan


@vision_mutant(blocks, "gate")
def gate_sigmoid(_: Any, __: Method) -> Method:
    """The gate is a sigmoid, which is half open at 0."""
    return torch.sigmoid


@vision_mutant(blocks, "gate")
def gate_on_attention_only(block: Any, gate: Method) -> Method:
    """The feed-forward has no gate."""
    return lambda value: gate(value) if value is block.attention_gate else torch.ones_like(value)


@vision_mutant(blocks, "gate")
def gate_on_feed_forward_only(block: Any, gate: Method) -> Method:
    """The attention has no gate."""
    return lambda value: gate(value) if value is block.ffn_gate else torch.ones_like(value)


@vision_mutant(blocks, "gate")
def one_gate_for_both(block: Any, gate: Method) -> Method:
    """The attention's gate stands before the feed-forward too."""
    return lambda _: gate(block.attention_gate)


@vision_mutant(blocks, "gate", stage="gradient")
def gates_detached(_: Any, gate: Method) -> Method:
    """No gradient reaches the gates, which stay at 0 for ever."""
    return lambda value: gate(value.detach())


@vision_mutant(blocks, "looks")
def gated_feed_forward_missing(_: Any, __: Method) -> Method:
    """A block is its attention alone."""
    return lambda seen: torch.zeros_like(seen[..., :1])


@vision_mutant(blocks, "looks")
def blind_feed_forward_runs(_: Any, __: Method) -> Method:
    """The feed-forward changes tokens that see nothing."""
    return lambda seen: torch.ones_like(seen.any(-1, keepdim=True))


@vision_mutant(gazes, "scores", origin="transformers#26428")
def blind_rows_are_uniform(_: Any, scores: Method) -> Method:
    """What is masked gets a large negative number: a row with nothing else attends to everything alike."""
    return lambda q, k, seen: scores(q, k, seen | ~seen.any(-1, keepdim=True))


@vision_mutant(gazes, "scores")
def padding_images_attended(_: Any, scores: Method) -> Method:
    """Images that no token sees, which pad a batch, are attended to."""

    def changed(q: Tensor, k: Tensor, seen: Tensor) -> Any:
        unseen = ~seen.any(1, keepdim=True) & seen.any((1, 2), keepdim=True)
        return scores(q, k, seen | (unseen & seen.any(-1, keepdim=True)))

    return changed


@vision_mutant(gazes, "forward")
def cross_attention_not_scaled(attention: Any, forward: Method) -> Method:
    """Queries and keys are not divided by the root of their width."""
    attention.scale = 1.0
    return forward


@vision_mutant(gazes, "forward")
def cross_keys_of_the_first_sequence(_: Any, forward: Method) -> Method:
    """All sequences of a batch look at the first one's images."""

    def changed(x: Tensor, made: LayerCache, seen: Tensor) -> Any:
        first = LayerCache(*(part[:1].expand(len(x), -1, -1, -1) for part in (made.keys, made.values)))
        return forward(x, first, seen)

    return changed


def visible(**row: Any) -> Callable[[F], F]:
    """Decorate change(visible [B, S, N]) -> the defective one."""

    def decorate(change: F) -> F:
        return entered(change, lambda _, seen: lambda given: seen(change(given)), seeings, "seen", **row)

    return decorate


@visible(origin="flamingo-pytorch 0e1a915")
def earlier_images_leak(given: Tensor) -> Tensor:
    """A token sees all images up to its own."""
    return given.flip(-1).cumsum(-1).flip(-1) > 0


@visible()
def next_image_for_last(given: Tensor) -> Tensor:
    """A token sees the image after its own."""
    return given.roll(1, -1)


@visible()
def image_order_reversed(given: Tensor) -> Tensor:
    """Images are counted from the last one."""
    return given.flip(-1)


@visible()
def image_seen_too_early(given: Tensor) -> Tensor:
    """The token before an image comes into sight sees it."""
    return torch.cat([given[:, 1:], given[:, -1:]], dim=1) if given.shape[1] > 1 else given


@visible()
def image_not_seen_by_its_token(given: Tensor) -> Tensor:
    """The first token to see an image sees what the one before it does."""
    return torch.cat([torch.zeros_like(given[:, :1]), given[:, :-1]], dim=1) if given.shape[1] > 1 else given


@visible()
def visibility_of_the_first_sequence(given: Tensor) -> Tensor:
    """All sequences of a batch see the images that the first one sees."""
    return given[:1].expand_as(given)


@vision_mutant(resamplers, "timed", origin="flamingo-pytorch 3707d58")
def video_without_time(_: Any, __: Method) -> Method:
    """Frames have no embedding of their time, so that a video is a set of them."""
    return lambda features: features


@vision_mutant(resamplers, "timed")
def last_frame_without_time(resampler: Any, timed: Method) -> Method:
    """The last frame that there may be has no embedding of its time."""

    def changed(features: Tensor) -> Any:
        most, last = len(resampler.time), features[..., -1:, :, :]
        whole = timed(features)
        full = features.shape[-3] == most
        return torch.cat([whole[..., :-1, :, :], last], dim=-3) if full else whole

    return changed


@vision_mutant(resamplers, "timed")
def frames_timed_one_late(resampler: Any, _: Method) -> Method:
    """Frames have the embedding of the time after theirs."""
    return lambda features: features + resampler.time.roll(-1, 0)[: features.shape[-3], None]


@vision_mutant(resamplers, "timed")
def last_frames_share_a_time(resampler: Any, _: Method) -> Method:
    """Frames beyond the second have its time."""

    def changed(features: Tensor) -> Any:
        at = torch.arange(features.shape[-3]).clamp(max=1)
        return features + resampler.time[at, None]

    return changed


@vision_mutant(resamplers, "timed")
def only_the_first_frame(_: Any, timed: Method) -> Method:
    """Of a video the first frame is looked at."""
    return lambda features: timed(features[..., :1, :, :])


@vision_mutant(resamplers, "forward")
def resampler_skipped(resampler: Any, _: Method) -> Method:
    """Text looks at features as they come, as many of them as there are latents."""
    return lambda features: features.flatten(2, 3)[:, :, : len(resampler.latents)]


@vision_mutant(seeings, "images", origin="flamingo-pytorch 3eea7f3")
def embeddings_bypass_the_resampler(seeing: Any, images: Method) -> Method:
    """Features given as those of single images are looked at as they come."""

    def changed(features: Tensor) -> Any:
        if features.dim() == 5:
            return images(features)
        raw = features[:, :, : seeing.vision.latents].flatten(1, 2)
        return tuple(block.attention.keys(raw) for block in seeing.blocks)

    return changed


@vision_mutant(seeings, "images")
def single_images_without_time(seeing: Any, images: Method) -> Method:
    """Features given as those of single images have no embedding of their time."""

    def changed(features: Tensor) -> Any:
        return images(features if features.dim() == 5 else features - seeing.resampler.time[0])

    return changed


@vision_mutant(resampler_layers, "attended")
def latents_do_not_attend_themselves(_: Any, __: Method) -> Method:
    """Keys and values of the resampler are made of features alone."""
    return lambda features, _latents: features


@vision_mutant(lambda seeing: [layer.feature_norm for layer in resampler_layers(seeing)], "forward")
def features_are_not_normed(_: Any, __: Method) -> Method:
    """The resampler's norm of features is left out."""
    return lambda features: features


@vision_mutant(seeings, "seen")
def only_the_first_latents(seeing: Any, seen: Method) -> Method:
    """Text sees one latent of an image."""

    def changed(given: Tensor) -> Any:
        return seen(given) & (
            torch.arange(given.shape[-1] * seeing.vision.latents) % seeing.vision.latents == 0
        )

    return changed


@vision_mutant(seeings, "looking")
def one_block_for_all(seeing: Any, looking: Method) -> Method:
    """All layers have the first block before them."""
    first = seeing.blocks[0]
    for block in seeing.blocks[1:]:
        block.forward, block.attention.keys = first.forward, first.attention.keys
    return looking


@vision_mutant(seeings, "looking")
def blocks_one_layer_late(seeing: Any, looking: Method) -> Method:
    """Blocks stand behind the layer that they should stand before."""
    last = len(seeing.text.blocks) - 1
    seeing.before = tuple(min(layer + 1, last) for layer in seeing.before)
    return looking


@vision_mutant(seeings, "images", stage="gradient")
def images_detached(_: Any, images: Method) -> Method:
    """No gradient passes through the images' keys and values."""

    def changed(features: Tensor) -> Any:
        return tuple(LayerCache(made.keys.detach(), made.values.detach()) for made in images(features))

    return changed


@vision_mutant(seeings, "images", stage="cache")
def cross_keys_of_another_call(_: Any, images: Method) -> Method:
    """Keys and values of images are kept from the first call on, whatever is given later."""
    kept: dict[torch.Size, Any] = {}
    return lambda features: kept.setdefault(features.shape, images(features))


def with_a_cache(**row: Any) -> Callable[[F], F]:
    """Decorate change(visible [B, past + S, N], S) -> the defective one of calls after the first."""

    def decorate(change: F) -> F:
        def make(_: Any, run: Method) -> Method:
            def changed(tokens: Tensor, cache: Any, given: Tensor, *rest: Any) -> Any:
                return run(tokens, cache, given if cache is None else change(given, tokens.shape[1]), *rest)

            return changed

        return entered(change, make, seeings, "run", stage="cache", **row)

    return decorate


@with_a_cache(origin="open_flamingo 72f169a")
def decode_visibility_one_late(given: Tensor, _: int) -> Tensor:
    """With a cache a new token sees the images that the token before it does."""
    return torch.cat([given[:, :1], given[:, :-1]], dim=1)


@with_a_cache()
def later_chunks_are_blind(given: Tensor, new: int) -> Tensor:
    """A chunk after the first sees no image; single steps do."""
    return given & (new == 1)


@with_a_cache()
def steps_see_the_first_image(given: Tensor, new: int) -> Tensor:
    """A step with a cache sees the first image in the place of its own."""
    first = torch.zeros_like(given)
    first[..., 0] = given.any(-1)
    return first if new == 1 else given
