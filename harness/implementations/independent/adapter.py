"""The second reference under the Protocols' names.

Letters: B sequences, S tokens, L = past + S, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from harness.implementations.independent.arithmetic import feed_forward, linear, norm, product
from harness.implementations.independent.attention import Past, Place, attention
from harness.implementations.independent.moe import balance_loss, mixture, z_loss
from harness.implementations.protocols import Capability, Routing, Unsupported
from harness.reference import weights as named
from harness.spec.architecture import Architecture

FROZEN = "correction_bias"
"""Ending of the names of what no gradient reaches."""


@dataclass(frozen=True)
class Kept:
    """What `extend` hands on."""

    layers: tuple[Past, ...]
    real: Tensor
    """[B, L] bool."""


class IndependentModel:
    """Every Architecture, computed in float64."""

    def __init__(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
        self.architecture = architecture
        self._weights = {
            name: value.detach().double().clone().requires_grad_(not name.endswith(FROZEN))
            for name, value in weights.items()
        }

    @property
    def capabilities(self) -> frozenset[Capability]:
        """One pass, and its gradients; nothing is generated."""
        dense: frozenset[Capability] = frozenset(("parameters", "forward", "cache", "gradients", "weights"))
        return dense if self.architecture.moe is None else dense | {"routing", "auxiliary_loss"}

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.architecture.vocab_size

    def parameters(self) -> Mapping[str, Tensor]:
        """Every learned tensor by canonical name."""
        return dict(self._weights)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy every tensor in; raises KeyError or ValueError on a missing, unused or misshapen one."""
        if odd := sorted(weights.keys() ^ self._weights.keys()):
            raise KeyError(f"missing, or not of this model: {', '.join(odd)}")
        for name, value in weights.items():
            if (want := self._weights[name].shape) != value.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)} in place of {tuple(want)}")
        with torch.no_grad():
            for name, value in weights.items():
                self._weights[name].copy_(value)

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits [B, S, V]."""
        return self._run(tokens, None, mask, positions)[0]

    def extend(
        self,
        tokens: Tensor,
        cache: Kept | None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Kept]:
        """Logits [B, S, V] of the next tokens, and the cache after them."""
        return self._run(tokens, cache, mask, positions)[:2]

    def routing(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> list[Routing]:
        """One trace per MoE layer."""
        return [trace for trace, _ in self._run(tokens, None, mask, positions)[2]]

    def auxiliary_loss(self, tokens: Tensor, *, mask: Tensor | None = None) -> Mapping[str, Tensor]:
        """Scalars "balance" (absent where the convention is "none") and "z"."""
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        found = self._run(tokens, None, mask, None)[2]

        def stacked(parts: list[Tensor]) -> Tensor:
            return torch.stack(parts).view(len(parts), *tokens.shape, -1)

        kind = self.architecture.auxiliary_loss.balance
        losses = {
            "z": z_loss(stacked([trace.logits for trace, _ in found if trace.logits is not None]), real)
        }
        if kind != "none":
            scores = stacked([trace.scores for trace, _ in found if trace.scores is not None])
            losses["balance"] = balance_loss(kind, scores, stacked([chosen for _, chosen in found]), real)
        return losses

    def gradients(self, loss: Tensor) -> Mapping[str, Tensor]:
        """d loss / d parameter by canonical name, zeros where there is none."""
        learned = [name for name, value in self._weights.items() if value.requires_grad]
        inputs = [self._weights[name] for name in learned]
        found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        zeros = {name: torch.zeros_like(value) for name, value in self._weights.items()}
        return zeros | {name: g for name, g in zip(learned, found, strict=True) if g is not None}

    def router_names(self) -> list[str]:
        """Canonical names of the routers' weights."""
        return [name for name in self._weights if name.endswith(".moe.router.weight")]

    def _run(
        self, tokens: Tensor, cache: Kept | None, mask: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Kept, list[tuple[Routing, Tensor]]]:
        a, w = self.architecture, self._weights
        place = _place(tokens, cache, mask, positions)
        x = w["embedding.weight"][tokens]
        if a.positions == "learned":
            x = w["positions.weight"][place.positions] + x
        new = place.real[:, -tokens.shape[1] :].flatten()
        kept, traces = [], []
        for i in range(a.n_layers):
            y = norm(x, a.norm, w, f"layers.{i}.attention_norm")
            mixed, layer = attention(a, i, w, y, place, None if cache is None else cache.layers[i])
            kept.append(layer)
            if not a.parallel_block:
                x = mixed + x
                y = norm(x, a.norm, w, f"layers.{i}.ffn_norm")
            if a.is_moe_layer(i):
                assert a.moe is not None
                trace, chosen = mixture(a.moe, i, w, y.flatten(0, 1), new)
                traces.append((trace, chosen))
                assert trace.output is not None
                added = trace.output.view_as(x)
            else:
                assert a.ffn is not None
                added = feed_forward(a.ffn, y, w, f"layers.{i}.ffn")
            x = (mixed + added if a.parallel_block else added) + x
        final = norm(x, a.norm, w, "final_norm")
        if a.tie_embeddings:
            logits = product(final, w["embedding.weight"].transpose(0, 1))
        else:
            logits = linear(final, w, "unembedding")
        return logits, Kept(tuple(kept), place.real), traces


def _place(tokens: Tensor, cache: Kept | None, mask: Tensor | None, positions: Tensor | None) -> Place:
    past = 0 if cache is None else cache.real.shape[1]
    if mask is None:
        new = torch.ones_like(tokens, dtype=torch.bool)
        mask = new if cache is None else torch.cat([cache.real, new], 1)
    real = mask.bool()
    if positions is None:
        positions = (real.long().cumsum(1) - real.long())[:, past:]
    return Place(positions, real)


@dataclass(frozen=True)
class Independent:
    """The Implementation "independent"."""

    name: str = "independent"
    needs_architecture: bool = True

    def build(
        self, architecture: Architecture | None, *, device: str, dtype: torch.dtype, seed: int
    ) -> IndependentModel:
        """A fresh model with weights drawn from `seed`, in float64 whatever `dtype` is; raises Unsupported
        without an architecture."""
        del dtype
        if architecture is None:
            raise Unsupported("the second reference has no shape of its own: it needs a spec")
        if device == "meta":
            shapes = named.shapes(architecture)
            return IndependentModel(
                architecture, {n: torch.empty(s, device=device) for n, s in shapes.items()}
            )
        return IndependentModel(architecture, _drawn(architecture, seed))


@lru_cache(maxsize=8)
def _drawn(architecture: Architecture, seed: int) -> Mapping[str, Tensor]:
    """A seed's weights, which a run builds again and again."""
    return named.draw(architecture, torch.Generator().manual_seed(seed))
