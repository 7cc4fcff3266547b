"""From an address to a session that can be put under load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch

from harness.implementations.protocols import Serves, Streams, Unsupported
from harness.implementations.registry import resolve
from harness.reference.engine import Limits, Speculation
from harness.reference.engine.values import Method
from harness.spec import load, twin


@dataclass(frozen=True)
class Engine:
    """What is put under load: a model, and the size and the speculation that each session of it has."""

    address: str
    model: Any
    limits: Limits | None
    speculation: Speculation | None

    @property
    def here(self) -> bool:
        """Whether it runs in this process, so that a fresh session is a fresh engine."""
        return not self.address.startswith("openai:")

    @contextmanager
    def session(self) -> Iterator[Streams]:
        """A running engine that streams; it is closed in the end. Raises Unsupported."""
        running: Any = self.model.start(self.limits, speculation=self.speculation)
        try:
            if not callable(getattr(running, "stream", None)):
                raise Unsupported(
                    f"{self.address} serves, but not in pieces as they come: nothing can be timed"
                )
            yield running
        finally:
            running.close()


def engine(
    address: str,
    spec: str | None,
    *,
    dtype: torch.dtype,
    seed: int,
    limits: Limits | None,
    speculation: Speculation | None,
) -> Engine:
    """The engine under an address; limits None is its own size.

    Raises SpecError, AdapterError, or Unsupported naming what the implementation lacks.
    """
    architecture = None if spec is None else twin(load(spec).architecture)
    model = resolve(address).build(architecture, device="cpu", dtype=dtype, seed=seed)
    if "serve" not in model.capabilities or not isinstance(model, Serves):
        raise Unsupported(f"{address} does not serve: it declares no capability 'serve'")
    if limits is not None and "limits" not in model.capabilities:
        raise Unsupported(f"{address} has a size of its own: leave out the options that give it one")
    return Engine(address, model, limits, speculation)


def speculation(text: str) -> Speculation:
    """METHOD or METHOD:LENGTH; raises Unsupported where there is no such method."""
    method, colon, length = text.partition(":")
    known = get_args(Method)
    if method not in known or (colon and not length.isdigit()) or length == "0":
        raise Unsupported(f"speculation {text!r}: say METHOD:LENGTH; METHOD is one of {', '.join(known)}")
    chosen: Method = next(one for one in known if one == method)
    return Speculation(chosen, int(length)) if colon else Speculation(chosen)


def slo(bounds: list[str]) -> dict[str, float]:
    """Bounds in seconds out of NAME=SECONDS; raises Unsupported for another name, or no number above 0."""
    found: dict[str, float] = {}
    for text in bounds:
        name, _, value = text.partition("=")
        try:
            seconds = float(value)
        except ValueError:
            seconds = 0.0
        if name not in ("ttft", "tpot", "e2e") or not seconds > 0:
            raise Unsupported(f"SLO {text!r}: say ttft=SECONDS, tpot=SECONDS or e2e=SECONDS")
        found[name] = seconds
    return found
