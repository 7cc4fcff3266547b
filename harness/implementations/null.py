"""The null implementation: it declares everything, computes nothing and costs nothing.

What a property takes on it is the harness's own time; what a property passes on it, a constant satisfies.
Letters: B sequences, S tokens per sequence, T = B * S, V vocabulary, E experts, K top-k, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor

from harness.implementations.protocols import Capability, Routing
from harness.reference.engine import (
    Arrival,
    Completion,
    Limits,
    Method,
    Request,
    Sampling,
    Served,
    Speculation,
)
from harness.reference.weights import shapes
from harness.spec.architecture import Architecture

V = 11
"""Of its own shape; E, K and D are 2, 1 and 4."""


def zeros(*shape: int) -> Tensor:
    """Zeros of that shape, float32, that take no memory and no time to fill."""
    return torch.zeros(()).expand(shape)


@dataclass(frozen=True)
class NullSession:
    """A Session that serves nothing."""

    def run(self, arrivals: Sequence[Arrival]) -> Served:
        """An empty completion for each."""
        return Served([_nothing(arrival.request) for arrival in arrivals])

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class NullModel:
    """A model whose every answer is a constant of the right type and shape."""

    architecture: Architecture | None

    @property
    def capabilities(self) -> frozenset[Capability]:
        """All there are; what concerns routers only where there may be some."""
        routers = frozenset(("routing", "auxiliary_loss", "bias_update"))
        dense = self.architecture is not None and self.architecture.moe is None
        return frozenset(get_args(Capability)) - (routers if dense else frozenset())

    @property
    def vocab_size(self) -> int:
        """V."""
        return V if self.architecture is None else self.architecture.vocab_size

    @property
    def settings(self) -> frozenset[str]:
        """Every field of Sampling and Request."""
        return frozenset(part.name for kind in (Sampling, Request) for part in fields(kind))

    @property
    def methods(self) -> frozenset[str]:
        """Every method of Speculation."""
        return frozenset(get_args(Method))

    def parameters(self) -> Mapping[str, Tensor]:
        """One zero."""
        return {"nothing": zeros(1)}

    def saved(self) -> Mapping[str, Tensor]:
        """The same."""
        return self.parameters()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Weights are taken, and forgotten."""

    def load_draft(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
        """So are those of a draft."""

    def update_biases(self, rate: float) -> None:
        """There is none."""

    def training(self) -> AbstractContextManager[None]:
        """No mode differs from another."""
        return nullcontext()

    def recomputing(self) -> AbstractContextManager[None]:
        """Nothing is kept, and nothing computed."""
        return nullcontext()

    def forward(self, tokens: Tensor, **_: Any) -> Tensor:
        """Zero logits [B, S, V]."""
        return zeros(*tokens.shape, self.vocab_size)

    def extend(self, tokens: Tensor, cache: int | None, **_: Any) -> tuple[Tensor, int]:
        """Zero logits [B, S, V], and the number of tokens so far in the place of a cache."""
        return self.forward(tokens), (cache or 0) + tokens.shape[1]

    def routing(self, tokens: Tensor, **_: Any) -> list[Routing]:
        """Every token goes to experts 0 .. K - 1 with weight zero."""
        a = self.architecture
        if a is None or a.moe is None:
            return [_route(0, tokens.numel(), 2, 1, 4)]
        size = (tokens.numel(), a.moe.n_experts, a.moe.top_k, a.d_model)
        return [_route(i, *size) for i in range(a.n_layers) if a.is_moe_layer(i)]

    def gradients(self, loss: Tensor) -> Mapping[str, Tensor]:
        """Zero, by canonical name; loss is not looked at."""
        del loss
        return (
            {} if self.architecture is None else {n: zeros(*s) for n, s in shapes(self.architecture).items()}
        )

    def router_names(self) -> Iterable[str]:
        """Canonical names of the routers' weights."""
        found = () if self.architecture is None else shapes(self.architecture)
        return [name for name in found if name.endswith(".moe.router.weight")]

    def auxiliary_loss(self, tokens: Tensor, **_: Any) -> Mapping[str, Tensor]:
        """Zero, of each kind."""
        del tokens
        kinds = (
            ("z",)
            if self.architecture and self.architecture.auxiliary_loss.balance == "none"
            else ("balance", "z")
        )
        return {kind: zeros() for kind in kinds}

    def generate(
        self, requests: Sequence[Request], *, speculation: Speculation | None = None
    ) -> Sequence[Completion]:
        """An empty completion for each."""
        del speculation
        return [_nothing(request) for request in requests]

    def start(self, limits: Limits | None = None, *, speculation: Speculation | None = None) -> NullSession:
        """An engine that serves nothing."""
        del limits, speculation
        return NullSession()


def _nothing(request: Request) -> Completion:
    return Completion((), "length", logprobs=() if request.logprobs else None)


def _route(layer: int, tokens: int, n_experts: int, top_k: int, width: int) -> Routing:
    return Routing(
        layer,
        torch.arange(top_k).expand(tokens, top_k),
        zeros(tokens, top_k),
        zeros(tokens, n_experts),
        zeros(tokens, n_experts),
        zeros(tokens, width),
        zeros(tokens, width),
    )


@dataclass(frozen=True)
class Null:
    """The Implementation "null": any architecture, or a shape of its own."""

    name: str = "null"
    needs_architecture: bool = False

    def build(
        self, architecture: Architecture | None, *, device: str, dtype: torch.dtype, seed: int
    ) -> NullModel:
        """A model that ignores all three options."""
        del device, dtype, seed
        return NullModel(architecture)
