"""What a proposer is asked and what it answers.

Letters: n proposed tokens, V vocabulary of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from harness.reference.engine.draws import Draws
from harness.reference.engine.values import Request


@dataclass(frozen=True)
class Proposal:
    """Tokens to be verified, each with the law that it was drawn from."""

    tokens: tuple[int, ...]
    distributions: Tensor
    """[n, V] float64."""


class Unfinished(Protocol):
    """What a proposer sees of a sequence."""

    @property
    def index(self) -> int:
        """Unique among the sequences of an engine: under it a proposer keeps what it remembers."""

    @property
    def request(self) -> Request:
        """What was asked."""

    @property
    def generated(self) -> Sequence[int]:
        """The tokens so far, after the prompt."""


class Proposer(Protocol):
    """Something cheap that guesses what comes next."""

    def propose(self, sequence: Unfinished, count: int, draws: Draws) -> Proposal:
        """At most `count` tokens after the sequence's own; possibly none."""

    def forget(self, sequence: Unfinished) -> None:
        """The sequence has ended: nothing of it is kept."""


def certain(tokens: Sequence[int], vocab_size: int) -> Proposal:
    """A proposal of tokens that were not drawn: all probability is on them."""
    ids = torch.tensor(list(tokens), dtype=torch.int64)
    return Proposal(tuple(tokens), functional.one_hot(ids, vocab_size).to(torch.float64))


def useful(sequence: Unfinished, count: int) -> int:
    """How many of `count` proposals can serve: a round adds one token more than are accepted, and nothing
    is kept beyond max_tokens."""
    return max(0, min(count, sequence.request.max_tokens - len(sequence.generated) - 1))


def ended(request: Request, tokens: Sequence[int]) -> bool:
    """Whether the last of the tokens is one of `eos`."""
    return bool(tokens) and tokens[-1] in request.eos


def until_end(request: Request, tokens: Sequence[int]) -> tuple[int, ...]:
    """The tokens up to the first of `eos`, after which nothing is kept."""
    for i, token in enumerate(tokens):
        if token in request.eos:
            return tuple(tokens[: i + 1])
    return tuple(tokens)
