"""Models that draft, each with a cache of its own.

Letters: S new tokens, U vocabulary of the draft, V of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from harness.reference.engine.sampling import NoToken
from harness.reference.model import ReferenceModel, place
from harness.reference.trace import Cache, LayerCache


class Extends(Protocol):
    """A model that goes on from a cache, as ReferenceModel does."""

    def extend(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits [1, S, U] of the next S tokens [1, S], and the cache after them."""


class Reads(Protocol):
    """What a drafter needs: logits of a whole sequence, however they come about."""

    def read(self, key: int, tokens: Sequence[int]) -> Tensor:
        """Logits [1, V] of what follows the tokens of sequence `key`. Raises NoToken where there are none."""

    def forget(self, key: int) -> None:
        """Nothing is remembered of a sequence."""


class FirstLayers:
    """The first layers of a model, with its final norm and unembedding (early exit)."""

    def __init__(self, model: ReferenceModel, layers: int) -> None:
        self.model, self.layers = model, layers

    def extend(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits [1, S, U] and the cache of the first layers."""
        context = place(tokens, cache, None, None)
        x = self.model.embed(tokens, context.positions)
        caches: list[LayerCache] = []
        for i, block in enumerate(self.model.blocks[: self.layers]):
            x, layer_cache, _ = block(x, context, None if cache is None else cache.layers[i])
            caches.append(layer_cache)
        return self.model.unembed(x), Cache(tuple(caches), context.real)


@dataclass(frozen=True)
class Remembered:
    """What a model has read of one sequence."""

    tokens: tuple[int, ...]
    cache: Cache


class Reader:
    """A model that reads growing, and sometimes shrinking, sequences without reading anything twice."""

    def __init__(self, whole: ReferenceModel, model: Extends) -> None:
        """model: `whole`, or the part of it that reads."""
        self.model = model
        self.context = whole.architecture.max_positions
        self.device = next(whole.parameters()).device
        self.memory: dict[int, Remembered] = {}

    def read(self, key: int, tokens: Sequence[int], last: int = 1) -> Tensor:
        """Logits [last, U] of what follows each of the last tokens of a sequence.

        Raises NoToken for a sequence that the model cannot read: empty, or longer than its context.
        """
        if not last <= len(tokens) <= self.context:
            have, most = len(tokens), self.context
            raise NoToken(f"a sequence of {have} tokens cannot be drafted for; {last} to {most} can be read")
        kept = self.rollback(self.memory.get(key), tokens[: len(tokens) - last])
        done = 0 if kept is None else len(kept.tokens)
        fresh = torch.tensor([list(tokens[done:])], device=self.device)
        with torch.no_grad():
            logits, cache = self.model.extend(fresh, None if kept is None else kept.cache)
        self.memory[key] = Remembered(tuple(tokens), cache)
        return logits[0, -last:].cpu()

    def rollback(self, memory: Remembered | None, tokens: Sequence[int]) -> Remembered | None:
        """What was read of `tokens` before: rejected drafts and what was read after them are cut off."""
        if memory is None:
            return None
        length = agreement(memory.tokens, tokens)
        return Remembered(memory.tokens[:length], cut(memory.cache, length)) if length else None

    def forget(self, key: int) -> None:
        """Nothing is remembered of a sequence."""
        self.memory.pop(key, None)


class Translated:
    """A draft whose token ids differ from the target's.

    Its own text is the sequence without the tokens that it lacks. Its law is passed on over the target's
    ids: what lies on tokens that the target lacks is dropped, and the rest normalised by the sampler.
    """

    def __init__(self, reader: Reader, vocabulary: Sequence[int], vocab_size: int) -> None:
        """vocabulary: the target's id of each of the draft's U tokens, negative for one that it lacks."""
        self.reader, self.vocab_size = reader, vocab_size
        self.vocabulary = tuple(vocabulary)
        self.own = {theirs: own for own, theirs in reversed(list(enumerate(self.vocabulary))) if theirs >= 0}

    def read(self, key: int, tokens: Sequence[int]) -> Tensor:
        """Logits [1, V], -inf where the draft has no such token."""
        known = [self.own[token] for token in tokens if token in self.own]
        return self.translate(self.reader.read(key, known))

    def translate(self, logits: Tensor) -> Tensor:
        """Logits [n, U] of the draft to log probabilities [n, V]; tokens that become one add up."""
        theirs = torch.tensor(self.vocabulary)
        q = logits.to(torch.float64).softmax(-1)[:, theirs >= 0]
        return q.new_zeros(len(q), self.vocab_size).index_add(1, theirs[theirs >= 0], q).log()

    def forget(self, key: int) -> None:
        """Nothing is remembered of a sequence."""
        self.reader.forget(key)


def agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def cut(cache: Cache, length: int) -> Cache:
    """The cache as it was after its first `length` tokens."""
    layers = tuple(replace(c, keys=c.keys[:, :length], values=c.values[:, :length]) for c in cache.layers)
    return Cache(layers, cache.real[:, :length])
