"""A model that is not ours, under the Protocols, with an adapter that fits on a page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.implementations import Unsupported, hf_like, resolve
from harness.implementations.protocols import Forward, Gradients, HasParameters, Routed
from suites.selftest import stranger_adapter
from suites.selftest.controls import small
from suites.selftest.stranger_model import EXPERTS, LAYERS, TOP_K, VOCAB, WIDTH, TinyMoe

ADDRESS = "suites.selftest.stranger_adapter:make"


@pytest.fixture
def model():
    """Their model, drawn from seed 0."""
    return resolve(ADDRESS).build(None, device="cpu", dtype=torch.float32, seed=0)


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two sequences of 7."""
    return torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def test_the_adapter_has_under_thirty_lines() -> None:
    """A stranger needs fewer than 30 lines, blank ones and docstrings counted."""
    assert len(Path(stranger_adapter.__file__).read_text().splitlines()) < 30


def test_the_protocols_hold(model) -> None:
    """What is declared is there, and nothing is declared that is not."""
    assert model.capabilities == {"parameters", "forward", "gradients", "routing"}
    for protocol in (HasParameters, Forward, Gradients, Routed):
        assert isinstance(model, protocol)


def test_forward_gives_logits(model, tokens) -> None:
    """Logits [B, S, V], and positions default to the number of real tokens before."""
    logits = model.forward(tokens)
    assert logits.shape == (2, 7, VOCAB)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], dim=1)
    mask = torch.arange(10).expand(2, 10) >= 3
    # One float32 pass against another over more keys: a few hundred roundings of 6e-8 on logits near 1.
    torch.testing.assert_close(model.forward(padded, mask=mask)[:, 3:], logits, atol=1e-4, rtol=1e-4)


def test_routing_is_what_the_block_did(model, tokens) -> None:
    """From the trace alone (hidden, indices, weights) the block's output is computed again."""
    traces = model.routing(tokens)
    assert [trace.layer for trace in traces] == list(range(LAYERS))
    for trace, layer in zip(traces, model.module.layers, strict=True):
        assert trace.indices.shape == trace.weights.shape == (14, TOP_K)
        assert trace.logits.shape == (14, EXPERTS)
        assert trace.hidden.shape == trace.output.shape == (14, WIDTH)
        again = torch.zeros_like(trace.output)
        for slot in range(TOP_K):
            up, down = layer.moe.up[trace.indices[:, slot]], layer.moe.down[trace.indices[:, slot]]
            hidden = torch.einsum("thd,td->th", up, trace.hidden).relu()
            again += trace.weights[:, slot, None] * torch.einsum("tdh,th->td", down, hidden)
        # Sums of 40 and 48 products of order one in float32.
        torch.testing.assert_close(again.detach(), trace.output, atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_router(model, tokens) -> None:
    """Gradients come by the model's own names, and the routers are told."""
    gradients = model.gradients(model.forward(tokens).square().mean())
    assert set(gradients) == set(model.parameters())
    routers = list(model.router_names())
    assert routers == [f"layers.{i}.moe.gate.weight" for i in range(LAYERS)]
    assert all(gradients[name].abs().max() > 0 for name in routers)


def test_a_seed_is_a_model_and_the_global_generator_is_left_alone() -> None:
    """Equal seeds give equal weights, and building draws nothing from anyone else's stream."""
    before = torch.random.get_rng_state()
    one, same, other = (
        resolve(ADDRESS).build(None, device="cpu", dtype=torch.float32, seed=seed).parameters()
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_what_cannot_be_expressed_is_unsupported() -> None:
    """An architecture that the stranger cannot build, and a router that is not there, are refused."""
    with pytest.raises(Unsupported, match="a shape of its own"):
        resolve(ADDRESS).build(small("mixtral-8x7b"), device="cpu", dtype=torch.float32, seed=0)
    lost = hf_like(lambda _: TinyMoe(), name="lost", router="mlp.gate")
    with pytest.raises(Unsupported, match=r"no module of the model is called \*\.mlp\.gate"):
        lost.build(None, device="cpu", dtype=torch.float32, seed=0)
