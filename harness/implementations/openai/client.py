"""One endpoint and what it offers: requests in, completions out, from many threads at once.

The serving benchmark uses `stream(request) -> Streamed(completion, sent_at, chunks, ended_at)`, of a
session or of this class: `chunks` are pairs of the time at which a chunk came (time.perf_counter, seconds)
and the tokens in it. A request that fails ends with finish_reason "error", a sentence, and the tokens that
had come; only what is nobody's fault raises (Unsupported: a setting that is not offered, the budget of
requests spent).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from harness.implementations.openai.transport import Failure, Transport
from harness.implementations.openai.wire import Answer, Offer, body
from harness.reference.engine import Completion, Request, Streamed


@dataclass(frozen=True)
class Client:
    """Completions of one server."""

    transport: Transport
    offer: Offer

    def check(self, request: Request) -> None:
        """Raise Unsupported where `request` asks for what is not offered; nothing is sent."""
        _body(request, self.offer)

    def complete(self, request: Request) -> Completion:
        """The answer in one piece."""
        answer = Answer(self.offer)
        try:
            answer.add(self.transport.post("/completions", body(request, self.offer)))
            return answer.completion(request)
        except (Failure, ValueError) as error:
            return answer.so_far(request, "error", str(error))

    def stream(self, request: Request, *, cancel_after: int | None = None) -> Streamed:
        """The answer as server-sent events; after `cancel_after` tokens the connection is closed."""
        answer, chunks, sent_at = Answer(self.offer), [], time.perf_counter()
        completion: Completion | None = None
        try:
            asked = body(request, self.offer) | {"stream": True}
            with self.transport.events("/completions", asked) as events:
                for event in events if cancel_after != 0 else ():
                    if tokens := answer.add(event):
                        chunks.append((time.perf_counter(), tokens))
                    if cancel_after is not None and len(answer.tokens) >= cancel_after:
                        break
                if cancel_after is None or len(answer.tokens) < cancel_after:
                    completion = answer.completion(request)
                else:
                    completion = _cut(answer.so_far(request, "cancelled"), cancel_after)
        except (Failure, ValueError) as error:
            completion = answer.so_far(request, "error", str(error))
        return Streamed(completion, sent_at, tuple(chunks), time.perf_counter())


def _cut(completion: Completion, count: int) -> Completion:
    logprobs = None if completion.logprobs is None else completion.logprobs[:count]
    return replace(completion, tokens=completion.tokens[:count], logprobs=logprobs)


def _body(request: Request, offer: Offer) -> dict[str, Any] | None:
    try:
        return body(request, offer)
    except ValueError:
        return None
