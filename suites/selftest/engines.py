"""Small engines, seeded requests, and what every run of an engine must satisfy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from harness.implementations.reference import Reference, ReferenceUnderTest
from harness.reference.engine import (
    Arrival,
    Completion,
    Engine,
    Limits,
    Request,
    Sampling,
    Served,
    Speculation,
)
from suites.selftest.controls import generator, small

GREEDY = Sampling(temperature=0.0)


@cache
def served(name: str = "mixtral-8x7b") -> ReferenceUnderTest:
    """The twin of a control in float64, with a draft of the same shape and other weights."""
    architecture = small(name)
    model = Reference().build(architecture, device="cpu", dtype=torch.float64, seed=1)
    other = Reference().build(architecture, device="cpu", dtype=torch.float64, seed=2)
    near = {k: w.lerp(other.parameters()[k].detach(), 0.1) for k, w in model.parameters().items()}
    model.load_draft(architecture, near)
    return model


def engine(limits: Limits, speculation: Speculation | None = None, name: str = "mixtral-8x7b") -> Engine:
    """A fresh engine over that model."""
    return served(name).engine(limits, speculation)


def prompt(length: int, seed: int = 0, name: str = "mixtral-8x7b") -> tuple[int, ...]:
    """Random tokens."""
    size = small(name).vocab_size
    return tuple(torch.randint(size, (length,), generator=generator(1000 + seed)).tolist())


def mixed(name: str = "mixtral-8x7b") -> list[Request]:
    """Requests of many lengths, greedy and seeded, some with a common beginning."""
    shared = prompt(9, 99, name)
    shapes = ((3, 5), (9, 7), (1, 4), (6, 12), (12, 2), (5, 9), (17, 6), (2, 1))
    requests = []
    for i, (length, wanted) in enumerate(shapes):
        start = shared if i % 2 else ()
        sampling = GREEDY if i % 3 else Sampling(temperature=1.5, seed=i)
        requests.append(Request((*start, *prompt(length, i, name)), wanted, sampling, logprobs=True))
    return requests


def run(one: Engine, requests: Sequence[Request], every: float = 1.0) -> Served:
    """The requests, one after `every` iterations; afterwards all pages are free or cached."""
    answer = one.run([Arrival(request, at=every * i) for i, request in enumerate(requests)])
    assert one.pool.used == 0
    assert not any(one.pool.references)
    assert sorted([*one.pool.free, *one.pool.cached]) == list(range(one.limits.pages))
    return answer


def tokens(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    """What was generated, per request."""
    return [completion.tokens for completion in completions]
