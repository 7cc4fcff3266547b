"""An OpenAI-compatible server under test, by its address.

    openai:http://127.0.0.1:8000/v1[,model=NAME][,tokens=PATH][,plain=URL][,...]

    model=NAME        default: the first that GET /models lists
    tokens=PATH       JSON list of the tokens' strings by id, each a character (`moe-harness tiny` writes it);
                      tokens=text compares completions as text, where no better is to be had
    vocab=N           size of the vocabulary, for a server that takes and gives token ids
    plain=URL         the same server without speculation: requests without speculation go there
    method=NAME       the Speculation.method that the first server uses, with plain=; default draft_model
    without=A+B       settings that are not sent: one that would end the server
    prompts=tokens    or text; default: token ids where the server takes them
    timeout=30        seconds for one request, retries included
    requests=2000     at most, for one address; then the outcome is `unsupported`, and says so
    concurrency=16    at once

A server keeps its own model: it is compared with itself. The key is taken from the environment
(MOE_HARNESS_API_KEY, else OPENAI_API_KEY). `generate` asks for whole answers, `serve` for streams.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from harness.implementations.openai.client import Client
from harness.implementations.openai.probing import Unusable, probe
from harness.implementations.openai.transport import Budget, Failure, Transport
from harness.implementations.openai.vocabulary import Bytes, Table, Vocabulary
from harness.implementations.protocols import Capability, Unsupported
from harness.implementations.registry import AdapterError, did_you_mean
from harness.reference.engine import Arrival, Completion, Limits, Request, Served, Speculation, Streamed
from harness.reference.engine.values import Method
from harness.spec.architecture import Architecture

DEFAULTS = {
    "model": "",
    "tokens": "",
    "vocab": "0",
    "plain": "",
    "method": "draft_model",
    "without": "",
    "prompts": "",
    "timeout": "30",
    "requests": "2000",
    "concurrency": "16",
}
"""What may follow the URL."""
In = TypeVar("In")
Out = TypeVar("Out")


def connect(rest: str) -> OpenAIImplementation:
    """The implementation at `openai:` + rest; asks the server what it offers. Raises AdapterError."""
    url, *pairs = rest.split(",")
    options = dict(DEFAULTS)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in options or not equals or not value:
            hint = did_you_mean(key, options) if key not in options else ""
            raise AdapterError(
                f"openai: no option {pair!r}{hint}; options are {', '.join(DEFAULTS)}, each key=value"
            )
        options[key] = value
    for key, choices in (("prompts", ("", "tokens", "text")), ("method", get_args(Method))):
        if options[key] not in choices:
            raise AdapterError(
                f"openai: {key} cannot be {options[key]!r}; it is {' or '.join(filter(None, choices))}"
            )
    numbers = {key: _number(key, options[key]) for key in ("vocab", "timeout", "requests", "concurrency")}
    budget = Budget(int(numbers["requests"]))
    clients = []
    for address in (url, *filter(None, (options["plain"],))):
        try:
            transport = Transport(
                address,
                timeout_s=numbers["timeout"],
                budget=budget,
                connections=int(numbers["concurrency"]),
            )
        except ValueError as error:
            raise AdapterError(f"openai: the address cannot be used: {error}") from None
        try:
            offer = probe(
                transport,
                model=options["model"],
                vocabulary=_vocabulary(options["tokens"]),
                size=int(numbers["vocab"]),
                prompts=options["prompts"],
                without=frozenset(filter(None, options["without"].split("+"))),
            )
        except (Failure, Unusable, Unsupported, ValueError) as error:
            raise AdapterError(f"openai:{transport.url}: {error}") from None
        clients.append(Client(transport, offer))
    plain = clients[1] if len(clients) > 1 else None
    return OpenAIImplementation(clients[0], plain, options["method"], int(numbers["concurrency"]))


@dataclass(frozen=True)
class OpenAIModel:
    """A server, and the same one without speculation where there is one."""

    server: Client
    plain: Client | None
    method: str
    concurrency: int

    @property
    def capabilities(self) -> frozenset[Capability]:
        """generate and serve; speculate where there is a plain server to compare with."""
        offered: frozenset[Capability] = frozenset(("generate", "serve"))
        return offered if self.plain is None else offered | {"speculate"}

    @property
    def vocab_size(self) -> int:
        """V, of the server or of bytes."""
        return self.server.offer.vocabulary.size

    @property
    def settings(self) -> frozenset[str]:
        """What every server here takes."""
        return self.server.offer.settings & (self.plain or self.server).offer.settings

    @property
    def refused(self) -> Mapping[str, str]:
        """Why other settings are left out, a sentence each."""
        return {**(self.plain or self.server).offer.refused, **self.server.offer.refused}

    @property
    def methods(self) -> frozenset[str]:
        """The one that the server was started with."""
        return frozenset(() if self.plain is None else (self.method,))

    def load_draft(self, architecture: Architecture, weights: Mapping[str, Any]) -> None:  # noqa: ARG002
        """A server keeps its own draft: raises Unsupported."""
        raise Unsupported("a server keeps the draft that it was started with")

    def generate(
        self, requests: Sequence[Request], *, speculation: Speculation | None = None
    ) -> Sequence[Completion]:
        """All at once, each answered in one piece."""
        client = self._client(speculation)
        for request in requests:
            client.check(request)
        return _at_once(client.complete, requests, self.concurrency)

    def start(self, limits: Limits | None = None, *, speculation: Speculation | None = None) -> OpenAISession:
        """The server as it is. Raises Unsupported for a size: a server has its own."""
        if limits is not None:
            raise Unsupported("a server keeps the size that it was started with")
        return OpenAISession(self._client(speculation), self.concurrency)

    def _client(self, speculation: Speculation | None) -> Client:
        if speculation is None:
            return self.plain or self.server
        if self.plain is None:
            raise Unsupported("without plain=URL it is not known what this server does without speculation")
        if speculation.method != self.method:
            raise Unsupported(f"the server speculates by {self.method}, not by {speculation.method}")
        return self.server


@dataclass(frozen=True)
class OpenAISession:
    """A server that runs already, and goes on afterwards."""

    client: Client
    concurrency: int

    def run(self, arrivals: Sequence[Arrival]) -> Served:
        """Each as a stream, `Arrival.at` seconds from now, `concurrency` at a time."""
        for arrival in arrivals:
            self.client.check(arrival.request)
        start = time.perf_counter()

        def served(index: int) -> Completion:
            arrival = arrivals[index]
            time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
            return self.client.stream(arrival.request, cancel_after=arrival.cancel_after).completion

        order = sorted(range(len(arrivals)), key=lambda index: arrivals[index].at)
        found = dict(zip(order, _at_once(served, order, self.concurrency), strict=True))
        return Served([found[index] for index in range(len(arrivals))])

    def stream(self, request: Request) -> Streamed:
        """One request, with the times at which its tokens came."""
        return self.client.stream(request)

    def close(self) -> None:
        """Nothing: the server is not ours to stop."""


@dataclass(frozen=True)
class OpenAIImplementation:
    """The Implementation "openai:URL"; its model is the same server every time."""

    server: Client
    plain: Client | None
    method: str
    concurrency: int
    needs_architecture: bool = False

    @property
    def name(self) -> str:
        """The URL, without user, password and options."""
        return f"openai:{self.server.transport.url}"

    def build(
        self,
        architecture: Architecture | None,
        *,
        device: str,  # noqa: ARG002
        dtype: torch.dtype,  # noqa: ARG002
        seed: int,  # noqa: ARG002
    ) -> OpenAIModel:
        """The server as it is. Raises Unsupported for an architecture: a server has its own."""
        if architecture is not None:
            raise Unsupported("a server keeps the model that it was started with: give no spec")
        return OpenAIModel(self.server, self.plain, self.method, self.concurrency)


def _at_once(function: Callable[[In], Out], given: Sequence[In], concurrency: int) -> list[Out]:
    if len(given) == 1:
        return [function(given[0])]
    with ThreadPoolExecutor(max_workers=max(1, min(concurrency, len(given)))) as pool:
        return list(pool.map(function, given))


def _vocabulary(tokens: str) -> Vocabulary | None:
    if not tokens:
        return None
    return Bytes() if tokens == "text" else Table.load(Path(tokens))


def _number(key: str, text: str) -> float:
    try:
        value = float(text) if key == "timeout" else int(text)
    except ValueError:
        value = -1
    if not (0 < value < 1e9 or (key == "vocab" and value == 0)):
        raise AdapterError(f"openai: {key} cannot be {text!r}; give a number above 0")
    return value
