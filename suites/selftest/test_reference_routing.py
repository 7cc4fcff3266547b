"""The reference's router and experts in their corners: ties, empty experts, capacity, groups, repetition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.reference import ReferenceModel, RoutingTrace, build
from harness.reference.experts import Moe
from harness.reference.router import capacity, top
from harness.spec import Architecture
from suites.selftest.controls import MOE_CONTROLS, changed, generator, ragged, relative, small


def moe_of(model: ReferenceModel) -> Moe:
    """The last block's MoE layer."""
    moe = model.blocks[-1].moe
    assert moe is not None
    return moe


def routed(architecture: Architecture, seed: int = 1) -> tuple[ReferenceModel, RoutingTrace, Tensor]:
    """A model, its last layer's trace on ragged tokens, and the flat mask."""
    model = build(architecture, dtype=torch.float64, generator=generator(seed))
    tokens, mask = ragged(architecture, seed + 1)
    with torch.no_grad():
        return model, model.routing(tokens, mask=mask)[-1], mask.flatten()


def test_ties_go_to_the_lowest_index() -> None:
    """Of equal values the lowest indices are taken, also when all are equal."""
    assert top(torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0]]), 4).tolist() == [[1, 2, 4, 0]]
    assert top(torch.zeros(2, 12), 3).tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("name", MOE_CONTROLS)
def test_duplicated_router_rows_choose_the_lower_expert(name: str) -> None:
    """Where two experts have one router row, the higher is never chosen before the lower."""
    model = build(small(name, top_k=1), dtype=torch.float64, generator=generator(2))
    tokens, _ = ragged(model.architecture, 3)
    for block in model.blocks:
        if block.moe is not None:
            router = block.moe.router
            with torch.no_grad():
                for tensor in (router.weight, router.bias, router.correction_bias):
                    if tensor is not None:
                        tensor[6:] = tensor[:6].clone()
    for trace in model.routing(tokens):
        assert trace.selected.max() < 6
        assert len(trace.selected.unique()) > 1


@pytest.mark.parametrize("name", MOE_CONTROLS)
def test_experts_without_tokens_are_harmless(name: str) -> None:
    """Experts that no token reaches change nothing and get a gradient of exactly zero."""
    model = build(small(name), dtype=torch.float64, generator=generator(4))
    moe = moe_of(model)
    tokens = ragged(model.architecture, 5)[0][:1, :1]  # one token: at most 3 of 12 experts work
    logits = model(tokens)
    chosen = set(model.routing(tokens)[-1].selected.flatten().tolist())
    gradient = model.gradients(logits.square().sum())[f"layers.{len(model.blocks) - 1}.moe.experts.down"]
    for expert in range(12):
        assert bool(gradient[expert].any()) == (expert in chosen)
        if expert not in chosen:
            with torch.no_grad():
                moe.experts.down[expert] = torch.nan
    assert torch.equal(model(tokens), logits)


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("factor", [0.1, 0.7, 1.1, 4.0])
def test_capacity_is_kept_and_slots_are_conserved(factor: float, policy: str) -> None:
    """No expert exceeds its capacity, none that had to drop is below it, and the right tokens stay."""
    router = {"capacity_factor": factor, "drop_policy": policy}
    architecture = changed(small("mixtral-8x7b", top_k=3), moe={"router": router})
    model, trace, real = routed(architecture)
    undropped = moe_of(model).router.weigh(trace.scores, trace.logits, trace.selected)
    limit = capacity(int(real.sum()), 3, 12, factor)
    kept = trace.indices >= 0
    assert not kept[~real].any()
    assert torch.equal(trace.indices[kept], trace.selected[kept])
    assert torch.equal(trace.weights, undropped.where(kept, 0))
    for expert in range(12):
        wants = (trace.selected == expert) & real[:, None]
        stays = (trace.indices == expert).any(1)
        assert int(stays.sum()) == min(limit, int(wants.sum()))
        token = wants.any(1).nonzero().flatten()
        priority = -undropped[wants] if policy == "probability" else token
        assert stays[token[priority.argsort(stable=True)[:limit]]].all()


def test_capacity_is_exact_for_factors_as_printed() -> None:
    """1.1 means 11/10: 10 expected tokens make 11 places, not 12 by rounding up the float."""
    assert capacity(tokens=60, top_k=2, n_experts=12, factor=1.1) == 11
    assert capacity(tokens=7, top_k=3, n_experts=12, factor=1.0) == 2
    assert capacity(tokens=1, top_k=1, n_experts=12, factor=0.01) == 1


def test_padding_takes_no_place_under_capacity() -> None:
    """Under a capacity factor a batch routes its real tokens as it would without its padding."""
    architecture = changed(small("mixtral-8x7b"), moe={"router": {"capacity_factor": 0.8}})
    model, trace, real = routed(architecture)
    tokens, mask = ragged(architecture, 2)
    every = torch.ones_like(mask)
    assert not torch.equal(model.routing(tokens, mask=every)[-1].indices[real], trace.indices[real])
    first = model.routing(tokens[1:2, 5:])[0].indices
    padded = model.routing(tokens[1:2], mask=mask[1:2])[0].indices
    assert torch.equal(padded[5:], first)


def test_masked_groups_stay_out_when_all_scores_are_negative() -> None:
    """With correction biases below every score, only experts of the best groups are chosen."""
    model, _, _ = routed(small("deepseek-v3"))
    router = moe_of(model).router
    assert router.correction_bias is not None
    router.correction_bias.fill_(-3.0)
    tokens, _ = ragged(model.architecture, 3)
    trace = model.routing(tokens)[-1]
    best_two = trace.scores.unflatten(-1, (4, 3)).sort(descending=True).values[..., :2].sum(-1)
    groups = top(best_two, router.router.topk_groups)
    assert ((trace.selected // 3)[:, :, None] == groups[:, None, :]).any(-1).all()


def test_a_correction_bias_selects_and_does_not_weigh() -> None:
    """A bias added to every expert alike changes no weight and no choice."""
    model, before, _ = routed(small("deepseek-v3"))
    router = moe_of(model).router
    assert router.correction_bias is not None
    router.correction_bias += 0.25
    tokens, mask = ragged(model.architecture, 2)
    after = model.routing(tokens, mask=mask)[-1]
    assert torch.equal(before.selected, after.selected)
    assert torch.equal(before.weights, after.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_precision_is_never_below_the_spec(dtype: torch.dtype) -> None:
    """Logits, scores and correction biases are float32 although the model may be bfloat16."""
    model = build(small("deepseek-v3"), dtype=dtype)
    tokens, _ = ragged(model.architecture, 1)
    trace = model.routing(tokens)[0]
    router = moe_of(model).router
    assert router.correction_bias is not None
    for tensor in (trace.logits, trace.scores, trace.weights, router.correction_bias):
        assert tensor.dtype == torch.float32
    assert trace.output.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MOE_CONTROLS)
def test_two_runs_are_equal_to_the_bit(name: str, dtype: torch.dtype) -> None:
    """The same seed gives the same weights, logits and gradients to the bit."""
    outcomes = []
    for _ in range(2):
        model = build(small(name), dtype=dtype, generator=generator(20))
        tokens, mask = ragged(model.architecture, 21)
        logits = model(tokens, mask=mask)
        outcomes.append((logits, model.gradients(logits[mask].float().square().mean())))
    (logits, gradients), (again, gradients_again) = outcomes
    assert torch.equal(logits, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@pytest.mark.parametrize("name", MOE_CONTROLS)
def test_token_order_does_not_matter_to_the_experts(name: str) -> None:
    """A MoE layer on permuted tokens is the permuted layer."""
    model = build(small(name), dtype=torch.float64, generator=generator(22))
    x = torch.randn(29, model.architecture.d_model, generator=generator(23), dtype=torch.float64)
    order = torch.randperm(29, generator=generator(24))
    real = torch.ones(29, dtype=torch.bool)
    with torch.no_grad():
        moe = moe_of(model)
        # float64 sums of other row blocks: rounding only
        assert relative(moe(x[order], real).output, moe(x, real).output[order]) < 1e-12
