"""transformers' own `generate` under test: plain, and assisted in each way that it offers.

Letters: V vocabulary, S tokens, B requests. Nothing here repairs the engine: an answer is what it returned,
cut at the token or the sequence that ended it, and an exception is passed on.

Where transformers means something else than `Sampling` says: it casts logits to float32; which of
equally probable tokens top_p keeps is left to an unstable sort; one call has one GenerationConfig and
one random stream, so that requests with different settings are generated one group after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from harness.implementations.protocols import Session, Unsupported
from harness.implementations.transformers import continuous, words
from harness.implementations.transformers.library import library
from harness.reference.engine import Completion, Limits, Request, Sampling, Speculation
from harness.spec.architecture import Architecture

SETTINGS = frozenset(
    (
        *("logit_bias", "repetition_penalty", "temperature", "top_k", "top_p", "min_p"),
        *("eos", "stop", "min_tokens", "logprobs"),
    )
)
METHODS = frozenset(("draft_model", "self_draft", "early_exit", "prompt_lookup", "universal", "staged"))


@dataclass
class Tally:
    """What speculation did in one call, seen at the candidate generator."""

    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    pending: list[int] = field(default_factory=list)
    """The sequence that was last proposed."""
    before: int = 0
    """How much of it was there before."""

    def watch(self, candidates: Any) -> Any:
        """The same candidate generator, counted."""
        propose, update = candidates.get_candidates, candidates.update_candidate_strategy

        def get_candidates(input_ids: Tensor, *rest: Any, **kwargs: Any) -> Any:
            proposed = propose(input_ids, *rest, **kwargs)
            self.pending = proposed[0][0].tolist()
            self.drafted += len(self.pending) - input_ids.shape[1]
            self.before = input_ids.shape[1]
            self.rounds += 1
            return proposed

        def update_candidate_strategy(input_ids: Tensor, *rest: Any, **kwargs: Any) -> Any:
            # transformers' own count of matches leaves out a drafted token that ends the sequence
            decided = input_ids[0, self.before :].tolist()
            for ours, theirs in zip(self.pending[self.before :], decided, strict=False):
                if ours != theirs:
                    break
                self.accepted += 1
            return update(input_ids, *rest, **kwargs)

        candidates.get_candidates = get_candidates
        candidates.update_candidate_strategy = update_candidate_strategy
        return candidates


@dataclass
class Generation:
    """The decoding side of one module of transformers."""

    module: Any
    vocab_size: int
    make_draft: Callable[[Architecture, Mapping[str, Tensor]], nn.Module]
    generator: torch.Generator
    """Its stream is put into torch's global generator for a call, and taken back after it."""
    draft: Any = None

    def __post_init__(self) -> None:
        # What the config of a family suggests (an EOS id, a top_k) is no part of a request.
        self.module.generation_config = library().GenerationConfig()

    @property
    def settings(self) -> frozenset[str]:
        """Fields of Sampling and Request that are honoured."""
        return SETTINGS

    @property
    def serve_settings(self) -> frozenset[str]:
        """Those that continuous batching honours."""
        return continuous.SETTINGS

    @property
    def methods(self) -> frozenset[str]:
        """Kinds of speculation that are offered."""
        return METHODS

    def load_draft(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
        """Make the assistant model, of the same family."""
        self.draft = self.make_draft(architecture, weights)
        self.draft.generation_config = library().GenerationConfig()

    def generate(
        self, requests: Sequence[Request], *, speculation: Speculation | None = None
    ) -> list[Completion]:
        """One completion per request, in order. Requests of equal settings are one left-padded batch; with
        speculation, which transformers has for one sequence at a time, each is a call of its own."""
        for request in requests:
            require_expressible(request, SETTINGS)
            if not request.prompt:
                raise ValueError("transformers generates from one token or more: this prompt is empty")
        done: dict[int, Completion] = {}
        if speculation is not None:
            how = self._assistance(speculation)
            for index, request in enumerate(requests):
                done[index] = self._assisted(request, how)
        else:
            order = sorted(range(len(requests)), key=lambda i: repr(_settings(requests[i])))
            for _, group in groupby(order, key=lambda i: repr(_settings(requests[i]))):
                members = list(group)
                completions = self._call([requests[i] for i in members], {})
                done.update(zip(members, completions, strict=True))
        return [done[index] for index in range(len(requests))]

    def start(self, limits: Limits | None = None, *, speculation: Speculation | None = None) -> Session:
        """A session of continuous batching."""
        if speculation is not None:
            raise Unsupported("transformers' continuous batching does not speculate")
        return continuous.start(self.module, limits, self.generator)

    def _assisted(self, request: Request, how: dict[str, Any]) -> Completion:
        tally, choose = Tally(), self.module._get_candidate_generator  # noqa: SLF001  # no public hook
        self.module._get_candidate_generator = lambda *a, **k: tally.watch(choose(*a, **k))  # noqa: SLF001
        try:
            (completion,) = self._call([request], how)
        finally:
            del self.module._get_candidate_generator  # noqa: SLF001
        return replace(completion, drafted=tally.drafted, accepted=tally.accepted, rounds=tally.rounds)

    def _assistance(self, speculation: Speculation) -> dict[str, Any]:
        """Arguments of `generate`; how many tokens to draft is read from the assistant's own config."""
        method, length = speculation.method, speculation.length
        if method == "prompt_lookup":
            return {"prompt_lookup_num_tokens": length, "max_matching_ngram_size": speculation.ngram}
        assistant = self.module if method in ("self_draft", "early_exit") else self.draft
        if assistant is None:
            raise Unsupported(f"{method} needs a draft model: load_draft was not called")
        config = library().GenerationConfig(
            num_assistant_tokens=length,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        assistant.generation_config = config
        if method == "early_exit":
            return {"assistant_early_exit": speculation.layers}
        if method == "staged":
            config.prompt_lookup_num_tokens = length
            config.max_matching_ngram_size = speculation.ngram
        if method == "universal":
            theirs = int(assistant.config.vocab_size)
            if theirs == self.vocab_size:
                raise Unsupported("transformers takes two vocabularies of one size for the same")
            if len(speculation.vocabulary) != theirs:
                raise Unsupported(
                    f"the draft has {theirs} tokens, and vocabulary maps {len(speculation.vocabulary)}"
                )
            return {
                "assistant_model": assistant,
                "tokenizer": words.tokenizer(range(self.vocab_size)),
                "assistant_tokenizer": words.tokenizer(speculation.vocabulary),
            }
        return {"assistant_model": assistant}

    def _call(self, requests: Sequence[Request], assistance: dict[str, Any]) -> list[Completion]:
        device = next(self.module.parameters()).device
        first = requests[0]
        width = max(len(r.prompt) for r in requests)
        # Of one's own choosing it would hide itself: a draft leaves out what equals it, in the prompt too.
        pad = first.eos[0] if first.eos else None
        rows = [[pad or 0] * (width - len(r.prompt)) + list(r.prompt) for r in requests]
        mask = [[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in requests]
        config = library().GenerationConfig(
            max_new_tokens=max(r.max_tokens for r in requests),
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_logits=first.logprobs,
            **_config(first),
        )
        more = dict(assistance)
        if first.stop:
            more.setdefault("tokenizer", words.tokenizer(range(self.vocab_size), probe=words.PROBE))
        with borrowed(self.generator), torch.no_grad():
            output = self.module.generate(
                torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
                **_fields(config, more),
            )
        logits = (
            torch.stack(output.logits, 1).log_softmax(-1, dtype=torch.float64) if first.logprobs else None
        )
        generated = output.sequences[:, width:].tolist()
        return [
            ended(r, tokens, None if logits is None else logits[i].tolist())
            for i, (r, tokens) in enumerate(zip(requests, generated, strict=True))
        ]


def _fields(config: Any, more: dict[str, Any]) -> dict[str, Any]:
    """Put what belongs there into the config; what is left are arguments of `generate`."""
    rest = {}
    for name, value in more.items():
        if hasattr(config, name):
            setattr(config, name, value)
        else:
            rest[name] = value
    return rest


def _settings(request: Request) -> Request:
    return replace(request, prompt=(), max_tokens=0, salt="")


def _config(request: Request) -> dict[str, Any]:
    """The fields of a GenerationConfig. All are said, for what is left out has defaults (top_k = 50)."""
    sampling = request.sampling
    said: dict[str, Any] = {
        "eos_token_id": list(request.eos) or None,
        "min_new_tokens": request.min_tokens or None,
        "repetition_penalty": sampling.repetition_penalty,
        "do_sample": sampling.temperature > 0,
    }
    if sampling.logit_bias:
        said["sequence_bias"] = {(token,): bias for token, bias in sampling.logit_bias}
    if request.stop:
        said["stop_strings"] = [words.text(sequence) for sequence in request.stop]
    if sampling.temperature > 0:
        said |= {
            "temperature": sampling.temperature,
            "top_k": max(sampling.top_k, 0),
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
        }
    return said


def require_expressible(request: Request, settings: frozenset[str]) -> None:
    """Raises Unsupported naming a field that is not at its default and not among `settings`."""
    for values, defaults in ((request, Request((), 1)), (request.sampling, Sampling())):
        for item in fields(values):
            if item.name in ("prompt", "max_tokens", "sampling", "salt") or item.name in settings:
                continue
            if getattr(values, item.name) != getattr(defaults, item.name):
                raise Unsupported(f"transformers cannot express {item.name} per request")


def ended(request: Request, tokens: Sequence[int], logprobs: Sequence[Sequence[float]] | None) -> Completion:
    """A completion out of what was generated: cut at the end, at padding, or at max_tokens of a batch."""
    kept, reason = list(tokens[: request.max_tokens]), "length"
    for position, token in enumerate(kept):
        if token in request.eos:
            kept, reason = kept[:position], "stop"
            break
        found = [s for s in request.stop if tuple(kept[: position + 1][-len(s) :]) == s]
        if found:
            # only where the engine went no further than to pad: text after a stop sequence is not hidden
            if all(after == request.eos[:1] for after in zip(kept[position + 1 :])):
                kept, reason = kept[: position + 1 - max(map(len, found))], "stop"
            break
    values = None
    if logprobs is not None:
        values = tuple(row[token] for row, token in zip(logprobs, kept, strict=False))
    return Completion(tuple(kept), "stop" if reason == "stop" else "length", logprobs=values)


@contextmanager
def borrowed(generator: torch.Generator) -> Iterator[None]:
    """torch's global generator continues the stream of `generator` in here, for engines that take none."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(torch.default_generator.get_state())
