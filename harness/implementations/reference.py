"""The reference under test: every capability, by plain delegation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from typing import get_args

import torch
from torch import Tensor

from harness.implementations.protocols import Capability, Routing, Unsupported
from harness.reference import Cache, ReferenceModel, build, weights
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
from harness.reference.experts import Experts
from harness.reference.remembered import remembered
from harness.reference.vision import SeeingCache, SeeingModel, load
from harness.spec.architecture import Architecture
from harness.spec.vision import Sight, Vision


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
    seeing: SeeingModel | None = None
    """The model with cross-attention, where some was loaded."""
    on_vision: list[Callable[[SeeingModel], None]] = field(default_factory=list)
    """Called with every SeeingModel that is made, before it is used."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Everything; what concerns routers only where there are some."""
        dense: frozenset[Capability] = frozenset(
            (
                *("parameters", "forward", "cache", "gradients", "weights"),
                *("train", "recompute", "cross_attention"),
                *("generate", "enumerable", "speculate", "serve", "limits"),
            )
        )
        moe = self.model.architecture.moe
        if moe is None:
            return dense
        balanced: frozenset[Capability] = (
            frozenset(("bias_update",)) if moe.router.correction_bias else frozenset()
        )
        routed: frozenset[Capability] = frozenset(("routing", "auxiliary_loss", "alternatives"))
        return dense | routed | balanced

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
        """d loss / d parameter by canonical name, those of cross-attention included."""
        text = self.model.gradients(loss)
        return text if self.seeing is None else text | self.seeing.gradients(loss)

    def router_names(self) -> list[str]:
        """Canonical names of the routers' weights."""
        return self.model.router_names()

    def auxiliary_loss(self, tokens: Tensor, *, mask: Tensor | None = None) -> Mapping[str, Tensor]:
        """Scalars "balance" and "z" without coefficients."""
        return self.model.auxiliary_loss(tokens, mask=mask)

    def alternatives(self) -> Mapping[str, ReferenceUnderTest]:
        """The same weights where every expert computes every token, and most with weight 0."""
        like = next(self.model.parameters())
        other = build(self.model.architecture, device=like.device, dtype=like.dtype)
        other.load_weights(self.model.parameters_by_name())
        for block in other.blocks:
            if block.moe is not None:
                block.moe.experts.forward = partial(every_expert, block.moe.experts)  # type: ignore[method-assign]
        return {"experts=dense": ReferenceUnderTest(other)}

    @contextmanager
    def training(self) -> Iterator[None]:
        """Training mode: the routers' noise is drawn from `generator`."""
        before = self.model.training
        for router in self.model.routers:
            router.generator = self.generator
        self.model.train()
        try:
            yield
        finally:
            self.model.train(before)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Passes forget what each layer computed, and compute it again for its gradient."""
        before, self.model.checkpointing = self.model.checkpointing, True
        try:
            yield
        finally:
            self.model.checkpointing = before

    def update_biases(self, rate: float) -> None:
        """One step of every correction bias."""
        self.model.update_biases(rate)

    def saved(self) -> Mapping[str, Tensor]:
        """A copy of the state."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    @property
    def sight(self) -> Sight | None:
        """What the cross-attention that was loaded looks at."""
        return None if self.seeing is None else self.seeing.vision.sight

    @property
    def _seeing(self) -> SeeingModel:
        if self.seeing is None:
            raise Unsupported("no cross-attention was loaded")
        return self.seeing

    def load_vision(self, vision: Vision, weights: Mapping[str, Tensor]) -> None:
        """Gated blocks before some of the layers."""
        self.seeing = SeeingModel(self.model, vision)
        load(self.seeing, weights)
        for patch in self.on_vision:
            patch(self.seeing)

    def see(self, tokens: Tensor, features: Tensor, visible: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] with images."""
        return self._seeing.run(tokens, None, visible, features, mask)[0]

    def see_on(
        self,
        tokens: Tensor,
        cache: SeeingCache | None,
        visible: Tensor,
        *,
        features: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, SeeingCache]:
        """Logits [B, S, V] of the next tokens with images, and the cache after them."""
        logits, after, _ = self._seeing.run(tokens, cache, visible, features, mask)
        return logits, after

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


def every_expert(experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Tokens x [T, D] through all experts, each weighted by what indices and weights [T, K] give it, or 0."""
    out = torch.zeros_like(x)
    for expert in range(experts.n_experts):
        share = (weights * (indices == expert)).sum(-1, keepdim=True).to(x.dtype)
        out = out + share * experts.compute(expert, x)
    return out


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
        try:
            drawn = None if device == "meta" else _drawn(architecture, seed)
            model = build(architecture, device=device, dtype=dtype, values=drawn)
        except ValueError as error:
            raise Unsupported(str(error)) from error
        return ReferenceUnderTest(model, torch.Generator().manual_seed(seed))


@lru_cache(maxsize=8)
def _drawn(architecture: Architecture, seed: int) -> Mapping[str, Tensor]:
    """A seed's weights, which a run builds again and again; not to be written to."""
    return weights.draw(architecture, torch.Generator().manual_seed(seed))
