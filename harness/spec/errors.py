"""One sentence for each thing wrong with a spec: file:line: field: what is wrong; what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class SpecError(ValueError):
    """A spec, config or baseline cannot be used: one sentence with file, line and field."""


def sentence(file: object, line: int | None, field: str, wrong: str, right: str) -> str:
    """`file:line: field: wrong; right`, leaving out what is not known."""
    place = f"{file}:{line}" if line else str(file)
    return ": ".join(part for part in (place, field, f"{wrong}; {right}") if part)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'did you mean "x"?', or the known words when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known) or 'none'}"


def dotted(path: Sequence[str | int]) -> str:
    """("claim", 2, "id") -> "claim[2].id"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def show(value: Any) -> str:
    """A value as a reader of TOML would recognise it, cut to a readable length."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = f'"{value}"'
    elif isinstance(value, Mapping):
        text = "a table"
    else:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def wrong_and_right(error: Mapping[str, Any]) -> tuple[str, str]:
    """The two halves of the sentence for one pydantic error (a missing or unknown key apart)."""
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message, "change one of the fields it names"
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "Input should be a table"
    message = message.replace("Input should", "it should")
    return f"got {show(error['input'])}", message[0].lower() + message[1:]
