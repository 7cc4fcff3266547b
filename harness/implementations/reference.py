"""The reference under test: every capability, by plain delegation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.implementations.protocols import Capability, Routing, Unsupported
from harness.reference import Cache, ReferenceModel, build
from harness.spec.architecture import Architecture


@dataclass(frozen=True)
class ReferenceUnderTest:
    """A ReferenceModel with the Protocols' names; a mutant replaces a stage of `model`."""

    model: ReferenceModel

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Everything; what concerns routers only where there are some."""
        dense: frozenset[Capability] = frozenset(("parameters", "forward", "cache", "gradients", "weights"))
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
            return ReferenceUnderTest(build(architecture, device=device, dtype=dtype, generator=generator))
        except ValueError as error:
            raise Unsupported(str(error)) from error
