"""Prefixes that requests share: the engines that they are asked of, and what must have been found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.conformance.case import Case
from harness.conformance.property import Void
from harness.conformance.serving import counted, run
from harness.reference.engine import Completion, Limits, Request

PAGE = 4
"""Tokens of a page. A full page is shared, and the prompt's last token is always computed."""
SHARING = Limits(page_size=PAGE)
APART = Limits(page_size=PAGE, prefix_sharing=False)


def one_by_one(session: Any, requests: Sequence[Request]) -> list[Completion]:
    """Each request after the end of the one before, in one session."""
    return [run(session, [request]).completions[0] for request in requests]


def hits(case: Case, answers: Sequence[Completion]) -> None:
    """Note how many tokens were found in the cache; Void if none ever was."""
    case.note("cached_tokens", counted(answers, "cached_tokens"))
    if not counted(answers, "cached_tokens"):
        raise Void("no prefix was found in the cache, or the engine does not say so")
