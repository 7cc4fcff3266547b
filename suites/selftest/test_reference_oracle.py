"""The reference in float64 and the oracle, which share no code, compute the same numbers at every stage."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from torch import Tensor

from harness.reference import build, oracle, weights
from harness.spec import Architecture
from suites.selftest.controls import CONTROLS, MOE_CONTROLS, changed, generator, ragged, relative, small

CLOSE = 1e-9
"""float64 rounds at 1e-16; sums over at most a few hundred terms, through four layers with weights of
standard deviation 0.5, which sharpen every softmax, stay four decades below this."""


def compare(architecture: Architecture, *, positions: Tensor | None = None, seed: int = 11) -> None:
    """Assert that all stages agree at the real tokens."""
    values = weights.draw(architecture, generator(seed))
    tokens, mask = ragged(architecture, seed + 1)
    model = build(architecture, dtype=torch.float64)
    model.load_weights(values)
    with torch.no_grad():
        logits, _, routing = model.run(tokens, None, mask, positions)
    expected = oracle.forward(architecture, values, tokens, mask=mask, positions=positions)
    assert [t.layer for t in routing] == [t.layer for t in expected.routing]
    assert len(routing) == architecture.n_moe_layers
    real = mask.flatten()
    for have, want in zip(routing, expected.routing, strict=True):
        for exact in ("selected", "indices"):
            assert torch.equal(getattr(have, exact)[real], getattr(want, exact)[real]), (have.layer, exact)
        for stage in ("hidden", "logits", "scores", "weights", "output"):
            error = relative(getattr(have, stage)[real], getattr(want, stage)[real])
            assert error < CLOSE, (have.layer, stage, error)
    assert relative(logits[mask], expected.logits[mask]) < CLOSE


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_agrees(name: str) -> None:
    """The twin of every control spec agrees with the oracle, stage by stage."""
    compare(small(name))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", MOE_CONTROLS)
def test_every_top_k_agrees(name: str, top_k: int) -> None:
    """One, two and three experts per token agree under every router."""
    compare(small(name, top_k=top_k))


ROUTERS = {
    "capacity by position": ("mixtral-8x7b", {"capacity_factor": 0.8}),
    "capacity by probability": ("mixtral-8x7b", {"capacity_factor": 0.8, "drop_policy": "probability"}),
    "roomy capacity": ("deepseek-v3", {"capacity_factor": 1.1, "drop_policy": "probability"}),
    "groups by their best": ("deepseek-v3", {"group_score": "max"}),
    "sigmoid without normalising": ("deepseek-v3", {"normalise": False}),
    "softmax in groups": ("deepseek-v3", {"score": "softmax", "correction_bias": False}),
    "router bias": ("mixtral-8x7b", {"bias": True, "scaling_factor": 1.7}),
}


@pytest.mark.parametrize("case", ROUTERS)
def test_routers_beyond_the_controls_agree(case: str) -> None:
    """Capacity, group scores, biases and scaling agree in combinations that no control has."""
    name, router = ROUTERS[case]
    compare(changed(small(name), moe={"router": router}))


EXPERTS = {
    "relu, not gated": {"expert": {"gated": False, "activation": "relu"}},
    "gelu with biases": {"expert": {"activation": "gelu", "bias": True}},
    "gelu_tanh": {"expert": {"activation": "gelu_tanh"}},
    "gated shared expert": {"shared_gate": True, "shared": {"d_ff": 44}},
    "every other layer": {"period": 2, "offset": 0, "first_dense": 1},
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_beyond_the_controls_agree(case: str) -> None:
    """Activations, biases, shared experts and layer patterns agree in combinations that no control has."""
    compare(changed(small("deepseek-v3", n_layers=4), moe=EXPERTS[case]))


YARN = {"kind": "yarn", "factor": 8.0, "original_max_positions": 32}
ATTENTIONS = {
    "linear": ("llama-3.1-8b", {"rope": {"scaling": {"kind": "linear", "factor": 3.0}}}),
    "plain yarn": ("llama-3.1-8b", {"rope": {"scaling": YARN}}),
    "yarn, attention factor": ("llama-3.1-8b", {"rope": {"scaling": YARN | {"attention_factor": 1.3}}}),
    "yarn, two mscales": (
        "deepseek-v3",
        {"rope": {"scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}}},
    ),
    "part of the head": ("llama-3.1-8b", {"rope": {"dim": 6}}),
    "interleaved": ("llama-3.1-8b", {"rope": {"layout": "interleaved", "dim": 10}}),
    "explicit scale": ("llama-3.1-8b", {"scale": 0.11}),
    "norm and clip": ("olmoe-1b-7b", {"qkv_clip": 0.9}),
    "clip": ("olmoe-1b-7b", {"qkv_clip": 0.9, "qk_norm": "none"}),
    "sinks and window everywhere": ("llama-3.1-8b", {"sinks": True, "window": 4, "pattern": ("window",)}),
    "window of one": ("llama-3.1-8b", {"window": 1, "pattern": ("full", "window")}),
    "latent queries in full": ("deepseek-v3", {"mla": {"q_lora_rank": None}}),
    "latent with biases": ("deepseek-v3", {"qkv_bias": True, "o_bias": True, "sinks": True}),
    "latent, half layout": ("deepseek-v3", {"rope": {"layout": "half", "scaling": None}}),
}


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_beyond_the_controls_agrees(case: str) -> None:
    """Rope variants, scales, windows, sinks and latent attention agree beyond what the controls use."""
    name, attention = ATTENTIONS[case]
    compare(changed(small(name), attention=attention))


@pytest.mark.parametrize("name", ["llama-3.1-70b", "deepseek-v3", "gpt-oss-20b", "gpt3-175b"])
def test_given_positions_agree(name: str) -> None:
    """Positions that are given, with gaps and not from 0, are the ones that are used."""
    positions = torch.arange(17).mul(3).add(5).expand(3, 17) + torch.tensor([[0], [11], [2]])
    compare(small(name), positions=positions)


@pytest.mark.parametrize("stage", ["weigh", "select", "score", "project"])
def test_a_changed_stage_is_seen(stage: str) -> None:
    """Replacing one router stage of one layer makes the comparison fail: it can."""
    architecture = small("mixtral-8x7b")
    values = weights.draw(architecture, generator(3))
    tokens, _ = ragged(architecture, 4)
    model = build(architecture, dtype=torch.float64)
    model.load_weights(values)
    moe = model.blocks[0].moe
    assert moe is not None
    right = getattr(moe.router, stage)

    def wrong(_: object, *inputs: Tensor) -> Tensor:
        return right(*inputs).flip(-1)

    setattr(moe.router, stage, MethodType(wrong, moe.router))
    expected = oracle.forward(architecture, values, tokens)
    if stage == "select":
        # The order of the chosen says nothing about the sum; the trace shows it.
        assert not torch.equal(model.routing(tokens)[0].selected, expected.routing[0].selected)
    else:
        assert relative(model(tokens).detach(), expected.logits) > 1e-3  # a real difference, not rounding
