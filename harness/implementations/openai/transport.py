"""HTTP with everything bounded: time, bytes, tries and the number of requests; and no secret in any text.

The key comes from the environment alone (MOE_HARNESS_API_KEY, else OPENAI_API_KEY) and lives in the header of
the requests: not in a field that is printed, a message, or a log. Redirects are not followed, proxies and
.netrc are not consulted, so that it reaches the endpoint that was named and no other.
"""

from __future__ import annotations

import codecs
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from pydantic import SecretStr

from harness.implementations.protocols import Unsupported

KEYS = ("MOE_HARNESS_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the key; the first that is set."""
TRIES = 4
"""Of one request, where the endpoint refuses the connection or answers 429 or 503."""
MAX_BYTES = 16 * 2**20
"""Of one answer."""
_FIRST_PAUSE_S = 0.1
_SHOWN = 200
"""Characters of an endpoint's own words in a sentence of ours."""


class Failure(Exception):
    """A request came to nothing: one sentence, and the HTTP status where there was one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Budget:
    """How many requests may still be made, by all threads together."""

    def __init__(self, requests: int) -> None:
        self.requests = requests
        self.left = requests
        self._lock = threading.Lock()

    def spend(self) -> None:
        """Count one request. Raises Unsupported where none is left."""
        with self._lock:
            if self.left <= 0:
                raise Unsupported(
                    f"the budget of {self.requests} requests is spent; give a larger requests=N"
                )
            self.left -= 1


class Transport:
    """An endpoint: JSON and server-sent events, each request within `timeout_s` seconds.

    Every method raises Failure where no proper answer came, and Unsupported where the budget is spent.
    """

    def __init__(self, url: str, *, timeout_s: float, budget: Budget, connections: int) -> None:
        """`url` ends in the version ("http://127.0.0.1:8000/v1"). Raises ValueError where it is none."""
        parsed = _parsed(url)
        self.url = str(parsed.copy_with(userinfo=b"")).rstrip("/")
        self.timeout_s, self.budget = timeout_s, budget
        key = SecretStr(next((os.environ[name] for name in KEYS if os.environ.get(name)), ""))
        if key and not (key.get_secret_value().isascii() and key.get_secret_value().isprintable()):
            raise ValueError("the key in the environment holds characters that no HTTP header can carry")
        headers = {"accept-encoding": "identity"}
        if key:
            headers["authorization"] = f"Bearer {key.get_secret_value()}"
        auth = (parsed.username, parsed.password) if parsed.userinfo and not key else None
        self._http = httpx2.Client(
            transport=_Bounded(timeout_s, connections),
            headers=headers,
            auth=auth,
            timeout=timeout_s,
            trust_env=False,
            follow_redirects=False,
        )
        self._hidden = tuple(secret for secret in (key, SecretStr(parsed.password)) if secret)

    def __repr__(self) -> str:
        return f"Transport({self.url!r})"

    def get(self, path: str) -> Any:
        """The JSON at `path`."""
        with self._answered("GET", path, None) as response:
            return _json(response.text, f"GET {path}")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that answers `body`."""
        with self._answered("POST", path, body) as response:
            return _json(response.text, f"POST {path}")

    @contextmanager
    def events(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[Any]]:
        """The JSON of each server-sent event that answers `body`, up to [DONE]; leaving closes the stream."""
        with self._answered("POST", path, body, streamed=True) as response:
            kind = response.headers.get("content-type", "none")
            if not kind.startswith("text/event-stream"):
                response.read()
                raise Failure(f"POST {path} was to stream, but answered {kind}: {_excerpt(response.text)}")
            yield self._parsed_events(response, path)

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def _parsed_events(self, response: httpx2.Response, path: str) -> Iterator[Any]:
        for event in httpx2.EventSource(response, max_event_size=MAX_BYTES):
            if event.data == "[DONE]":
                return
            yield _json(event.data, f"an event of POST {path}")

    @contextmanager
    def _answered(
        self, method: str, path: str, body: dict[str, Any] | None, *, streamed: bool = False
    ) -> Iterator[httpx2.Response]:
        """An answer with status 200, read to its end unless it is streamed."""
        try:
            response = self._tried(method, path, body)
            try:
                if not streamed:
                    response.read()
                yield response
            finally:
                response.close()
        except httpx2.TimeoutException as error:
            raise Failure(
                f"{method} {path} took longer than {self.timeout_s:g} s ({_named(error)})"
            ) from None
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise Failure(f"{method} {path} broke off: {self._hide(_named(error))}") from None
        except Failure as failure:
            raise Failure(self._hide(str(failure)), failure.status) from None

    def _tried(self, method: str, path: str, body: dict[str, Any] | None) -> httpx2.Response:
        """The first answer that is no plea to come again, with its body unread; by then it has status 200."""
        deadline, pause = time.monotonic() + self.timeout_s, _FIRST_PAUSE_S
        for again in reversed(range(TRIES)):
            self.budget.spend()
            request = self._http.build_request(method, f"{self.url}{path}", json=body)
            try:
                response = self._http.send(request, stream=True)
            except httpx2.ConnectError as error:
                wait, reason = pause, Failure(f"nothing answers at {self.url}: {_named(error)}")
            else:
                if response.status_code == httpx2.codes.OK:
                    return response
                wait, reason = _asked_to_wait(response, pause), self._refusal(response, f"{method} {path}")
                if response.status_code not in (429, 503):
                    raise reason
            if not again or time.monotonic() + wait > deadline:
                raise reason
            time.sleep(wait)
            pause *= 2
        raise AssertionError("the last try raises")

    def _refusal(self, response: httpx2.Response, what: str) -> Failure:
        """Reads and closes the answer."""
        status = response.status_code
        try:
            said = _excerpt(response.read().decode("utf-8", "replace"))
        except httpx2.HTTPError as error:
            said = _named(error)
        finally:
            response.close()
        if response.has_redirect_location:
            return Failure(
                f"{what} redirects ({status}) to another place; name that one in the address", status
            )
        return Failure(f"{what} answered {status}: {said}", status)

    def _hide(self, text: str) -> str:
        for secret in self._hidden:
            text = text.replace(secret.get_secret_value(), "***")
        return text


class _Bounded(httpx2.HTTPTransport):
    """Ends an answer that lasts too long, is too large or is no UTF-8, however it trickles in."""

    def __init__(self, seconds: float, connections: int) -> None:
        # A connection for each request: one that is kept may be closed by the server just as the next leaves
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=0)
        super().__init__(trust_env=False, limits=limits)
        self._seconds = seconds

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """As every transport does; the deadline runs from here."""
        deadline = time.monotonic() + self._seconds
        response = super().handle_request(request)
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = _BoundedStream(response.stream, deadline)
        return response


class _BoundedStream(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.SyncByteStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def __iter__(self) -> Iterator[bytes]:
        size, decoder = 0, codecs.getincrementaldecoder("utf-8")()
        for part in self._stream:
            size += len(part)
            if size > MAX_BYTES:
                raise httpx2.ReadError(f"the answer has more than {MAX_BYTES} bytes")
            if time.monotonic() > self._deadline:
                raise httpx2.ReadTimeout("it still came in")
            _decode(decoder.decode, part)
            yield part

    def close(self) -> None:
        self._stream.close()


def _decode(decode: Callable[[bytes], str], part: bytes) -> None:
    try:
        decode(part)
    except UnicodeDecodeError as error:
        raise httpx2.DecodingError(f"the answer is not UTF-8 ({error.reason})") from None


def _parsed(url: str) -> httpx2.URL:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"it is no URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("it is no URL of a server; say http://HOST:PORT/v1")
    if parsed.query or parsed.fragment:
        raise ValueError("the URL goes on after its path; say http://HOST:PORT/v1")
    return parsed


def _asked_to_wait(response: httpx2.Response, otherwise: float) -> float:
    """Seconds of the header Retry-After; a date, which servers of models do not send, is not read."""
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return otherwise


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Failure(f"{what} answered what is no JSON: {_excerpt(text)}") from None


def _excerpt(text: str) -> str:
    """What an endpoint said, on one line and not too long."""
    line = " ".join(text.split()).encode("unicode_escape").decode()
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {_excerpt(str(error))}" if str(error) else type(error).__name__
