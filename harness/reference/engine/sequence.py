"""The state of one request inside of an engine.

Letters: V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from harness.reference.engine.draws import Draws
from harness.reference.engine.values import Completion, FinishReason, Grammar, Request


@dataclass(eq=False)
class Sequence:
    """One request, what was generated for it, and how much of it the model has computed.

    It lives through preemption: only `pages` and `computed` are lost with its slot.
    """

    index: int
    """Unique in its engine, and larger than those of all that came before."""
    request: Request
    """With max_tokens at most what the context leaves."""
    draws: Draws
    arrival: int = 0
    """Its place among the arrivals of a run."""
    cancel_after: int | None = None
    generated: list[int] = field(default_factory=list)
    """Every token decided so far, those that ended it included."""
    pages: list[int] = field(default_factory=list)
    """Its pages in order: token i lies in the i // page_size-th."""
    computed: int = 0
    """Tokens, from the first on, whose keys and values lie in its pages."""
    served_at: int = 0
    """The last pass that computed tokens of it."""
    logprobs: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    completion: Completion | None = None

    @property
    def tokens(self) -> list[int]:
        """The prompt and what was generated."""
        return [*self.request.prompt, *self.generated]

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.request.prompt) + len(self.generated)

    @property
    def room(self) -> int:
        """Tokens that may still be generated."""
        return self.request.max_tokens - len(self.generated)

    def complete(self, reason: FinishReason, keep: int | None = None, error: str = "") -> None:
        """It ends, with the first `keep` of the generated tokens (default all)."""
        tokens = tuple(self.generated[:keep])
        self.completion = Completion(
            tokens,
            reason,
            tuple(self.logprobs[: len(tokens)]) if self.request.logprobs else None,
            error,
            self.drafted,
            self.accepted,
            self.rounds,
            self.cached_tokens,
            self.preemptions,
        )


def problem(request: Request, vocab_size: int, positions: int, slots: int) -> str:
    """Why a request cannot be served, as a sentence; empty where it can.

    positions: tokens of the longest context. slots: tokens whose keys and values the pool can hold.
    """
    prompt, wanted = len(request.prompt), request.max_tokens
    if not prompt:
        return "the prompt is empty; it needs at least one token"
    for name, tokens in (("prompt", request.prompt), ("eos", request.eos)):
        for token in tokens:
            if not 0 <= token < vocab_size:
                return f"{name}: token {token} is not in the vocabulary of 0 to {vocab_size - 1}"
    if wanted < 1:
        return f"max_tokens is {wanted}; it must be at least 1"
    if () in request.stop:
        return "stop: an empty sequence would end every completion; leave it out"
    if prompt >= positions:
        return f"the prompt has {prompt} tokens; a context of {positions} leaves at most {positions - 1}"
    need = min(prompt + wanted, positions) - 1  # the last token is never fed back
    if need > slots:
        return f"{prompt} tokens of prompt and max_tokens {wanted} need {need} slots; all pages have {slots}"
    return sampling_problem(request, vocab_size)


def sampling_problem(request: Request, vocab_size: int) -> str:
    """What is wrong with the request's Sampling, as a sentence; empty where nothing is."""
    s = request.sampling
    bounds = {
        "temperature": (s.temperature, s.temperature >= 0, "0 or more"),
        "repetition_penalty": (s.repetition_penalty, s.repetition_penalty > 0, "more than 0"),
        "presence_penalty": (s.presence_penalty, True, "a finite number"),
        "frequency_penalty": (s.frequency_penalty, True, "a finite number"),
        "top_p": (s.top_p, 0 <= s.top_p <= 1, "from 0 to 1"),
        "min_p": (s.min_p, 0 <= s.min_p <= 1, "from 0 to 1"),
    }
    for name, (value, inside, right) in bounds.items():
        if not (math.isfinite(value) and inside):
            return f"{name} is {value}; it must be {right}"
    for token, bias in s.logit_bias:
        if not 0 <= token < vocab_size:
            return f"logit_bias: token {token} is not in the vocabulary of 0 to {vocab_size - 1}"
        if math.isnan(bias) or bias == math.inf:
            return (
                f"logit_bias of token {token} is {bias}; it must be a number, or minus infinity to forbid it"
            )
    if s.grammar is not None and (why := grammar_problem(s.grammar, vocab_size)):
        return why
    if s.seed is not None and not 0 <= s.seed < 2**64:
        return f"seed is {s.seed}; it must be from 0 to 2^64 - 1"
    return ""


def grammar_problem(grammar: Grammar, vocab_size: int) -> str:
    """What is wrong with an automaton, as a sentence; empty where nothing is."""
    states = len(grammar.states)
    if not states:
        return "grammar: there are no states; it starts in state 0, so at least one is needed"
    for state, pairs in enumerate(grammar.states):
        for token, after in pairs:
            if not 0 <= token < vocab_size:
                return (
                    f"grammar, state {state}: token {token} is not in the vocabulary of 0 to {vocab_size - 1}"
                )
            if not 0 <= after < states:
                return f"grammar, state {state}: token {token} leads to {after}; states are 0 to {states - 1}"
    return ""
