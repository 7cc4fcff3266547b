"""What a system under test offers: one Protocol per capability, and no base class to inherit.

Letters: B sequences, S tokens per sequence, T = B * S tokens, V vocabulary, D d_model, E experts,
K top-k.

An implementation builds models. A model declares what it can do by `capabilities`; the
harness asks for nothing that was not declared, and checks what was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from harness.reference.engine import Arrival, Completion, Limits, Request, Served, Speculation, Streamed
from harness.spec.architecture import Architecture
from harness.spec.vision import Sight, Vision

Capability = Literal[
    "parameters",
    "forward",
    "routing",
    "cache",
    "gradients",
    "weights",
    "auxiliary_loss",
    "generate",
    "enumerable",
    "speculate",
    "serve",
    "limits",
    "train",
    "recompute",
    "bias_update",
    "cross_attention",
    "alternatives",
]


class Unsupported(Exception):
    """An implementation says that it lacks something: the reason is the message."""


@dataclass(frozen=True)
class Routing:
    """What one MoE layer's router did with T tokens: the stage trace.

    Stages: param (router weight) -> proj (logits) -> score -> select (indices) -> weight -> combine.
    A stage that the implementation does not show is None.
    """

    layer: int
    """Index of the transformer layer."""
    indices: Tensor
    """[T, K] int64: selected experts; -1 where a token's slot was dropped over capacity."""
    weights: Tensor | None = None
    """[T, K]: combine weights, aligned with indices; 0 where dropped."""
    logits: Tensor | None = None
    """[T, E]: the router's linear layer, before any score function."""
    scores: Tensor | None = None
    """[T, E]: after the score function, before any correction bias."""
    hidden: Tensor | None = None
    """[T, D]: input of the MoE layer."""
    output: Tensor | None = None
    """[T, D]: output of the MoE layer, shared experts included, before the residual sum."""


class Model(Protocol):
    """The least a model under test must be."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this model offers; each entry needs the Protocol of the same name below."""

    @property
    def vocab_size(self) -> int:
        """V: token ids are 0 .. V - 1."""


@runtime_checkable
class HasParameters(Protocol):
    """Capability "parameters": works on the meta device at full size."""

    def parameters(self) -> Mapping[str, Tensor]:
        """Every learned tensor once, by the implementation's own name; tied tensors once; no buffers
        except those that are learned or updated in training (a router's correction bias)."""


@runtime_checkable
class Forward(Protocol):
    """Capability "forward"."""

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits [B, S, V] of tokens [B, S]; mask [B, S] is True at real tokens (default all),
        positions [B, S] (default: count of real tokens before)."""


@runtime_checkable
class Cached(Protocol):
    """Capability "cache": the same pass in pieces."""

    def extend(
        self,
        tokens: Tensor,
        cache: Any | None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Logits [B, S, V] of the next S tokens and the cache after them; cache None starts anew.
        mask [B, past + S] covers the past too."""


@runtime_checkable
class Routed(Protocol):
    """Capability "routing"."""

    def routing(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Sequence[Routing]:
        """One trace per MoE layer, in layer order, of a forward pass."""


@runtime_checkable
class LoadsWeights(Protocol):
    """Capability "weights": the reference's weights under canonical names (harness.reference.weights)."""

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy every tensor in; raises KeyError or ValueError on a missing, unused or misshapen one."""


@runtime_checkable
class Gradients(Protocol):
    """Capability "gradients": forward is differentiable."""

    def gradients(self, loss: Tensor) -> Mapping[str, Tensor]:
        """d loss / d parameter by canonical name (with "weights"; else by own name), zeros where none."""

    def router_names(self) -> Iterable[str]:
        """The keys of `gradients` that hold the routers' projection weights."""


@runtime_checkable
class AuxiliaryLosses(Protocol):
    """Capability "auxiliary_loss"."""

    def auxiliary_loss(self, tokens: Tensor, *, mask: Tensor | None = None) -> Mapping[str, Tensor]:
        """Uncoefficiented scalars by kind: "balance" (in the architecture's convention), "z"."""


@runtime_checkable
class Trains(Protocol):
    """Capability "train": `forward`, `routing` and `auxiliary_loss` in training mode too."""

    def training(self) -> AbstractContextManager[None]:
        """Within it the model is in training mode: noise on routers is drawn, loads are counted. After it the
        mode is what it was before."""


@runtime_checkable
class Recomputes(Protocol):
    """Capability "recompute": activation checkpointing."""

    def recomputing(self) -> AbstractContextManager[None]:
        """Within it passes keep no activations, and `gradients` computes them a second time."""


@runtime_checkable
class UpdatesBiases(Protocol):
    """Capability "bias_update", with "train": balance by correction biases in place of a loss."""

    def update_biases(self, rate: float) -> None:
        """b_e += rate * sign(mean load - load_e) in every MoE layer, the load being the tokens that chose
        expert e in training passes since the last update (arXiv 2408.15664, algorithm 1)."""

    def saved(self) -> Mapping[str, Tensor]:
        """What a checkpoint would hold, by the names of `parameters`."""


@runtime_checkable
class HasAlternatives(Protocol):
    """Capability "alternatives": the same model, computed in other ways (kernels, dispatches)."""

    def alternatives(self) -> Mapping[str, Forward]:
        """Models with the same weights, each by what it does differently ("experts=batched_mm"), made anew by
        each call. One that offers less than this model says so by its capabilities."""


@runtime_checkable
class CrossAttends(Protocol):
    """Capability "cross_attention": text that looks at images, whose features an encoder outside has made.

    Letters besides: N images (or videos) of a sequence, M frames of one, P features of a frame, W their
    width.
    """

    @property
    def sight(self) -> Sight | None:
        """The sizes of features that it takes; None until `load_vision`, where that decides them."""

    def load_vision(self, vision: Vision, weights: Mapping[str, Tensor]) -> None:
        """With "weights": put cross-attention of that shape into the model, with the weights of
        harness.reference.vision by canonical names; from then on `gradients` holds theirs too. Raises
        Unsupported for a shape that it cannot have."""

    def see(self, tokens: Tensor, features: Tensor, visible: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] of tokens [B, S] with images [B, N, M, P, W], or single ones [B, N, P, W].

        visible [B, S, N] is True where a token sees an image (`harness.reference.vision.last_image` makes
        Flamingo's); an image that no token sees is padding. mask [B, S] as in `forward`. Differentiable in
        features.
        """

    def see_on(
        self,
        tokens: Tensor,
        cache: Any | None,
        visible: Tensor,
        *,
        features: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """With "cache": logits [B, S, V] of the next S tokens and the cache after them. The first call (cache
        None) is given the features of all images; later ones see the same, kept in the cache. visible
        [B, past + S, N] and mask [B, past + S] cover the past too."""


@runtime_checkable
class Generates(Protocol):
    """Capability "generate". With "enumerable" every random draw of `generate` is made in this thread by
    torch.multinomial, torch.rand or torch.rand_like, so that its law can be enumerated; `remembering()`, if
    there is such a method, is a context in which a pass over the same bytes may be answered from memory."""

    @property
    def settings(self) -> frozenset[str]:
        """The fields of Sampling and Request that are honoured, by name; others must be at their default."""

    def generate(
        self, requests: Sequence[Request], *, speculation: Speculation | None = None
    ) -> Sequence[Completion]:
        """One completion per request, in order, decoded together as one batch.

        Raises Unsupported for a setting or a speculation that is not offered.
        """


@runtime_checkable
class Speculates(Protocol):
    """Capability "speculate": `generate` and `serve` take a Speculation."""

    @property
    def methods(self) -> frozenset[str]:
        """The values of Speculation.method that are offered."""

    def load_draft(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
        """Make a draft model of that architecture, with the reference's weights by canonical names."""


class Session(Protocol):
    """A running engine: what it keeps from one run to the next (cached prefixes) stays until it is closed."""

    def run(self, arrivals: Sequence[Arrival]) -> Served:
        """Serve them all to their end. A request that cannot be served ends with finish_reason "error"."""

    def close(self) -> None:
        """End the engine; nothing of it is used afterwards."""


@runtime_checkable
class Streams(Protocol):
    """What a Session has besides, where its answers come in pieces: the serving benchmark asks for it."""

    def stream(self, request: Request) -> Streamed:
        """Send one request and wait for its end; called from many threads at once. A request that fails ends
        with finish_reason "error"."""


@runtime_checkable
class Serves(Protocol):
    """Capability "serve". With "limits" an engine of a given size can be had.

    A model whose sessions honour fewer settings than its `generate` has them as `serve_settings`.
    """

    def start(self, limits: Limits | None = None, *, speculation: Speculation | None = None) -> Session:
        """A fresh engine; limits None is the engine's own size. Raises Unsupported as `generate` does."""


class Implementation(Protocol):
    """Something under test: a factory of models. `module:factory` must return one of these."""

    @property
    def name(self) -> str:
        """As addressed: "reference", "mutant:NAME", "transformers:mixtral", "package.module:factory"."""

    @property
    def needs_architecture(self) -> bool:
        """False: build(None) works (a tiny model of its own shape)."""

    def build(
        self, architecture: Architecture | None, *, device: str, dtype: torch.dtype, seed: int
    ) -> Model:
        """A fresh model in eval mode with random weights drawn from `seed`.
        Raises Unsupported if the architecture cannot be expressed."""
