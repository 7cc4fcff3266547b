"""Where in a TOML text a key stands: tomllib gives values, an error message needs lines.

The text has already been accepted by tomllib, so this scanner only follows structure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Path = tuple[str | int, ...]

_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}'  # multi-line strings; up to two quotes may precede the end
    r'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\''
    r"|\#[^\n]*|\n|[ \t\r]+|[\[\]{}=,]|[^\s\[\]{}=,#\"']+",
    re.DOTALL,
)


class _Scanner:
    """Tokens of a TOML text with their lines, read once from front to back."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Path, int] = {}
        self.array_tables: dict[Path, int] = {}
        self.tokens: list[tuple[str, int]] = []
        line = 1
        for match in _TOKEN.finditer(text):
            word = match.group()
            if word == "\n" or not (word.isspace() or word.startswith("#")):
                self.tokens.append((word, line))
            line += word.count("\n")
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def next(self) -> tuple[str, int]:
        self.at += 1
        return self.tokens[self.at - 1]

    def skip(self, *tokens: str) -> None:
        """Pass over any number of these."""
        while self.peek() in tokens:
            self.at += 1

    def close(self, token: str) -> None:
        """Pass over one of these."""
        self.at += self.peek() == token

    def key(self, end: str) -> tuple[Path, int]:
        """A dotted key up to the token `end`, and its line."""
        parts: list[str | int] = []
        line = self.tokens[self.at][1]
        while self.peek() and self.peek() != end:
            token, line = self.next()
            parts += [token[1:-1]] if token[0] in "\"'" else [p for p in token.split(".") if p]
        self.close(end)
        return tuple(parts), line

    def note(self, base: Path, key: Path, line: int) -> None:
        for depth in range(1, len(key) + 1):
            self.lines.setdefault(base + key[:depth], line)

    def value(self, path: Path) -> None:
        opening, _ = self.next()
        if opening == "{":
            self.skip("\n", ",")
            while self.peek() not in ("}", ""):
                key, line = self.key("=")
                self.note(path, key, line)
                self.value(path + key)
                self.skip("\n", ",")
            self.close("}")
        elif opening == "[":
            index = 0
            self.skip("\n", ",")
            while self.peek() not in ("]", ""):
                self.lines.setdefault((*path, index), self.tokens[self.at][1])
                self.value((*path, index))
                index += 1
                self.skip("\n", ",")
            self.close("]")
        else:
            while self.peek() not in (",", "]", "}", "\n", ""):
                self.at += 1

    def resolve(self, key: Path) -> Path:
        """A header's path with the index of the latest element of every array of tables on its way."""
        found: Path = ()
        for part in key:
            found = (*found, part)
            if found in self.array_tables:
                found = (*found, self.array_tables[found])
        return found

    def document(self) -> dict[Path, int]:
        """Read to the end: headers and the keys below them."""
        table: Path = ()
        self.skip("\n")
        while self.peek():
            if self.peek() == "[":
                self.next()
                is_array = self.peek() == "["
                self.skip("[")
                key, line = self.key("]")
                self.skip("]")
                table = self.header(key, line) if is_array else self.resolve(key)
                self.note((), table, line)
            else:
                key, line = self.key("=")
                self.note(table, key, line)
                self.value(table + key)
            self.skip("\n")
        return self.lines

    def header(self, key: Path, line: int) -> Path:
        """Begin the next element of an array of tables, and return its path."""
        parent = self.resolve(key[:-1])
        array: Path = (*parent, key[-1])
        self.array_tables[array] = self.array_tables.get(array, -1) + 1
        self.lines.setdefault(array, line)
        return (*array, self.array_tables[array])


def lines_of(text: str) -> dict[Path, int]:
    """Line (from 1) of every key, table and array element, by path: ("claim", 2, "id") -> 41."""
    return _Scanner(text).document()


def nearest(lines: Mapping[Path, int], path: Path) -> int:
    """Line of `path`, or of the nearest thing around it that has one."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return 1
