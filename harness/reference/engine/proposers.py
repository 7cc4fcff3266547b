"""Where proposals come from: a draft model, in several guises, and the sequence itself.

Letters: n proposed tokens, V vocabulary of the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.reference.engine.drafting import FirstLayers, Reader, Reads, Translated
from harness.reference.engine.draws import Draws
from harness.reference.engine.proposal import (
    Proposal,
    Proposer,
    Unfinished,
    certain,
    ended,
    until_end,
    useful,
)
from harness.reference.engine.sampling import NoToken, Sampler
from harness.reference.engine.values import Request, Speculation
from harness.reference.engine.verification import Verifier
from harness.reference.model import ReferenceModel


class PromptLookup:
    """Proposes what followed the last n-gram where it stood before; nothing where it is new."""

    def __init__(self, ngram: int, vocab_size: int) -> None:
        self.ngram, self.vocab_size = ngram, vocab_size

    def propose(self, sequence: Unfinished, count: int, draws: Draws) -> Proposal:  # noqa: ARG002
        """Certain tokens: nothing is drawn."""
        request = sequence.request
        found = self.following((*request.prompt, *sequence.generated), useful(sequence, count))
        return certain(until_end(request, found), self.vocab_size)

    def following(self, tokens: tuple[int, ...], count: int) -> tuple[int, ...]:
        """At most `count` tokens that followed the latest earlier place of the longest n-gram at the end."""
        for n in range(min(self.ngram, len(tokens) - 1), 0, -1):
            for start in range(len(tokens) - n - 1, -1, -1):
                if tokens[start : start + n] == tokens[-n:]:
                    return tokens[start + n :][:count]
        return ()

    def forget(self, sequence: Unfinished) -> None:
        """It remembers nothing."""


class Drafter:
    """A model drafts token by token, with the request's own sampling."""

    def __init__(self, reader: Reads, sampler: Sampler, vocab_size: int) -> None:
        self.reader, self.sampler, self.vocab_size = reader, sampler, vocab_size

    def propose(self, sequence: Unfinished, count: int, draws: Draws) -> Proposal:
        """Each token is drawn from the draft's law after those before it, until the draft has none."""
        request, tokens, laws = sequence.request, list[int](), list[Tensor]()
        while len(tokens) < useful(sequence, count) and not ended(request, tokens):
            generated = (*sequence.generated, *tokens)
            try:
                logits = self.reader.read(sequence.index, (*request.prompt, *generated))[-1]
                q = self.law(logits, request, generated)
            except NoToken:
                break
            tokens.append(self.choose(q, draws))
            laws.append(q)
        return Proposal(tuple(tokens), torch.stack(laws) if laws else no_laws(self.vocab_size))

    def law(self, logits: Tensor, request: Request, generated: Sequence[int]) -> Tensor:
        """Probabilities [V] of the draft's next token: what it is drawn from, and what is reported."""
        return self.sampler.distribution(logits, request, generated)

    def choose(self, q: Tensor, draws: Draws) -> int:
        """A token by the draft's law."""
        return draws.choose(q)

    def forget(self, sequence: Unfinished) -> None:
        """Drops what the draft has cached of it."""
        self.reader.forget(sequence.index)


class Staged:
    """A draft that is itself speculated: the prompt proposes to the draft, the draft to the target.

    The draft verifies what the prompt proposes as the target verifies the draft's: what it passes on
    has the draft's own law (arXiv 2312.11462 calls this a cascade).
    """

    def __init__(self, reader: Reader, lookup: PromptLookup, sampler: Sampler) -> None:
        self.reader, self.lookup, self.sampler = reader, lookup, sampler
        self.verifier = Verifier()

    def propose(self, sequence: Unfinished, count: int, draws: Draws) -> Proposal:
        """Rounds of lookup and verification by the draft, until there are enough tokens."""
        request, tokens, laws = sequence.request, list[int](), list[Tensor]()
        while (wanted := useful(sequence, count) - len(tokens)) > 0 and not ended(request, tokens):
            generated = (*sequence.generated, *tokens)
            text = (*request.prompt, *generated)
            guess = certain(until_end(request, self.lookup.following(text, wanted - 1)), self.vocab_size)
            try:
                logits = self.reader.read(sequence.index, text + guess.tokens, last=len(guess.tokens) + 1)
                q = self.verifier.targets(logits, request, generated, guess.tokens, self.sampler)
            except NoToken:
                break
            decided, _ = self.verifier.verify(guess, q, draws)
            decided = until_end(request, decided)
            tokens += decided
            laws += q[: len(decided)]
        return Proposal(tuple(tokens), torch.stack(laws) if laws else no_laws(self.vocab_size))

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.lookup.vocab_size

    def forget(self, sequence: Unfinished) -> None:
        """Drops what the draft has cached of it."""
        self.reader.forget(sequence.index)


def no_laws(vocab_size: int) -> Tensor:
    """The laws [0, V] of no tokens."""
    return torch.zeros(0, vocab_size, dtype=torch.float64)


def make(
    speculation: Speculation, target: ReferenceModel, draft: ReferenceModel | None, sampler: Sampler
) -> Proposer:
    """The proposer of a method. Raises ValueError where something that it needs is missing or wrong."""
    check(speculation, target, draft)
    vocab_size = target.architecture.vocab_size
    lookup = PromptLookup(speculation.ngram, vocab_size)
    match speculation.method:
        case "prompt_lookup":
            return lookup
        case "self_draft":
            return Drafter(Reader(target, target), sampler, vocab_size)
        case "early_exit":
            return Drafter(Reader(target, FirstLayers(target, speculation.layers)), sampler, vocab_size)
    assert draft is not None  # checked above
    reader = Reader(draft, draft)
    match speculation.method:
        case "universal":
            return Drafter(Translated(reader, speculation.vocabulary, vocab_size), sampler, vocab_size)
        case "staged":
            return Staged(reader, lookup, sampler)
        case "draft_model":
            return Drafter(reader, sampler, vocab_size)


def check(speculation: Speculation, target: ReferenceModel, draft: ReferenceModel | None) -> None:
    """Raise ValueError where a speculation contradicts itself or its models."""
    s, a, method = speculation, target.architecture, f'speculation by "{speculation.method}"'
    if s.length < 1 or s.ngram < 1:
        raise ValueError(f"speculation.length is {s.length} and ngram {s.ngram}; each must be at least 1")
    if s.method == "early_exit" and not 1 <= s.layers <= a.n_layers:
        raise ValueError(f"speculation.layers is {s.layers}; it must be from 1 to {a.n_layers}")
    if s.method in ("prompt_lookup", "self_draft", "early_exit"):
        return
    if draft is None:
        raise ValueError(f"{method} needs a draft model, and none was loaded")
    drafted = draft.architecture.vocab_size
    if s.method != "universal" and drafted != a.vocab_size:
        raise ValueError(f"{method} needs one vocabulary; the draft has {drafted} tokens, not {a.vocab_size}")
    if s.method == "universal" and len(s.vocabulary) != drafted:
        have = len(s.vocabulary)
        raise ValueError(f"speculation.vocabulary has {have} entries; it needs one for each of {drafted}")
    if any(token >= a.vocab_size for token in s.vocabulary):
        raise ValueError(
            f"speculation.vocabulary leads to {max(s.vocabulary)}; the target has {a.vocab_size}"
        )
