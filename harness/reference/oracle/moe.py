"""Routing by sorting lists, experts token by token. Letters: E experts, K top-k, D d_model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Decimal

import numpy as np
import torch
from torch import Tensor

from harness.reference.oracle.arithmetic import (
    Array,
    States,
    Token,
    Weights,
    feed_forward,
    hidden,
    linear,
    sigmoid,
    softmax,
)
from harness.reference.trace import RoutingTrace
from harness.spec.architecture import FeedForward, Moe


def mixture(moe: Moe, i: int, w: Weights, x: States, shape: Token) -> tuple[States, RoutingTrace]:
    """The MoE layer's output per token, and its trace with rows in [B, S] order."""
    name = f"layers.{i}.moe"
    logits = {t: [float(v) for v in linear(x[t], w, f"{name}.router")] for t in x}
    chosen, scores, pairs = {}, {}, {}
    corrected = moe.router.correction_bias
    bias = w.arrays[f"{name}.router.correction_bias"].tolist() if corrected else [0.0] * moe.n_experts
    for t in x:
        scores[t] = [sigmoid(v) for v in logits[t]] if moe.router.score == "sigmoid" else softmax(logits[t])
        chosen[t] = _choose(moe, scores[t], logits[t], bias)
        pairs[t] = list(zip(chosen[t], _weigh(moe, scores[t], logits[t], chosen[t]), strict=True))
    kept = _keep(moe, pairs)
    outputs: States = {}
    for t in x:
        out = np.zeros_like(x[t])
        for expert, weight in kept[t]:
            if expert >= 0:
                out += weight * _expert(moe.expert, x[t], w, f"{name}.experts", expert)
        if moe.shared is not None:
            shared = feed_forward(moe.shared, x[t], w, f"{name}.shared")
            gate = sigmoid(float(linear(x[t], w, f"{name}.shared_gate")[0])) if moe.shared_gate else 1.0
            out += gate * shared
        outputs[t] = out

    def rows(values: Mapping[Token, Sequence[float] | Array], width: int) -> Tensor:
        table = np.zeros((shape[0] * shape[1], width))
        for (b, s), row in values.items():
            table[b * shape[1] + s] = row
        return torch.from_numpy(table)

    def index_rows(values: Mapping[Token, Sequence[int]]) -> Tensor:
        # Shifted by one, so that rows of padding, which stay zero, become -1.
        return rows({t: [e + 1 for e in v] for t, v in values.items()}, moe.top_k).to(torch.int64) - 1

    d_model = w.arrays[f"{name}.router.weight"].shape[1]
    return outputs, RoutingTrace(
        layer=i,
        hidden=rows(x, d_model),
        logits=rows(logits, moe.n_experts),
        scores=rows(scores, moe.n_experts),
        selected=index_rows(chosen),
        indices=index_rows({t: [e for e, _ in kept[t]] for t in x}),
        weights=rows({t: [v for _, v in kept[t]] for t in x}, moe.top_k),
        output=rows(outputs, d_model),
    )


def _choose(moe: Moe, scores: list[float], logits: list[float], bias: list[float]) -> list[int]:
    """The top_k experts, best first, equal ones by index."""
    r = moe.router
    value = [v + b for v, b in zip(logits if r.order == "after_topk" else scores, bias, strict=True)]
    size = moe.n_experts // r.n_groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(r.n_groups)]
    worth = []
    for group in members:
        best = sorted((value[e] for e in group), reverse=True)
        worth.append(best[0] if r.group_score == "max" else sum(best[:2]))
    groups = sorted(range(r.n_groups), key=lambda g: (-worth[g], g))[: r.topk_groups]
    allowed = [e for g in groups for e in members[g]]
    return sorted(allowed, key=lambda e: (-value[e], e))[: moe.top_k]


def _weigh(moe: Moe, scores: list[float], logits: list[float], chosen: list[int]) -> list[float]:
    if moe.router.order == "after_topk":
        weights = softmax([logits[e] for e in chosen])
    else:
        weights = [scores[e] for e in chosen]
        if moe.router.normalise:
            weights = [v / math.fsum(weights) for v in weights]
    return [v * moe.router.scaling_factor for v in weights]


def _keep(moe: Moe, pairs: dict[Token, list[tuple[int, float]]]) -> dict[Token, list[tuple[int, float]]]:
    """Experts in turn keep their first or heaviest tokens; what finds no place becomes (-1, 0)."""
    if moe.router.capacity_factor is None:
        return pairs
    exact = Decimal(len(pairs) * moe.top_k) * Decimal(repr(moe.router.capacity_factor)) / moe.n_experts
    limit = int(exact.to_integral_value(ROUND_CEILING))
    full: set[tuple[Token, int]] = set()
    for expert in range(moe.n_experts):
        askers = [(t, v) for t in sorted(pairs) for e, v in pairs[t] if e == expert]
        if moe.router.drop_policy == "probability":
            askers.sort(key=lambda asker: -asker[1])
        full |= {(t, expert) for t, _ in askers[limit:]}
    return {t: [(-1, 0.0) if (t, e) in full else (e, v) for e, v in pairs[t]] for t in pairs}


def _expert(ff: FeedForward, x: Array, w: Weights, name: str, e: int) -> Array:
    def layer(part: str, y: Array) -> Array:
        z: Array = w.arrays[f"{name}.{part}"][e] @ y
        return z + w.arrays[f"{name}.{part}_bias"][e] if ff.bias else z

    return layer("down", hidden(ff, layer("gate", x) if ff.gated else None, layer("up", x)))
