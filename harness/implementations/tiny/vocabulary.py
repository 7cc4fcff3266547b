"""One printable character per token, so that text and token ids are the same thing in two spellings.

A server that takes and gives text then shows every token id, and a prompt of ids can be sent as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice

EOS = 0
"""The token that ends a completion. There is no token for the beginning: a prompt is what was sent."""

FIRST = 0x21
"""Of the characters, in the order of Unicode: those of ASCII after the space."""

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A conversation is its messages, one after another: a template's own words would not be in the vocabulary."""


def characters(size: int) -> tuple[str, ...]:
    """The string of each token id, `size` of them: printable, no space, no letter that composes or decomposes.

    Raises ValueError if there are fewer than 2, or more than there are such characters below U+10000.
    """
    found = tuple(islice(_simple(), size))
    if not 2 <= size <= len(found):
        raise ValueError(f"a vocabulary of {size} tokens: there must be from 2 to {len(tuple(_simple()))}")
    return found


def text(tokens: Sequence[int], size: int) -> str:
    """The tokens as text."""
    strings = characters(size)
    return "".join(strings[token] for token in tokens)


def _simple() -> Iterator[str]:
    import unicodedata

    for code in count(FIRST):
        if code > 0xFFFF:
            return
        character = chr(code)
        # Tokenizers may normalise, strip marks or treat U+2581 as a space: none of that may touch a token.
        plain = character.isprintable() and not character.isspace() and unicodedata.combining(character) == 0
        if plain and character != "\u2581" and unicodedata.normalize("NFKD", character) == character:
            yield character
