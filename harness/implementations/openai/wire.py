"""Requests and completions as JSON of /v1/completions, both ways.

Fields that OpenAI's reference documents go out under its names; extensions under those of vLLM, or of
llama.cpp where that answers. Neutral values are sent too: servers have defaults of their own for top_k or
min_p.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from harness.implementations.openai.transport import Failure
from harness.implementations.openai.vocabulary import Vocabulary
from harness.implementations.protocols import Unsupported
from harness.reference.engine import Completion, Request, Sampling
from harness.reference.engine.values import FinishReason

STANDARD = (
    "temperature",
    "top_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "logprobs",
)
"""Settings whose fields OpenAI's reference of /v1/completions documents."""
EXTENSIONS = ("top_k", "min_p", "repetition_penalty", "min_tokens", "salt")
"""Settings whose fields some servers have."""
NAMES = {"salt": "cache_salt"}
LLAMA_CPP_NAMES = {"repetition_penalty": "repeat_penalty"}
"""The field of a setting, where its name differs."""


@dataclass(frozen=True)
class Offer:
    """What a server was found to take and to give."""

    model: str
    vocabulary: Vocabulary
    settings: frozenset[str]
    """Fields of Sampling and Request that go to the server."""
    refused: Mapping[str, str]
    """Why the others do not, by name: a sentence each."""
    id_prompts: bool = False
    """Prompts go out as token ids, not as text."""
    helpers: frozenset[str] = frozenset()
    """Fields that are no settings: return_token_ids, stop_token_ids, ignore_eos."""
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)


def body(request: Request, offer: Offer) -> dict[str, Any]:
    """The JSON that asks for `request`.

    Raises Unsupported for a setting that is not offered, ValueError for what cannot be told in text.
    """
    for owner, default in ((request, Request((), 0)), (request.sampling, Sampling())):
        for one in fields(owner):
            asked = one.name not in ("prompt", "max_tokens", "sampling") and one.name not in offer.settings
            if asked and getattr(owner, one.name) != getattr(default, one.name):
                raise Unsupported(offer.refused.get(one.name, f"the endpoint has no field for {one.name}"))
    sampling, text = request.sampling, offer.vocabulary.text
    sent: dict[str, Any] = {
        "model": offer.model,
        "prompt": list(request.prompt) if offer.id_prompts else text(request.prompt),
        "max_tokens": request.max_tokens,
    }
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        if name in offer.settings:
            sent[offer.names.get(name, name)] = getattr(sampling, name)
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name):
            sent[name] = getattr(sampling, name)
    if sampling.seed is not None:
        sent["seed"] = sampling.seed
    if sampling.logit_bias:
        sent["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    stop = [text(sequence) for sequence in request.stop]
    if "stop_token_ids" in offer.helpers:
        sent |= {"stop_token_ids": list(request.eos)} if request.eos else {}
    else:
        stop += [text((token,)) for token in request.eos]
    sent |= {"stop": stop} if stop else {}
    sent |= {name: True for name in ("ignore_eos", "return_token_ids") if name in offer.helpers}
    sent |= {"min_tokens": request.min_tokens} if request.min_tokens else {}
    sent |= {offer.names.get("salt", "salt"): request.salt} if request.salt else {}
    sent |= {"logprobs": 1} if request.logprobs else {}
    return sent


class Answer:
    """A completion as it comes in, whole or in pieces."""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self.tokens: list[int] = []
        self._logprobs: list[float] = []
        self._finish: Any = None
        self._counts: dict[str, int] = {}
        self._printed = True
        self._counted: int | None = None

    def add(self, piece: Any) -> int:
        """Take one answer or one event; how many tokens were in it. Raises Failure: it is no completion."""
        if not isinstance(piece, dict):
            raise Failure(f"the answer is a JSON {type(piece).__name__}, not an object")
        if piece.get("error"):
            raise Failure(f"the endpoint reports an error: {_message(piece['error'])}")
        choices = piece.get("choices")
        if not isinstance(choices, list) or len(choices) > 1 or not all(isinstance(c, dict) for c in choices):
            raise Failure("the answer has no list `choices` of one object")
        self._count(piece)
        return self._choice(choices[0]) if choices else 0

    def completion(self, request: Request) -> Completion:
        """What came, at its end. Raises Failure: the end is missing, or one that has no meaning here."""
        reasons: dict[Any, FinishReason] = {"stop": "stop", "length": "length"}
        if not isinstance(self._finish, str) or self._finish not in reasons:
            raise Failure(f"the answer ended with finish_reason {self._finish!r}, not 'stop' or 'length'")
        shown, exact = len(self.tokens), self._printed and self._offer.vocabulary.exact
        if exact and self._finish == "length" and self._counted not in (None, shown):
            raise Failure(f"the endpoint counts {self._counted} tokens, but its text shows {shown}")
        made = self.so_far(request, reasons[self._finish])
        return made if made.finish_reason == "length" else _without_end(made, request, ids=not self._printed)

    def so_far(self, request: Request, finish_reason: FinishReason, error: str = "") -> Completion:
        """What came until now."""
        logprobs = tuple(self._logprobs) if request.logprobs and self._logprobs else None
        return Completion(tuple(self.tokens), finish_reason, logprobs, error, **self._counts)

    def _choice(self, choice: dict[str, Any]) -> int:
        text, ids, before = choice.get("text"), choice.get("token_ids"), len(self.tokens)
        if isinstance(ids, list) and all(type(token) is int for token in ids):
            self.tokens += ids
            self._printed = False
        elif text is not None and not isinstance(text, str):
            raise Failure(f"the text of a choice is a JSON {type(text).__name__}, not a string")
        else:
            try:
                self.tokens += self._offer.vocabulary.tokens(text or "")
            except ValueError as error:
                raise Failure(str(error)) from None
        self._logprobs += _logprobs(choice.get("logprobs"))
        self._finish = choice.get("finish_reason") or self._finish
        return len(self.tokens) - before

    def _count(self, piece: dict[str, Any]) -> None:
        """llama.cpp counts drafts in `timings`; OpenAI the cached tokens in `usage`."""
        timings, usage = piece.get("timings"), piece.get("usage")
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        if isinstance(usage, dict) and type(usage.get("completion_tokens")) is int:
            self._counted = usage["completion_tokens"]
        for source, key, name in (
            (timings, "draft_n", "drafted"),
            (timings, "draft_n_accepted", "accepted"),
            (details, "cached_tokens", "cached_tokens"),
        ):
            if isinstance(source, dict) and type(source.get(key)) is int:
                self._counts[name] = source[key]


def _without_end(made: Completion, request: Request, *, ids: bool) -> Completion:
    """Less the token or sequence that ended it: token ids and logprobs include it, text does not."""
    count = len(made.tokens)
    endings = (*((token,) for token in request.eos), *request.stop) if ids else ()
    for ending in endings:
        if ending and made.tokens[-len(ending) :] == ending:
            count = len(made.tokens) - len(ending)
            break
    logprobs = None if made.logprobs is None else made.logprobs[:count]
    return replace(made, tokens=made.tokens[:count], logprobs=logprobs)


def _logprobs(found: Any) -> list[float]:
    """OpenAI's form {"token_logprobs": [...]}, or llama.cpp's {"content": [{"logprob": ...}]}."""
    if not isinstance(found, dict):
        return []
    values = found.get("token_logprobs")
    if values is None and isinstance(found.get("content"), list):
        values = [one.get("logprob") if isinstance(one, dict) else None for one in found["content"]]
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise Failure("the logprobs of a choice are no list of numbers")
    return [float(value) for value in values]


def _message(error: Any) -> str:
    said = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(said).split())[:200]
