"""An engine that runs by itself, in a thread, and answers clients as tokens come."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field, replace

from harness.reference.engine.engine import Engine
from harness.reference.engine.sequence import Sequence
from harness.reference.engine.values import Completion, Request, Streamed


@dataclass(eq=False)
class Client:
    """One who waits for an answer."""

    request: Request
    sent_at: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    seen: int = 0
    ended_at: float = 0.0
    completion: Completion | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def receive(self, sequence: Sequence) -> bool:
        """Note what came since the last pass; whether the answer is complete."""
        done = sequence.completion
        known = len(sequence.generated if done is None else done.tokens)
        if known > self.seen:
            self.chunks.append((time.perf_counter(), known - self.seen))
            self.seen = known
        if done is not None:
            self.end(done)
        return done is not None

    def end(self, completion: Completion) -> None:
        """The answer is complete."""
        self.completion, self.ended_at = completion, time.perf_counter()
        self.ended.set()


class Live:
    """Steps an engine as long as there is a client; only its own thread touches the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[Client | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def stream(self, request: Request) -> Streamed:
        """Ask, and wait for the end; called from many threads at once."""
        client = Client(request, time.perf_counter())
        if self._closed.is_set():
            client.end(Completion((), "error", error="the engine is closed"))
        else:
            self._inbox.put(client)
        client.ended.wait()
        assert client.completion is not None
        return Streamed(client.completion, client.sent_at, tuple(client.chunks), client.ended_at)

    def close(self) -> None:
        """End the thread; whoever waits is told so."""
        self._closed.set()
        self._inbox.put(None)
        self._thread.join()

    def _loop(self) -> None:
        serving: dict[Sequence, Client] = {}
        try:
            while not self._closed.is_set():
                while not (serving and self._inbox.empty()):
                    client = self._inbox.get()
                    if client is None:
                        return
                    serving[self.engine.add(client.request)] = client
                if self.engine.scheduler.busy:
                    self.engine.step()
                serving = {one: client for one, client in serving.items() if not client.receive(one)}
        except Exception as error:  # noqa: BLE001  # whoever waits must hear of it, or waits for ever
            self._failed(serving, f"the engine stopped: {type(error).__name__}: {error}")
        finally:
            self._failed(serving, "the engine was closed")

    def _failed(self, serving: dict[Sequence, Client], why: str) -> None:
        self._closed.set()
        for sequence, client in serving.items():
            if client.completion is None:
                client.end(replace(_partial(sequence), error=why))
        while not self._inbox.empty():
            late = self._inbox.get()
            if late is not None:
                late.end(Completion((), "error", error=why))


def _partial(sequence: Sequence) -> Completion:
    return Completion(tuple(sequence.generated), "error")
