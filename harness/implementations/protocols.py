"""What a system under test offers: one Protocol per capability, and no base class to inherit.

Letters: B sequences, S tokens per sequence, T = B * S tokens, V vocabulary, D d_model, E experts,
K top-k.

An implementation builds models. A model declares what it can do by `capabilities`; the
harness asks for nothing that was not declared, and checks what was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from harness.reference.engine import Arrival, Completion, Limits, Request, Served, Speculation, Streamed
from harness.spec.architecture import Architecture

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
