"""Implementations that misbehave in one way each, addressed like any stranger's: MODULE:NAME."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 11


@dataclass(frozen=True)
class Odd:
    """An implementation of its own shape whose forward pass is `logits`."""

    name: str
    logits: Callable[[Tensor], Any]
    capabilities: Any = frozenset(("forward",))
    needs_architecture: bool = False
    vocab_size: int = VOCAB_SIZE

    def build(self, *_: object, **__: object) -> Odd:
        return self

    def forward(self, tokens: Tensor, **_: object) -> Any:
        return self.logits(tokens)


def _zeros(tokens: Tensor) -> Tensor:
    return torch.zeros(*tokens.shape, VOCAB_SIZE)


def good() -> Odd:
    """Does as it says."""
    return Odd("good", _zeros)


def nan() -> Odd:
    """Gives logits that are not numbers."""
    return Odd("nan", lambda tokens: _zeros(tokens) / 0)


def shape() -> Odd:
    """Gives one token too few."""
    return Odd("shape", lambda tokens: _zeros(tokens)[:, 1:])


def silent() -> Odd:
    """Gives nothing."""
    return Odd("silent", lambda tokens: None)


def raises() -> Odd:
    """Raises in its forward pass."""

    def logits(tokens: Tensor) -> Tensor:
        raise RuntimeError("out of luck\nand out of lines")

    return Odd("raises", logits)


def exits() -> Odd:
    """Tries to end the process politely."""

    def logits(tokens: Tensor) -> Tensor:
        raise SystemExit(0)

    return Odd("exits", logits)


def hangs() -> Odd:
    """Never gives an answer."""

    def logits(tokens: Tensor) -> Tensor:
        while True:
            time.sleep(0.01)

    return Odd("hangs", logits)


def killed() -> Odd:
    """Loses its process, as under the out-of-memory killer."""

    def logits(tokens: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return tokens

    return Odd("killed", logits)


def interrupts() -> Odd:
    """Is interrupted from the keyboard."""

    def logits(tokens: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        return tokens

    return Odd("interrupts", logits)


def lies() -> Odd:
    """Declares capabilities whose methods it does not have."""
    return Odd("lies", _zeros, capabilities=frozenset(("forward", "cache", "routing")))


def misspells() -> Odd:
    """Declares a capability that there is not."""
    return Odd("misspells", _zeros, capabilities=frozenset(("foward",)))


def declares_text() -> Odd:
    """Declares its capability as a text, which is a set of letters."""
    return Odd("declares_text", _zeros, capabilities="forward")


def declares_nothing() -> Odd:
    """Declares no capabilities at all, not even that it has none."""
    return Odd("declares_nothing", _zeros, capabilities=None)


def quits() -> Odd:
    """Ends the process when it is asked for an implementation."""
    raise SystemExit(0)


@dataclass(frozen=True)
class Unbuildable:
    """An implementation that cannot be built."""

    name: str = "unbuildable"
    needs_architecture: bool = False

    def build(self, *_: object, **__: object) -> Odd:
        raise MemoryError("no room")


def unbuildable() -> Unbuildable:
    """Raises when a model is built."""
    return Unbuildable()


@dataclass(frozen=True)
class Stuck(Unbuildable):
    """An implementation that is never built."""

    def build(self, *_: object, **__: object) -> Odd:
        while True:
            time.sleep(0.01)


def stuck() -> Unbuildable:
    """Hangs when a model is built."""
    return Stuck("stuck")


def not_one() -> str:
    """A factory of something else."""
    return "a text"
