"""The reference: a decoder-only transformer built from any Architecture, eager and deterministic.

Letters: B sequences, S new tokens, L = past + S tokens, T = B * S, V vocabulary, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.reference import attention, losses, weights
from harness.reference.attention import Context
from harness.reference.experts import Moe
from harness.reference.layers import Embedding, FeedForward, Linear, Norm, Options
from harness.reference.recomputed import recomputed
from harness.reference.router import Router
from harness.reference.trace import Cache, LayerCache, RoutingTrace
from harness.spec.architecture import Architecture


class Block(nn.Module):
    """One layer: attention and a feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, a: Architecture, layer: int, *, options: Options) -> None:
        super().__init__()
        self.layer, self.parallel = layer, a.parallel_block
        self.attention_norm = Norm(a.norm, a.d_model, options=options)
        self.attention = attention.make(a, layer, options=options)
        self.ffn_norm = None if a.parallel_block else Norm(a.norm, a.d_model, options=options)
        self.moe: Moe | None = None
        self.ffn: FeedForward | None = None
        if a.is_moe_layer(layer):
            assert a.moe is not None
            self.moe = Moe(a.moe, a.d_model, options=options)
        else:
            assert a.ffn is not None  # Architecture refuses a dense layer without one
            self.ffn = FeedForward(a.ffn, a.d_model, options=options)

    def feed_forward(self, x: Tensor, context: Context) -> tuple[Tensor, RoutingTrace | None]:
        """[B, S, D] -> [B, S, D] and, in a MoE layer, how it was routed."""
        if self.moe is None:
            assert self.ffn is not None
            return self.ffn(x), None
        real = context.real[:, -x.shape[1] :]
        trace: RoutingTrace = self.moe(x.flatten(0, 1), real.flatten(), self.layer)
        return trace.output.view_as(x), trace

    def forward(
        self, x: Tensor, context: Context, past: LayerCache | None
    ) -> tuple[Tensor, LayerCache, RoutingTrace | None]:
        """[B, S, D] -> [B, S, D], the layer's cache and its routing.

        Sequential: x + attention(norm(x)), then the same with the feed-forward. Parallel (PaLM,
        arXiv 2204.02311, section 2): x + attention(norm(x)) + ffn(norm(x)).
        """
        normed = self.attention_norm(x)
        mixed, cache = self.attention(normed, context, past)
        if self.ffn_norm is None:
            out, trace = self.feed_forward(normed, context)
            return x + mixed + out, cache, trace
        x = x + mixed
        out, trace = self.feed_forward(self.ffn_norm(x), context)
        return x + out, cache, trace


class ReferenceModel(nn.Module):
    """The executable meaning of an Architecture.

    Every stage is a method or attribute of a module instance (`model.blocks[2].moe.router.weigh`,
    `model.balance_loss`), so that a mutant can replace one of them.
    """

    def __init__(self, a: Architecture, *, options: Options) -> None:
        super().__init__()
        self.architecture = a
        self.embedding = Embedding(a.vocab_size, a.d_model, options=options)
        learned = a.positions == "learned"
        self.positions = Embedding(a.max_positions, a.d_model, options=options) if learned else None
        self.layers = nn.ModuleList(Block(a, i, options=options) for i in range(a.n_layers))
        self.final_norm = Norm(a.norm, a.d_model, options=options)
        tied = a.tie_embeddings
        self.unembedding = None if tied else Linear(a.d_model, a.vocab_size, options=options)
        self.balance_loss = losses.BALANCES.get(a.auxiliary_loss.balance)
        self.z_loss = losses.z_loss
        self.checkpointing = False
        self.eval()

    @property
    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def routers(self) -> list[Router]:
        """Those of all MoE layers, in layer order."""
        return [block.moe.router for block in self.blocks if block.moe is not None]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[B, S] -> [B, S, D]: token embedding, plus the position's where positions are learned."""
        x: Tensor = self.embedding(tokens)
        return x if self.positions is None else x + self.positions(positions)

    def unembed(self, x: Tensor) -> Tensor:
        """[B, S, D] -> logits [B, S, V]."""
        matrix = self.embedding if self.unembedding is None else self.unembedding
        return functional.linear(self.final_norm(x), matrix.weight)

    def run(
        self, tokens: Tensor, cache: Cache | None, mask: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Cache, list[RoutingTrace]]:
        """Logits [B, S, V], the cache after them, and the routing of every MoE layer."""
        context = place(tokens, cache, mask, positions)
        x = self.embed(tokens, context.positions)
        caches: list[LayerCache] = []
        traces: list[RoutingTrace] = []
        for i, block in enumerate(self.blocks):
            call = recomputed(block) if self.checkpointing else block
            x, layer_cache, trace = call(x, context, None if cache is None else cache.layers[i])
            caches.append(layer_cache)
            if trace is not None:
                traces.append(trace)
        return self.unembed(x), Cache(tuple(caches), context.real), traces

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits [B, S, V] of tokens [B, S].

        mask [B, S] is True at real tokens (default all); positions [B, S] (default: the number of real
        tokens before). Logits at padding are finite and mean nothing. Raises ValueError on a bad shape.
        """
        return self.run(tokens, None, mask, positions)[0]

    def extend(
        self,
        tokens: Tensor,
        cache: Cache | None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Logits [B, S, V] of the next S tokens, and the cache after them; cache None starts anew.

        mask [B, L] covers the past too (default: the past's own, and all new tokens real). Any split gives
        the logits of the full pass, except under a capacity factor: capacity counts the tokens of a call.
        """
        logits, cache, _ = self.run(tokens, cache, mask, positions)
        return logits, cache

    def routing(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> list[RoutingTrace]:
        """The stage trace of every MoE layer, in layer order."""
        return self.run(tokens, None, mask, positions)[2]

    def auxiliary_loss(self, tokens: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Scalars without coefficients, summed over layers: "balance" in the architecture's convention
        (absent where it is "none") and "z"; nothing for a dense model."""
        traces = self.routing(tokens, mask=mask)
        if not traces:
            return {}
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(torch.bool)
        scores, logits, selected = (
            torch.stack([getattr(trace, name) for trace in traces]).view(len(traces), *tokens.shape, -1)
            for name in ("scores", "logits", "selected")
        )
        out = {"z": self.z_loss(logits, real)}
        if self.balance_loss is not None:
            out["balance"] = self.balance_loss(scores, selected, real)
        return out

    def update_biases(self, rate: float) -> None:
        """One step of every router's correction bias against the load since the step before."""
        for block in self.blocks:
            if block.moe is None:
                continue
            block.moe.router.update_bias(rate)

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Canonical name -> tensor, correction biases included, tied tensors once."""
        return dict(self.state_dict(keep_vars=True))

    def router_names(self) -> list[str]:
        """Canonical names of the routers' projection weights."""
        return [f"layers.{b.layer}.moe.router.weight" for b in self.blocks if b.moe is not None]

    def load_weights(self, values: Mapping[str, Tensor]) -> None:
        """Copy every tensor in; raises KeyError or ValueError on a missing, unused or misshapen one."""
        weights.load(self.parameters_by_name(), values)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """d loss / d parameter by canonical name; zeros where the loss does not depend on it."""
        tensors = self.parameters_by_name()
        learned = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        found: Iterable[Tensor | None] = torch.autograd.grad(
            loss, list(learned.values()), allow_unused=True, retain_graph=True
        )
        grads = dict(zip(learned, found, strict=True))
        return {
            name: torch.zeros_like(tensor) if (grad := grads.get(name)) is None else grad
            for name, tensor in tensors.items()
        }


def place(tokens: Tensor, cache: Cache | None, mask: Tensor | None, positions: Tensor | None) -> Context:
    """Where tokens [B, S] stand after the cache: which of all L are real, and the positions of the new.

    Raises ValueError on a shape that does not fit.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; [sequences, tokens] is needed")
    batch, new = tokens.shape
    past = 0 if cache is None else cache.length
    if mask is not None:
        if tuple(mask.shape) != (batch, past + new):
            have, want = tuple(mask.shape), (batch, past + new)
            raise ValueError(f"mask has shape {have}; {want} is needed, past included")
        real = mask.to(torch.bool)
    else:
        real = torch.ones(batch, new, dtype=torch.bool, device=tokens.device)
        real = real if cache is None else torch.cat([cache.real, real], dim=1)
    if positions is None:
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, past:]
    elif positions.shape != tokens.shape:
        raise ValueError(f"positions have shape {tuple(positions.shape)}; {tuple(tokens.shape)} is needed")
    return Context(positions, real)


def build(
    architecture: Architecture,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    std: float = 0.5,
    values: Mapping[str, Tensor] | None = None,
) -> ReferenceModel:
    """The model in eval mode with the weights `values`, or drawn as `harness.reference.weights.draw` does.

    On the meta device nothing is allocated or drawn. Without a generator the seed is 0. Raises
    ValueError naming the field, if the architecture combines what has no defined meaning, and as
    `load_weights` does.
    """
    device = torch.device(device)
    model = ReferenceModel(architecture, options={"device": device, "dtype": dtype})
    if device.type != "meta" and values is not None:
        model.load_weights(values)
    elif device.type != "meta":
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        with torch.no_grad():
            parameters = model.parameters_by_name()
            for name, shape in weights.shapes(architecture).items():
                parameters[name].copy_(weights.draw_one(name, shape, generator, std))
    return model
