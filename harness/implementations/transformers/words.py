"""Tokenizers in memory: token i is one Chinese character, so that sequences of tokens are texts and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from harness.implementations.transformers.library import library

FIRST = 0x4E00
"""The first of 20,000 characters that no normaliser touches and that need no space between them."""


def text(tokens: Sequence[int]) -> str:
    """The characters of these tokens."""
    return "".join(chr(FIRST + token) for token in tokens)


PROBE = "abcdef"
"""What transformers' stop strings expect any tokenizer to know: it decodes each token behind this prefix."""


def tokenizer(meanings: Iterable[int], *, probe: str = "") -> Any:
    """A tokenizer whose id j is the character of token meanings[j], or of none where that is negative; the
    letters of `probe` follow."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    known = (meaning if meaning >= 0 else -1 - j for j, meaning in enumerate(meanings))
    vocabulary = {text((meaning,)): j for j, meaning in enumerate(known)}
    vocabulary |= {letter: len(vocabulary) + j for j, letter in enumerate(probe)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    # A blank is no token at all: transformers takes what it becomes for the vocabulary's sign of a space.
    letters = pre_tokenizers.Split(Regex("."), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), letters])
    made.decoder = decoders.Fuse()
    return library().PreTrainedTokenizerFast(tokenizer_object=made)
