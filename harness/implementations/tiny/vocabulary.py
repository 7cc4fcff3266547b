"""One printable character per token, so that text and token ids are the same thing in two spellings.

A server that takes and gives text then shows every token id, and a prompt of ids can be sent as text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice

from harness.implementations.registry import AdapterError

EOS = 0
"""The token that ends a completion. There is no token for the beginning: a prompt is what was sent."""

FIRST = 0x21
"""Of the characters, in the order of Unicode: those of ASCII after the space."""

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A conversation is its messages, one after another: a template's own words are not in the vocabulary."""


@cache
def characters(size: int) -> tuple[str, ...]:
    """The string of each token id, `size` of them. Raises AdapterError if there are not so many."""
    found = tuple(islice(_simple(), size))
    if not 2 <= size <= len(found):
        most = sum(1 for _ in _simple())
        raise AdapterError(f"a vocabulary of {size} tokens cannot be had: there must be from 2 to {most}")
    return found


def text(tokens: Sequence[int], size: int) -> str:
    """The tokens as text."""
    strings = characters(size)
    return "".join(strings[token] for token in tokens)


def _simple() -> Iterator[str]:
    """Printable characters that tokenizers leave as they are: no space, no mark, nothing that composes."""
    for character in map(chr, range(FIRST, 0x10000)):
        plain = character.isprintable() and not character.isspace() and not unicodedata.combining(character)
        # U+2581 is a space to SentencePiece.
        if plain and character != "\u2581" and unicodedata.normalize("NFKD", character) == character:
            yield character
