"""Families of transformers under the Protocols, most of them without a line of code of their own."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.nn import functional

from harness.evidence.flops import count
from harness.implementations import Unsupported, resolve
from harness.spec import load
from harness.theory.flops import forward_total
from suites.selftest.controls import changed, small
from suites.selftest.test_implementations_weights import SPECS

pytest.importorskip("transformers")

from harness.implementations.transformers.library import PINNED, library

UNMAPPED = (
    "qwen2_moe",
    "phimoe",
    "granitemoe",
    "ernie4_5_moe",
    "glm4_moe",
    "minimax",
    "llama4_text",
    "jetmoe",
)
SPARSE = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "dbrx", *UNMAPPED)
BACKENDS = ("eager", "batched_mm", "grouped_mm")
SWITCHED = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3")
"""Mapped families with a choice of how experts run."""
LAYERS, E, K, D = 4, 8, 2, 64
"""Of the shrunken models."""


@cache
def model(family: str):
    """A family at its own shrunken size."""
    return resolve(f"transformers:{family}").build(None, device="cpu", dtype=torch.float32, seed=0)


def tokens(vocab_size: int) -> torch.Tensor:
    """Two sequences of 13."""
    return torch.randint(0, vocab_size, (2, 13), generator=torch.Generator().manual_seed(1))


def test_the_pinned_version_is_installed() -> None:
    """The adapters are tested against the version that the extra pins."""
    assert library().__version__ == PINNED


@pytest.mark.parametrize("family", SPARSE)
def test_a_family_shows_its_routing(family: str) -> None:
    """Every MoE layer has a trace of the right shapes, whose experts are the best of what was announced."""
    under_test = model(family)
    assert "routing" in under_test.capabilities
    traces = under_test.routing(tokens(under_test.vocab_size))
    layers = [trace.layer for trace in traces]
    assert layers in (list(range(LAYERS)), list(range(1, LAYERS)))
    for trace in traces:
        assert trace.indices.shape == trace.weights.shape == (26, K)
        assert trace.indices.dtype == torch.int64
        assert trace.logits.shape == (26, E)
        assert trace.hidden.shape == trace.output.shape == (26, D)
        assert (trace.indices[:, 0] != trace.indices[:, 1]).all()
        assert trace.weights.isfinite().all()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "granitemoe", "jetmoe"])
def test_the_trace_is_of_one_router(family: str) -> None:
    """Where selection is plain top-k, indices are that of the logits and weights sum to one."""
    under_test = model(family)
    for trace in under_test.routing(tokens(under_test.vocab_size)):
        assert torch.equal(trace.indices.sort(-1)[0], trace.logits.topk(K).indices.sort(-1)[0])
        # Two float32 weights: a rounding each.
        torch.testing.assert_close(trace.weights.sum(-1), torch.ones(26), atol=2**-22, rtol=0)


def test_hidden_times_router_is_logits() -> None:
    """The hidden state of the trace is what the router read, and the output what its block gave."""
    under_test = model("mixtral")
    parameters = under_test.parameters()
    for trace in under_test.routing(tokens(under_test.vocab_size)):
        at = f"model.layers.{trace.layer}.mlp"
        assert torch.equal(functional.linear(trace.hidden, parameters[f"{at}.gate.weight"]), trace.logits)
        block = under_test.module.get_submodule(at)
        assert torch.equal(block(trace.hidden[None])[0], trace.output)


@pytest.mark.parametrize("family", SPARSE)
def test_the_cache_continues(family: str) -> None:
    """Prefill and two continuations give the logits of one pass."""
    under_test = model(family)
    ids = tokens(under_test.vocab_size)
    with torch.no_grad():
        whole = under_test.forward(ids)
    held, pieces = None, []
    for piece in ids.split([7, 1, 5], dim=1):
        logits, held = under_test.extend(piece, held)
        pieces.append(logits)
    # Float32 through four layers with weights ten times the usual size; logits are of order one.
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("family", SPARSE)
def test_gradients_are_listed(family: str) -> None:
    """Every trainable parameter has a gradient entry, and each routing layer names its router."""
    under_test = model(family)
    gradients = under_test.gradients(under_test.forward(tokens(under_test.vocab_size)).square().mean())
    assert {n for n, p in under_test.module.named_parameters() if p.requires_grad} == set(gradients)
    routers = list(under_test.router_names())
    assert len(routers) == len(under_test.sites)
    assert all(gradients[name].shape == (E, D) for name in routers)


def test_a_seed_is_a_model() -> None:
    """Equal seeds give equal weights whatever was drawn before, and others differ."""
    family = resolve("transformers:mixtral")
    torch.rand(3)
    again = family.build(None, device="cpu", dtype=torch.float32, seed=0)
    other = family.build(None, device="cpu", dtype=torch.float32, seed=1)
    name = "model.layers.0.mlp.gate.weight"
    assert torch.equal(model("mixtral").parameters()[name], again.parameters()[name])
    assert not torch.equal(other.parameters()[name], again.parameters()[name])


def test_outputs_are_large_enough_to_judge() -> None:
    """At test size weights are drawn so that logits are of order one, not the usual thousandths."""
    with torch.no_grad():
        assert all(model(family).forward(torch.arange(9)[None]).std() > 0.5 for family in SPARSE)


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", BACKENDS)
def test_counted_flops_are_the_theory(family: str, attention: str, experts: str) -> None:
    """The FLOPs that a family executes are those of theory, to the FLOP, in every backend it has."""
    architecture = small(SPECS[family])
    implementation = resolve(f"transformers:{family},experts={experts},attention={attention}")
    lacking = (family == "gpt_oss" and attention == "sdpa") or (family not in SWITCHED and experts != "eager")
    if lacking:
        with pytest.raises(Unsupported, match=r"cannot be built|one way to run experts"):
            implementation.build(architecture, device="cpu", dtype=torch.float32, seed=0)
        return
    under_test = implementation.build(architecture, device="cpu", dtype=torch.float32, seed=0)
    ids = tokens(under_test.vocab_size)
    assert count(lambda: under_test.forward(ids)).total == forward_total(architecture, *ids.shape)


GIGAFLOP = {
    "mixtral": 26.57091584,
    "deepseek_v3": 83.483295744,
    "llama": 144.372137984,
    "gpt2": 358.791143424,
}
"""Forward 1e9 FLOP per token of Mixtral-8x7B, DeepSeek-V3, Llama-3.1-70B and GPT-3 at 2,048 tokens, every
query with every key: torch's FlopCounterMode over transformers 5.23.0 on meta, batched_mm experts."""


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", GIGAFLOP)
def test_full_size_counts_on_meta(family: str, experts: str) -> None:
    """At full size on the meta device the count is the published one, and theory's."""
    architecture = load(SPECS[family]).architecture
    if family not in SWITCHED:
        experts = "eager"
    under_test = resolve(f"transformers:{family},experts={experts}").build(
        architecture, device="meta", dtype=torch.bfloat16, seed=0
    )
    ids = torch.zeros(1, 2048, dtype=torch.long, device="meta")
    total = count(lambda: under_test.forward(ids)).total
    assert total == round(GIGAFLOP[family] * 1e9) * 2048
    assert total == forward_total(architecture, 1, 2048)


def test_what_needs_values_is_unsupported_on_meta() -> None:
    """Eager experts look at which tokens came: on meta that is Unsupported, not a crash."""
    under_test = resolve("transformers:mixtral").build(None, device="meta", dtype=torch.float32, seed=0)
    with pytest.raises(Unsupported, match="meta tensors have none"):
        under_test.forward(torch.zeros(1, 4, dtype=torch.long, device="meta"))


@pytest.mark.parametrize("family", SWITCHED)
def test_backends_agree(family: str) -> None:
    """The three ways to run experts give the same logits with the same weights."""
    ids = tokens(128)
    with torch.no_grad():
        eager, *others = (
            resolve(f"transformers:{family},experts={experts}")
            .build(None, device="cpu", dtype=torch.float32, seed=0)
            .forward(ids)
            for experts in BACKENDS
        )
    for other in others:
        # As in the cache's test: float32 through four layers of large weights.
        torch.testing.assert_close(other, eager, atol=5e-4, rtol=5e-4)


def test_float64_needs_eager_experts() -> None:
    """There is no float64 grouped product: that is said at once."""
    grouped = resolve("transformers:mixtral,experts=grouped_mm")
    with pytest.raises(Unsupported, match="no float64 kernel: say experts=eager"):
        grouped.build(None, device="cpu", dtype=torch.float64, seed=0)
    built = resolve("transformers:mixtral").build(None, device="cpu", dtype=torch.float64, seed=0)
    assert built.forward(torch.arange(5)[None]).dtype == torch.float64


def test_grouped_products_need_aligned_widths() -> None:
    """In bfloat16 the twin's odd expert width has no grouped product: said at once, by name and width."""
    grouped = resolve("transformers:mixtral,experts=grouped_mm")
    with pytest.raises(Unsupported, match=r"multiple of 16 bytes, and .*experts\.\w+ has a width of \d+"):
        grouped.build(small("mixtral-8x7b"), device="cpu", dtype=torch.bfloat16, seed=0)
    aligned = changed(small("mixtral-8x7b"), moe={"expert": {"d_ff": 64}})
    built = grouped.build(aligned, device="cpu", dtype=torch.bfloat16, seed=0)
    assert built.forward(torch.arange(5)[None]).isfinite().all()


def test_a_family_around_a_text_model_names_it() -> None:
    """A multimodal family is not built at full size by accident: the text model inside is named."""
    with pytest.raises(Unsupported, match="say transformers:gemma4_text"):
        resolve("transformers:gemma4").build(None, device="cpu", dtype=torch.float32, seed=0)


def test_a_dense_family_offers_no_routing() -> None:
    """What a family has no part of is not declared."""
    offered = model("llama").capabilities
    assert offered >= {"parameters", "forward", "gradients", "cache"}
    assert not offered & {"routing", "auxiliary_loss", "weights"}
