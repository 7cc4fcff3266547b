"""The exact law of a program that draws random numbers with torch: every draw it can make is made.

Letters: B rows, V categories.

The program is run again and again under a depth-first search over its draws: the first run takes the first
possible answer of every draw, and each later one repeats the choices of the run before up to the last draw
that has an answer left. No probability is estimated, so what remains of a defect cannot hide in noise.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import fsum
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from harness.evidence.law import MASS_TOLERANCE, Law
from harness.evidence.lazy import Lazy, NotEnumerable, Uniforms
from harness.evidence.races import exponentials

SAME = 1e-6
"""How far the probabilities of a draw may lie apart when it is repeated: float32 kernels may sum in another
order according to how memory is aligned, which moves a softmax by some 1e-7."""


OVERLAPPING = "random numbers that fill a view of a tensor, or are seen through one, cannot be enumerated"


class Undetermined(RuntimeError):
    """The program is not a function of its draws: the same answers led it elsewhere."""


@dataclass
class Draw:
    """One draw on the current path: the probabilities of its answers, and which is being followed."""

    probabilities: tuple[float, ...]
    taken: int


@dataclass
class Tape:
    """The answers of one run: those of `draws` first, then the first possible one of each new draw."""

    draws: list[Draw]
    at: int = 0
    failure: Exception | None = None
    """What went wrong in a draw; kept, because an engine may catch it as the fault of one request."""

    def answer(self, weights: Sequence[float]) -> int:
        """The index of the answer to a draw with these weights. Raises Undetermined where it was another
        draw at the last run."""
        total = fsum(weights)
        probabilities = tuple(w / total for w in weights)
        if self.at == len(self.draws):
            first = next(i for i, p in enumerate(probabilities) if p > 0)
            self.draws.append(Draw(probabilities, first))
        draw = self.draws[self.at]
        if len(draw.probabilities) != len(probabilities) or any(
            abs(a - b) > SAME for a, b in zip(draw.probabilities, probabilities, strict=True)
        ):
            raise self.failed(
                Undetermined(
                    f"the program is no function of its draws: after the same {self.at} answers, draw "
                    f"{self.at + 1} had probabilities {_shown(draw.probabilities)} and then "
                    f"{_shown(probabilities)}; it must start from the same state at every run"
                )
            )
        self.at += 1
        return draw.taken

    def failed(self, error: Exception) -> Exception:
        """Remember the first error of the run."""
        self.failure = self.failure or error
        return error


def _shown(probabilities: Sequence[float]) -> str:
    rest = ", ..." if len(probabilities) > 8 else ""
    return "[" + ", ".join(f"{p:.4g}" for p in probabilities[:8]) + rest + "]"


@dataclass
class Interception(TorchFunctionMode):
    """Within this context, in this thread, random draws of torch are answered by a tape."""

    tape: Tape
    uniforms: Uniforms = field(init=False)
    filled: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By id: a tensor that was filled in place, and the lazy numbers that stand for it."""
    storages: set[int] = field(default_factory=set)
    """The memory of those tensors."""

    def __post_init__(self) -> None:
        super().__init__()
        self.uniforms = Uniforms(self.tape.answer)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        draw = _DRAWS.get(func)
        try:
            if draw is not None:
                return draw(self, *args, **(kwargs or {}))
            if func in _REFUSED:
                raise NotEnumerable(
                    f"{func.__name__} cannot be enumerated; "
                    "draw by torch.multinomial, bernoulli, rand or rand_like"
                )
            if not self.filled:
                return func(*args, **(kwargs or {}))
            return self.substituted(func, args, kwargs or {})
        except (NotEnumerable, Undetermined) as error:
            self.tape.failed(error)
            raise

    def substituted(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
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
        if isinstance(held, Lazy) or held._is_view():  # noqa: SLF001
            raise NotEnumerable(OVERLAPPING)
        self.filled[id(held)] = (held, numbers)
        self.storages.add(held.untyped_storage().data_ptr())
        return held

    def multinomial(
        self, weights: Tensor, num_samples: int, replacement: bool = False, **kwargs: Any
    ) -> Tensor:
        """[B, num_samples] or [num_samples] categories; each is one draw, rows in order.

        Without replacement the categories are drawn one after the other from those that are left, which is
        the law of torch's own kernel (the order of an exponential race).
        """
        held = weights.detach().to("cpu", torch.float64)
        # what torch refuses (negative, infinite, no mass, wrong shape) is refused in its own words
        torch.multinomial(held, num_samples, replacement, generator=torch.Generator())
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
        held = probabilities.detach().to("cpu", torch.float64)
        torch.bernoulli(held, generator=torch.Generator())
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


_DRAWS: dict[Any, Callable[..., Any]] = {
    torch.multinomial: Interception.multinomial,
    Tensor.multinomial: Interception.multinomial,
    torch.bernoulli: Interception.bernoulli,
    torch.rand: Interception.rand,
    torch.rand_like: Interception.rand_like,
    Tensor.exponential_: Interception.exponential_,
    Tensor.uniform_: Interception.uniform_,
}

_REFUSED = frozenset(
    (
        *(torch.normal, torch.randn, torch.randn_like, torch.randint, torch.randint_like, torch.randperm),
        *(torch.poisson, Tensor.normal_, Tensor.bernoulli_, Tensor.random_, Tensor.geometric_),
        *(Tensor.cauchy_, Tensor.log_normal_, nn.functional.gumbel_softmax),
    )
)
"""Draws with too many answers, or that are made where nothing can be intercepted."""


def law(program: Callable[[], Hashable], *, most_paths: int = 200_000, prune: float = 0.0) -> Law:
    """The exact law of what `program()` returns.

    Its draws must come from torch.multinomial, bernoulli, rand or rand_like, in this thread, and uniform
    numbers may only be compared (see `harness.evidence.lazy`); generators and the global seed play no part.
    Branches off a path that are reached with a probability below `prune` are counted as pruned, and not
    followed.

    Raises NotEnumerable where a draw has no finite number of answers or more than `most_paths` runs are
    needed, Undetermined where the program is no function of its draws, and whatever the program raises.
    """
    sums: dict[Hashable, float] = {}
    draws: list[Draw] = []
    paths, pruned = 0, 0.0
    while True:
        if paths == most_paths:
            raise NotEnumerable(
                f"more than {most_paths} paths, which cover {fsum(sums.values()):.3g} of the mass: generate "
                "fewer tokens, use a smaller vocabulary, or prune"
            )
        outcome = _run(program, draws)
        if any(isinstance(part, Tensor) for part in pytree.tree_leaves(outcome)):
            raise TypeError("the program returned a tensor, which has no equals: return a number or a tuple")
        paths += 1
        reached = 1.0
        for draw in draws:
            reached *= draw.probabilities[draw.taken]
        sums[outcome] = sums.get(outcome, 0.0) + reached
        pruned += _advance(draws, prune)
        if not draws:
            break
    found = Law(sums, paths, pruned)
    if abs(found.mass + pruned - 1) > MASS_TOLERANCE:
        raise Undetermined(f"the probabilities of all paths sum to {found.mass + pruned!r}, not to 1")
    return found


def _run(program: Callable[[], Hashable], draws: list[Draw]) -> Hashable:
    """One run that repeats the answers in `draws` and appends those to draws beyond them."""
    tape = Tape(draws)
    repeated = len(draws)
    seed, state = torch.initial_seed(), torch.get_rng_state()
    try:
        with Interception(tape):
            outcome = program()
    except Exception:
        if tape.failure is not None:
            raise tape.failure from None
        raise
    if tape.failure is not None:
        raise tape.failure
    if tape.at < repeated:
        raise Undetermined(
            f"the program is no function of its draws: with the same answers it made {repeated} draws or "
            f"more, and then {tape.at}; it must start from the same state at every run"
        )
    if torch.initial_seed() == seed and not torch.equal(torch.get_rng_state(), state):
        raise Undetermined(
            "a random number was drawn in a way that cannot be intercepted (in compiled code?)"
        )
    return outcome


def _advance(draws: list[Draw], prune: float) -> float:
    """Move `draws` to the next path, or empty it; the probability of the branches left out."""
    reached = [1.0]
    for draw in draws:
        reached.append(reached[-1] * draw.probabilities[draw.taken])
    pruned = 0.0
    while draws:
        draw, before = draws[-1], reached[len(draws) - 1]
        for index in range(draw.taken + 1, len(draw.probabilities)):
            branch = before * draw.probabilities[index]
            if branch >= prune and branch > 0:
                draw.taken = index
                return pruned
            pruned += branch
        draws.pop()
    return pruned
