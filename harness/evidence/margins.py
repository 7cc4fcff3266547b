"""How far apart two correct computations may be: error bounds that decide what can be compared.

Letters: T tokens, D inner dimension of a dot product, E experts, K top-k, u unit roundoff.

Two kinds of bound, each where it is the right one:

* `dot_bound` is a theorem about one dot product, in any order of summation, fused or not: use it on
  a stage whose input was captured (router logits).
* `monte_carlo` measures how far rounding moves the outputs of a whole model, by perturbing an exact
  (float64) run of it where a lower precision would round: use it where no theorem is sharp enough.

Neither looks at the implementation under test, so neither can be widened by a defect in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 6
"""Perturbed runs. The widest of 6 runs x V logits under-reads the true spread of a bell curve by
less than a factor of 2, which `SAFETY` covers."""

SAFETY = 8.0
"""Over the widest perturbed run: 2 for the few samples, 4 because a module rounds more than once where
the perturbed run rounds once (residual sum, activation, softmax and norm are about three roundings each,
and three independent ones outside of a module add up to less than 4)."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next number of `dtype` (round to nearest)."""
    return float(torch.finfo(dtype).eps) / 2


def gamma(n: int, dtype: torch.dtype) -> float:
    """n u / (1 - n u): the growth of n roundings (Higham, Accuracy and Stability of Numerical
    Algorithms, 2nd ed., lemma 3.1). Raises ValueError where n u >= 1, where no bound holds."""
    nu = n * unit_roundoff(dtype)
    if nu >= 1:
        raise ValueError(f"no error bound: {n} roundings of {dtype} lose every digit")
    return nu / (1 - nu)


def dot_bound(
    weight: Tensor, inputs: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[T, E]: |fl(W x + b) - (W x + b)| <= gamma_{D+2} (|W| |x| + |b|) (Higham, section 3.1, eq. 3.5).

    weight [E, D], inputs [T, D], bias [E], all as held by the implementation; D products and sums, one
    rounding for the bias and one for storing the result. Raises ValueError where no bound holds.
    """
    size = inputs.double().abs() @ weight.double().abs().T
    if bias is not None:
        size = size + bias.double().abs()
    return gamma(weight.shape[1] + 2, dtype) * size


@dataclass(frozen=True)
class Spread:
    """One output of an exact run, and how far perturbed runs moved it."""

    centre: Tensor
    """As computed without perturbation."""
    deviation: Tensor
    """The same shape: the largest absolute deviation of a perturbed run (1 where a whole number,
    such as an expert's index, ever changed)."""

    def radius(self, *, inner: int) -> Tensor:
        """The tolerance, of the deviation's shape: SAFETY * sqrt(inner) * deviation.

        A dot product of length n errs by about sqrt(n) u and not by n u, because its roundings are as
        good as independent (Higham and Mary 2019, SIAM J. Sci. Comput. 41(5), theorem 2.4); the perturbed
        run errs by one u. `inner` is the longest dot product of the model.
        """
        return SAFETY * math.sqrt(inner) * self.deviation


Rounding = Callable[[Tensor], Tensor]


def monte_carlo(
    module: nn.Module,
    run: Callable[[Rounding], Mapping[str, Tensor]],
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
    samples: int = SAMPLES,
) -> dict[str, Spread]:
    """Spread of every output of `run` under rounding to `dtype` (Monte Carlo arithmetic, Parker 1997).

    `run` computes with `module` in float64 and gives the same shapes each time; it is handed a function
    that errs likewise, for what no module puts out (rotary angles). In each sample every module's
    output, and the gradient that comes back through it, is perturbed by u * U(-1, 1) of the larger of
    its own size and the root mean square of its vector: the error of a dot product scales with the size
    of what was summed, which its neighbours show even where it cancelled itself.
    """
    exact = {name: value.detach().clone() for name, value in run(lambda value: value).items()}
    worst = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in exact.items()}
    for _ in range(samples):
        with perturbed(module, unit_roundoff(dtype), generator) as err:
            outputs = run(err)
        for name, value in outputs.items():
            if value.is_floating_point():
                change = (value.detach().double() - exact[name].double()).abs()
            else:
                change = (value != exact[name]).double()
            worst[name] = torch.maximum(worst[name], change)
    return {name: Spread(value, worst[name]) for name, value in exact.items()}


@contextmanager
def perturbed(module: nn.Module, size: float, generator: torch.Generator) -> Iterator[Rounding]:
    """Within the context, every output of every module of `module` errs by `size`, relatively; what
    `with` names does the same to any other tensor."""

    def err(value: Tensor) -> Tensor:
        scale = torch.maximum(value.detach().abs(), value.detach().square().mean(-1, keepdim=True).sqrt())
        noise = torch.rand(value.shape, dtype=value.dtype, generator=generator) * 2 - 1
        return value + size * scale * noise

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(hook(_module, _inputs, part) for part in output)
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() == 0:
            return output
        moved = err(output)
        if moved.requires_grad:
            moved.register_hook(err)
        return moved

    handles = [part.register_forward_hook(hook) for part in module.modules()]
    try:
        yield err
    finally:
        for handle in handles:
            handle.remove()


def topk_gap(keys: Tensor, k: int) -> Tensor:
    """[T]: how far the k-th largest of keys [T, E] is above the next; infinite where k = E."""
    ordered = keys.sort(dim=-1, descending=True).values
    if k >= keys.shape[-1]:
        return torch.full(keys.shape[:-1], math.inf, dtype=keys.dtype)
    return ordered[..., k - 1] - ordered[..., k]


def comparable_tokens(changed: Tensor) -> Tensor:
    """[B, S] bool: tokens before the first one of their sequence whose experts may flip (changed [B, S]).

    A flip reaches every later token of the sequence through attention, and no earlier one.
    """
    return changed.long().cumsum(dim=-1) == 0
