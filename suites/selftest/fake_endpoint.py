"""A small OpenAI-compatible server over the reference engine, in this process, that fails as it is told.

    with Endpoint(faults={7: "stall"}) as endpoint:
        resolve(endpoint.address("timeout=5", tokens=tmp_path / "tokens.json"))

A request of seed 7 meets the fault (None: one without a seed); all others are served by one engine, together.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from harness.implementations.tiny.vocabulary import characters
from harness.reference import ReferenceModel, build, weights
from harness.reference.engine import Completion, Engine, Limits, Request, Sampling
from harness.spec import load, twin

V = 80
STRINGS = characters(V)
IDS = {string: token for token, string in enumerate(STRINGS)}
EXTENSIONS = frozenset(
    ("top_k", "min_p", "repetition_penalty", "min_tokens", "cache_salt", "return_token_ids", "stop_token_ids")
)
STATUS = {"500": 500, "404": 404, "429": 429, "401": 401, "html": 200, "redirect": 307}
"""Faults that are an answer of another kind."""
FAULTS = (
    *STATUS,
    "close",
    "close-at-once",
    "stall",
    "stall-at-once",
    "trickle",
    "garbage",
    "invalid-json",
    "invalid-utf8",
    "wrong-shape",
    "null",
    "no-finish",
    "error-event",
    "too-long",
    "too-short",
    "no-choices",
    "endless",
)


@cache
def tiny_model() -> ReferenceModel:
    """Two layers in float64, the same every time."""
    architecture = twin(load("mixtral-8x7b").architecture, vocab_size=V)
    model = build(architecture, dtype=torch.float64)
    model.load_weights(weights.draw(architecture, torch.Generator().manual_seed(0), std=0.5))
    return model


class Endpoint:
    """The server; `seen` counts requests by path, `headers` are those of the last one."""

    def __init__(
        self,
        *,
        faults: Mapping[int | None, str] | None = None,
        extensions: frozenset[str] = EXTENSIONS,
        id_prompts: bool = True,
        ignored: frozenset[str] = frozenset(),
        refusals: int = 0,
    ) -> None:
        """`ignored`: fields that are taken and dropped. `refusals`: requests that are answered 503 first."""
        self.faults, self.extensions, self.id_prompts = dict(faults or {}), extensions, id_prompts
        self.ignored, self.refusals = ignored, refusals
        self.retry_after = "0"
        self.seen: Counter[str] = Counter()
        self.headers: dict[str, str] = {}
        self.cancelled = 0
        self.engine = Engine(tiny_model(), Limits(sequences=4, page_size=4, pages=64, chunk=16))
        self.changed = threading.Condition()
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"endpoint": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.threads = [
            threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True),
            threading.Thread(target=self._step, daemon=True),
        ]

    def __enter__(self) -> Endpoint:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        with self.changed:
            self.changed.notify_all()
        self.server.shutdown()
        self.server.server_close()
        for thread in self.threads:
            thread.join()

    @property
    def url(self) -> str:
        """Up to the version."""
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def address(self, *options: str, tokens: Path) -> str:
        """For --impl; writes the table of tokens to `tokens`."""
        tokens.write_text(json.dumps(STRINGS))
        return ",".join((f"openai:{self.url}", f"tokens={tokens}", *options))

    def pieces(self, request: Request) -> Iterator[tuple[tuple[int, ...], Completion | None]]:
        """The tokens of each pass, and with the last ones what became of it; closing it cancels."""
        with self.changed:
            sequence = self.engine.add(request)
            self.changed.notify_all()
        sent = 0
        try:
            while True:
                with self.changed:
                    while (done := sequence.completion) is None and len(sequence.generated) <= sent:
                        self.changed.wait(timeout=1)
                        if self.closing.is_set():
                            return
                    known = tuple(sequence.generated if done is None else done.tokens)
                if done is not None:
                    yield known[sent:], done
                    return
                held = (
                    max((len(stop) for stop in request.stop), default=1) - 1
                )  # it may turn out to be a stop
                if len(known) - held > sent:
                    yield known[sent : len(known) - held], None
                    sent = len(known) - held
                else:
                    time.sleep(0.001)
        finally:
            with self.changed:
                if sequence.completion is None:
                    self.cancelled += 1
                    self.engine.cancel(sequence)

    def _step(self) -> None:
        while not self.closing.is_set():
            with self.changed:
                if self.engine.scheduler.busy:
                    self.engine.step()
                    self.changed.notify_all()
                else:
                    self.changed.wait(timeout=0.05)
            time.sleep(0)  # a lock that is taken again at once is given to nobody else


class _Refused(Exception):
    """A request that is answered 400."""


class _Handler(BaseHTTPRequestHandler):
    endpoint: Endpoint
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client is gone
            super().handle()

    def do_GET(self) -> None:
        self.endpoint.seen[self.path] += 1
        self.endpoint.headers = {name.lower(): value for name, value in self.headers.items()}
        self._json(200, {"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": "fake"}]})

    def do_POST(self) -> None:
        endpoint = self.endpoint
        endpoint.seen[self.path] += 1
        endpoint.headers = {name.lower(): value for name, value in self.headers.items()}
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        if endpoint.refusals:
            endpoint.refusals -= 1
            self._json(503, {"error": {"message": "busy"}}, {"Retry-After": endpoint.retry_after})
            return
        try:
            body = json.loads(raw)
            fault = endpoint.faults.get(body.get("seed"), "")
            request = _request(body, endpoint)
        except (_Refused, ValueError, TypeError) as refused:
            self._json(400, {"error": {"message": str(refused)}})
            return
        if fault in STATUS:
            self._status(fault)
        elif body.get("stream"):
            self._stream(request, body, fault)
        else:
            self._whole(request, body, fault)

    def _status(self, fault: str) -> None:
        key = self.headers.get("authorization", "none").removeprefix("Bearer ")
        headers = {"Location": "/v2"} if fault == "redirect" else {}
        if fault == "html":
            self._send(200, b"<html><body>It works!</body></html>", "text/html", headers)
        else:
            said = {"error": {"message": f"status {fault}; your key is {key}"}}
            self._json(STATUS[fault], said, headers)

    def _whole(self, request: Request, body: dict[str, Any], fault: str) -> None:
        tokens: tuple[int, ...] = ()
        completion = None
        for piece, ending in self.endpoint.pieces(request):
            tokens, completion = tokens + piece, ending
        if completion is None or completion.finish_reason == "error":
            self._json(400, {"error": {"message": completion.error if completion else "closing"}})
            return
        answer = _answer(tokens, completion.finish_reason, body, completion.logprobs)
        payload = json.dumps(answer).encode()
        length = len(payload)
        if fault in ("close", "close-at-once", "too-long"):
            length += 100
        elif fault == "too-short":
            length -= 5
        elif fault in ("trickle", "endless"):
            length = 2**40
        elif fault in ("garbage", "invalid-json"):
            payload = payload[:-3] + b"}}}"
        elif fault == "invalid-utf8":
            payload = payload.replace(b'"text"', b'"te\xff\xfe')[:length]
        elif fault in ("wrong-shape", "no-choices", "null", "no-finish", "error-event"):
            payload = json.dumps(_spoilt(answer, fault)).encode()
            length = len(payload)
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(length))
        self.end_headers()
        if fault in ("stall", "stall-at-once", "trickle", "endless"):
            self._hold(fault, payload)
        elif fault == "close-at-once":
            self.close_connection = True
        else:
            self.wfile.write(payload)
            self.close_connection = fault in ("close", "too-long", "too-short")

    def _stream(self, request: Request, body: dict[str, Any], fault: str) -> None:
        pieces = self.endpoint.pieces(request)
        try:
            first = next(pieces, None)
            if first is None:  # the endpoint closes
                return
            if first[1] is not None and first[1].finish_reason == "error":
                self._json(400, {"error": {"message": first[1].error}})
                return
            self.send_response(200)
            self.send_header("content-type", "text/event-stream; charset=utf-8")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            if fault == "stall-at-once":
                self._hold("stall", b"")
            elif fault != "close-at-once":
                self._events([first], pieces, body, fault)
            self.close_connection = True
        finally:
            pieces.close()

    def _events(self, first: list[Any], rest: Iterator[Any], body: dict[str, Any], fault: str) -> None:
        for some in (first, rest):
            for tokens, completion in some:
                # all of them come with the last event
                logprobs = completion.logprobs if completion else None
                reason = completion.finish_reason if completion else None
                event = _answer(tokens, reason, body, logprobs)
                if fault and self._spoil(event, fault):
                    return
                self._chunk(f"data: {json.dumps(event)}\n\n".encode())
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _spoil(self, event: dict[str, Any], fault: str) -> bool:
        """Fail in the middle of a stream; whether that is the end of it."""
        if fault in ("stall", "trickle", "endless"):
            self._hold(fault, b"")
        elif fault in ("garbage", "invalid-json"):
            self._chunk(
                b'data: {"choices": [{"text": \n\n' if fault == "invalid-json" else bytes(range(10, 100))
            )
            self._chunk(b"")
        elif fault == "invalid-utf8":
            self._chunk(b'data: {"choices": [{"text": "\xff\xfe"}]}\n\n')
            self._chunk(b"")
        elif fault in ("wrong-shape", "no-choices", "null", "error-event"):
            self._chunk(f"data: {json.dumps(_spoilt(event, fault))}\n\n".encode())
            self._chunk(b"")
        elif fault == "no-finish":
            if event["choices"][0]["finish_reason"] is None:
                return False
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        elif fault in ("too-long", "too-short"):
            self.wfile.write(b"40\r\ndata: {" if fault == "too-long" else b"2\r\ndata: {}\n\n\r\n")
        return True  # "close": nothing more

    def _hold(self, fault: str, payload: bytes) -> None:
        """Keep the connection open: in silence, or with bytes that lead nowhere."""
        self.wfile.write(payload[:10])
        self.wfile.flush()
        while not self.endpoint.closing.wait(0.02):
            if fault == "trickle":
                self.wfile.write(b"5\r\n: \n\n\n\r\n" if not payload else b" ")
            elif fault == "endless":
                block = b": x\n" * 2**14
                self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if not payload else block)

    def _json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers or {})

    def _send(self, status: int, payload: bytes, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-type": kind, "content-length": str(len(payload))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def _chunk(self, payload: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(payload), payload))
        self.wfile.flush()


def _request(body: dict[str, Any], endpoint: Endpoint) -> Request:
    """Raises _Refused as a server would answer 400."""
    unknown = set(body) & (EXTENSIONS - endpoint.extensions)
    if unknown:
        raise _Refused(f"unexpected fields: {sorted(unknown)}")
    body = {key: value for key, value in body.items() if key not in endpoint.ignored}
    prompt = body["prompt"]
    if isinstance(prompt, list) and not endpoint.id_prompts:
        raise _Refused("prompt must be a string")
    if isinstance(prompt, str):
        prompt = _ids(prompt)
    bias = {int(token): float(value) for token, value in (body.get("logit_bias") or {}).items()}
    sampling = Sampling(
        logit_bias=tuple(bias.items()),
        **{
            name: body[name]
            for name in (
                *("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature"),
                *("top_k", "top_p", "min_p", "seed"),
            )
            if name in body
        },
    )
    return Request(
        tuple(prompt),
        body.get("max_tokens", 16),
        sampling,
        eos=tuple(body.get("stop_token_ids", ())),
        stop=tuple(_ids(text) for text in body.get("stop", ())),
        min_tokens=body.get("min_tokens", 0),
        logprobs=bool(body.get("logprobs")),
        salt=body.get("cache_salt", ""),
    )


def _ids(text: str) -> tuple[int, ...]:
    if not set(text) <= IDS.keys():
        raise _Refused(f"no token prints {text!r}")
    return tuple(IDS[character] for character in text)


def _answer(tokens: Any, reason: str | None, body: dict[str, Any], logprobs: Any) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": 0,
        "text": "".join(STRINGS[token] for token in tokens),
        "finish_reason": reason,
        "logprobs": {"token_logprobs": list(logprobs)}
        if body.get("logprobs") and logprobs is not None
        else None,
    }
    if body.get("return_token_ids"):
        choice["token_ids"] = list(tokens)
    return {"id": "x", "object": "text_completion", "model": "tiny", "choices": [choice]}


def _spoilt(answer: dict[str, Any], fault: str) -> Any:
    return {
        "wrong-shape": [answer, 3],
        "no-choices": answer | {"choices": 3},
        "null": answer | {"choices": [answer["choices"][0] | {"text": ["a"], "token_ids": None}]},
        "no-finish": answer | {"choices": [answer["choices"][0] | {"finish_reason": None}]},
        "error-event": {"error": {"message": "the worker died", "code": 500}},
    }[fault]
