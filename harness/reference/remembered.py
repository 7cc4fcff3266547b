"""A model that computes each pass once: enumeration replays a generation hundreds of times, and nearly all of
its passes are those of an earlier replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from harness.reference.model import ReferenceModel
from harness.reference.trace import Cache


@contextmanager
def remembered(*models: ReferenceModel | None) -> Iterator[None]:
    """Within this context a pass over the same bytes is answered from memory.

    A pass is a function of tokens, cache, mask, positions and the weights, which must not change meanwhile.
    Who gets an answer must not write to it. Within another such context it does nothing more.
    """
    patched = [model for model in models if model is not None and "run" not in vars(model)]
    for model in patched:
        model.run = _once(model)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for model in patched:
            del model.run  # the method of the class shows again


def _once(model: ReferenceModel) -> Any:
    run, answers = model.run, dict[tuple[bytes | None, ...], Any]()

    def remembering(
        tokens: Tensor, cache: Cache | None, mask: Tensor | None, positions: Tensor | None
    ) -> Any:
        kept = [] if cache is None else [cache.real, *(t for c in cache.layers for t in (c.keys, c.values))]
        key = tuple(_bytes(tensor) for tensor in (tokens, mask, positions, *kept))
        if key not in answers:
            answers[key] = run(tokens, cache, mask, positions)
        return answers[key]

    return remembering


def _bytes(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().contiguous().cpu().numpy().tobytes()
