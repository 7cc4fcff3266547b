"""A model under test whose answers are what its Protocols say, or break the property that asked.

Letters: B sequences, S tokens per sequence, V vocabulary. Without this, an answer of another type or shape
would crash in the middle of a comparison, and read like a fault of the harness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import Tensor

from harness.conformance.clock import Clock, Timed
from harness.conformance.property import Violation
from harness.implementations.protocols import Routing
from harness.reference.engine import Completion, Request
from harness.reference.engine.values import FinishReason


class Malformed(Violation):
    """An answer is not what the Protocol says that it is."""


class Checked:
    """A model, with the type and shape of every answer checked. Values are for the properties to judge.

    Every method raises Malformed where the model does not have it, or gives something else. The time in its
    methods, and in those of its sessions, is on `clock`.
    """

    def __init__(self, model: Any, clock: Clock | None = None) -> None:
        self._model, self._clock = model, clock or Clock()

    def __getattr__(self, name: str) -> Any:
        return self._clock.timed(getattr(self._model, name))

    def start(self, *arguments: Any, **options: Any) -> Any:
        """A fresh engine, whose methods are on the clock."""
        return Timed(self._call("start", *arguments, **options), self._clock)

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Logits [B, S, V] of tokens [B, S]."""
        return self._logits("forward", self._call("forward", tokens, **options), tokens)

    def extend(self, tokens: Tensor, cache: Any | None, **options: Any) -> tuple[Tensor, Any]:
        """Logits [B, S, V] of the next tokens [B, S], and the cache after them."""
        return self._extended("extend", tokens, self._call("extend", tokens, cache, **options))

    def see(self, tokens: Tensor, features: Tensor, visible: Tensor, **options: Any) -> Tensor:
        """Logits [B, S, V] of tokens [B, S] with images."""
        return self._logits("see", self._call("see", tokens, features, visible, **options), tokens)

    def see_on(
        self, tokens: Tensor, cache: Any | None, visible: Tensor, **options: Any
    ) -> tuple[Tensor, Any]:
        """Logits [B, S, V] of the next tokens [B, S] with images, and the cache after them."""
        return self._extended("see_on", tokens, self._call("see_on", tokens, cache, visible, **options))

    def routing(self, tokens: Tensor, **options: Any) -> Sequence[Routing]:
        """One trace per MoE layer; the shapes of its stages are compared stage by stage."""
        answer = self._call("routing", tokens, **options)
        traces = isinstance(answer, Sequence) and all(
            isinstance(getattr(one, "indices", None), Tensor) for one in answer
        )
        _require(traces, f"routing gave {_shown(answer)}, not a list of Routing with indices")
        found: Sequence[Routing] = answer
        return found

    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors by name."""
        return _tensors("parameters", self._call("parameters"))

    def gradients(self, loss: Tensor) -> Mapping[str, Tensor]:
        """Tensors by the names of the parameters."""
        return _tensors("gradients", self._call("gradients", loss))

    def auxiliary_loss(self, tokens: Tensor, **options: Any) -> Mapping[str, Tensor]:
        """Scalars by kind."""
        losses = _tensors("auxiliary_loss", self._call("auxiliary_loss", tokens, **options))
        for kind, loss in losses.items():
            _require(loss.dim() == 0, f"auxiliary_loss gave {_shown(loss)} as {kind}, not a scalar")
        return losses

    def generate(self, requests: Sequence[Request], **options: Any) -> Sequence[Completion]:
        """One completion per request, of tokens of the vocabulary."""
        answers = self._call("generate", requests, **options)
        right = isinstance(answers, Sequence) and len(answers) == len(requests)
        _require(
            right, f"generate gave {_shown(answers)}, not one completion for each of {len(requests)} requests"
        )
        for i, answer in enumerate(answers):
            _completion(f"generate gave, for request {i},", answer, self._model.vocab_size)
        found: Sequence[Completion] = answers
        return found

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        found = getattr(self._model, method, None)
        _require(callable(found), f"the model declares more than it has: there is no method {method}")
        assert found is not None
        with self._clock.running():
            return found(*arguments, **options)

    def _extended(self, method: str, tokens: Tensor, answer: Any) -> tuple[Tensor, Any]:
        pair = isinstance(answer, tuple) and len(answer) == 2
        _require(pair, f"{method} gave {_shown(answer)}, not a pair of logits and cache")
        return self._logits(method, answer[0], tokens), answer[1]

    def _logits(self, method: str, answer: Any, tokens: Tensor) -> Tensor:
        want = (*tokens.shape, self._model.vocab_size)
        right = isinstance(answer, Tensor) and answer.shape == want and answer.is_floating_point()
        _require(right, f"{method} gave {_shown(answer)}, not logits of shape {want}")
        logits: Tensor = answer
        return logits


def _completion(what: str, answer: Any, vocab_size: int) -> None:
    """Raise Malformed unless it is a Completion whose fields are of their types."""
    _require(isinstance(answer, Completion), f"{what} {_shown(answer)}, not a Completion")
    tokens, logprobs = answer.tokens, answer.logprobs
    known = isinstance(tokens, tuple) and all(type(t) is int and 0 <= t < vocab_size for t in tokens)
    _require(known, f"{what} tokens {tokens!r}, not a tuple of ids from 0 to {vocab_size - 1}")
    named = answer.finish_reason in get_args(FinishReason)
    _require(named, f"{what} finish_reason {answer.finish_reason!r}, not one of {get_args(FinishReason)}")
    paired = logprobs is None or (isinstance(logprobs, tuple) and all(isinstance(x, float) for x in logprobs))
    _require(paired, f"{what} logprobs {_shown(logprobs)}, not a tuple of floats or None")
    for name in ("drafted", "accepted", "rounds", "cached_tokens", "preemptions"):
        count = getattr(answer, name)
        _require(type(count) is int and count >= 0, f"{what} {name} {count!r}, not a number from 0")


def _tensors(method: str, answer: Any) -> Mapping[str, Tensor]:
    right = isinstance(answer, Mapping) and all(isinstance(value, Tensor) for value in answer.values())
    _require(right, f"{method} gave {_shown(answer)}, not tensors by name")
    tensors: Mapping[str, Tensor] = answer
    return tensors


def _shown(answer: object) -> str:
    """An answer by its type, and a tensor by its shape."""
    if isinstance(answer, Tensor):
        return f"{str(answer.dtype).removeprefix('torch.')} of shape {tuple(answer.shape)}"
    return "None" if answer is None else f"a {type(answer).__name__}"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise Malformed(message)
