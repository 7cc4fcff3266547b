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


def tokenizer(meanings: Iterable[int]) -> Any:
    """A tokenizer whose id j is the character of token meanings[j]."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {text((meaning,)): j for j, meaning in enumerate(meanings)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return library().PreTrainedTokenizerFast(tokenizer_object=made)
