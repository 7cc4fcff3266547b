"""How long a property is inside of the implementation under test; the rest is the harness's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


class Clock:
    """Seconds of wall time in which at least one call of the implementation is running."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._running = 0
        self._since = 0.0
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """So far, calls that have not returned included."""
        with self._lock:
            return self._spent + (time.perf_counter() - self._since if self._running else 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the implementation computes: calls inside of calls, and in threads, count once."""
        with self._lock:
            if not self._running:
                self._since = time.perf_counter()
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._spent += time.perf_counter() - self._since

    def timed(self, value: Any) -> Any:
        """What is called, with its calls on this clock; anything else as it is."""
        if not callable(value):
            return value
        function: Callable[..., Any] = value

        @wraps(function, updated=())
        def call(*arguments: Any, **options: Any) -> Any:
            with self.running():
                return function(*arguments, **options)

        return call


class Timed:
    """An object, such as a session of an engine, whose methods are on a clock."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self._inner, self._clock = inner, clock

    def __getattr__(self, name: str) -> Any:
        return self._clock.timed(getattr(self._inner, name))
