"""A smaller case on which a property still fails: fewer tokens, layers and experts, narrower matrices.

Greedy, in a fixed order, the smallest size of each kind first. A step is taken only if the implementation
breaks the property by a counterexample at the same stage, and the reference holds it there: a case that is
too small for a property to mean anything fails everyone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch

from harness.conformance import subjects
from harness.conformance.case import Case, Shrink, global_draws, replaced
from harness.conformance.checked import Malformed
from harness.conformance.conventions import unexplained
from harness.conformance.property import Property, Violation
from harness.conformance.subjects import Subject
from harness.conformance.verdict import Verdict, verdict
from harness.implementations.reference import Reference, ReferenceUnderTest
from harness.spec import load, twin
from harness.spec.architecture import Architecture, Moe

LENGTHS, BATCHES = (1, 2, 3, 5, 8, 12), (1, 2)
LAYERS, TOP_K = (1, 2, 3), (1, 2)
EXPERTS = (2, 3, 4, 6, 8)
HEADS = ((1, 1), (2, 1), (2, 2), (4, 2))
WIDTHS = (4, 8, 16, 32, 64)
VOCABULARIES = (2, 3, 5, 11, 31)
WINDOWS = (1, 2, 4)


class OutOfTime(BaseException):
    """The budget is spent; not an Exception, so that no implementation takes it for its own."""


@dataclass(frozen=True)
class Attempt:
    """How a property ended on a case."""

    case: Case | None
    """None where the case could not be made."""
    ending: Verdict
    error: BaseException | None = None

    @property
    def counterexample(self) -> bool:
        """It was broken by what was computed."""
        return is_counterexample(self.error)


@dataclass(frozen=True)
class Shrunken:
    """The smallest case that was found."""

    shrink: Shrink
    attempt: Attempt
    finished: bool
    """Nothing smaller of the kinds above fails; False where the budget was spent before that was known."""


@dataclass(frozen=True)
class OwnShape:
    """The reference in a shape of its own, beside an implementation that has one."""

    name: str = "reference"
    needs_architecture: bool = False

    def build(
        self, architecture: Architecture | None, *, device: str, dtype: torch.dtype, seed: int
    ) -> ReferenceUnderTest:
        """The reference, of the twin of a shipped spec where no architecture is given."""
        shape = architecture or twin(load(subjects.DEFAULT_SPECS[0]).architecture)
        return Reference().build(shape, device=device, dtype=dtype, seed=seed)


def is_counterexample(error: BaseException | None) -> bool:
    """Whether what was computed is wrong: it is no crash, and no answer of another type or shape."""
    return isinstance(error, Violation) and not isinstance(error, Malformed)


def attempt(
    function: Callable[[Case], object], prop: Property, subject: Subject, seed: int, shrink: Shrink
) -> Attempt:
    """Run the property's test function on a case of that size."""
    case = None
    try:
        case = subjects.case(subject, prop, seed, shrink)
        with global_draws(seed):
            function(case)
    except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:  # noqa: BLE001  # it is judged
        return Attempt(case, verdict(error), error)
    return Attempt(case, verdict(None))


def failed(error: BaseException) -> Attempt:
    """What ended before a case was made."""
    return Attempt(None, verdict(error), error)


def shrunken(
    function: Callable[[Case], object],
    prop: Property,
    subject: Subject,
    seed: int,
    *,
    stage: str,
    budget_s: float,
) -> Shrunken | str:
    """A smaller case on which the property is broken at `stage` by a counterexample, or why there is none.

    The budget is of wall time, for everything.
    """
    judge = replace(subject, implementation=Reference() if subject.architecture else OwnShape())
    found: Shrunken | None = None

    def same(one: Attempt) -> bool:
        return one.counterexample and one.ending.stage == stage

    try:
        with unexplained(), time_limit(budget_s):
            first = attempt(function, prop, subject, seed, Shrink())
            if not same(first):
                ended = " at another stage" if first.counterexample else f", {first.ending.reason}"
                return f"not shrunken: run once more, it {first.ending.outcome}{ended}"
            knobs, best, again = _knobs(subject, first.case), Shrink(), True
            while again:
                again = False
                for options in knobs:
                    for tried in options(best):
                        one = attempt(function, prop, subject, seed, tried)
                        if (
                            same(one)
                            and attempt(function, prop, judge, seed, tried).ending.outcome == "passed"
                        ):
                            best, again = tried, True
                            found = Shrunken(best, one, finished=False)
                            break
    except OutOfTime:
        return found or f"not shrunken: nothing smaller was found to fail in {budget_s:.3g} s"
    return replace(found, finished=True) if found else "not shrunken: nothing smaller fails where this does"


def as_dict(shrink: Shrink) -> dict[str, Any]:
    """What of it is not at its default, of JSON's types."""
    return {name: value for name, value in asdict(shrink).items() if value not in (None, "", {})}


def of_dict(values: Mapping[str, Any]) -> Shrink:
    """From what `as_dict` gave; raises TypeError for a name that is no field."""
    return Shrink(**values)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside once the seconds are over, at once or, outside of the main thread and where
    there are no such signals, not at all. A timer that ran before is stopped meanwhile, and goes on after."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def over(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    before, (left, every) = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # even where the time is over just now
            signal.signal(signal.SIGALRM, before)
            signal.setitimer(signal.ITIMER_REAL, left, every)


Options = Callable[[Shrink], Iterator[Shrink]]
"""From the best case so far to smaller ones in one respect, the smallest first."""


def _knobs(subject: Subject, case: Case | None) -> list[Options]:
    """In the order in which they are tried; first all of them at once."""
    knobs: list[Options] = []
    if case is not None and case.looked_at:
        label = next(reversed(case.looked_at))
        knobs.append(lambda best: iter([] if best.variant else [replace(best, variant=label)]))
    if case is not None and case.drawn_tokens is not None:
        n_tokens, n_rows = case.drawn_tokens.shape[1], case.drawn_tokens.shape[0]
        knobs.append(lambda best: _below(best, "length", LENGTHS, n_tokens))
        knobs.append(lambda best: _below(best, "batch", BATCHES, n_rows))
    tokens = len(knobs)
    if subject.architecture is not None:
        whole = twin(subject.architecture)
        kinds = (_layers, _top_k, _experts, _heads, _widths_of_heads, _widths, _rest)
        knobs += [partial(_smaller, whole, fields) for fields in kinds]
    return [partial(_at_once, knobs), partial(_at_once, knobs[tokens:]), *knobs]


def _at_once(knobs: Sequence[Options], best: Shrink) -> Iterator[Shrink]:
    """Every respect at its smallest."""
    least = best
    for options in knobs:
        least = next(options(least), least)
    if least != best:
        yield least


def _below(best: Shrink, name: str, sizes: Sequence[int], now: int) -> Iterator[Shrink]:
    most = getattr(best, name) or now
    return (of_dict(vars(best) | {name: n}) for n in sizes if n < most)


def _smaller(
    whole: Architecture, fields: Callable[[Architecture], Iterator[dict[str, Any]]], best: Shrink
) -> Iterator[Shrink]:
    now = replaced(whole, best.fields)
    for changed in fields(now):
        try:
            replaced(now, changed)
        except ValueError:  # the parts do not fit together
            continue
        yield replace(best, fields={**best.fields, **changed})


def _layers(now: Architecture) -> Iterator[dict[str, Any]]:
    patterns = dict.fromkeys([now.attention.pattern, now.attention.pattern[::-1]])
    for n in (n for n in LAYERS if n < now.n_layers):
        for pattern in patterns:
            changed = {"n_layers": n, "attention__pattern": list(pattern)}
            if now.moe is not None:
                every = {"moe__first_dense": 0, "moe__period": 1, "moe__offset": 0, "ffn": None}
                yield changed | every
            yield changed


def _top_k(now: Architecture) -> Iterator[dict[str, Any]]:
    if now.moe is not None:
        yield from ({"moe__top_k": k} for k in TOP_K if k < now.moe.top_k)


def _experts(now: Architecture) -> Iterator[dict[str, Any]]:
    if now.moe is None:
        return
    for n in (n for n in EXPERTS if n < now.moe.n_experts):
        if now.moe.router.n_groups > 2:
            yield {"moe__n_experts": n, "moe__router__n_groups": 2, "moe__router__topk_groups": 1}
        yield {"moe__n_experts": n}


def _heads(now: Architecture) -> Iterator[dict[str, Any]]:
    have = now.attention.n_heads, now.attention.n_kv_heads
    for heads, groups in HEADS:
        same_kind = (have[0] > have[1] > 1) == (heads > groups > 1) and (groups == 1) <= (have[1] == 1)
        if heads < have[0] and (same_kind or heads == groups == 1):
            yield {"attention__n_heads": heads, "attention__n_kv_heads": groups}


def _widths_of_heads(now: Architecture) -> Iterator[dict[str, Any]]:
    mla = now.attention.mla
    if mla is not None:
        narrow = {"kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
        narrow |= {} if mla.q_lora_rank is None else {"q_lora_rank": 4}
        if any(value < getattr(mla, name) for name, value in narrow.items()):
            yield {f"attention__mla__{name}": value for name, value in narrow.items()} | {
                "attention__head_dim": 8
            }
        return
    for n in (n for n in WIDTHS if n < now.attention.head_dim):
        rope = now.attention.rope
        few = {"attention__rope__dim": n} if rope is not None and rope.dim is not None else {}
        yield {"attention__head_dim": n} | few


def _widths(now: Architecture) -> Iterator[dict[str, Any]]:
    moe = now.moe
    for n in WIDTHS:
        changed = {"d_model": n} if n < now.d_model else {}
        changed |= {"ffn__d_ff": n} if now.ffn is not None and n < now.ffn.d_ff else {}
        if moe is not None:
            changed |= {"moe__expert__d_ff": n} if n < moe.expert.d_ff else {}
            changed |= {"moe__shared__d_ff": _shared(moe, n)} if _has_wider_shared(moe, n) else {}
        if changed:
            yield changed


def _has_wider_shared(moe: Moe, width: int) -> bool:
    return moe.shared is not None and _shared(moe, width) < moe.shared.d_ff


def _shared(moe: Moe, width: int) -> int:
    """Shared experts that are so many routed ones stay so."""
    assert moe.shared is not None
    number, rest = divmod(moe.shared.d_ff, moe.expert.d_ff)
    return width if rest else number * width


def _rest(now: Architecture) -> Iterator[dict[str, Any]]:
    yield from ({"vocab_size": n} for n in VOCABULARIES if n < now.vocab_size)
    window = now.attention.window
    if window is not None:
        yield from ({"attention__window": n} for n in WINDOWS if n < window)
