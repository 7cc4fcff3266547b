"""Token ids of a server that answers text.

Letters: V vocabulary. `Table`: the strings of all tokens are known, and every token that can be read back
is a single character, so that text and ids say the same (the models that `moe-harness tiny` writes). `Ids`:
the server takes ids and gives ids. `Bytes`: nothing is known; completions are compared as text, the bytes
of its UTF-8 taken for token ids (V = 256), and lengths are not lengths in tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol


class Vocabulary(Protocol):
    """Between ids and text. `exact`: one id is one token of the server."""

    @property
    def size(self) -> int:
        """V."""

    @property
    def exact(self) -> bool:
        """Whether these ids are the server's own."""

    def text(self, tokens: Sequence[int]) -> str:
        """What the server is asked to continue. Raises ValueError for an id that it cannot be told."""

    def tokens(self, text: str) -> tuple[int, ...]:
        """The ids of what it answered. Raises ValueError for text that no token prints."""


@dataclass(frozen=True)
class Table:
    """A vocabulary whose tokens print as single characters; what is longer is never read back."""

    strings: tuple[str, ...] = field(repr=False)
    """By token id."""
    exact: bool = True

    @property
    def size(self) -> int:
        """V."""
        return len(self.strings)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {string: token for token, string in enumerate(self.strings) if len(string) == 1}

    def text(self, tokens: Sequence[int]) -> str:
        """The strings of `tokens`, joined."""
        unknown = [token for token in tokens if not 0 <= token < len(self.strings)]
        if unknown:
            raise ValueError(f"token {unknown[0]} is not in the vocabulary of {self.size}")
        return "".join(self.strings[token] for token in tokens)

    def tokens(self, text: str) -> tuple[int, ...]:
        """One id per character."""
        unknown = [character for character in text if character not in self._ids]
        if unknown:
            raise ValueError(f"the text holds {unknown[0]!r}, which is no token of the table")
        return tuple(self._ids[character] for character in text)

    @classmethod
    def load(cls, path: Path) -> Table:
        """From a JSON list of strings by token id. Raises ValueError: unreadable, or not one to one."""
        try:
            strings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"tokens={path} cannot be read: {error}") from None
        if not isinstance(strings, list) or not all(isinstance(one, str) and one for one in strings):
            raise ValueError(f"tokens={path} is not a JSON list of strings, one per token id")
        if len(set(strings)) != len(strings) or not any(len(one) == 1 for one in strings):
            raise ValueError(f"tokens={path}: its strings must differ, most of them a single character")
        return cls(tuple(strings))


@dataclass(frozen=True)
class Ids:
    """Only ids: for a server that takes ids as prompts and gives ids back."""

    size: int
    exact: bool = True

    def text(self, tokens: Sequence[int]) -> str:
        """Not possible."""
        raise ValueError(f"the text of token {tokens[0] if tokens else ''} is not known; give tokens=PATH")

    def tokens(self, text: str) -> tuple[int, ...]:
        """Not possible."""
        raise ValueError(f"the answer {text!r} came without token ids")


@dataclass(frozen=True)
class Bytes:
    """No vocabulary: text as the bytes of its UTF-8."""

    size: int = 256
    exact: bool = False

    def text(self, tokens: Sequence[int]) -> str:
        """The text of these bytes where they are UTF-8, else one printable ASCII character for each."""
        try:
            return bytes(tokens).decode("utf-8")
        except UnicodeDecodeError:
            return "".join(chr(33 + token % 94) for token in tokens)

    def tokens(self, text: str) -> tuple[int, ...]:
        """The bytes of `text`."""
        return tuple(text.encode("utf-8", "surrogatepass"))
