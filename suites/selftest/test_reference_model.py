"""Building the reference: names, shapes, sizes, dtypes, gradients, and what it refuses."""

from __future__ import annotations

import time

import pytest
import torch

from harness.implementations.protocols import (
    AuxiliaryLosses,
    Cached,
    CrossAttends,
    Forward,
    Generates,
    Gradients,
    HasAlternatives,
    HasParameters,
    LoadsWeights,
    Recomputes,
    Routed,
    Serves,
    Speculates,
    Trains,
    Unsupported,
    UpdatesBiases,
)
from harness.implementations.reference import Reference
from harness.reference import build, weights
from harness.spec import Architecture, Attention, FeedForward, Moe, Rope, load
from suites.selftest.controls import CONTROLS, changed, generator, ragged, relative, small


@pytest.mark.parametrize("name", CONTROLS)
def test_names_and_shapes_are_canonical(name: str) -> None:
    """At full size on the meta device, the model's tensors are exactly `weights.shapes`."""
    architecture = load(name).architecture
    model = build(architecture, device="meta", dtype=torch.bfloat16)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.parameters_by_name().items()}
    assert shapes == weights.shapes(architecture)


def test_a_model_of_1_8e12_parameters_is_built_in_seconds() -> None:
    """120 layers of 16 experts at d_model 10752: 1.83e12 parameters to the last one, on meta."""
    d, f, v, layers, experts = 10752, 43008, 100352, 120, 16
    architecture = Architecture(
        d_model=d,
        n_layers=layers,
        vocab_size=v,
        max_positions=8192,
        attention=Attention(n_heads=84, n_kv_heads=84, head_dim=128, rope=Rope()),
        moe=Moe(n_experts=experts, top_k=2, expert=FeedForward(d_ff=f, gated=False, activation="gelu")),
    )
    start = time.process_time()
    model = build(architecture, device="meta", dtype=torch.bfloat16)
    logits = model(torch.zeros(1, 5, dtype=torch.int64, device="meta"))
    seconds = time.process_time() - start
    per_layer = 4 * d * d + experts * 2 * d * f + experts * d + 2 * d
    assert sum(p.numel() for p in model.parameters()) == layers * per_layer + 2 * v * d + d
    assert logits.shape == (1, 5, v)
    assert seconds < 10  # measured 0.1 s; a machine under load has two decades of room


@pytest.mark.parametrize("name", CONTROLS)
def test_one_seed_is_one_model_in_every_dtype(name: str) -> None:
    """Weights of one seed are equal up to the dtype's rounding, and `build` draws what `draw` draws."""
    architecture = small(name)
    drawn = weights.draw(architecture, generator(1))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = build(architecture, dtype=dtype, generator=generator(1))
        for key, tensor in model.parameters_by_name().items():
            assert torch.equal(tensor, drawn[key].to(tensor.dtype)), key


@pytest.mark.parametrize("name", CONTROLS)
def test_no_drawn_weight_hides_a_defect(name: str) -> None:
    """No drawn tensor is zero or constant, and norm weights are not all one."""
    for key, tensor in weights.draw(small(name), generator(2)).items():
        assert tensor.abs().min() > 0, key
        assert tensor.std() > 0.05, key  # the least spread drawn is 0.2, of at least 6 numbers


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt3-175b", "palm-540b", "deepseek-v3"])
def test_narrow_dtypes_follow_float64(name: str, dtype: torch.dtype, close: float) -> None:
    """Logits in float32 and bfloat16 follow float64, within what sharp softmaxes make of the rounding.

    2^-24 and 2^-8, each times about a thousand for four layers of weights at std 0.5; a near-tie in
    routing could exceed it, and with this seed none does.
    """
    architecture = small(name)
    tokens, mask = ragged(architecture, 3)
    with torch.no_grad():
        wide = build(architecture, dtype=torch.float64, generator=generator(4))(tokens, mask=mask)
        narrow = build(architecture, dtype=dtype, generator=generator(4))(tokens, mask=mask)
    assert narrow.dtype == dtype
    assert relative(narrow[mask], wide[mask]) < close


@pytest.mark.parametrize("name", CONTROLS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Along a random direction of all weights, the derivative is that of a central difference."""
    architecture = small(name)
    model = build(architecture, dtype=torch.float64, generator=generator(5))
    tokens, mask = ragged(architecture, 6)
    values = {key: tensor.detach().clone() for key, tensor in model.parameters_by_name().items()}
    direction = {
        key: torch.zeros_like(value)
        if key.endswith("correction_bias")
        else torch.randn(value.shape, generator=generator(7), dtype=torch.float64)
        for key, value in values.items()
    }

    def loss_at(step: float) -> torch.Tensor:
        model.load_weights({key: value + step * direction[key] for key, value in values.items()})
        logits: torch.Tensor = model(tokens, mask=mask)
        return logits[mask].log_softmax(-1)[:, 0].mean()

    gradients = model.gradients(loss_at(0.0))
    assert set(gradients) == set(values)
    along = sum(float((gradients[key] * direction[key]).sum()) for key in values)
    step = 1e-7
    with torch.no_grad():
        slope = float(loss_at(step) - loss_at(-step)) / (2 * step)
    # error: 1e-16 / step = 1e-9 of rounding, and step^2 times a third derivative
    assert slope == pytest.approx(along, rel=1e-5)


def test_tied_embeddings_are_one_tensor_with_both_gradients() -> None:
    """A tied matrix appears once, and its gradient is the sum of both of its uses."""
    tied = small("gpt3-175b")
    model = build(tied, dtype=torch.float64)
    assert "unembedding.weight" not in model.parameters_by_name()
    untied = build(tied.model_copy(update={"tie_embeddings": False}), dtype=torch.float64)
    values = dict(model.parameters_by_name())
    untied.load_weights(values | {"unembedding.weight": values["embedding.weight"]})
    tokens, _ = ragged(tied, 8)
    once = model.gradients(model(tokens).square().mean())["embedding.weight"]
    both = untied.gradients(untied(tokens).square().mean())
    assert relative(once, both["embedding.weight"] + both["unembedding.weight"]) < 1e-12  # float64


def test_forward_leaves_the_model_as_it_was() -> None:
    """No call changes a weight, and repeating a call repeats its result."""
    model = build(small("deepseek-v3"), dtype=torch.float64)
    tokens, mask = ragged(model.architecture, 9)
    before = {key: tensor.detach().clone() for key, tensor in model.parameters_by_name().items()}
    first = model(tokens, mask=mask)
    model.routing(tokens)
    model.auxiliary_loss(tokens)
    model.extend(tokens, None)
    assert torch.equal(model(tokens, mask=mask), first)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.parameters_by_name().items())


def test_loading_names_what_does_not_fit() -> None:
    """Missing, unused and misshapen tensors are each named."""
    model = build(small("mixtral-8x7b"))
    values = dict(weights.draw(model.architecture, generator(1)))
    router = values.pop("layers.0.moe.router.weight")
    with pytest.raises(KeyError, match=r"missing weights: layers\.0\.moe\.router\.weight"):
        model.load_weights(values)
    with pytest.raises(ValueError, match=r"layers\.0\.moe\.router\.weight has shape .* needs"):
        model.load_weights(values | {"layers.0.moe.router.weight": router.T})
    whole = values | {"layers.0.moe.router.weight": router}
    with pytest.raises(KeyError, match="does not have: lm_head"):
        model.load_weights(whole | {"lm_head": router})


def test_what_has_no_meaning_is_refused_by_field() -> None:
    """Combinations without a defined meaning are refused, naming the field."""
    with pytest.raises(ValueError, match=r"attention\.rope: 7 rotated"):
        build(changed(small("llama-3.1-8b"), attention={"rope": {"dim": 7}}), device="meta")
    clipped = changed(small("deepseek-v3"), attention={"qkv_clip": 1.0})
    with pytest.raises(Unsupported, match=r"attention\.qkv_clip"):
        Reference().build(clipped, device="meta", dtype=torch.float32, seed=0)
    with pytest.raises(Unsupported, match="needs a spec"):
        Reference().build(None, device="cpu", dtype=torch.float32, seed=0)


@pytest.mark.parametrize("name", CONTROLS)
def test_the_implementation_offers_what_it_declares(name: str) -> None:
    """Every capability that the reference declares is there by its Protocol."""
    protocols = {
        "parameters": HasParameters,
        "forward": Forward,
        "routing": Routed,
        "cache": Cached,
        "gradients": Gradients,
        "weights": LoadsWeights,
        "auxiliary_loss": AuxiliaryLosses,
        "generate": Generates,
        "enumerable": Generates,
        "speculate": Speculates,
        "serve": Serves,
        "limits": Serves,
        "train": Trains,
        "recompute": Recomputes,
        "bias_update": UpdatesBiases,
        "cross_attention": CrossAttends,
        "alternatives": HasAlternatives,
    }
    architecture = small(name)
    model = Reference().build(architecture, device="cpu", dtype=torch.float32, seed=1)
    assert all(isinstance(model, protocols[capability]) for capability in model.capabilities)
    assert ("routing" in model.capabilities) == (architecture.moe is not None)
    tokens, mask = ragged(architecture, 1)
    assert model.forward(tokens, mask=mask).shape == (*tokens.shape, model.vocab_size)
    if architecture.moe is not None:
        traces = model.routing(tokens)
        assert [trace.layer for trace in traces] == [
            i for i in range(architecture.n_layers) if architecture.is_moe_layer(i)
        ]
        assert len(list(model.router_names())) == architecture.n_moe_layers
