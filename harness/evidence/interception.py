"""Random draws of torch, answered by a tape instead of a generator.

Letters: B rows, V categories.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from harness.evidence.lazy import Lazy, NotEnumerable, Uniforms
from harness.evidence.races import exponentials
from harness.evidence.tape import Tape, Undetermined

OVERLAPPING = "random numbers that fill a view of a tensor, or are seen through one, cannot be enumerated"

_ONE_AT_A_TIME = threading.RLock()
"""Held while functions of torch are replaced."""


class Unwatched(BaseException):
    """The run must be repeated with every operator watched. No engine may catch it."""


@dataclass
class Interception(TorchFunctionMode):
    """The draws of one run, answered by a tape.

    Draws that are looked up in the module torch are intercepted in any run (`replacing`), at no cost. Where
    this is entered as a context, every operator of the thread is watched besides, which takes longer than a
    tiny model: then draws under other names, by methods of tensors and in place are seen too.
    """

    tape: Tape
    watching: bool
    needed: bool = False
    """Watching has seen what would have been missed without."""
    uniforms: Uniforms = field(init=False)
    filled: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By id: a tensor that was filled in place, and the lazy numbers that stand for it."""
    storages: set[int] = field(default_factory=set)
    """The memory of those tensors."""

    def __post_init__(self) -> None:
        super().__init__()
        self.uniforms = Uniforms(self.tape.answer, self.tape.failed)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        draw = _DRAWS.get(func)
        if draw is not None:
            self.needed = True
            return self.drawn(draw, args, kwargs or {})
        if not self.filled:
            return func(*args, **(kwargs or {}))
        return self.drawn(partial(Interception.substituted, func=func), (args, kwargs or {}), {})

    def drawn(self, draw: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The answer of one of the methods below, whose errors are remembered."""
        try:
            return draw(self, *args, **kwargs)
        except (NotEnumerable, Undetermined) as error:
            self.tape.failed(error)
            raise

    def substituted(self, args: Sequence[Any], kwargs: dict[str, Any], *, func: Any) -> Any:
        """Call `func` with lazy numbers in place of the tensors that were filled with them."""
        target = args[0] if args else None
        args, kwargs = pytree.tree_map_only(Tensor, self.meant, (tuple(args), kwargs))
        name = getattr(func, "__name__", "")
        if name.endswith("__") or not name.endswith("_") or not any(isinstance(x, Lazy) for x in args):
            return func(*args, **kwargs)
        elsewhere = getattr(Tensor, name[:-1], None)
        result = None if elsewhere is None else elsewhere(*args, **kwargs)
        if not isinstance(target, Tensor) or not isinstance(result, Lazy):
            raise NotEnumerable(f"{name} of random numbers that fill a tensor cannot be enumerated")
        return self.fill(target, result)

    def meant(self, x: Tensor) -> Tensor:
        """What a tensor stands for: itself, or the numbers that it was filled with."""
        if id(x) in self.filled:
            return self.filled[id(x)][1]
        if not isinstance(x, Lazy) and x.untyped_storage().data_ptr() in self.storages:
            raise NotEnumerable(OVERLAPPING)
        return x

    def exponential_(self, held: Tensor, lambd: float = 1, **_: Any) -> Tensor:
        """Fill a tensor with exponential numbers that are not drawn yet."""
        return self.fill(held, exponentials(self.uniforms, held.shape, held.dtype, held.device) / lambd)

    def uniform_(self, held: Tensor, low: float = 0, high: float = 1, **_: Any) -> Tensor:
        """Fill a tensor with uniform numbers that are not drawn yet."""
        fresh = self.uniforms.fresh(held.shape, held.dtype, held.device)
        return self.fill(held, fresh * (high - low) + low)

    def fill(self, held: Tensor, numbers: Tensor) -> Tensor:
        """From now on `numbers` stand for `held`, which is returned as torch returns it."""
        if not self.watching:
            raise Unwatched
        self.needed = True
        if isinstance(held, Lazy) or held._is_view():  # noqa: SLF001
            raise NotEnumerable(OVERLAPPING)
        self.filled[id(held)] = (held, numbers)
        if held.numel():
            self.storages.add(held.untyped_storage().data_ptr())
        return held

    def multinomial(
        self, weights: Tensor, num_samples: int, replacement: bool = False, **kwargs: Any
    ) -> Tensor:
        """[B, num_samples] or [num_samples] categories; each is one draw, rows in order.

        Without replacement the categories are drawn one after the other from those that are left, which is
        the law of torch's own kernel (the order of an exponential race).
        """
        held = self.meant(weights).detach().to("cpu", torch.float64)
        # what torch refuses (negative, infinite, no mass, wrong shape) is refused in its own words
        held.multinomial(num_samples, replacement, generator=torch.Generator())
        chosen = []
        for row in held.reshape(-1, held.shape[-1]).tolist():
            if not replacement and num_samples > sum(w > 0 for w in row):
                raise NotEnumerable(
                    "multinomial without replacement asks for more categories than are possible"
                )
            for _ in range(num_samples):
                chosen.append(self.tape.answer(row))
                if not replacement:
                    row[chosen[-1]] = 0.0
        out = torch.tensor(chosen, dtype=torch.long, device=weights.device)
        return _placed(out.reshape((*held.shape[:-1], num_samples)), kwargs)

    def bernoulli(self, probabilities: Tensor, **kwargs: Any) -> Tensor:
        """Ones and zeros of the shape and dtype of `probabilities`."""
        held = self.meant(probabilities).detach().to("cpu", torch.float64)
        held.bernoulli(generator=torch.Generator())
        drawn = [1 - self.tape.answer((p, 1 - p)) for p in held.flatten().tolist()]
        like = torch.tensor(drawn, dtype=probabilities.dtype, device=probabilities.device)
        return _placed(like.reshape(probabilities.shape), kwargs)

    def rand(self, *size: Any, **kwargs: Any) -> Tensor:
        """Uniform numbers that are not drawn yet."""
        shaped = {k: v for k, v in kwargs.items() if k in ("size", "dtype")}
        _unplaced("rand", kwargs)
        like = torch.empty(*size, **shaped, device="meta")
        device = torch.device(kwargs.get("device") or torch.get_default_device())
        return self.uniforms.fresh(like.shape, like.dtype, device)

    def rand_like(self, like: Tensor, **kwargs: Any) -> Tensor:
        """Uniform numbers that are not drawn yet, of a tensor's shape."""
        dtype = kwargs.get("dtype") or like.dtype
        return self.uniforms.fresh(like.shape, dtype, torch.device(kwargs.get("device") or like.device))


def _placed(result: Tensor, kwargs: dict[str, Any]) -> Tensor:
    out = kwargs.get("out")
    return result if out is None else out.resize_(result.shape).copy_(result)


def _unplaced(name: str, kwargs: dict[str, Any]) -> None:
    if kwargs.get("out") is not None:
        raise NotEnumerable(f"{name} into a tensor (out=) cannot be enumerated; let it return a new one")


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotEnumerable(
            f"{name} cannot be enumerated; draw by torch.multinomial, bernoulli, rand or rand_like"
        )

    return refuse


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: _refusal(name)
        for name in ("normal", "poisson", "randint", "randint_like", "randn", "randn_like", "randperm")
    },
    "multinomial": Interception.multinomial,
    "bernoulli": Interception.bernoulli,
    "rand": Interception.rand,
    "rand_like": Interception.rand_like,
}
"""Draws by their names in torch. Those that are refused have too many answers."""

_METHODS: dict[str, Callable[..., Any]] = {
    **{
        name: _refusal(name)
        for name in ("bernoulli_", "cauchy_", "geometric_", "log_normal_", "normal_", "random_")
    },
    "multinomial": Interception.multinomial,
    "bernoulli": Interception.bernoulli,
    "exponential_": Interception.exponential_,
    "uniform_": Interception.uniform_,
}

_DRAWS: dict[Any, Callable[..., Any]] = {
    **{getattr(torch, name): draw for name, draw in _FUNCTIONS.items()},
    **{getattr(Tensor, name): draw for name, draw in _METHODS.items()},
    nn.functional.gumbel_softmax: _refusal("gumbel_softmax"),
}


@contextmanager
def replacing(current: Callable[[], Interception]) -> Iterator[None]:
    """Within the context, in this thread, the draws of the module torch go to the interception of the run."""
    thread = threading.get_ident()

    def replacement(draw: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        def answered(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return original(*args, **kwargs)
            # what answers a draw is not watched, as it is not where watching itself sees the draw
            with torch._C.DisableTorchFunction():  # noqa: SLF001
                return current().drawn(draw, args, kwargs)

        return answered

    with _ONE_AT_A_TIME:
        originals = {name: getattr(torch, name) for name in _FUNCTIONS}
        try:
            for name, original in originals.items():
                setattr(torch, name, replacement(_FUNCTIONS[name], original))
            yield
        finally:
            for name, original in originals.items():
                setattr(torch, name, original)
