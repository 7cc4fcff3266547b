"""Gated cross-attention by loops over tokens, images and heads, in numpy, sharing no code with the reference.

Letters: D d_model, W width of a feature, h head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from harness.reference.oracle import OracleTrace, forward
from harness.reference.oracle.arithmetic import Array, States, Weights, feed_forward, linear, norm, softmax
from harness.spec.architecture import Architecture, FeedForward, Norm
from harness.spec.vision import Vision

_NORM = Norm(kind="layernorm", bias=True)


def _attend(x: Array, others: Sequence[Array], vision: Vision, w: Weights, name: str) -> Array:
    """One query over some vectors; zero where there are none."""
    h, mixed = vision.head_dim, []
    q, keys, values = (
        linear(x, w, f"{name}.q"),
        *([linear(y, w, f"{name}.{p}") for y in others] for p in "kv"),
    )
    for head in range(vision.heads):
        part = slice(head * h, (head + 1) * h)
        if not others:
            mixed.append(np.zeros(h))
            continue
        weights = softmax([float(q[part] @ key[part]) / math.sqrt(h) for key in keys])
        mixed.append(np.sum([p * value[part] for p, value in zip(weights, values, strict=True)], axis=0))
    return linear(np.concatenate(mixed), w, f"{name}.o")


def _resampled(frames: Array, vision: Vision, w: Weights) -> list[Array]:
    """One image or video [M, P, W] -> its latents (Flamingo, arXiv 2204.14198, appendix A.1.1)."""
    at, ff = "vision.resampler", FeedForward(d_ff=vision.d_ff, activation="gelu", gated=False)
    time = w.arrays[f"{at}.time"]
    features = [feature + time[m] for m, frame in enumerate(frames) for feature in frame]
    latents = list(w.arrays[f"{at}.latents"])
    for i in range(vision.resampler_layers):
        layer = f"{at}.layers.{i}"
        queries = [norm(x, _NORM, w, f"{layer}.latent_norm") for x in latents]
        others = [norm(x, _NORM, w, f"{layer}.feature_norm") for x in features] + queries
        for r, query in enumerate(queries):
            x = latents[r] + _attend(query, others, vision, w, f"{layer}.attention")
            latents[r] = x + feed_forward(ff, norm(x, _NORM, w, f"{layer}.ffn_norm"), w, f"{layer}.ffn")
    return [norm(x, _NORM, w, f"{at}.norm") for x in latents]


def see(
    architecture: Architecture,
    vision: Vision,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    features: Tensor,
    visible: Tensor,
    *,
    mask: Tensor | None = None,
) -> OracleTrace:
    """Logits and routing of tokens [B, S] with images [B, N, M, P, W], of which a token sees those that are
    visible [B, S, N]; mask [B, S] is True at real tokens (default all). Weights of both by canonical name."""
    w, ff = Weights(weights), FeedForward(d_ff=vision.d_ff, activation="gelu", gated=False)
    frames = features.detach().double().cpu().numpy()
    images = [[_resampled(image, vision, w) for image in sequence] for sequence in frames]

    def before(layer: int, states: States) -> States:
        if layer % vision.every:
            return states
        at, out = f"vision.cross.{layer // vision.every}", {}
        a, b = (math.tanh(float(w.arrays[f"{at}.{part}_gate"])) for part in ("attention", "ffn"))
        for (row, place), state in states.items():
            seen = [y for n, some in enumerate(images[row]) if bool(visible[row, place, n]) for y in some]
            x = state
            if seen:
                query = norm(x, _NORM, w, f"{at}.attention_norm")
                x = x + a * _attend(query, seen, vision, w, f"{at}.attention")
                x = x + b * feed_forward(ff, norm(x, _NORM, w, f"{at}.ffn_norm"), w, f"{at}.ffn")
            out[row, place] = x
        return out

    return forward(architecture, weights, tokens, mask=mask, before=before)
