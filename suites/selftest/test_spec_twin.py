"""The shrunken twin: small, of the same kind, and without accidental symmetries."""

from collections.abc import Mapping
from typing import Any

import pytest

from harness.spec import Architecture, load, names, twin
from harness.theory import parameters

SIZES = {
    *(
        "d_model",
        "n_layers",
        "vocab_size",
        "max_positions",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "d_ff",
        "dim",
    ),
    *(
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_experts",
        "top_k",
    ),
    *("n_groups", "topk_groups", "first_dense", "window", "original_max_positions", "dtype"),
}
"""What a twin may change; all else is kept."""


def full(name: str) -> Architecture:
    """The architecture of a shipped spec, its unknowns put at the first of their values that fit."""
    spec = load(name)
    values: dict[str, Any] = {}
    for leaf in spec.unknowns:
        domain = leaf.domain
        assert domain is not None
        values[leaf.path] = domain.given(values.get(domain.of or ""))[-1]
    return spec.complete(values)


@pytest.fixture(params=names())
def pair(request: pytest.FixtureRequest) -> tuple[Architecture, Architecture]:
    """A shipped architecture and its twin."""
    architecture = full(request.param)
    return architecture, twin(architecture)


def kept(model: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every leaf of a dump that is no size, by path; a part that is absent is a leaf too."""
    found: dict[str, Any] = {}
    for key, value in model.items():
        if isinstance(value, Mapping):
            found |= kept(value, f"{prefix}{key}.")
        elif value is None or key not in SIZES:
            found[prefix + key] = value
    return found


def test_structure_is_kept(pair: tuple[Architecture, Architecture]) -> None:
    """Booleans, enumerations, factors and what is absent are the original's."""
    original, small = pair
    assert kept(small.model_dump()) == kept(original.model_dump())


def test_it_is_small(pair: tuple[Architecture, Architecture]) -> None:
    """Under a million parameters, in float32."""
    assert parameters.total(pair[1]) < 1_000_000
    assert pair[1].dtype == "float32"


def test_heads_stay_of_their_kind(pair: tuple[Architecture, Architecture]) -> None:
    """Multi-head, grouped or multi-query, and the query width against d_model as in the original."""

    def kind(a: Architecture) -> tuple[bool, bool, int]:
        width = a.attention.n_heads * a.attention.head_dim
        return (
            a.attention.n_kv_heads == a.attention.n_heads,
            a.attention.n_kv_heads == 1,
            (width > a.d_model) - (width < a.d_model),
        )

    original, small = pair
    assert kind(small) == kind(original)


def test_no_widths_coincide(pair: tuple[Architecture, Architecture]) -> None:
    """Widths that a transposed or swapped matrix would hide behind are all different."""
    small = pair[1]
    attention, mla = small.attention, small.attention.mla
    networks = [n for n in (small.ffn, small.moe and small.moe.expert, small.moe and small.moe.shared) if n]
    widths = [small.d_model, small.vocab_size, attention.head_dim, attention.n_heads]
    widths += [width for n in networks for width in (n.d_ff, 2 * n.d_ff)]
    if attention.n_kv_heads not in (1, attention.n_heads):
        widths += [attention.n_kv_heads * attention.head_dim]
    if mla is not None:
        widths += [mla.kv_lora_rank, mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim]
        widths += [mla.q_lora_rank] if mla.q_lora_rank is not None else []
        widths += [attention.n_heads * mla.v_head_dim, attention.n_heads * attention.head_dim]
    if small.moe is not None:
        widths += [small.moe.n_experts]
    assert sorted(widths) == sorted(set(widths))


def test_experts_are_many_and_uneven(pair: tuple[Architecture, Architecture]) -> None:
    """Twelve experts, two digits and no power of two; top_k is the original's up to three."""
    original, small = pair
    assert (original.moe is None) == (small.moe is None)
    if original.moe is not None and small.moe is not None:
        assert small.moe.n_experts == 12
        assert small.moe.top_k == min(original.moe.top_k, 3)
        assert (small.moe.router.n_groups > 1) == (original.moe.router.n_groups > 1)


def test_every_kind_of_layer_is_seen(pair: tuple[Architecture, Architecture]) -> None:
    """Dense and MoE layers, two of the latter, and window and full attention, as in the original."""

    def kinds(a: Architecture) -> tuple[set[bool], set[bool]]:
        layers = range(a.n_layers)
        return {a.is_moe_layer(i) for i in layers}, {a.is_window_layer(i) for i in layers}

    original, small = pair
    assert kinds(small) == kinds(original)
    assert small.n_layers >= 2
    assert small.moe is None or small.n_moe_layers >= 2


def changed(name: str, part: str, **values: Any) -> Architecture:
    """A shipped architecture with values of one part replaced."""
    dump = full(name).model_dump()
    table = dump
    for key in part.split("."):
        table = table[key]
    table.update(values)
    return Architecture.model_validate(dump)


def test_sizes_may_be_given() -> None:
    """n_experts, top_k, n_layers and vocab_size override the defaults."""
    small = twin(full("mixtral-8x7b"), n_experts=10, top_k=1, n_layers=5, vocab_size=17)
    assert small.moe is not None
    assert (small.moe.n_experts, small.moe.top_k, small.n_layers, small.vocab_size) == (10, 1, 5, 17)


def test_a_default_scale_is_dropped_and_another_kept() -> None:
    """1 / sqrt(head_dim) written out becomes absent; any other keeps its ratio to that."""
    assert twin(changed("mixtral-8x7b", "attention", scale=128**-0.5)).attention.scale is None
    scaled = twin(changed("mixtral-8x7b", "attention", scale=3 * 128**-0.5)).attention
    assert scaled.scale == pytest.approx(3 * scaled.head_dim**-0.5)


def test_partial_rotation_stays_partial_and_even() -> None:
    """Some of the dimensions are rotated, in pairs."""
    attention = twin(changed("mixtral-8x7b", "attention.rope", dim=32)).attention
    assert attention.rope is not None
    assert attention.rope.dim == attention.head_dim // 4


def test_interleaved_moe_layers_show_their_period() -> None:
    """A MoE layer every fourth one: two whole periods, after one dense layer."""
    original = changed("deepseek-v3", "moe", period=4, offset=3)
    assert [twin(original).is_moe_layer(i) for i in range(9)] == [i % 4 == 3 for i in range(9)]
    assert twin(original).n_layers == 9


def test_a_pattern_without_period_is_cut() -> None:
    """A pattern written out layer by layer keeps its kinds only."""
    written = ("window",) * 11 + ("full",)
    assert twin(changed("gpt-oss-20b", "attention", pattern=written)).attention.pattern == ("window", "full")
