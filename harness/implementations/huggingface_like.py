"""Any torch module that is called like a Hugging Face causal language model, as a model under test.

Letters: B sequences, S tokens per sequence, V vocabulary, D d_model, E experts, K top-k.

Called like one means: module(input_ids=[B, S], attention_mask=[B, S], position_ids=[B, S], ...) returns
the logits [B, S, V], as `.logits`, as the first of a tuple, or bare. Arguments that the module's forward
does not name are not passed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from harness.implementations import trace
from harness.implementations.protocols import Capability, Routing, Session, Unsupported
from harness.reference.engine import Completion, Limits, Request, Speculation
from harness.spec.architecture import Architecture

LEARNED_BUFFERS = ("correction_bias", "expert_bias")
"""Endings of the names of buffers that training updates, though no gradient does."""


class WeightMap(Protocol):
    """Between the reference's canonical weights and a module's own."""

    def load(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Copy every canonical tensor in; KeyError or ValueError on a missing, unused or misshapen one."""

    def canonical(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's named tensors (weights or their gradients) under canonical names and layouts."""


class Decoding(Protocol):
    """How a module generates and serves: capabilities "generate", "speculate" and "serve" of its model."""

    @property
    def settings(self) -> frozenset[str]:
        """As Generates has it."""

    @property
    def methods(self) -> frozenset[str]:
        """As Speculates has it."""

    def load_draft(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
        """As Speculates has it."""

    def generate(
        self, requests: Sequence[Request], *, speculation: Speculation | None = None
    ) -> Sequence[Completion]:
        """As Generates has it."""

    def start(self, limits: Limits | None = None, *, speculation: Speculation | None = None) -> Session:
        """As Serves has it."""


@dataclass(frozen=True)
class Past:
    """A cache between two calls of `extend`."""

    cache: Any
    length: int


@dataclass(frozen=True)
class LikeModel:
    """A module with the methods of every capability; `capabilities` says which of them hold."""

    module: nn.Module
    vocab_size: int
    capabilities: frozenset[Capability]
    sites: tuple[trace.Site, ...] = ()
    weight_map: WeightMap | None = None
    decoding: Decoding | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    """Capability that is not declared -> why."""
    others: Callable[[], Mapping[str, LikeModel]] | None = None
    """Makes modules of the same class that compute in other ways; their weights are put in here."""
    copies_caches: ClassVar[bool] = True
    """That a cache survives its use is the adapter's doing, so no property gives the module credit for it."""

    def parameters(self) -> Mapping[str, Tensor]:
        """Every learned tensor once, and the buffers that training updates."""
        learned = {n: b for n, b in self.module.named_buffers() if n.endswith(LEARNED_BUFFERS)}
        return {**dict(self.module.named_parameters()), **learned}

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits [B, S, V] in one pass without a cache."""
        return _logits(self._call(tokens, mask, positions, use_cache=False))

    def extend(
        self,
        tokens: Tensor,
        cache: Past | None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Past]:
        """Logits [B, S, V] of the next tokens; the cache that was passed in stays as it was."""
        past = 0 if cache is None else cache.length
        # Such caches are written in place: a copy lets a caller go on twice from the same point.
        state = None if cache is None else copy.deepcopy(cache.cache)
        with torch.no_grad():
            output = self._call(tokens, mask, positions, past=past, use_cache=True, past_key_values=state)
        state = getattr(output, "past_key_values", None)
        if state is None:
            raise Unsupported("the model returned no past_key_values though use_cache was true")
        return _logits(output), Past(state, past + tokens.shape[1])

    def routing(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Sequence[Routing]:
        """One trace per MoE layer of a forward pass."""
        return trace.record(
            self.module, self.sites, lambda: self._call(tokens, mask, positions, use_cache=False)
        )

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the reference's weights in. Raises KeyError or ValueError; Unsupported without a map."""
        if self.weight_map is None:
            raise Unsupported("there is no map from the reference's weights to this model's")
        self.weight_map.load(self.module, weights)

    def gradients(self, loss: Tensor) -> Mapping[str, Tensor]:
        """d loss / d parameter, canonical where there is a weight map; zeros where nothing flowed."""
        named = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        flowed = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        own = {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(named.items(), flowed, strict=True)
        }
        if self.weight_map is None:
            return own
        fixed = {name: torch.zeros_like(x) for name, x in self.parameters().items() if name not in own}
        return self.weight_map.canonical({**own, **fixed})

    def router_names(self) -> Iterable[str]:
        """The keys of `gradients` that hold the routers' projection weights."""
        if self.weight_map is not None:
            return [f"layers.{site.layer}.moe.router.weight" for site in self.sites]
        prefixes = tuple(f"{site.router}." for site in self.sites)
        named = self.module.named_parameters()
        return [n for n, p in named if n.startswith(prefixes) and p.dim() > 1 and p.requires_grad]

    def auxiliary_loss(self, tokens: Tensor, *, mask: Tensor | None = None) -> Mapping[str, Tensor]:
        """The balance loss that the module itself computes when asked for its router logits."""
        output = self._call(tokens, mask, None, use_cache=False, output_router_logits=True)
        loss = getattr(output, "aux_loss", None)
        if not isinstance(loss, Tensor):
            raise Unsupported("the model returns no aux_loss")
        return {"balance": loss}

    def alternatives(self) -> Mapping[str, LikeModel]:
        """The same weights in modules that compute in other ways. Raises Unsupported where there are none."""
        found = {} if self.others is None else self.others()
        if not found:
            raise Unsupported("there is one way to compute it")
        for other in found.values():
            other.module.load_state_dict(self.module.state_dict())
        return found

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within it the module is in training mode."""
        before = self.module.training
        self.module.train()
        try:
            yield
        finally:
            self.module.train(before)

    @property
    def settings(self) -> frozenset[str]:
        """Fields of Sampling and Request that are honoured."""
        return frozenset() if self.decoding is None else self.decoding.settings

    @property
    def serve_settings(self) -> frozenset[str]:
        """Those among them that a session honours."""
        return getattr(self.decoding, "serve_settings", self.settings)

    @property
    def methods(self) -> frozenset[str]:
        """Kinds of speculation that are offered."""
        return frozenset() if self.decoding is None else self.decoding.methods

    def load_draft(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
        """Make a draft model. Raises Unsupported where there is no decoding."""
        self._decoding().load_draft(architecture, weights)

    def generate(
        self, requests: Sequence[Request], *, speculation: Speculation | None = None
    ) -> Sequence[Completion]:
        """One completion per request. Raises Unsupported for what is not offered."""
        return self._decoding().generate(requests, speculation=speculation)

    def start(self, limits: Limits | None = None, *, speculation: Speculation | None = None) -> Session:
        """A fresh engine. Raises Unsupported for what is not offered."""
        return self._decoding().start(limits, speculation=speculation)

    def _decoding(self) -> Decoding:
        if self.decoding is None:
            raise Unsupported("the module only runs forward: nothing here generates")
        return self.decoding

    def _call(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, *, past: int = 0, **more: Any
    ) -> Any:
        batch, new = tokens.shape
        if positions is None:
            seen = torch.ones(batch, past + new, device=tokens.device) if mask is None else mask
            positions = (seen.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        arguments = {
            "input_ids": tokens,
            "attention_mask": self._attention_mask(tokens, mask, past),
            "position_ids": positions,
            **more,
        }
        accepted = _accepted(type(self.module))
        known = {k: v for k, v in arguments.items() if accepted is None or k in accepted}
        try:
            return self.module(**known)
        except NotImplementedError as error:
            if tokens.device.type != "meta":
                raise
            raise Unsupported(f"forward reads values, and meta tensors have none: {error}") from error

    def _attention_mask(self, tokens: Tensor, mask: Tensor | None, past: int) -> Tensor | None:
        if tokens.device.type == "meta":
            # Building a causal mask from [B, S] reads its values, of which meta tensors have none.
            dtype = next(p.dtype for p in self.module.parameters())
            batch, new = tokens.shape
            return torch.zeros(batch, 1, new, past + new, dtype=dtype, device="meta")
        return None if mask is None else mask.long()


@dataclass(frozen=True)
class LikeImplementation:
    """What `hf_like` returns; see there."""

    name: str
    make: Callable[[Architecture | None], nn.Module]
    needs_architecture: bool
    router: str | None
    derive: trace.Derive | None
    weight_map: WeightMap | None
    capabilities: frozenset[Capability]

    def build(
        self, architecture: Architecture | None, *, device: str, dtype: torch.dtype, seed: int
    ) -> LikeModel:
        """A fresh model in eval mode. Raises Unsupported where `make` does."""
        module = seeded(lambda: self.make(architecture), seed, device).to(device=device, dtype=dtype).eval()
        suffix = self.router
        where = trace.sites(
            module,
            lambda name, _: suffix is not None and f".{name}".endswith(f".{suffix}"),
            derive=self.derive,
        )
        if suffix is not None and not where:
            raise Unsupported(f"no module of the model is called *.{suffix}, where the router should be")
        return LikeModel(module, _vocabulary(module), self.capabilities, where, self.weight_map)


def hf_like(
    make: Callable[[Architecture | None], nn.Module],
    *,
    name: str,
    router: str | None = None,
    derive: trace.Derive | None = None,
    weight_map: WeightMap | None = None,
    needs_architecture: bool = False,
    also: Iterable[Capability] = (),
) -> LikeImplementation:
    """An implementation out of a function that makes a module called like a Hugging Face model.

    make(architecture): a module with freshly drawn weights; None asks for its own small shape; raise
    Unsupported for an architecture it cannot express. name: as it is addressed. router: how the names of
    the routers end ("mlp.gate"). derive: from logits [T, E] to indices and weights [T, K], for a router that
    returns only logits and experts that are not handed the rest. weight_map: from and to the
    reference's weights. also: capabilities beside parameters, forward and gradients, routing (with a
    router) and weights (with a map): "cache", if past_key_values go in and out, and "auxiliary_loss", if
    output_router_logits=True makes the output have an aux_loss.
    """
    declared: set[Capability] = {"parameters", "forward", "gradients", *also}
    if router is not None:
        declared.add("routing")
    if weight_map is not None:
        declared.add("weights")
    return LikeImplementation(name, make, needs_architecture, router, derive, weight_map, frozenset(declared))


def seeded(make: Callable[[], nn.Module], seed: int, device: str) -> nn.Module:
    """`make()` with its weights drawn from `seed`, on meta if that is the device and else on the CPU.

    Initialisers of modules draw from torch's global generator and take no other: it is put back as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device == "meta" else "cpu"):
        torch.default_generator.manual_seed(seed)
        return make()


def _accepted(cls: type[nn.Module]) -> set[str] | None:
    """Names of the arguments that the forward of `cls` takes; None if it takes any."""
    signature = inspect.signature(cls.forward)
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return None
    return set(signature.parameters)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model returned {type(output).__name__}, in which there are no logits")
    return logits


def _vocabulary(module: nn.Module) -> int:
    config = getattr(module, "config", None)
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        raise Unsupported("the module has no config.vocab_size")
    return size
