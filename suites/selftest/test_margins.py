"""The error bounds: they hold where they must, and are tight enough to see a narrower dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from harness import spec
from harness.conformance import stages
from harness.conformance.balance import balance_loss, metrics, z_loss
from harness.evidence.margins import (
    Rounding,
    comparable_tokens,
    dot_bound,
    gamma,
    monte_carlo,
    topk_gap,
    unit_roundoff,
)
from harness.reference import oracle, weights


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def test_gamma_grows_with_the_number_of_roundings_and_ends_where_no_bound_holds() -> None:
    """gamma_n is n u / (1 - n u), and an error where n u reaches 1."""
    u = unit_roundoff(torch.float32)
    assert u == 2.0**-24
    assert gamma(3, torch.float32) == 3 * u / (1 - 3 * u)
    with pytest.raises(ValueError, match="lose every digit"):
        gamma(256, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dot_bound_holds_for_its_dtype(dtype: torch.dtype) -> None:
    """A matmul in a dtype is within the bound of that dtype."""
    x = torch.randn(64, 48, generator=generator()).to(dtype)
    weight, bias = (
        torch.randn(12, 48, generator=generator(1)).to(dtype),
        torch.randn(12, generator=generator(2)).to(dtype),
    )
    exact = x.double() @ weight.double().T + bias.double()
    error = (nn.functional.linear(x, weight, bias).double() - exact).abs()
    assert bool((error <= dot_bound(weight, x, bias, dtype=dtype)).all())


def test_dot_bound_of_float32_shows_a_cast_to_bfloat16() -> None:
    """Logits that were cast to bfloat16 are outside of the bound for float32, nearly all of them."""
    x, weight = torch.randn(64, 96, generator=generator()), torch.randn(12, 96, generator=generator(1))
    exact = x.double() @ weight.double().T
    cast = (x @ weight.T).to(torch.bfloat16)
    assert ((cast.double() - exact).abs() > dot_bound(weight, x)).double().mean() > 0.9


def test_monte_carlo_covers_float32_and_not_bfloat16() -> None:
    """The radius from perturbed float64 runs covers a real float32 run and not a bfloat16 one, five seeds."""
    for seed in range(5):
        draw = generator(seed)
        layers = [nn.Linear(40, 40, dtype=torch.float64) for _ in range(4)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.4, generator=draw)
            nn.init.normal_(layer.bias, std=0.4, generator=draw)
        module = nn.Sequential(*(part for layer in layers for part in (layer, nn.SiLU())))
        x = torch.randn(16, 40, generator=draw, dtype=torch.float32)

        def run(_: Rounding, module: nn.Module = module, x: torch.Tensor = x) -> dict[str, torch.Tensor]:
            return {"out": module(x.double())}

        # Exactly representable, so that casting the weights is no error of its own.
        module.float().double()
        spread = monte_carlo(module, run, dtype=torch.float32, generator=draw)["out"]
        radius = spread.radius(inner=40).amax(-1, keepdim=True)
        error = (module.float()(x).double() - spread.centre).abs()
        assert bool((error <= radius).all())
        narrow = (module.bfloat16()(x.bfloat16()).double() - spread.centre).abs()
        assert float((narrow > radius).double().mean()) > 0.5


def test_monte_carlo_sees_selections_that_rounding_changes() -> None:
    """A whole number that any perturbed run changes has deviation 1, others 0."""
    module = nn.Identity()
    keys = torch.tensor([[1.0, 1.0 + 1e-9, 0.0], [1.0, 2.0, 0.0]], dtype=torch.float64)

    def run(_: Rounding) -> dict[str, torch.Tensor]:
        return {"best": module(keys).argmax(-1)}

    spread = monte_carlo(module, run, dtype=torch.float32, generator=generator(), samples=12)
    assert spread["best"].deviation.tolist() == [1.0, 0.0]


def test_gap_is_that_between_the_last_selected_and_the_first_left_out() -> None:
    """The k-th largest minus the next, infinite if nothing is left out."""
    keys = torch.tensor([[3.0, 1.0, 2.5, 0.0]])
    assert topk_gap(keys, 2).tolist() == [1.5]
    assert math.isinf(topk_gap(keys, 4).item())


def test_a_flip_makes_the_rest_of_its_sequence_incomparable() -> None:
    """Tokens before the first flip of their sequence are comparable, and no others."""
    changed = torch.tensor([[False, True, False], [False, False, False]])
    assert comparable_tokens(changed).tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-20b", "olmoe-1b-7b", "dbrx"])
def test_stages_agree_with_the_oracle(name: str) -> None:
    """Each stage, given the oracle's own input to it, is what the oracle computed token by token."""
    architecture = spec.twin(spec.load(name).architecture)
    assert architecture.moe is not None
    router = architecture.moe.router
    drawn = weights.draw(architecture, generator(3))
    tokens = torch.randint(architecture.vocab_size, (2, 5), generator=generator(4))
    for trace in oracle.forward(architecture, drawn, tokens).routing:
        dtype = torch.float64
        logits = stages.logits(drawn, trace.layer, trace.hidden, dtype)
        scores = stages.scores(router, trace.logits, dtype)
        correction = drawn.get(f"layers.{trace.layer}.moe.router.correction_bias")
        chosen, _ = stages.select(
            architecture.moe, stages.keys(router, trace.scores, trace.logits, correction)
        )
        shares = stages.combine_weights(router, scores, trace.logits, trace.indices, dtype)
        output = stages.combine(architecture, drawn, trace.layer, trace.hidden, trace.indices, shares, dtype)
        for judged, expected in (
            (logits, trace.logits),
            (scores, trace.scores),
            (shares, trace.weights),
            (output, trace.output),
        ):
            assert bool(((judged.value - expected).abs() <= judged.bound).all())
        assert torch.equal(chosen.sort(-1).values, trace.indices.sort(-1).values)


def test_balance_losses_of_even_and_collapsed_routing() -> None:
    """Even routing gives 1 (K where f is not divided by K), collapse E / K (or E), per layer."""
    real = torch.ones(2, 6, dtype=torch.bool)
    even = torch.arange(12).repeat(2).view(12, 2)
    flat = torch.full((12, 12), 1 / 12, dtype=torch.float64)
    peaked = torch.zeros(12, 12, dtype=torch.float64)
    peaked[:, :2] = 0.5
    collapsed = torch.tensor([[0, 1]]).expand(12, 2)
    # Two layers: added up under switch and sequence (2 x 1, 2 x E / K), pooled under huggingface (K, E).
    for convention in ("switch", "huggingface", "sequence"):
        assert float(balance_loss(convention, [flat, flat], [even, even], real)) == pytest.approx(2.0)
        found = balance_loss(convention, [peaked, peaked], [collapsed, collapsed], real)
        assert float(found) == pytest.approx(12.0)
    assert float(z_loss([torch.zeros(12, 12)], real)) == pytest.approx(math.log(12) ** 2)


def test_metrics_of_even_and_collapsed_routing() -> None:
    """Even load has no violation and full entropy; a collapsed one leaves the other experts idle."""
    real = torch.ones(1, 12, dtype=torch.bool)
    even = metrics([torch.arange(12)[:, None]], 12, real)
    assert even == {"max_violation": 0.0, "cv": 0.0, "entropy": 1.0, "idle_experts": 0.0, "dropped": 0.0}
    collapsed = metrics([torch.zeros(12, 1, dtype=torch.int64)], 12, real)
    assert (collapsed["max_violation"], collapsed["idle_experts"], collapsed["entropy"]) == (11.0, 11.0, 0.0)
    dropped = metrics([torch.tensor([[0], [-1]])], 2, torch.ones(1, 2, dtype=torch.bool))
    assert dropped["dropped"] == 0.5
