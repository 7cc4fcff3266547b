"""What is asked of an engine, and what it answers.

Letters: V vocabulary. Token ids are 0 .. V - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
Method = Literal["draft_model", "self_draft", "early_exit", "prompt_lookup", "universal", "staged"]
Batching = Literal["continuous", "static"]


@dataclass(frozen=True)
class Grammar:
    """A finite automaton over token ids: which may come, and where each leads. It starts in state 0."""

    states: tuple[tuple[tuple[int, int], ...], ...]
    """Per state, pairs of an allowed token and the state after it. In a state without pairs all tokens are
    allowed, and the state remains."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. The fields apply in the order in which they stand here.

    Penalties see the prompt and what was generated (repetition), or only what was generated (presence,
    frequency). After all of them the probabilities are normalised once.
    """

    grammar: Grammar | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen before: divided by it where positive, else multiplied (arXiv 1909.05858,
    eq. 1, as implemented by its authors)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens generated before."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens generated before, once for each time."""
    temperature: float = 1.0
    """Divides the logits. 0 is greedy: the largest logit, among equals the smallest token id."""
    top_k: int = 0
    """Only the k largest logits, and all that equal the k-th; 0 or less: all."""
    top_p: float = 1.0
    """The smallest set of most probable tokens whose probabilities sum to top_p or more; at least one token
    (arXiv 1904.09751, section 3.1). Among equals the smaller token ids come first."""
    min_p: float = 0.0
    """Only tokens at least min_p times as probable as the most probable one (arXiv 2407.01082)."""
    seed: int | None = None
    """The same seed gives the same tokens in any company; None draws from the engine's own generator."""


@dataclass(frozen=True)
class Request:
    """One prompt to be continued."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    eos: tuple[int, ...] = ()
    """Tokens that end the completion; they are not part of it."""
    stop: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that end the completion; they are not part of it."""
    min_tokens: int = 0
    """Before so many tokens the tokens of `eos` have probability 0."""
    logprobs: bool = False
    """Whether the completion gives the log probability of each token."""
    salt: str = ""
    """Cached prefixes are shared among requests of the same salt only (a tenant, an adapter)."""


@dataclass(frozen=True)
class Completion:
    """What became of one request."""

    tokens: tuple[int, ...]
    """Without the token or the sequence that ended it."""
    finish_reason: FinishReason
    """stop: a token of `eos` or a sequence of `stop`; length: max_tokens, or the context is full."""
    logprobs: tuple[float, ...] | None = None
    """Natural logarithm of each token's probability under the softmax of the model's own logits, before
    anything of `Sampling`."""
    error: str = ""
    """Why it could not be served: a sentence, with finish_reason "error"."""
    drafted: int = 0
    """Tokens that were proposed for it and verified."""
    accepted: int = 0
    """Those among them that stand in `tokens`, or that ended it."""
    rounds: int = 0
    """Passes of the target model that decided tokens of this request."""
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were found in the cache."""
    preemptions: int = 0
    """How often it lost its pages and was computed anew."""


@dataclass(frozen=True)
class Speculation:
    """Speculative decoding: something cheap proposes tokens, one pass of the target verifies them
    (arXiv 2211.17192, algorithm 1; arXiv 2302.01318, algorithm 2)."""

    method: Method = "draft_model"
    """draft_model: the loaded draft. self_draft: the target itself. early_exit: its first `layers` layers.
    prompt_lookup: what followed the last n-gram before. universal: a draft whose token ids differ, by
    `vocabulary`. staged: the draft is itself speculated, by prompt lookup."""
    length: int = 2
    """Tokens proposed per round at most (gamma)."""
    ngram: int = 2
    """prompt_lookup: longest n-gram looked for; shorter ones after it."""
    layers: int = 1
    """early_exit: layers of the target before its final norm and unembedding."""
    vocabulary: tuple[int, ...] = ()
    """universal: the target's token id for each of the draft's; target tokens that are absent are never
    proposed."""


@dataclass(frozen=True)
class Limits:
    """The size of an engine."""

    sequences: int = 4
    """Slots: requests that run at the same time."""
    page_size: int = 4
    """Tokens whose keys and values one page holds."""
    pages: int = 256
    chunk: int = 64
    """Tokens per iteration at most, decoding first, the rest of it for prefill."""
    batching: Batching = "continuous"
    """static: a batch is admitted when all slots are free, and holds them until its last request ends."""
    prefix_sharing: bool = True


@dataclass(frozen=True)
class Arrival:
    """A request and when it comes."""

    request: Request
    at: float = 0.0
    """Iterations of an engine in this process; seconds for a server."""
    cancel_after: int | None = None
    """Its client goes away after so many tokens (0: as soon as it was accepted)."""
    cancel_at: float | None = None
    """Its client goes away at that time, in the unit of `at`, whatever was computed by then."""


@dataclass(frozen=True)
class Iteration:
    """One pass of the target model in an engine, as it happened."""

    running: tuple[int, ...]
    """Arrivals (by their index) that hold a slot; -1 for a slot held by a batch whose request has ended."""
    waiting: int
    """Arrivals that are there and hold none."""
    prefill_tokens: int
    decode_tokens: int
    """Tokens fed to the target: prompts (and recomputation), and generated or drafted ones."""
    pages_used: int
    preempted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Served:
    """What an engine made of arrivals."""

    completions: Sequence[Completion]
    """In the order of the arrivals."""
    timeline: Sequence[Iteration] = field(default=())
    """Empty where the engine does not show it."""


@dataclass(frozen=True)
class Streamed:
    """A completion as its client saw it come. Times are those of time.perf_counter, in seconds."""

    completion: Completion
    sent_at: float
    """Just before the request was sent."""
    chunks: tuple[tuple[float, int], ...]
    """When each chunk came, and the tokens in it. Chunks without tokens are left out."""
    ended_at: float
    """When the last byte, or the error, had come."""
