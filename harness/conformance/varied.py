"""Requests that differ in all that can be asked for, for what must keep the settings of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from harness.conformance.case import Case
from harness.conformance.serving import alone, honours, offered, prompts
from harness.reference.engine import Grammar, Request, Sampling


def varied(case: Case, model: Any, lengths: Sequence[int] = (7, 5, 9, 6, 4, 5, 6)) -> list[Request]:
    """Seven requests with seeds whose settings differ: penalties, a grammar, ends, least lengths. Tokens that
    they count are likely, and one of them begins every prompt. All are greedy where no seed is honoured."""
    rows = prompts(case, lengths)
    (some,) = prompts(case, (18,))
    chosen = list(dict.fromkeys(some))[:12]
    ring = Grammar(tuple(tuple((t, (i + 1) % 4) for t in chosen[3 * i : 3 * i + 3]) for i in range(4)))
    often = tuple((token, 25.0) for token in chosen[:3])  # above all others, so that they repeat
    laws: tuple[Sampling, ...] = (
        Sampling(temperature=0.0, logit_bias=often, repetition_penalty=1.3),
        Sampling(temperature=1.5, grammar=ring),
        Sampling(temperature=0.0, logit_bias=often),
        Sampling(temperature=1.0, logit_bias=often, presence_penalty=6.0),
        Sampling(temperature=1.2, logit_bias=often, frequency_penalty=2.0, repetition_penalty=1.2),
        Sampling(temperature=0.0, logit_bias=often, frequency_penalty=3.0),
        Sampling(temperature=0.0, logit_bias=often, presence_penalty=3.0),
    )
    if not honours(model, "seed"):
        laws = tuple(replace(law, temperature=0.0) for law in laws)
    ends = (9, 8, 9, 10, 9, 10, 11)
    made = [
        Request((chosen[i % 3], *row), n, replace(law, seed=31 + i), logprobs=True)
        for i, (row, n, law) in enumerate(zip(rows, ends, laws, strict=True))
    ]
    made[2] = replace(made[2], eos=tuple(chosen[:3]), min_tokens=5)
    made = [offered(model, request) for request in made]
    if honours(model, "stop"):
        # Long, so that whatever happens in the middle of an answer happens in the middle of it
        (answer,) = alone(model, made[-1:])
        made[-1] = replace(made[-1], stop=(answer.tokens[:9],))
    return made
