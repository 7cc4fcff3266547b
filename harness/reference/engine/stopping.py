"""When a completion ends, and which of its tokens remain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.reference.engine.values import FinishReason, Request


@dataclass(frozen=True)
class Ended:
    """How a completion ended."""

    tokens: tuple[int, ...]
    """Those that remain: without the token or the sequence that ended it."""
    finish_reason: FinishReason
    consumed: int
    """Generated tokens up to the end, what ended it included; any after them were generated in vain."""


class Stopper:
    """Scans what was generated token by token: several tokens may have come at once, and the end may lie
    at any of them."""

    def end(self, request: Request, generated: Sequence[int], since: int = 0) -> Ended | None:
        """The first end within `generated`; None if it goes on.

        The first `since` tokens are known to hold none. A token may be several ends at once: one of `eos`
        comes before a sequence of `stop`, and that before max_tokens.
        """
        for count in range(since, len(generated) + 1):
            remain = self.stopped(request, generated[:count])
            if remain is not None:
                return Ended(tuple(generated[:remain]), "stop", count)
            if self.full(request, count):
                return Ended(tuple(generated[:count]), "length", count)
        return None

    def stopped(self, request: Request, generated: Sequence[int]) -> int | None:
        """How many tokens remain if the last one ends the completion by `eos` or `stop`, else None.

        Where several sequences end at the last token, the longest counts.
        """
        if generated and generated[-1] in request.eos:
            return len(generated) - 1
        ending = [len(stop) for stop in request.stop if self.ends_with(generated, stop)]
        return len(generated) - max(ending) if ending else None

    def ends_with(self, generated: Sequence[int], stop: Sequence[int]) -> bool:
        """Whether the generated tokens end with a whole stop sequence; the prompt is no part of it."""
        return 0 < len(stop) <= len(generated) and tuple(generated[-len(stop) :]) == tuple(stop)

    def full(self, request: Request, count: int) -> bool:
        """Whether there are as many tokens as were asked for."""
        return count >= request.max_tokens
