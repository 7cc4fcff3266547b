"""Uniform random tensors that are not drawn until something is asked of them.

Each element stands for scale * u + shift, where u is uniform on [0, 1) and all that is known of it is the
interval that earlier answers have left. Comparing it with a number splits that interval: each answer has its
exact conditional probability, so that one u compared twice gives the right joint law. u is a real number
here: that it is a multiple of 2^-24 in float32 shifts a probability by at most 2^-24, and is left out.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

aten = torch.ops.aten

Handler = Callable[..., Any]
"""What one operator does to lazy numbers: called with the operator and its arguments."""


USED_TWICE = "a random number that decides a race of exponentials is used for something else too"


class NotEnumerable(RuntimeError):
    """The law of a program cannot be had by enumeration: what it does with a random number has no
    finite number of answers."""


@dataclass
class Uniforms:
    """What is known of every uniform number of one run, and who answers questions about it."""

    answer: Callable[[Sequence[float]], int]
    """Picks one of several answers of the given probabilities, by its index."""
    failed: Callable[[Exception], object]
    """Is told of every error, because an engine may catch it as the fault of one request."""
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    spent: set[int] = field(default_factory=set)
    """Numbers that became exponentials, of which no interval is known."""
    raced: set[int] = field(default_factory=set)
    """Those among them that have decided a race."""

    def fresh(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> LazyUniform:
        """A tensor of new uniform numbers on [0, 1)."""
        first, count = len(self.low), torch.Size(shape).numel()
        self.low += [0.0] * count
        self.high += [1.0] * count
        ids = torch.arange(first, first + count).reshape(tuple(shape))
        one = torch.ones(tuple(shape), dtype=torch.float64)
        return LazyUniform.made((ids, one, torch.zeros_like(one)), self, dtype, device)

    def below(self, index: int, threshold: float) -> bool:
        """Whether number `index` is below `threshold`: decided now, and remembered."""
        if index in self.spent:
            raise NotEnumerable(USED_TWICE)
        low, high = self.low[index], self.high[index]
        inside = min(max(threshold, low), high)
        yes = self.answer(((inside - low) / (high - low), (high - inside) / (high - low))) == 0
        if yes:
            self.high[index] = inside
        else:
            self.low[index] = inside
        return yes

    def spend(self, ids: Tensor) -> None:
        """These numbers become exponentials. Raises NotEnumerable where something is known of one."""
        for index in ids.flatten().tolist():
            if index in self.spent or (self.low[index], self.high[index]) != (0.0, 1.0):
                raise NotEnumerable(USED_TWICE)
            self.spent.add(index)

    def race(self, ids: Tensor) -> None:
        """These exponentials decide a race. Raises NotEnumerable where one decided another before."""
        numbers = ids.flatten().tolist()
        if len(set(numbers)) < len(numbers) or not self.raced.isdisjoint(numbers):
            raise NotEnumerable(USED_TWICE)
        self.raced.update(numbers)


class Lazy(Tensor):
    """Random numbers that are not drawn yet: float64 or integer tensors of its own shape say which, and
    what became of them."""

    parts: tuple[Tensor, ...]
    source: Uniforms
    kind: str
    """What the error messages call it."""
    handlers: ClassVar[Mapping[Any, Handler]] = {}
    """By operator; an operator that is absent raises NotEnumerable."""

    @classmethod
    def made(
        cls, parts: Sequence[Tensor], source: Uniforms, dtype: torch.dtype, device: torch.device
    ) -> Self:
        """A tensor of the shape of its parts."""
        wrap = torch.Tensor._make_wrapper_subclass  # noqa: SLF001
        made = wrap(cls, parts[0].shape, dtype=dtype, device=device)
        made.parts, made.source = tuple(parts), source
        return made

    def remade(
        self, parts: Sequence[Tensor], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Self:
        """The same kind of numbers with other parts, dtype or device."""
        return self.made(parts, self.source, dtype or self.dtype, device or self.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        del tensor_contents
        return f"{type(self).__name__}(shape={tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func is Tensor.item:
            return args[0].reshape(())
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        handler = cls.handlers.get(func.overloadpacket)
        try:
            if handler is None:
                raise unanswerable(func, cls)
            return handler(func, *args, **(kwargs or {}))
        except NotEnumerable as error:
            next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Lazy)).source.failed(error)
            raise


def unanswerable(func: Any, kind: type[Lazy]) -> NotEnumerable:
    """The error that names an operator."""
    return NotEnumerable(
        f"{func.overloadpacket.__name__} of {kind.kind} cannot be enumerated; compare a uniform random "
        "number with a threshold, take the argmax of a race, or draw by torch.multinomial"
    )


def _rearranged(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator that only moves elements about, on each of the parts."""
    leaves = [
        x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()
    ]
    first = next(x for x in leaves if isinstance(x, Lazy))
    if any(type(x) is not type(first) for x in leaves):
        raise unanswerable(func, type(first))
    results = []
    for which in range(len(first.parts)):

        def part(x: Any, which: int = which) -> Any:
            return x.parts[which] if isinstance(x, Lazy) else x

        results.append(func(*pytree.tree_map(part, args), **pytree.tree_map(part, kwargs)))
    if isinstance(results[0], Tensor):
        return first.remade(results)
    return type(results[0])(first.remade(parts) for parts in zip(*results, strict=True))


def _reshaped(_: Any, x: Lazy, size: Sequence[int], *__: Any) -> Lazy:
    return x.remade([part.reshape(list(size)) for part in x.parts])


def _copied(func: Any, x: Lazy, *_: Any, **kwargs: Any) -> Lazy:
    """To another dtype or device."""
    dtype = kwargs.get("dtype") or x.dtype
    if not dtype.is_floating_point:
        raise NotEnumerable(f"{func.overloadpacket.__name__}: {x.kind} became {dtype} before it was used")
    return x.remade(x.parts, dtype, kwargs.get("device"))


MOVES: Mapping[Any, Handler] = {
    **dict.fromkeys(
        (
            *(aten.alias, aten.cat, aten.clone, aten.detach, aten.expand, aten.flip, aten.gather, aten.index),
            *(aten.index_select, aten.permute, aten.repeat, aten.select, aten.slice, aten.split),
            *(aten.split_with_sizes, aten.squeeze, aten.stack, aten.t, aten.transpose, aten.unbind),
            aten.unsqueeze,
        ),
        _rearranged,
    ),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten._reshape_alias), _reshaped),  # noqa: SLF001
    aten._to_copy: _copied,  # noqa: SLF001
}
"""Operators that move elements and do not change them."""


def plain(func: Any, kind: type[Lazy], value: Any) -> Tensor:
    """A float64 tensor of a number or tensor that is not lazy. Raises NotEnumerable where it is."""
    if isinstance(value, Lazy):
        raise unanswerable(func, kind)
    return torch.as_tensor(value, dtype=torch.float64).detach().to("cpu")


class LazyUniform(Lazy):
    """Uniform numbers (see the module); its parts are the numbers' indices, scale and shift."""

    kind = "a uniform random number"


def _compared(func: Any, left: Any, right: Any) -> Tensor:
    """[...] bool: left < right and the like, each element decided in turn."""
    name = func.overloadpacket.__name__
    lazy, other, flipped = (left, right, False) if isinstance(left, LazyUniform) else (right, left, True)
    limits, *parts = torch.broadcast_tensors(plain(func, LazyUniform, other), *lazy.parts)
    wanted_below = (name in ("lt", "le")) != flipped
    answers = []
    for t, *numbers in zip(*(part.flatten().tolist() for part in (limits, *parts)), strict=True):
        index, scale, shift = numbers
        # scale u + shift < t is u < (t - shift) / scale, turned round where the scale is negative
        limit = (t - shift) / scale if scale else math.nan
        if scale == 0:
            answers.append(getattr(operator, name)(*((t, shift) if flipped else (shift, t))))
        elif math.isnan(limit):  # nothing compares with it
            answers.append(False)
        else:
            answers.append(lazy.source.below(index, limit) == (wanted_below == (scale > 0)))
    return torch.tensor(answers, dtype=torch.bool, device=lazy.device).reshape(limits.shape)


def _affine(func: Any, left: Any, right: Any, *, alpha: float = 1) -> LazyUniform:
    """Sums, differences, products and quotients with plain numbers."""
    name = func.overloadpacket.__name__
    if name == "rsub":
        name, left, right = "sub", right, left
    first = isinstance(left, LazyUniform)
    lazy: LazyUniform = left if first else right
    other = plain(func, LazyUniform, right if first else left)
    ids, scale, shift = lazy.parts
    if name in ("add", "sub"):
        sign = -1 if name == "sub" else 1
        of_lazy, of_other = (1, sign * alpha) if first else (sign * alpha, 1)
        scale, shift = of_lazy * scale, of_lazy * shift + of_other * other
    elif name == "mul" or first:
        factor = other if name == "mul" else 1 / other
        scale, shift = factor * scale, factor * shift
    else:
        raise unanswerable(func, LazyUniform)
    return lazy.remade(torch.broadcast_tensors(ids, scale, shift))


def _negated(_: Any, x: LazyUniform) -> LazyUniform:
    ids, scale, shift = x.parts
    return x.remade((ids, -scale, -shift))


def _searched(
    func: Any,
    boundaries: Any,
    values: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
) -> Tensor:
    """searchsorted, which is how many boundaries lie below (right: at or below) each value."""
    if isinstance(boundaries, Lazy):
        raise unanswerable(func, LazyUniform)
    wide = boundaries if boundaries.dim() == 1 else boundaries.unsqueeze(-2)
    value = values.unsqueeze(-1)
    found: Tensor = (wide <= value if right or side == "right" else wide < value).sum(-1)
    return found.int() if out_int32 else found


def _bucketed(func: Any, values: Any, boundaries: Any, **kwargs: Any) -> Tensor:
    return _searched(func, boundaries, values, **kwargs)


def _logarithm(func: Any, x: LazyUniform) -> Tensor:
    """-log(u) is exponential, the start of a race."""
    from harness.evidence.races import exponentials

    ids, scale, shift = x.parts
    if not (
        bool((scale == 1).all() and (shift == 0).all()) or bool((scale == -1).all() and (shift == 1).all())
    ):
        raise unanswerable(func, LazyUniform)
    return exponentials(x.source, ids.shape, x.dtype, x.device, ids).neg()


LazyUniform.handlers = {
    **MOVES,
    **dict.fromkeys((aten.lt, aten.le, aten.gt, aten.ge), _compared),
    **dict.fromkeys((aten.add, aten.sub, aten.rsub, aten.mul, aten.div), _affine),
    aten.neg: _negated,
    aten.searchsorted: _searched,
    aten.bucketize: _bucketed,
    aten.log: _logarithm,
}
