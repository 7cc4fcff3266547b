"""The reference under test: every capability, by plain delegation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import get_args

import torch
from torch import Tensor

from harness.implementations.protocols import Capability, Routing, Unsupported
from harness.reference import Cache, ReferenceModel, build
from harness.reference.engine import (
    Arrival,
    Completion,
    Engine,
    Iteration,
    Limits,
    Live,
    Method,
    Request,
    Sampling,
    Served,
    Speculation,
    Streamed,
)
from harness.reference.remembered import remembered
from harness.spec.architecture import Architecture


@dataclass
class EngineSession:
    """A Session that is an engine in this process: use either `run` or `stream`."""

    engine: Engine
    _live: Live | None = None
    _starting: threading.Lock = field(default_factory=threading.Lock)

    def run(self, arrivals: Sequence[Arrival]) -> Served:
        """Serve them all to their end."""
        return self.engine.run(arrivals)

    def stream(self, request: Request) -> Streamed:
        """Ask a thread that steps the engine, and wait for the end."""
        with self._starting:
            self._live = self._live or Live(self.engine)
        return self._live.stream(request)

    @property
    def timeline(self) -> Sequence[Iteration]:
        """Every iteration so far."""
        return self.engine.timeline

    @property
    def slots(self) -> int:
        """Requests that can run at the same time."""
        return self.engine.limits.sequences

    def close(self) -> None:
        """End the thread, if there is one."""
        if self._live is not None:
            self._live.close()


@dataclass(eq=False)
class ReferenceUnderTest:
    """A ReferenceModel with the Protocols' names; a mutant replaces a stage of `model`, or of each engine."""

    model: ReferenceModel
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    """Of everything that is sampled without a seed; it advances."""
    draft: ReferenceModel | None = None
    on_engine: list[Callable[[Engine], None]] = field(default_factory=list)
    """Called with every engine that is built, before it is used."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Everything; what concerns routers only where there are some."""
        dense: frozenset[Capability] = frozenset(
            (
                *("parameters", "forward", "cache", "gradients", "weights"),
                *("generate", "enumerable", "speculate", "serve", "limits"),
            )
        )
        if self.model.architecture.moe is None:
            return dense
        return dense | {"routing", "auxiliary_loss"}

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.model.architecture.vocab_size

    def parameters(self) -> Mapping[str, Tensor]:
        """Every learned tensor by canonical name."""
        return self.model.parameters_by_name()

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits [B, S, V]."""
        return self.model.forward(tokens, mask=mask, positions=positions)

    def extend(
        self,
        tokens: Tensor,
        cache: Cache | None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Logits [B, S, V] of the next tokens and the cache after them."""
        return self.model.extend(tokens, cache, mask=mask, positions=positions)

    def routing(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> list[Routing]:
        """One trace per MoE layer."""
        return [
            Routing(t.layer, t.indices, t.weights, t.logits, t.scores, t.hidden, t.output)
            for t in self.model.routing(tokens, mask=mask, positions=positions)
        ]

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy every tensor in."""
        self.model.load_weights(weights)

    def gradients(self, loss: Tensor) -> Mapping[str, Tensor]:
        """d loss / d parameter by canonical name."""
        return self.model.gradients(loss)

    def router_names(self) -> list[str]:
        """Canonical names of the routers' weights."""
        return self.model.router_names()

    def auxiliary_loss(self, tokens: Tensor, *, mask: Tensor | None = None) -> Mapping[str, Tensor]:
        """Scalars "balance" and "z" without coefficients."""
        return self.model.auxiliary_loss(tokens, mask=mask)

    @property
    def settings(self) -> frozenset[str]:
        """Every field of Sampling and Request."""
        return frozenset(part.name for kind in (Sampling, Request) for part in fields(kind))

    @property
    def methods(self) -> frozenset[str]:
        """Every method of Speculation."""
        return frozenset(get_args(Method))

    def load_draft(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
        """A draft model on the device and in the dtype of the model."""
        like = next(self.model.parameters())
        self.draft = build(architecture, device=like.device, dtype=like.dtype)
        self.draft.load_weights(weights)

    def remembering(self) -> AbstractContextManager[None]:
        """Within it, each pass of the model and of its draft over the same bytes is computed once."""
        return remembered(self.model, self.draft)

    def engine(self, limits: Limits, speculation: Speculation | None = None) -> Engine:
        """A fresh engine; raises Unsupported where the architecture or the speculation rules it out."""
        try:
            engine = Engine(
                self.model, limits, speculation=speculation, draft=self.draft, generator=self.generator
            )
        except ValueError as error:
            raise Unsupported(str(error)) from error
        for patch in self.on_engine:
            patch(engine)
        return engine

    def generate(
        self, requests: Sequence[Request], *, speculation: Speculation | None = None
    ) -> Sequence[Completion]:
        """One completion per request, from an engine with a slot and pages for each."""
        page_size, positions = Limits().page_size, self.model.architecture.max_positions
        tokens = [min(len(r.prompt) + max(r.max_tokens, 1), positions) for r in requests]
        ahead = 1 if speculation is None else 1 + speculation.length
        limits = Limits(
            sequences=max(len(requests), 1),
            page_size=page_size,
            pages=max(sum(-(-count // page_size) for count in tokens), 1),
            chunk=max(sum(len(r.prompt) + ahead for r in requests), 1),
            prefix_sharing=False,
        )
        return self.engine(limits, speculation).run([Arrival(request) for request in requests]).completions

    def start(self, limits: Limits | None = None, *, speculation: Speculation | None = None) -> EngineSession:
        """A fresh engine of the given size, or of the default one."""
        return EngineSession(self.engine(limits or Limits(), speculation))


@dataclass(frozen=True)
class Reference:
    """The Implementation "reference"."""

    name: str = "reference"
    needs_architecture: bool = True

    def build(
        self, architecture: Architecture | None, *, device: str, dtype: torch.dtype, seed: int
    ) -> ReferenceUnderTest:
        """A fresh model with weights drawn from `seed`; raises Unsupported where none can be built."""
        if architecture is None:
            raise Unsupported("the reference has no shape of its own: it needs a spec")
        generator = torch.Generator().manual_seed(seed)
        try:
            model = build(architecture, device=device, dtype=dtype, generator=generator)
        except ValueError as error:
            raise Unsupported(str(error)) from error
        return ReferenceUnderTest(model, torch.Generator().manual_seed(seed))
