"""Models that are tables, and a bare loop of speculative decoding, for tests of the engine's parts.

Targets and drafts give every sequence logits of its own, 0.48 apart in total variation on average.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from harness.reference.engine import Grammar, Request, Sampling
from harness.reference.engine.drafting import Translated
from harness.reference.engine.draws import Draws
from harness.reference.engine.proposers import Drafter, PromptLookup, Staged
from harness.reference.engine.sampling import NoToken, Sampler
from harness.reference.engine.stopping import Ended, Stopper
from harness.reference.engine.verification import Verifier

V, GAMMA, LENGTH = 3, 2, 4
"""Outputs of GAMMA + 2 tokens: a wrong token after accepted proposals, and a wrong context for the round
that follows, both show."""
EXACT = 1e-9
"""float64 throughout: what remains is the rounding of some hundred products (2e-16 measured)."""
PROMPT = (0, 1, 2, 0, 1)
"""The last two tokens stood there before, so that prompt lookup has something to propose."""


@dataclass
class Table:
    """A model that is a table: logits of any sequence, drawn from the seed and the sequence."""

    seed: int
    size: int = V

    def read(self, key: int, tokens: Sequence[int], last: int = 1) -> Tensor:
        """Logits [last, size]."""
        ends = range(len(tokens) - last + 1, len(tokens) + 1)
        return torch.stack([self.logits(tuple(tokens[:end])) for end in ends])

    @cache  # noqa: B019  # a handful of tables of a few hundred rows
    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        """Logits [size] after the tokens."""
        r = random.Random(str((self.seed, tokens)))
        return torch.tensor([r.gauss(0, 1.5) for _ in range(self.size)], dtype=torch.float64)

    def forget(self, key: int) -> None:
        """It has no memory."""

    def __hash__(self) -> int:
        return hash((self.seed, self.size))


class Remembering(Sampler):
    """The sampler, asked once for each law: an enumeration comes to each a hundred times."""

    def __init__(self) -> None:
        self.known: dict[Any, Tensor | NoToken] = {}

    def distribution(self, logits: Tensor, request: Request, generated: Sequence[int]) -> Tensor:
        """As the sampler does."""
        key = (tuple(logits.tolist()), tuple(generated), request)
        if key not in self.known:
            try:
                self.known[key] = super().distribution(logits, request, generated)
            except NoToken as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, NoToken):
            raise found
        return found


@dataclass
class One:
    """A sequence."""

    request: Request
    generated: list[int] = field(default_factory=list)
    index: int = 7


TARGET, DRAFT, FOREIGN = Table(1), Table(2), Table(3, size=5)
VOCABULARY = (2, -1, 0, 2, -1)
"""Of the foreign draft's five tokens two become token 2, two do not exist, and token 1 is missing."""
WAYS: dict[str, Callable[[Sampler], Any]] = {
    "draft_model": lambda sampler: Drafter(DRAFT, sampler, V),
    "self_draft": lambda sampler: Drafter(TARGET, sampler, V),
    "prompt_lookup": lambda _: PromptLookup(2, V),
    "universal": lambda sampler: Drafter(Translated(FOREIGN, VOCABULARY, V), sampler, V),
    "staged": lambda sampler: Staged(DRAFT, PromptLookup(2, V), sampler),
}
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "hot, top_k": {"temperature": 2.0, "top_k": 2},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.3},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    "logit_bias": {"logit_bias": ((1, 1.5), (2, -torch.inf))},
    "grammar": {"grammar": Grammar((((0, 1), (1, 0)), ((1, 2), (2, 2)), ((2, 0),)))},
    "everything": {
        "logit_bias": ((1, 0.5),),
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.2,
        "temperature": 0.8,
        "top_k": 2,
        "top_p": 0.95,
        "min_p": 0.1,
    },
    "greedy": {"temperature": 0.0},
}
ENDS: dict[str, dict[str, Any]] = {
    "eos": {"eos": (2,)},
    "eos, not at once": {"eos": (2,), "min_tokens": 2},
    "stop": {"stop": ((1, 2), (0, 0))},
    "one token": {"max_tokens": 1},
}
REQUESTS = {name: Request(PROMPT, LENGTH, Sampling(**fields)) for name, fields in ASKED.items()} | {
    name: replace(Request(PROMPT, LENGTH), **fields) for name, fields in ENDS.items()
}


@dataclass
class Decoded:
    """What a loop of rounds made of a request."""

    ended: Ended
    accepted: list[int]
    """Proposals that stood, round by round."""


def decode(request: Request, proposer: Any, sampler: Sampler, verifier: Verifier, target: Table) -> Decoded:
    """Rounds of speculative decoding until the request ends: the engine without anything around it."""
    sequence, draws, stopper, accepted = One(request), Draws(), Stopper(), []
    while (ended := stopper.end(request, sequence.generated)) is None:
        proposal = proposer.propose(sequence, GAMMA, draws)
        text = (*request.prompt, *sequence.generated, *proposal.tokens)
        logits = target.read(0, text, last=len(proposal.tokens) + 1)
        laws = verifier.targets(logits, request, sequence.generated, proposal.tokens, sampler)
        tokens, count = verifier.verify(proposal, laws, draws)
        sequence.generated += tokens
        accepted.append(count)
    proposer.forget(sequence)
    return Decoded(ended, accepted)


def following(table: Table, request: Request, tokens: tuple[int, ...]) -> list[float]:
    """The law of the token after the prompt and `tokens`."""
    logits = table.logits((*request.prompt, *tokens))
    law_: list[float] = Sampler().distribution(logits, request, tokens).tolist()
    return law_
