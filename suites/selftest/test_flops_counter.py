"""The FLOP counter: every contraction, in every backend, on every device."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from harness.evidence.flops import FORMULAS, FlopCounter, count

M, K, N, G = 6, 10, 14, 3


def of(call) -> int:
    """FLOPs of a call."""
    return count(call).total


def tensor(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ones: counts do not depend on values."""
    return torch.ones(shape, device=device, dtype=dtype)


PRODUCTS = {
    "mm": (lambda d: tensor(M, K, device=d) @ tensor(K, N, device=d), 2 * M * K * N),
    "mv": (lambda d: tensor(M, K, device=d) @ tensor(K, device=d), 2 * M * K),
    "dot": (lambda d: tensor(K, device=d) @ tensor(K, device=d), 2 * K),
    "bmm": (lambda d: tensor(G, M, K, device=d) @ tensor(G, K, N, device=d), 2 * G * M * K * N),
    "addmm": (
        lambda d: torch.addmm(tensor(N, device=d), tensor(M, K, device=d), tensor(K, N, device=d)),
        2 * M * K * N,
    ),
    "baddbmm": (
        lambda d: torch.baddbmm(
            tensor(G, M, N, device=d), tensor(G, M, K, device=d), tensor(G, K, N, device=d)
        ),
        2 * G * M * K * N,
    ),
    "linear": (
        lambda d: functional.linear(tensor(2, M, K, device=d), tensor(N, K, device=d), tensor(N, device=d)),
        2 * 2 * M * K * N,
    ),
    "einsum": (
        lambda d: torch.einsum("gmk,gkn->gmn", tensor(G, M, K, device=d), tensor(G, K, N, device=d)),
        2 * G * M * K * N,
    ),
    "conv1d": (
        lambda d: functional.conv1d(
            tensor(2, 4, 9, device=d), tensor(6, 2, 3, device=d), padding=1, groups=2
        ),
        2 * (2 * 6 * 9) * (2 * 3),
    ),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_count_two_per_multiply_add(name: str, device: str) -> None:
    """Every matrix product counts 2 M K N, on real and on meta tensors alike."""
    call, expected = PRODUCTS[name]
    assert of(lambda: call(device)) == expected


@pytest.mark.parametrize("name", PRODUCTS)
def test_inference_mode_counts_the_same(name: str) -> None:
    """Composite operators that inference mode leaves whole are taken apart, not missed or counted twice."""
    call, expected = PRODUCTS[name]
    with torch.inference_mode():
        assert of(lambda: call("cpu")) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_count(dtype: torch.dtype) -> None:
    """torch's own counter sees nothing in a grouped product; ours counts 2 M K N over all groups."""
    # Strides of grouped operands must be multiples of 16 bytes.
    rows, inner, columns = 12, 16, 24
    x, w = tensor(rows, inner, dtype=dtype), tensor(G, inner, columns, dtype=dtype)
    offsets = torch.tensor([5, 5, rows], dtype=torch.int32)

    def call() -> torch.Tensor:
        return functional.grouped_mm(x, w, offs=offsets)

    assert of(call) == 2 * rows * inner * columns
    with FlopCounterMode(display=False) as theirs:
        call()
    assert theirs.get_total_flops() == 0, "torch counts grouped products by now: its formula can be compared"


def test_gradients_of_grouped_products_count() -> None:
    """Forward and backward of a grouped product are three products of the same size."""
    x = tensor(12, 16).requires_grad_()
    w = tensor(G, 16, 24).requires_grad_()
    with FlopCounter() as counter:
        functional.grouped_mm(
            x, w, offs=torch.tensor([5, 8, 12], dtype=torch.int32)
        ).square().sum().backward()
    assert not counter.unknown
    assert counter.total == 3 * 2 * 12 * 16 * 24


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_the_cpu_counts_all_pairs(causal: bool) -> None:
    """The CPU's fused attention counts 2 B H S T (d + v) as the two products of eager attention do."""
    batch, heads, queries, keys, width = 2, 4, 7, 7, 8
    q, k = tensor(batch, heads, queries, width), tensor(batch, heads, keys, width)
    counter = count(lambda: functional.scaled_dot_product_attention(q, k, k, is_causal=causal))
    assert set(counter.by_operator) == {"aten._scaled_dot_product_flash_attention_for_cpu"}
    assert counter.total == of(lambda: (q @ k.mT).softmax(-1) @ k) == 2 * batch * heads * queries * keys * 16


def test_gradients_of_attention_count_five_products() -> None:
    """The backward pass of fused attention computes the scores again and then four products."""
    q, k, v = (tensor(2, 4, 7, 8).requires_grad_() for _ in range(3))
    with FlopCounter() as counter:
        functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert counter.total == (2 + 5) * 2 * (2 * 4 * 7 * 7) * 8


def test_an_unknown_contraction_is_refused() -> None:
    """An operator that contracts and has no formula makes count() fail by its name."""
    with pytest.raises(RuntimeError, match=r"no FLOP formula for aten\.addbmm"):
        count(lambda: torch.ops.aten.addbmm(tensor(M, N), tensor(G, M, K), tensor(G, K, N)))


def test_every_formula_names_an_operator() -> None:
    """Each operator with a formula exists in this torch, but for the one that transformers registers."""
    for name in FORMULAS:
        namespace, _, operator = name.partition(".")
        assert namespace == "transformers" or hasattr(torch.ops.aten, operator), name


class TableRotaryEmbedding(nn.Module):
    """Angles of positions as a matrix product, as some models compute them."""

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """[S] to [S, 4]."""
        return positions[:, None] @ torch.ones(1, 4)


class Rotating(nn.Module):
    """A layer that needs such a table."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = TableRotaryEmbedding()
        self.project = nn.Linear(K, N, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[S, K] to [S, N]."""
        self.rotary(torch.arange(float(len(x))))
        return self.project(x)


def test_position_tables_are_told_apart() -> None:
    """What a *RotaryEmbedding multiplies is reported as excluded, and counted if that is asked for."""
    model = Rotating()
    counter = count(lambda: model(tensor(M, K)))
    assert (counter.total, counter.excluded) == (2 * M * K * N, 2 * M * 4)
    assert counter.by_module == {"Linear": counter.total}
    everything = count(lambda: model(tensor(M, K)), exclude=())
    assert everything.total == counter.total + counter.excluded


def test_a_failing_call_leaves_no_hooks_behind() -> None:
    """After an exception inside the context the next count starts clean."""
    with pytest.raises(RuntimeError), FlopCounter():
        Rotating()(tensor(M, K + 1))
    assert count(lambda: Rotating()(tensor(M, K))).by_module == {"Linear": 2 * M * K * N}
