"""Auxiliary losses by value against loops over tokens, and by gradient against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from harness.reference import build, losses
from suites.selftest.controls import changed, generator, ragged, small

LAYERS, EXPERTS, TOP_K = 2, 12, 3
EXACT = 1e-12
"""float64 sums of some hundred terms below 100."""


def inputs(seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and scores [N, B, S, E], a skewed choice [N, B, S, K] and a ragged mask [B, S]."""
    mask = ragged(small("mixtral-8x7b"), seed)[1]
    logits = torch.randn(LAYERS, *mask.shape, EXPERTS, generator=generator(seed), dtype=torch.float64)
    logits += torch.linspace(-2, 2, EXPERTS, dtype=torch.float64)
    return logits, logits.softmax(-1), logits.topk(TOP_K).indices, mask


def by_hand(convention: str, scores: Tensor, selected: Tensor, real: Tensor) -> float:
    """The loss by loops over lists, written down a second time from the papers."""
    layers, batch, length, n_experts = scores.shape
    tokens = [(b, s) for b in range(batch) for s in range(length) if real[b, s]]

    def count(layer: int, expert: int, among: list[tuple[int, int]]) -> int:
        return sum(selected[layer, b, s].tolist().count(expert) for b, s in among)

    def mean_score(layer: int, expert: int, among: list[tuple[int, int]], share: bool) -> float:
        rows = [scores[layer, b, s] for b, s in among]
        return math.fsum(float(r[expert] / (r.sum() if share else 1)) for r in rows) / len(rows)

    total = 0.0
    for e in range(n_experts):
        counts = [count(layer, e, tokens) for layer in range(layers)]
        means = [mean_score(layer, e, tokens, share=False) for layer in range(layers)]
        if convention == "switch":
            pairs = zip(counts, means, strict=True)
            total += sum(n_experts * c / (len(tokens) * TOP_K) * p for c, p in pairs)
        if convention == "huggingface":
            total += n_experts * sum(counts) / (layers * len(tokens)) * sum(means) / layers
        if convention == "sequence":
            for b in range(batch):
                own = [token for token in tokens if token[0] == b]
                for layer in range(layers):
                    f = n_experts / (TOP_K * len(own)) * count(layer, e, own)
                    total += f * mean_score(layer, e, own, share=True) / batch
    return total


@pytest.mark.parametrize("convention", losses.BALANCES)
def test_balance_is_what_the_loops_say(convention: str) -> None:
    """Each convention's value is that of a loop over tokens, with padding left out."""
    _, scores, selected, real = inputs()
    sigmoid = scores * 7  # unnormalised, as sigmoid scores are
    for values in (scores, sigmoid):
        have = float(losses.BALANCES[convention](values, selected, real))
        assert math.isclose(have, by_hand(convention, values, selected, real), rel_tol=EXACT)


def test_z_is_what_the_loops_say() -> None:
    """z is the mean square of logsumexp over real tokens, summed over layers."""
    logits, _, _, real = inputs()
    squares = [float(row.exp().sum().log()) ** 2 for layer in logits for row in layer[real]]
    assert math.isclose(
        float(losses.z_loss(logits, real)), math.fsum(squares) / int(real.sum()), rel_tol=EXACT
    )


@pytest.mark.parametrize("convention", losses.BALANCES)
def test_gradients_are_those_of_finite_differences(convention: str) -> None:
    """With the choice held fixed, the gradient by the logits is that of central differences."""
    logits, _, selected, real = inputs(2)
    balance = losses.BALANCES[convention]

    def loss(free: Tensor) -> Tensor:
        return balance(free.softmax(-1), selected, real) + losses.z_loss(free, real)

    # gradcheck's own defaults: steps of 1e-6 in float64, agreement to 1e-5 + 0.1%
    assert torch.autograd.gradcheck(loss, logits.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize(("convention", "uniform"), [("switch", 2), ("huggingface", 3), ("sequence", 2)])
def test_uniform_routing_has_the_known_value(convention: str, uniform: float) -> None:
    """Perfect balance gives 1 per layer (summed), or K where layers are pooled and K does not divide."""
    scores = torch.full((LAYERS, 2, 8, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    slots = torch.arange(LAYERS * 2 * 8 * TOP_K) % EXPERTS
    real = torch.ones(2, 8, dtype=torch.bool)
    value = losses.BALANCES[convention](scores, slots.view(LAYERS, 2, 8, TOP_K), real)
    assert math.isclose(float(value), uniform, rel_tol=EXACT)


def test_pooling_layers_hides_opposite_imbalances() -> None:
    """Two layers that are skewed in opposite ways look balanced to the pooled convention alone."""
    scores = torch.zeros(2, 1, 6, 4, dtype=torch.float64)
    scores[0, ..., :2], scores[1, ..., 2:] = 0.5, 0.5
    selected = torch.tensor([0, 1]).expand(1, 6, 2)
    selected = torch.stack([selected, selected + 2])
    real = torch.ones(1, 6, dtype=torch.bool)
    assert float(losses.huggingface_balance(scores, selected, real)) == 2  # K: as if uniform
    assert float(losses.switch_balance(scores, selected, real)) == 4  # 2 per layer, against 1


@pytest.mark.parametrize("convention", losses.BALANCES)
def test_a_model_excludes_its_padding(convention: str) -> None:
    """A model's losses with padding masked are those of the tokens alone."""
    architecture = changed(small("mixtral-8x7b"), auxiliary_loss={"balance": convention})
    model = build(architecture, dtype=torch.float64)
    tokens, mask = ragged(architecture, 4)
    padded = model.auxiliary_loss(tokens[1:2], mask=mask[1:2])
    alone = model.auxiliary_loss(tokens[1:2, 5:])
    assert set(padded) == {"balance", "z"}
    for kind, value in padded.items():
        assert math.isclose(float(value.detach()), float(alone[kind].detach()), rel_tol=1e-9)


@pytest.mark.parametrize("convention", losses.BALANCES)
def test_the_loss_counts_what_was_chosen_not_what_was_kept(convention: str) -> None:
    """Dropping over capacity does not make a first layer's routing look balanced."""
    whole = changed(small("mixtral-8x7b", n_layers=1), auxiliary_loss={"balance": convention})
    tight = changed(whole, moe={"router": {"capacity_factor": 0.2}})
    tokens, mask = ragged(whole, 5)
    values = [build(a, dtype=torch.float64).auxiliary_loss(tokens, mask=mask) for a in (whole, tight)]
    assert torch.equal(values[0]["balance"], values[1]["balance"])


def test_a_dense_model_has_no_router_losses() -> None:
    """A dense model gives none, and a convention of none leaves only z."""
    dense = small("llama-3.1-8b")
    assert build(dense).auxiliary_loss(ragged(dense, 1)[0]) == {}
    quiet = changed(small("mixtral-8x7b"), auxiliary_loss={"balance": "none"})
    assert set(build(quiet).auxiliary_loss(ragged(quiet, 1)[0])) == {"z"}
