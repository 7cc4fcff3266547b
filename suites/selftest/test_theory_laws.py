"""Laws that theory obeys for every architecture, with brute force as the judge wherever it is possible."""

from __future__ import annotations

import itertools
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.reference import weights
from harness.spec import Architecture, load
from harness.spec.architecture import Attention, FeedForward, Mla, Moe, Norm, Rope, Router
from harness.theory import flops, memory, parameters, routing, training
from harness.theory.bounds import INCREASING

small = st.integers(1, 7)
flag = st.booleans()


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    """Multi-head, grouped, multi-query or latent attention, with every option that has parameters."""
    groups, shared = draw(small), draw(st.integers(1, 4))
    kinds: list[Literal["full", "window"]] = ["full", "window"]
    pattern = draw(st.lists(st.sampled_from(kinds), min_size=1))
    mla, head_dim, n_kv = None, 2 * draw(small), groups
    if draw(flag):
        nope, rope = draw(small), 2 * draw(small)
        mla = Mla(
            q_lora_rank=draw(st.none() | small),
            kv_lora_rank=draw(small),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=draw(small),
        )
        head_dim, n_kv = nope + rope, groups * shared
    return Attention(
        n_heads=groups * shared,
        n_kv_heads=n_kv,
        head_dim=head_dim,
        qkv_bias=draw(flag),
        o_bias=draw(flag),
        qk_norm="none" if mla else draw(st.sampled_from(("none", "head", "width"))),
        sinks=draw(flag),
        window=draw(small) if "window" in pattern else None,
        pattern=tuple(pattern),
        rope=Rope(),
        mla=mla,
    )


@st.composite
def feed_forwards(draw: st.DrawFn) -> FeedForward:
    """Dense or gated, with or without biases."""
    return FeedForward(d_ff=draw(small), gated=draw(flag), bias=draw(flag))


@st.composite
def mixtures(draw: st.DrawFn, layers: int) -> Moe:
    """Experts on at least one of `layers` layers."""
    experts, period = draw(small), draw(st.integers(1, layers))
    shared = draw(st.none() | feed_forwards())
    first_dense = draw(st.integers(0, layers - 1))
    routed = draw(st.integers(first_dense, layers - 1))
    return Moe(
        n_experts=experts,
        top_k=draw(st.integers(1, experts)),
        expert=draw(feed_forwards()),
        shared=shared,
        shared_gate=shared is not None and draw(flag),
        router=Router(score="sigmoid", bias=draw(flag), correction_bias=draw(flag)),
        first_dense=first_dense,
        period=period,
        offset=routed % period,
    )


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Any architecture a spec can state, small."""
    layers = draw(small)
    moe = draw(st.none() | mixtures(layers))
    all_routed = moe is not None and moe.first_dense == 0 and moe.period == 1
    return Architecture(
        d_model=draw(small),
        n_layers=layers,
        vocab_size=draw(small),
        max_positions=draw(small),
        tie_embeddings=draw(flag),
        norm=Norm(kind="layernorm", bias=draw(flag)),
        parallel_block=draw(flag),
        attention=draw(attentions()),
        ffn=None if all_routed else draw(feed_forwards()),
        moe=moe,
    )


def changed(part: Any, path: str, change: Callable[[Any], Any]) -> Any:
    """`part` with the leaf at a dotted path changed, unvalidated; itself where there is no such leaf."""
    if part is None:
        return None
    name, _, rest = path.partition(".")
    old = getattr(part, name)
    return part.model_copy(update={name: changed(old, rest, change) if rest else change(old)})


def counts(architecture: Architecture, seq: int = 5) -> dict[str, int]:
    """Everything that theory counts of an architecture, flat."""
    found = {f"total.{name}": parameters.total(architecture, name) for name in parameters.CONVENTIONS}
    found |= {f"active.{name}": parameters.active(architecture, name) for name in parameters.CONVENTIONS}
    found |= {f"all.{name}": n for name, n in parameters.by_component(architecture).items()}
    found |= {f"one.{name}": n for name, n in parameters.active_by_component(architecture).items()}
    found |= parameters.buffers(architecture)
    for attention, mla in itertools.product(get_args(flops.Pairs), get_args(flops.LatentAttention)):
        work = flops.forward_by_component(architecture, 2, seq, cached=3, attention=attention, mla=mla)
        found |= {f"{attention}.{mla}.{name}": n for name, n in work.items()}
        found[f"{attention}.{mla}.token"] = flops.forward_per_token(
            architecture, seq, attention=attention, mla=mla
        )
    for name in training.FLOP_CONVENTIONS:
        found[f"training.{name}"] = training.flops_per_token(architecture, seq, name)
    found["weights"] = memory.weight_bytes(architecture)
    found["expert"] = parameters.one_expert(architecture)
    for mla in get_args(memory.LatentCache):
        found[f"cache.{mla}"] = memory.kv_cache_bytes(architecture, seq, 2, mla=mla)
        found[f"cache.{mla}.token"] = memory.kv_cache_bytes_per_token(architecture, mla=mla)
    return found


@given(architectures())
def test_counts_are_exact_integers(architecture: Architecture) -> None:
    """Every count of an architecture is a Python int: no float, no bool, and not negative."""
    assert {name: n for name, n in counts(architecture).items() if type(n) is not int or n < 0} == {}


@given(architectures())
def test_components_add_up(architecture: Architecture) -> None:
    """Totals are the sums of their components, and nothing active exceeds the whole."""
    whole, active = parameters.by_component(architecture), parameters.active_by_component(architecture)
    assert parameters.total(architecture) == sum(whole.values())
    assert parameters.active(architecture) == sum(active.values())
    assert set(whole) == set(active) == set(parameters.COMPONENTS)
    assert all(active[name] <= whole[name] for name in whole)
    work = flops.forward_by_component(architecture, 2, 5)
    assert tuple(work) == flops.COMPONENTS
    assert flops.forward_total(architecture, 2, 5) == sum(work.values())


@given(architectures())
def test_totals_are_the_sizes_of_the_tensors(architecture: Architecture) -> None:
    """Parameters and buffers add up to the elements of all tensors that the reference would allocate."""
    tensors = weights.shapes(architecture)
    counted = parameters.total(architecture) + sum(parameters.buffers(architecture).values())
    assert counted == sum(map(math.prod, tensors.values()))


@given(architectures())
def test_conventions_nest(architecture: Architecture) -> None:
    """No convention counts more than all, and the experts' share is whole experts."""
    for count in (parameters.total, parameters.active):
        assert max(count(architecture, name) for name in parameters.CONVENTIONS) == count(architecture, "all")
    moe = architecture.moe
    experts = parameters.part(architecture, "experts")
    assert experts == (moe.n_experts * parameters.one_expert(architecture) if moe else 0)


@given(architectures())
def test_layers_are_counted_as_the_architecture_lists_them(architecture: Architecture) -> None:
    """The closed forms for MoE and window layers agree with a walk over the layers."""
    layers = range(architecture.n_layers)
    assert parameters.n_moe_layers(architecture) == sum(map(architecture.is_moe_layer, layers))
    assert flops.n_window_layers(architecture) == sum(map(architecture.is_window_layer, layers))
    # No layer is left where dense ones fill them all: a search over n_layers gets 0, nothing negative.
    one_layer = changed(architecture, "n_layers", lambda _: 1)
    assert parameters.n_moe_layers(one_layer) == one_layer.n_moe_layers


@given(architectures(), st.sampled_from(sorted(INCREASING)))
def test_counts_grow_with_every_dimension(architecture: Architecture, path: str) -> None:
    """One more of any dimension never lowers a count: what the bounds over unknowns rest on."""
    before = counts(architecture)
    after = counts(changed(architecture, path, lambda value: value + 1 if path[-5:] != "gated" else True))
    assert {name: (n, after[name]) for name, n in before.items() if after[name] < n} == {}


@given(architectures(), st.integers(1, 40))
def test_forward_flops_are_twice_the_matrices_and_an_attention_term(
    architecture: Architecture, context: int
) -> None:
    """A token costs 2 FLOP per matrix parameter it meets and 2 (h + v) per head, layer and key."""
    attention = architecture.attention
    value = attention.mla.v_head_dim if attention.mla else attention.head_dim
    products = architecture.n_layers * attention.n_heads * context * (attention.head_dim + value)
    expected = 2 * parameters.active(architecture, "matmul") + 2 * products
    assert flops.forward_per_token(architecture, context) == expected
    assert flops.forward_total(architecture, 3, context) == 3 * context * expected


@given(st.integers(0, 12), st.integers(0, 12), st.none() | st.integers(1, 9))
def test_admitted_pairs_are_those_of_the_mask(queries: int, cached: int, window: int | None) -> None:
    """The closed form for query-key pairs counts the ones of the mask, written out."""
    mask = [
        (query, key)
        for query in range(cached, cached + queries)
        for key in range(cached + queries)
        if key <= query and (window is None or query - key < window)
    ]
    assert flops.admitted_pairs(queries, cached, window) == len(mask)


@given(architectures(), st.integers(1, 12))
def test_causal_attention_is_half_and_half_the_diagonal(architecture: Architecture, seq: int) -> None:
    """Without windows causal attention costs (S + 1) / (2 S) of the full square, and all else the same."""
    attention = architecture.attention.model_copy(update={"window": None, "pattern": ("full",)})
    full_only = architecture.model_copy(update={"attention": attention})
    full = flops.forward_by_component(full_only, 2, seq)
    causal = flops.forward_by_component(full_only, 2, seq, attention="causal")
    for name in flops.COMPONENTS:
        pairs = name in ("attention.scores", "attention.values")
        assert causal[name] * (2 * seq if pairs else 1) == full[name] * (seq + 1 if pairs else 1)


@given(architectures(), st.integers(1, 9), st.integers(1, 9), st.sampled_from(("expanded", "absorbed")))
def test_a_pass_in_pieces_costs_the_whole(
    architecture: Architecture, first: int, rest: int, mla: flops.LatentAttention
) -> None:
    """A causal pass costs as much in one prefill, in two pieces, and token by token."""
    whole = flops.forward_total(architecture, 2, first + rest, attention="causal", mla=mla)
    pieces = flops.forward_total(architecture, 2, first, attention="causal", mla=mla)
    pieces += flops.forward_total(architecture, 2, rest, cached=first, attention="causal", mla=mla)
    steps = [
        flops.forward_per_token(architecture, context, attention="causal", mla=mla)
        for context in range(1, first + rest + 1)
    ]
    assert whole == pieces == 2 * sum(steps)


@given(architectures(), st.integers(1, 9), st.integers(0, 9))
def test_cached_tokens_cost_their_pairs_and_their_expansion(
    architecture: Architecture, seq: int, cached: int
) -> None:
    """S new tokens after C cached ones multiply their rows of the square; recomputed latents cost C more."""
    square = flops.forward_by_component(architecture, 2, cached + seq)
    rows = flops.forward_by_component(architecture, 2, seq, cached=cached)
    for name in ("attention.scores", "attention.values", "attention.projections"):
        assert rows[name] * (cached + seq) == square[name] * seq
    again = flops.forward_total(architecture, 2, seq, cached=cached, mla="recomputed") - sum(rows.values())
    mla = architecture.attention.mla
    width = architecture.attention.n_heads * (mla.qk_nope_head_dim + mla.v_head_dim) if mla else 0
    assert again == (2 * 2 * cached * architecture.n_layers * mla.kv_lora_rank * width if mla else 0)


@given(architectures(), st.integers(1, 9))
def test_last_logits_save_the_other_unembeddings(architecture: Architecture, seq: int) -> None:
    """With logits of the last token alone, S - 1 unembeddings of 2 D V FLOP per sequence are saved."""
    last = flops.forward_total(architecture, 3, seq, logits="last")
    unembedding = 2 * architecture.d_model * architecture.vocab_size
    assert flops.forward_total(architecture, 3, seq) - last == 3 * (seq - 1) * unembedding


@given(architectures(), st.integers(1, 40))
def test_the_cache_holds_what_each_layer_can_still_see(architecture: Architecture, seq: int) -> None:
    """Cache bytes are the sum over layers of min(S, window) tokens' keys and values."""
    attention = architecture.attention
    width = 2 * attention.n_kv_heads * attention.head_dim
    if attention.mla is not None:
        width = attention.mla.kv_lora_rank + attention.mla.qk_rope_head_dim
    kept = [
        min(seq, attention.window) if attention.window and architecture.is_window_layer(i) else seq
        for i in range(architecture.n_layers)
    ]
    assert memory.kv_cache_bytes(architecture, seq, 2, "float32") == 2 * 4 * width * sum(kept)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-20b", "qwen3-30b-a3b"])
def test_arrays_are_evaluated_elementwise(name: str) -> None:
    """Float arrays in place of dimensions give, element by element, the integers of each completion."""
    spec = load(name)
    grid: dict[str, list[int]] = {
        "d_model": [1024, 10752],
        "n_layers": [7, 120],
        "vocab_size": [100352],
        "attention.n_heads": [96, 128],
        "moe.n_experts": [16, 64],
        "moe.top_k": [2, 3],
        "moe.expert.d_ff": [4096],
        "moe.expert.gated": [0, 1],
    }
    if name != "deepseek-v3":  # its heads come from the latents
        grid |= {"attention.n_kv_heads": [1, 8], "attention.head_dim": [64, 112]}
    points = list(itertools.product(*grid.values()))
    columns = np.array(points, dtype=np.float64).T
    together = counts(spec.vectorised(dict(zip(grid, columns, strict=True))), seq=2048)
    for i, point in enumerate(points):
        one = counts(spec.vectorised(dict(zip(grid, point, strict=True))), seq=2048)
        for key, expected in one.items():
            found = np.broadcast_to(together[key], len(points))[i]
            assert type(expected) is int
            # Below 2**53 float64 arithmetic on integers is exact.
            assert expected < 2**53, key
            assert found == expected, key


def switch_loss(choices: list[tuple[int, ...]], p: list[list[float]]) -> float:
    """E sum_i f_i P_i with f_i = c_i / (T K), written out."""
    experts, tokens, k = len(p[0]), len(p), len(choices[0])
    load = [sum(i in chosen for chosen in choices) / (tokens * k) for i in range(experts)]
    mean = [sum(row[i] for row in p) / tokens for i in range(experts)]
    return experts * sum(f * q for f, q in zip(load, mean, strict=True))


def test_balance_loss_at_its_landmarks() -> None:
    """The Switch balance loss is 1 at equal loads, E / K at collapse, and may fall below 1 between."""
    uneven = [[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]]
    # Rounding of a few double-precision sums of numbers near 1.
    close = pytest.approx
    uniform, collapse = routing.balance_loss_at_uniform, routing.balance_loss_at_collapse
    assert switch_loss([(0, 1), (2, 3)], uneven) == close(uniform(2, "switch"), rel=1e-12)
    collapsed = [[0.6, 0.4, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]
    assert switch_loss([(0, 1), (0, 1)], collapsed) == close(collapse(4, 2, "switch"), rel=1e-12)
    below = switch_loss([(0,), (0,), (0,), (1,)], [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.0, 1.0]])
    assert below == close(7 / 8, rel=1e-12)
    assert uniform(2, "huggingface") == 2 * uniform(2, "switch")  # f without the division by K
    assert collapse(4, 2, "huggingface") == 2 * collapse(4, 2, "switch")


@given(st.integers(1, 5), st.data(), st.integers(1, 3))
def test_distinct_experts_equal_the_enumeration(experts: int, data: st.DataObject, tokens: int) -> None:
    """Expected distinct experts are the mean over all equally likely choices of K of E by T tokens."""
    k = data.draw(st.integers(1, experts))
    choices = list(itertools.combinations(range(experts), k))
    runs = list(itertools.product(choices, repeat=tokens))
    mean = sum(len(set().union(*run)) for run in runs) / len(runs)
    # Rounding of a mean of at most 1,000 small integers.
    assert routing.expected_distinct_experts(experts, k, tokens) == pytest.approx(mean, rel=1e-12)


def test_theory_needs_no_torch_and_loads_fast() -> None:
    """Importing all of theory loads no torch, and costs under 0.4 s of processor time."""
    code = (
        "import sys, harness.theory.describe, harness.theory.serving, harness.theory.routing\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    seconds = []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(3):  # the first one may have to compile
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # A cold describe has to answer within 1 s; half of that is the interpreter, output and reserve.
    assert min(seconds) < 0.4
