"""Settings over long texts, and together: what they count lies far back, and each looks at what others left.

A grammar forces all tokens but the last, whose law is compared: so a completion of any length has no more
outcomes than there are tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch

from harness.conformance import Case, conformance, laws
from harness.conformance.decoding import Trial, lossless, methods, offered_only, remembering, trial
from harness.conformance.serving import honours, offered
from harness.reference.engine import Grammar, Request, Sampling, Speculation

V = 8
ONCE, LATER, NEVER = 7, 6, 5
"""Tokens that the prompt has at its very beginning alone; that only what follows has; that nothing has."""
TOGETHER = 48
"""Requests whose settings are all drawn: of any two that could be applied in the wrong order, or that hide
each other, some twelve are set in one request."""


def forced(tokens: tuple[int, ...], last: tuple[int, ...] = ()) -> Grammar:
    """Just these tokens, and then one of `last`, or any."""
    steps = tuple(((token, i + 1),) for i, token in enumerate(tokens))
    return Grammar((*steps, tuple((token, len(steps)) for token in last)))


def long_prompt(t: Trial, room: int) -> Trial:
    """The trial with a prompt that leaves `room` tokens of the context, of which the first comes once."""
    length = t.pair.architecture.max_positions - room - 1
    some = torch.randint(NEVER, (length,), generator=t.case.generator())
    return replace(t, pair=replace(t.pair, prompt=(ONCE, *t.case.drawn(some).tolist())))


def judge(t: Trial, requests: Mapping[str, Request], speculation: Speculation | None = None) -> None:
    """The law of each, from the reference after those texts alone that can come about."""
    forward = t.case.reference(t.pair.architecture, t.pair.target).forward
    logits = laws.asked(forward, t.pair.prompt)
    with remembering(t.model):
        for what, request in requests.items():
            wanted = laws.target_law(logits, request)
            lossless(t.case, what, t.found(request, speculation), wanted)


def histories(t: Trial, text: tuple[int, ...]) -> dict[str, Request]:
    """Every setting that counts tokens, on either side of what leaves the law as it is."""
    made = {
        "repetition_penalty 1.8": Sampling(repetition_penalty=1.8),
        "repetition_penalty 0.6": Sampling(repetition_penalty=0.6),
        "presence_penalty 1.1": Sampling(presence_penalty=1.1),
        "presence_penalty -1.1": Sampling(presence_penalty=-1.1),
        "frequency_penalty 0.3": Sampling(frequency_penalty=0.3),
        "frequency_penalty -0.3": Sampling(frequency_penalty=-0.3),
        "all penalties": Sampling(repetition_penalty=1.3, presence_penalty=-0.8, frequency_penalty=0.2),
    }
    return {
        what: t.request(len(text) + 1, replace(sampling, grammar=forced(text)))
        for what, sampling in made.items()
    }


@conformance(
    "decoding.penalties-count-the-whole-text",
    clause="engine.Sampling.repetition_penalty",
    needs=("generate", "enumerable", "weights"),
    kills=(
        "repetition-forgets-the-prompt",
        "repetition-forgets-what-lies-far-back",
        "repetition-is-never-rewarded",
        "presence-is-never-rewarded",
        "frequency-counts-the-latest",
    ),
    costly=True,
)
def test_whole_text(case: Case) -> None:
    """Penalties, rewards too, count what came at the beginning of a text that fills the context."""
    t = trial(case, V)
    # Of what is generated LATER comes first and once, and the others unevenly often
    text = (LATER, *case.drawn(torch.randint(3, (22,), generator=case.generator())).tolist())
    long = long_prompt(t, len(text) + 1)
    first = {"repetition_penalty 0.7": Sampling(repetition_penalty=0.7)}
    judge(long, offered_only(case, t.model, {what: long.request(1, s) for what, s in first.items()}))
    short = offered_only(case, t.model, histories(t, (LATER, 0, 1, 0, 0)))
    judge(t, short)
    judge(long, offered_only(case, t.model, {"a long answer": histories(long, text)["all penalties"]}))
    if "draft_model" in getattr(t.model, "methods", ()):
        judge(t, {f"{what}, drafted": request for what, request in short.items()}, DRAFTED)


DRAFTED = Speculation("draft_model", 3)
FREE = 3
"""Tokens at the end of a long answer that are drawn: a window of drafts, the last of them also a bonus."""


@conformance(
    "decoding.late-rounds-keep-the-law",
    clause="decoding.speculation",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=(
        "every-draft-stands",
        "late-rounds-are-lenient",
    ),
    costly=True,
)
def test_late(case: Case) -> None:
    """After many rounds, at the end of the context, drafted tokens still have the law of the target."""
    t = trial(case, V)
    methods(case, t.model, "draft_model")
    text = (LATER, *case.drawn(torch.randint(3, (12,), generator=case.generator())).tolist())
    long = long_prompt(t, len(text) + FREE)
    law = Sampling(grammar=forced(text, (LATER, 0)), frequency_penalty=0.4, repetition_penalty=1.4)
    requests = {"a long answer, drafted": long.request(len(text) + FREE, law)}
    judge(long, offered_only(case, t.model, requests), DRAFTED)


def together(t: Trial, count: int, generator: torch.Generator) -> dict[str, Request]:
    """Requests with most settings at once, each drawn from values on either side of its neutral one."""

    def one(*values: float) -> float:
        return values[int(torch.randint(len(values), (), generator=generator))]

    def some(least: int) -> tuple[int, ...]:
        size = int(torch.randint(least, V, (), generator=generator))
        return tuple(torch.randperm(V, generator=generator)[:size].tolist())

    made = {}
    for i in range(count):
        biases = tuple((token, one(-3.5, -0.9, 0.8, 2.5)) for token in some(1))
        sampling = Sampling(
            grammar=forced((LATER, 2, LATER), some(5) if i % 3 else ()),
            logit_bias=biases if i % 4 else (),
            repetition_penalty=one(1.0, 0.6, 1.5, 2.2),
            presence_penalty=one(0.0, -1.2, 0.9),
            frequency_penalty=one(0.0, -0.6, 0.5),
            temperature=one(0.3, 0.8, 1.0, 1.7, 3.0),
            top_k=int(one(0, 3, 5, 6)),
            top_p=one(1.0, 0.45, 0.7, 0.8, 0.93),
            min_p=one(0.0, 0.04, 0.15, 0.25, 0.4),
        )
        free = tuple(token for token in some(3) if token not in (LATER, 2))
        ends = {"eos": free[:2], "min_tokens": int(one(0, 4, 4))} if i % 2 else {}
        ends |= {"stop": ((LATER, some(1)[0]),)} if i % 5 == 1 else {}
        made[f"request {i}, {_shown(sampling)}"] = t.request(4, sampling, **ends)
    return made


def _shown(sampling: Sampling) -> str:
    numbers = (name for name in SCALARS if getattr(sampling, name) != getattr(Sampling, name))
    return ", ".join(f"{name} {getattr(sampling, name)}" for name in numbers)


SCALARS = tuple(f.name for f in fields(Sampling) if f.name not in ("grammar", "logit_bias", "seed"))


@conformance(
    "decoding.settings-together-are-applied-in-order",
    clause="engine.Sampling",
    needs=("generate", "enumerable", "weights"),
    kills=(
        "min-p-comes-before-top-p",
        "min-p-is-off-beside-top-p",
        "top-p-near-1-is-off",
        "least-length-yields-to-a-grammar",
        "grammars-let-everything-end",
    ),
    costly=True,
)
def test_together(case: Case) -> None:
    """Where many settings are set at once each is applied, in the order of their fields, drafted or not."""
    t = trial(case, V)
    requests = together(t, TOGETHER, case.generator())
    if not honours(t.model, "grammar"):  # only the first token's law is small enough
        requests = {what: replace(request, max_tokens=1) for what, request in requests.items()}
    asked = {what: offered(t.model, request) for what, request in requests.items()}
    judge(t, asked)
    if "draft_model" in getattr(t.model, "methods", ()):
        judge(t, {f"{what}, drafted": asked[what] for what in list(asked)[::4]}, DRAFTED)
