"""FLOPs that a piece of PyTorch really executed: two for each multiply-add of a contraction.

Letters: B batch, H query heads, S queries, T keys, d query/key head width, v value head width, G groups,
M, K, N sizes of one matrix product [M, K] @ [K, N].

torch.utils.flop_counter has no formula for `aten._grouped_mm` nor for the flash attention kernel of the
CPU, so it silently counts them as nothing. Here every contraction has a formula, and an operator that
looks like one and has none is reported in `unknown`, never dropped.

Conventions. Element-wise work, reductions, sorts and gathers count nothing. Attention counts every
query-key pair that the operator was given, whether or not a causal flag lets the kernel skip half of
them. A grouped product counts the rows it was given. Nothing depends on values, so a model on the meta
device counts like a real one, in any mix of dtypes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

Formula = Callable[..., int]

POSITION_TABLES = ("RotaryEmbedding",)
"""Endings of class names whose FLOPs are not the model's: they tabulate cos and sin of the positions (an
outer product with the inverse frequencies, done as a matmul by some models), which may be precomputed."""

_LOOKS_LIKE_A_CONTRACTION = re.compile(
    r"(mm|mv|dot|matmul|linear|bilinear|einsum|conv\dd|convolution|attention|lstm|gru|rnn_\w+)(_|$)"
)


def product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """[..., M, K] @ [..., K, N], or [K, N] a vector [K]: 2 M K N for each of the batch."""
    return 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


def added_product(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
    """addmm, baddbmm, addmv: the product alone, since adding the first argument is element-wise."""
    return product(a, b)


def linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """[..., K] @ [N, K] transposed: 2 K N for each row."""
    return 2 * x.numel() * weight.shape[0]


def grouped_product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """The grouped product, in each of its four forms.

    [M, K] with [G, K, N] (rows split among the groups), [G, M, K] with [K, N] (columns split) and [M, K]
    with [K, N] (the inner dimension split: the gradient of the weights) hold 2 M K N together whatever the
    split, [G, M, K] with [G, K, N] holds 2 G M K N.
    """
    if a.dim() == 3 and b.dim() == 3:
        return product(a, b)
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def grouped_product_backward(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
    """The gradients of both operands of `grouped_product`: twice the forward."""
    return 2 * grouped_product(a, b)


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """query [B, H, S, d], key [B, *, T, d], value [B, *, T, v]: 2 B H S T (d + v)."""
    pairs = prod(query.shape[:-1]) * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> int:
    """Scores again, then four products: 2 B H S T (3 d + 2 v) (Dao et al. 2022, arXiv 2205.14135, alg. 4)."""
    pairs = prod(query.shape[:-1]) * key.shape[-2]
    return 2 * pairs * (3 * query.shape[-1] + 2 * value.shape[-1])


def convolution(x: Tensor, weight: Tensor, *rest: Any, **__: Any) -> int:
    """2 per output element and weight that touches it; the output's size is worked out on meta."""
    transposed = bool(rest[4]) if len(rest) > 4 else False
    if transposed:
        return 2 * x.numel() * prod(weight.shape[1:])
    out = torch.ops.aten.convolution(x.to("meta"), weight.to("meta"), None, *rest[1:])
    return 2 * int(out.numel()) * prod(weight.shape[1:])


FORMULAS: Mapping[str, Formula] = {
    "aten.mm": product,
    "aten.bmm": product,
    "aten.mv": product,
    "aten.dot": product,
    "aten.vdot": product,
    "aten.addmm": added_product,
    "aten._addmm_activation": added_product,
    "aten.baddbmm": added_product,
    "aten.addmv": added_product,
    "aten.linear": linear,
    "aten.mkldnn_linear": linear,
    "aten._scaled_mm": product,
    "aten._grouped_mm": grouped_product,
    "aten._scaled_grouped_mm": grouped_product,
    "transformers.grouped_mm_fallback": grouped_product,
    "transformers.grouped_mm_fallback_backward": grouped_product_backward,
    "aten.convolution": convolution,
    **{
        f"aten._scaled_dot_product_{kernel}": attention
        for kernel in (
            "flash_attention",
            "flash_attention_for_cpu",
            "efficient_attention",
            "cudnn_attention",
            "fused_attention_overrideable",
        )
    },
    **{
        f"aten._scaled_dot_product_{kernel}_backward": attention_backward
        for kernel in (
            "flash_attention",
            "flash_attention_for_cpu",
            "efficient_attention",
            "cudnn_attention",
            "fused_attention_overrideable",
        )
    },
}
"""What each operator costs, by the name of its packet; called with the operator's own arguments."""


class FlopCounter(TorchDispatchMode):
    """A context that counts: `with FlopCounter() as counter: model(x)`, then `counter.total`.

    exclude: endings of module class names; what runs inside such a module goes to `excluded` instead.
    by_module is keyed by the class name of the innermost nn.Module ("" outside any); the hooks that tell
    it do not see a backward pass, so gradients are counted under "".
    """

    def __init__(self, exclude: Sequence[str] = POSITION_TABLES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.exclude = tuple(exclude)
        self.by_operator: Counter[str] = Counter()
        self.by_module: Counter[str] = Counter()
        self.excluded = 0
        self.unknown: Counter[str] = Counter()
        """Operators that look like a contraction and have no formula: their calls. Not empty: the total is a
        lower bound, and nothing more."""
        self._stack: list[str] = []
        self._handles: list[RemovableHandle] = []

    @property
    def total(self) -> int:
        """FLOPs counted so far, without the excluded ones."""
        return sum(self.by_operator.values())

    def __enter__(self) -> Self:
        def enter(module: nn.Module, _: Any) -> None:
            self._stack.append(type(module).__name__)

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            self._stack.pop()

        self._handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc, traceback)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._stack.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        formula = FORMULAS.get(name)
        if formula is None:
            # In inference mode composite operators arrive whole: take them apart and count the parts.
            super().__enter__()  # type: ignore[no-untyped-call]
            try:
                parts = func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if parts is not NotImplemented:
                return parts
            bare = name.rpartition(".")[2].removesuffix("_backward")
            if _LOOKS_LIKE_A_CONTRACTION.search(bare):
                self.unknown[name] += 1
            return func(*args, **kwargs)
        self._add(name, int(formula(*args, **kwargs)))
        return func(*args, **kwargs)

    def _add(self, operator: str, flops: int) -> None:
        if any(name.endswith(self.exclude) for name in self._stack):
            self.excluded += flops
            return
        self.by_operator[operator] += flops
        self.by_module[self._stack[-1] if self._stack else ""] += flops


def count(call: Callable[[], Any], *, exclude: Sequence[str] = POSITION_TABLES) -> FlopCounter:
    """Run `call` without gradients and return the counter of what it executed.

    Raises RuntimeError if it ran a contraction that has no formula: a count that is too small is worse
    than none.
    """
    with torch.no_grad(), FlopCounter(exclude) as counter:
        call()
    if counter.unknown:
        listed = ", ".join(sorted(counter.unknown))
        raise RuntimeError(f"no FLOP formula for {listed}: add one to harness.evidence.flops.FORMULAS")
    return counter
