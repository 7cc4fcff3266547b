"""Exponential races: categorical draws by the argmax of w / e, or of log w + Gumbel noise.

For independent e ~ Exp(1), the index of the largest w_i / e_i is i with probability w_i / sum_j w_j, and
-log e is Gumbel noise (Maddison, Tarlow and Minka 2014, arXiv 1411.0030, section 2). So all that has to be
known of an exponential is its weight, and the argmax is one draw with a finite number of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.evidence.lazy import MOVES, Lazy, NotEnumerable, Uniforms, aten, plain, unanswerable


class LazyRace(Lazy):
    """direction * form(e, w) of exponential numbers e; its parts are the numbers' indices and log w."""

    kind = "an exponential random number"
    form: str
    """"linear": e / w. "inverse": w / e. "log": log(e / w). "scaled": a multiple of log(e / w)."""
    direction: int

    def become(self, log_weights: Tensor, form: str, direction: int) -> LazyRace:
        """Another function of the same numbers."""
        ids, log_w = torch.broadcast_tensors(self.parts[0], log_weights)
        return _race((ids, log_w), self.source, self.dtype, self.device, form, direction)

    def remade(
        self, parts: Sequence[Tensor], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> LazyRace:
        """The same function of others of its numbers."""
        return _race(
            parts, self.source, dtype or self.dtype, device or self.device, self.form, self.direction
        )


def _race(
    parts: Sequence[Tensor],
    source: Uniforms,
    dtype: torch.dtype,
    device: torch.device,
    form: str = "linear",
    direction: int = 1,
) -> LazyRace:
    made = LazyRace.made(parts, source, dtype, device)
    made.form, made.direction = form, direction
    return made


def exponentials(
    source: Uniforms,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    ids: Tensor | None = None,
) -> LazyRace:
    """Exponential numbers of rate 1; new ones, or those made from the uniform numbers `ids`."""
    if ids is None:
        ids = source.fresh(shape, dtype, device).parts[0]
    source.spend(ids)
    return _race((ids, torch.zeros(tuple(shape), dtype=torch.float64)), source, dtype, device)


def _product(func: Any, left: Any, right: Any) -> LazyRace:
    """Products and quotients with plain numbers that are not negative."""
    name = func.overloadpacket.__name__
    first = isinstance(left, LazyRace)
    lazy: LazyRace = left if first else right
    factor = plain(func, LazyRace, right if first else left)
    if bool((factor < 0).any()):
        raise unanswerable(func, LazyRace)
    log_w, by = lazy.parts[1], factor.log()
    if lazy.form in ("log", "scaled"):
        if factor.numel() != 1 or factor == 0 or (name == "div" and not first):
            raise unanswerable(func, LazyRace)
        return lazy.become(log_w, "scaled", lazy.direction)
    if name == "div" and not first:
        turned = {"linear": "inverse", "inverse": "linear"}[lazy.form]
        return lazy.become(log_w + by if turned == "inverse" else log_w - by, turned, lazy.direction)
    more = (lazy.form == "inverse") == (name == "mul")
    return lazy.become(log_w + by if more else log_w - by, lazy.form, lazy.direction)


def _sum(func: Any, left: Any, right: Any, *, alpha: float = 1) -> LazyRace:
    """Sums and differences with plain numbers: Gumbel noise on logits."""
    name = func.overloadpacket.__name__
    first = isinstance(left, LazyRace)
    lazy: LazyRace = left if first else right
    if lazy.form != "log" or alpha != 1:
        raise unanswerable(func, LazyRace)
    other = plain(func, LazyRace, right if first else left)
    sign = -lazy.direction if name == "sub" and not first else lazy.direction
    shift = -other if name == "sub" and first else other
    # sign (log e - log w) + c = sign (log e - (log w - sign c))
    return lazy.become(lazy.parts[1] - sign * shift, "log", sign)


def _negated(_: Any, x: LazyRace) -> LazyRace:
    return x.become(x.parts[1], x.form, -x.direction)


def _reciprocal(func: Any, x: LazyRace) -> LazyRace:
    if x.form not in ("linear", "inverse"):
        raise unanswerable(func, LazyRace)
    return x.become(x.parts[1], "inverse" if x.form == "linear" else "linear", x.direction)


def _logarithm(func: Any, x: LazyRace) -> LazyRace:
    if x.form not in ("linear", "inverse") or x.direction < 0:
        raise unanswerable(func, LazyRace)
    return x.become(x.parts[1], "log", 1 if x.form == "linear" else -1)


def _winner(func: Any, x: LazyRace, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """argmax and argmin: one draw of the weights per row, and the numbers are used up."""
    wanted = 1 if func.overloadpacket.__name__ == "argmax" else -1
    if x.direction * (1 if x.form == "inverse" else -1) != wanted:
        raise unanswerable(func, LazyRace)
    ids, log_w = x.parts
    if dim is None:
        ids, log_w, dim, keepdim = ids.flatten(), log_w.flatten(), 0, False
    rows = log_w.movedim(dim, -1)
    if bool(torch.isnan(rows).any() or torch.isinf(rows.amax(-1)).any()):
        raise NotEnumerable(
            "a race of exponentials has a weight that is infinite or no number, or none above 0"
        )
    x.source.race(ids)
    weights = (rows - rows.amax(-1, keepdim=True)).exp().reshape(-1, rows.shape[-1])
    won = [x.source.answer(row) for row in weights.tolist()]
    found = torch.tensor(won, dtype=torch.long, device=x.device).reshape(rows.shape[:-1])
    return found.unsqueeze(dim) if keepdim else found


LazyRace.handlers = {
    **MOVES,
    **dict.fromkeys((aten.mul, aten.div), _product),
    **dict.fromkeys((aten.add, aten.sub), _sum),
    **dict.fromkeys((aten.argmax, aten.argmin), _winner),
    aten.neg: _negated,
    aten.reciprocal: _reciprocal,
    aten.log: _logarithm,
}
