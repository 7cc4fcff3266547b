"""Chance: what is drawn for a request has nothing to do with its neighbours, nor with what was drawn before.

An enumerated law takes each draw for independent of all others; that they are is asked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from harness.conformance import Case, conformance, require
from harness.conformance.decoding import generated, lossless, offered_only, precise, trial, ways
from harness.conformance.laws import outcome
from harness.conformance.passes import independent
from harness.conformance.property import Void
from harness.conformance.serving import ask_for, honours, prompts
from harness.evidence.law import Law
from harness.reference.engine import Request, Sampling, Speculation

SOURCES = ("multinomial", "rand", "rand_like")
"""Functions of torch that an enumerable engine draws by."""


@conformance(
    "decoding.neighbours-are-drawn-independently",
    clause="engine.Sampling",
    needs=("generate", "enumerable", "weights"),
    kills=("rows-share-their-uniforms", "repetition-counts-the-padding"),
    applies=independent,
    costly=True,
)
def test_neighbours(case: Case) -> None:
    """The joint law of two requests of different lengths and settings is the product of both their laws."""
    t = trial(case, 2)
    pair = offered_only(
        case,
        t.model,
        {
            "short, with a penalty": Request((1,), 2, Sampling(repetition_penalty=1.7)),
            "longer, and hotter": t.request(2, Sampling(temperature=1.6)),
        },
    )
    every: dict[str, Speculation | None] = {"without speculation": None}
    if "draft_model" in getattr(t.model, "methods", ()):
        every["1 draft each"] = Speculation("draft_model", 1)
    alone = [t.wanted(request) for request in pair.values()]
    if len(alone) < 2:
        raise Void("the engine honours the settings of one request of two: it has no neighbour")
    wanted = Law({(a, b): alone[0][a] * alone[1][b] for a in alone[0] for b in alone[1]})
    for how, speculation in every.items():

        def both(speculation: Speculation | None = speculation) -> tuple[object, ...]:
            return tuple(map(outcome, generated(t.model, list(pair.values()), speculation)))

        lossless(case, how, t.law_of(both), wanted, stage="law")


@contextmanager
def drawn_from(states: list[bytes]) -> Iterator[None]:
    """Within it, the state of the generator before each draw is put into the list."""

    def noting(draw: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            generator = options.get("generator") or torch.default_generator
            states.append(generator.get_state().numpy().tobytes())
            return draw(*args, **options)

        return noted

    patches = [patch.object(torch, name, noting(getattr(torch, name))) for name in SOURCES]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


@conformance(
    "decoding.no-random-number-serves-twice",
    clause="engine.Sampling.seed",
    needs=("generate", "enumerable"),
    kills=("drafts-draw-from-a-copy", "seeded-requests-start-anew-each-round"),
    applies=independent,
    costly=True,
)
def test_fresh(case: Case) -> None:
    """No two draws of requests without a seed, or of one with a seed, start from one state of a generator."""
    model = precise(case)
    ask_for(model, "temperature")
    prompt = prompts(case, (5,))[0]
    calls = {"without a seed": [Request(prompt, 6, Sampling(temperature=2.0))] * 2}
    if honours(model, "seed"):
        calls["with a seed"] = [Request(prompt, 6, Sampling(temperature=2.0, seed=7))]
    every: dict[str, Speculation | None] = {"without speculation": None}
    if "speculate" in model.capabilities:
        offered = ways(case, model, 2)
        every |= {
            name: way for name, way in offered.items() if name in ("draft_model", "self_draft", "staged")
        }
    total = 0
    for how, speculation in every.items():
        for what, requests in calls.items():
            states: list[bytes] = []
            with drawn_from(states):
                generated(model, requests, speculation)
            total += len(states)
            require(
                len(set(states)) == len(states),
                f"{how}, {what}: {len(states)} draws start from {len(set(states))} states of a generator",
                stage="seed",
            )
    case.note("draws", total)
    if not total:
        raise Void(f"nothing was drawn by torch.{', torch.'.join(SOURCES)}")
