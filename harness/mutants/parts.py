"""The parts of an engine that a defect may be put into."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def engines(engine: Any) -> Iterable[Any]:
    """The engine itself."""
    return [engine]


def pools(engine: Any) -> Iterable[Any]:
    """Its pages."""
    return [engine.pool]


def schedulers(engine: Any) -> Iterable[Any]:
    """Its scheduler."""
    return [engine.scheduler]


def samplers(engine: Any) -> Iterable[Any]:
    """Its sampler."""
    return [engine.sampler]


def verifiers(engine: Any) -> Iterable[Any]:
    """What decides which drafts stand."""
    return [engine.verifier]


def stoppers(engine: Any) -> Iterable[Any]:
    """What finds the end of a completion."""
    return [engine.stopper]


def drafters(engine: Any) -> Iterable[Any]:
    """Its draft model's part, where one drafts token by token."""
    return [engine.proposer] if hasattr(engine.proposer, "choose") else []


def readers(engine: Any) -> Iterable[Any]:
    """What a draft model remembers of sequences, in the target's or in its own token ids."""
    reader = getattr(engine.proposer, "reader", None)
    return [] if reader is None else [getattr(reader, "reader", reader)]


def translators(engine: Any) -> Iterable[Any]:
    """Between the token ids of a draft and the target's, where they differ."""
    reader = getattr(engine.proposer, "reader", None)
    return [reader] if hasattr(reader, "translate") else []


def lookups(engine: Any) -> Iterable[Any]:
    """Its prompt lookup, where it proposes by that alone."""
    return [engine.proposer] if hasattr(engine.proposer, "following") else []
