"""One pass of a model over the tokens of several sequences at once, counted by what sets its time.

Letters: B sequences, S new tokens of each, C tokens of each already cached, W attention window.

Every count may be a number or an array that broadcasts with the others. Passes add up: a prefill chunk and
the decode steps that run beside it in one batch (SARATHI, arXiv 2308.16369) are one pass, their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from harness.spec.architecture import Architecture
from harness.theory.sharding import least, most


@dataclass(frozen=True)
class Pass:
    """Counts over all sequences and all data-parallel ranks together, where `spread` as if every rank had as
    much as the busiest."""

    tokens: Any
    """New tokens: what the matrices multiply."""
    sequences: Any
    """Tokens that reach the unembedding: one a sequence, or all that speculation verifies."""
    cached: Any
    """Tokens read from the caches of a full layer."""
    pairs: Any
    """Query-key pairs that the causal mask admits, per head of a full layer."""
    window_cached: Any = 0
    """The same two on a window layer."""
    window_pairs: Any = 0
    absorbed: Any = 0
    """Pairs of `pairs` that latent attention multiplies as latents: those of decoding."""
    expanded: Any = 0
    """Cached tokens whose latents a prefill chunk makes keys and values of again."""
    padding: Any = 0
    """Of `tokens`, those that only ranks without a request of their own seem to have."""

    @property
    def routed(self) -> Any:
        """Tokens that there are: what experts see that ranks share, and what users get."""
        return self.tokens - self.padding

    def __add__(self, other: Pass) -> Pass:
        return Pass(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Pass)))

    def divided(self, parts: Any) -> Pass:
        """One of so many equal parts: a microbatch."""
        return self.times(1 / parts)

    def spread(self, requests: Any, ranks: Any) -> Pass:
        """The pass of so many requests on data-parallel ranks, none of which shares a request with others.

        Of n requests the busiest of d ranks has max(1 / d, 1 / n). What is on one rank depends on it alone,
        so that all counts grow to d times its share; `routed` stays.
        """
        factor = most(ranks / most(requests, 1), 1)
        if isinstance(factor, int | float) and factor == 1:
            return self
        lumped = self.times(factor)
        return replace(lumped, padding=lumped.tokens - self.routed)

    def times(self, factor: Any) -> Pass:
        """So many of it."""
        return Pass(*(getattr(self, one.name) * factor for one in fields(Pass)))


NOTHING = Pass(0, 0, 0, 0)
"""The pass of no tokens."""


def decode(architecture: Architecture, batch: Any, context: Any, tokens: Any = 1) -> Pass:
    """B sequences with `context` cached tokens take `tokens` more each: 1, or g + 1 where g were drafted.

    All of them reach the unembedding. A mean context serves as well as the contexts themselves: every count
    of a full layer is linear in it.
    """
    pairs, near, read = _pairs(architecture, tokens, context)
    return Pass(
        tokens=batch * tokens,
        sequences=batch * tokens,
        cached=batch * context,
        pairs=batch * pairs,
        window_cached=batch * read,
        window_pairs=batch * near,
        absorbed=batch * pairs,
    )


def prefill(architecture: Architecture, batch: Any, prompt: Any, cached: Any = 0) -> Pass:
    """B prompts of `prompt` tokens, each after `cached` ones in its cache (a shared prefix, earlier chunks).

    Only the last token of each reaches the unembedding.
    """
    pairs, near, read = _pairs(architecture, prompt, cached)
    return Pass(
        tokens=batch * prompt,
        sequences=batch,
        cached=batch * cached,
        pairs=batch * pairs,
        window_cached=batch * read,
        window_pairs=batch * near,
        expanded=batch * cached,
    )


def chunks(architecture: Architecture, prompt: int, chunk: int) -> Iterator[Pass]:
    """One prompt in passes of at most `chunk` tokens, each on the cache that those before it filled.

    Tokens and pairs add up to those of the whole prefill; what is read from the cache grows as the square of
    the number of chunks. Raises ValueError where a chunk holds nothing.
    """
    if chunk < 1:
        raise ValueError(f"a chunk of {chunk} tokens holds nothing; give at least 1")
    for start in range(0, prompt, chunk):
        yield prefill(architecture, 1, min(chunk, prompt - start), start)


def _pairs(architecture: Architecture, queries: Any, cached: Any) -> tuple[Any, Any, Any]:
    """Of one sequence: pairs on a full layer, pairs on a window layer, cached tokens that a window reads."""
    window = architecture.attention.window
    full = queries * cached + queries * (queries + 1) / 2
    if window is None:
        return full, full, cached
    return (
        full,
        triangle(cached + queries, window) - triangle(cached, window),
        least(cached, window - 1),
    )


def triangle(n: Any, window: int) -> Any:
    """The sum of min(i, W) for i = 1 .. n, as in `flops.admitted_pairs`."""
    inside = least(n, window)
    return inside * (inside + 1) / 2 + (n - inside) * inside
