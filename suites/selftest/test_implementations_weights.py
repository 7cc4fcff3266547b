"""The reference's weights inside the models of transformers: the same logits, and nothing left over."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from harness.implementations import Unsupported, resolve
from harness.reference import build
from harness.reference import weights as canonical
from harness.spec import load
from suites.selftest.controls import changed, small

pytest.importorskip("transformers")

from harness.implementations.transformers.export import EXPORTS, config, fields
from harness.implementations.transformers.weights import RULES, FamilyMap

SPECS = {
    "mixtral": "mixtral-8x7b",
    "qwen3_moe": "qwen3-30b-a3b",
    "olmoe": "olmoe-1b-7b",
    "gpt_oss": "gpt-oss-20b",
    "deepseek_v3": "deepseek-v3",
    "dbrx": "dbrx",
    "llama": "llama-3.1-70b",
    "gpt2": "gpt3-175b",
}
EXPERTS = [family for family in SPECS if family not in ("llama", "gpt2")]
ROUNDINGS = 8
"""How many times the reference's own float32 error another float32 program may be away: it rounds as often
(1), in another order (sums of independent roundings differ by sqrt 2 at best), and the largest of some
thousand differences is compared with the largest of as many others."""


@cache
def pair(family: str):
    """The twin, its weights, the model of transformers and the reference in float32 and float64."""
    architecture = small(SPECS[family])
    weights = canonical.draw(architecture, torch.Generator().manual_seed(1))
    theirs = resolve(f"transformers:{family}").build(architecture, device="cpu", dtype=torch.float32, seed=0)
    theirs.load_weights(weights)
    ours = {dtype: build(architecture, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    for model in ours.values():
        model.load_weights(weights)
    return architecture, weights, theirs, ours[torch.float32], ours[torch.float64]


def ragged(vocab_size: int):
    """Three sequences of 23, one with left and one with right padding, and their mask."""
    tokens = torch.randint(0, vocab_size, (3, 23), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 23, dtype=torch.bool)
    mask[1, :5] = False
    mask[2, -4:] = False
    return tokens, mask


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a.detach().double() - b.detach().double()).abs().max())


def test_every_family_has_both() -> None:
    """A family has an export if, and only if, it has a weight map, and all are tested here."""
    assert set(EXPORTS) == set(RULES) == set(SPECS)


@pytest.mark.parametrize("family", SPECS)
def test_every_tensor_is_mapped_to_the_bit(family: str) -> None:
    """Canonical weights come back from the other side unchanged, and no tensor of either side is left."""
    _, weights, theirs, _, _ = pair(family)
    back = theirs.weight_map.canonical(theirs.parameters())
    assert list(back) == list(weights)
    for name, tensor in weights.items():
        assert torch.equal(back[name], tensor.float()), name


@pytest.mark.parametrize("family", SPECS)
def test_logits_equal_the_reference(family: str) -> None:
    """With the same weights, logits differ from the float64 reference by no more than float32 explains."""
    _, _, theirs, ours, exact = pair(family)
    tokens, mask = ragged(theirs.vocab_size)
    with torch.no_grad():
        want = exact.forward(tokens, mask=mask)[mask]
        bound = ROUNDINGS * worst(ours.forward(tokens, mask=mask)[mask], want)
        assert worst(theirs.forward(tokens, mask=mask)[mask], want) < bound
        # The bound means something: it is far below the logits themselves.
        assert bound < 1e-2 * float(want.std())


@pytest.mark.parametrize("family", SPECS)
def test_a_cache_continues_the_reference(family: str) -> None:
    """Prefill of 9 and then 1 and 13 tokens gives what the reference gives in one pass, beyond the window."""
    _, _, theirs, ours, exact = pair(family)
    tokens, _ = ragged(theirs.vocab_size)
    cache, pieces = None, []
    for piece in tokens.split([9, 1, 13], dim=1):
        logits, cache = theirs.extend(piece, cache)
        pieces.append(logits)
    with torch.no_grad():
        want = exact.forward(tokens)
        bound = ROUNDINGS * worst(ours.forward(tokens), want)
    assert worst(torch.cat(pieces, dim=1), want) < bound


def test_a_cache_can_be_continued_twice() -> None:
    """Extending a cache leaves it as it was: the same continuation gives the same logits again."""
    _, _, theirs, _, _ = pair("gpt_oss")
    tokens, _ = ragged(theirs.vocab_size)
    _, cache = theirs.extend(tokens[:, :9], None)
    first, second = (theirs.extend(tokens[:, 9:], cache)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", EXPERTS)
def test_the_trace_equals_the_reference(family: str) -> None:
    """Stage by stage: hidden, logits, indices, weights and output of every MoE layer are the reference's."""
    _, _, theirs, ours, exact = pair(family)
    tokens, _ = ragged(theirs.vocab_size)
    compared = list(zip(theirs.routing(tokens), ours.routing(tokens), exact.routing(tokens), strict=True))
    for got, rounded, want in compared:
        assert got.layer == want.layer
        order, exact_order = got.indices.argsort(-1), want.indices.argsort(-1)
        assert torch.equal(got.indices.gather(-1, order), want.indices.gather(-1, exact_order))
        for stage in ("hidden", "logits", "output"):
            bound = ROUNDINGS * worst(getattr(rounded, stage), getattr(want, stage))
            assert worst(getattr(got, stage), getattr(want, stage)) < bound, stage
        weights, rounded_weights = (
            trace.weights.gather(-1, trace.indices.argsort(-1)) for trace in (got, rounded)
        )
        exact_weights = want.weights.gather(-1, exact_order)
        # Weights may happen to be exact in the reference: then one rounding of a number up to 2.5 is granted.
        bound = ROUNDINGS * max(worst(rounded_weights, exact_weights), 2.5 * 2**-23)
        assert worst(weights, exact_weights) < bound


@pytest.mark.parametrize("family", SPECS)
def test_gradients_come_by_canonical_name(family: str) -> None:
    """Gradients are unpacked like the weights themselves, and agree with the reference's."""
    _, _, theirs, ours, exact = pair(family)
    tokens, _ = ragged(theirs.vocab_size)
    theirs_, ours_, exact_ = (
        model.gradients(model.forward(tokens).square().mean()) for model in (theirs, ours, exact)
    )
    assert set(theirs_) == set(exact_)
    for name, want in exact_.items():
        if name.endswith("correction_bias"):
            assert not theirs_[name].any()
            continue
        # A gradient is a sum over all tokens: one element's share of the error scales with the tensor's.
        bound = ROUNDINGS * max(worst(ours_[name], want), 2**-23 * float(want.abs().max()))
        assert worst(theirs_[name], want) < bound, name
    assert set(theirs.router_names()) <= set(theirs_)


@pytest.mark.parametrize("family", EXPERTS)
def test_the_balance_loss_is_theirs(family: str) -> None:
    """The auxiliary loss is the one of the family's own code, over real tokens only, where it has one."""
    architecture, weights, theirs, _, _ = pair(family)
    if family == "deepseek_v3":
        assert "auxiliary_loss" not in theirs.capabilities
        with pytest.raises(Unsupported, match="no aux_loss"):
            theirs.auxiliary_loss(torch.zeros(1, 3, dtype=torch.long))
        return
    pooled = changed(architecture, auxiliary_loss={"balance": "huggingface"})
    exact = build(pooled, dtype=torch.float64)
    exact.load_weights(weights)
    tokens, mask = ragged(theirs.vocab_size)
    for given in (None, mask):
        want = float(exact.auxiliary_loss(tokens, mask=given)["balance"].detach())
        # Counts are integers and probabilities average over 60 tokens: some ten float32 roundings remain,
        # and the logits carry the error of the layers before.
        got = float(theirs.auxiliary_loss(tokens, mask=given)["balance"].detach())
        assert got == pytest.approx(want, rel=1e-4)


def test_another_convention_of_the_loss_is_not_declared() -> None:
    """An architecture whose balance loss is not the pooled one does not get it under that name."""
    switch = changed(small("mixtral-8x7b"), auxiliary_loss={"balance": "switch"})
    model = resolve("transformers:mixtral").build(switch, device="cpu", dtype=torch.float32, seed=0)
    assert "auxiliary_loss" not in model.capabilities


def test_wrong_weights_are_refused() -> None:
    """A missing, an unused and a misshapen tensor are each refused by name, and nothing is copied."""
    architecture, weights, _, _, _ = pair("mixtral")
    model = resolve("transformers:mixtral").build(architecture, device="cpu", dtype=torch.float32, seed=0)
    before = model.forward(torch.tensor([[1, 2]]))
    name = "layers.0.moe.experts.gate"
    with pytest.raises(KeyError, match=rf"missing among the canonical weights: {name}"):
        model.load_weights({k: v for k, v in weights.items() if k != name})
    with pytest.raises(KeyError, match=r"unused among the canonical weights: layers\.0\.attention\.sinks"):
        model.load_weights({**weights, "layers.0.attention.sinks": torch.zeros(6)})
    with pytest.raises(ValueError, match=f"{name} has shape"):
        model.load_weights({**weights, name: weights[name].mT})
    assert torch.equal(model.forward(torch.tensor([[1, 2]])), before)


def test_a_wrong_layout_would_show() -> None:
    """Gate and up swapped, the likeliest mistake of a map, is a thousand times beyond the bound."""
    _, weights, theirs, ours, exact = pair("mixtral")
    tokens, _ = ragged(theirs.vocab_size)
    with torch.no_grad():
        want = exact.forward(tokens)
        bound = ROUNDINGS * worst(ours.forward(tokens), want)
        swapped = dict(weights)
        for i in range(2):
            gate, up = f"layers.{i}.moe.experts.gate", f"layers.{i}.moe.experts.up"
            swapped[gate], swapped[up] = weights[up], weights[gate]
        theirs.load_weights(swapped)
        assert worst(theirs.forward(tokens), want) > 1000 * bound
        theirs.load_weights(weights)


REFUSED = {
    "mixtral": [
        ({"moe": {"router": {"score": "sigmoid"}}}, "moe.router.score = 'sigmoid'"),
        ({"moe": {"router": {"capacity_factor": 1.25}}}, "moe.router.capacity_factor = 1.25"),
        ({"moe": {"router": {"dtype": "float64"}}}, "moe.router.dtype = 'float64'"),
        ({"attention": {"sinks": True}}, "attention.sinks = True"),
        ({"attention": {"qk_norm": "head"}}, "attention.qk_norm = 'head'"),
        ({"norm": {"kind": "layernorm"}}, "norm.kind = 'layernorm'"),
    ],
    "qwen3_moe": [({"moe": {"expert": {"activation": "gelu"}}}, None)],
    "olmoe": [({"attention": {"head_dim": 20}}, "attention.head_dim = 20")],
    "gpt_oss": [({"attention": {"sinks": False}}, "attention.sinks = False")],
    "deepseek_v3": [
        ({"norm": {"eps": 1e-5}}, "norm.eps = 1e-05"),
        ({"moe": {"shared": {"d_ff": 61}}}, "moe.shared.d_ff"),
    ],
    "llama": [({"attention": {"qk_norm": "head"}}, "attention.qk_norm = 'head'")],
    "gpt2": [({"ffn": {"gated": True}}, "ffn.gated = True")],
    "dbrx": [({"norm": {"eps": 1e-6}}, "norm.eps = 1e-06")],
}


@pytest.mark.parametrize(
    ("family", "change", "reason"), [(f, c, r) for f, cases in REFUSED.items() for c, r in cases]
)
def test_what_a_family_cannot_express_is_refused(family: str, change, reason: str | None) -> None:
    """An architecture off the family's path is Unsupported by the name of the field; one on it is built."""
    architecture = changed(small(SPECS[family]), **change)
    if reason is None:
        config(architecture, family)
        return
    with pytest.raises(Unsupported) as caught:
        config(architecture, family)
    assert f"transformers:{family} cannot express" in str(caught.value)
    assert reason in str(caught.value)


def test_dense_and_sparse_families_are_told_apart() -> None:
    """A dense architecture cannot be a Mixtral, nor a sparse one a Llama, nor anything an unmapped family."""
    with pytest.raises(Unsupported, match="without experts"):
        fields(small("llama-3.1-70b"), "mixtral")
    with pytest.raises(Unsupported, match="it is a dense family"):
        fields(small("mixtral-8x7b"), "llama")
    with pytest.raises(Unsupported, match="no architecture can be exported to phimoe"):
        config(small("mixtral-8x7b"), "phimoe")


def test_a_tensor_without_a_place_is_refused() -> None:
    """A weight map that leaves a canonical tensor out is refused by that tensor's name."""
    sinks = changed(small("mixtral-8x7b"), attention={"sinks": True})
    with pytest.raises(Unsupported, match=r"no place for layers\.0\.attention\.sinks"):
        FamilyMap.of(sinks, "mixtral")


@pytest.mark.parametrize("family", SPECS)
def test_full_size_has_the_published_parameters(family: str) -> None:
    """Built on the meta device at full size, the family's code holds what the spec says, to the parameter."""
    from harness.theory import parameters

    architecture = load(SPECS[family]).architecture
    model = resolve(f"transformers:{family}").build(architecture, device="meta", dtype=torch.bfloat16, seed=0)
    assert all(tensor.is_meta for tensor in model.parameters().values())
    learned = {k: v for k, v in model.parameters().items() if not k.endswith("correction_bias")}
    assert sum(tensor.numel() for tensor in learned.values()) == parameters.total(architecture)
