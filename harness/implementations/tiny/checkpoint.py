"""A tiny model as a folder that transformers, `transformers serve` and vLLM load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from harness.implementations.tiny.model import TinyModel
from harness.implementations.tiny.vocabulary import CHAT_TEMPLATE, EOS, characters
from harness.implementations.transformers import export
from harness.implementations.transformers.library import library, model_class
from harness.implementations.transformers.weights import FamilyMap


def write(model: TinyModel, folder: Path) -> None:
    """config.json, generation_config.json, safetensors, the tokenizer's files, and tokens.json: the string of
    each token id."""
    folder.mkdir(parents=True, exist_ok=True)
    config = export.config(model.architecture, model.family)
    config.eos_token_id, config.bos_token_id = EOS, None
    module = model_class(model.family)._from_config(config, dtype=torch.float32)  # noqa: SLF001  # no public one
    FamilyMap.of(model.architecture, model.family).load(module, model.weights)
    # Sampling settings belong to a request: a default of the model's would be applied by servers unasked.
    module.generation_config = library().GenerationConfig(eos_token_id=EOS)
    module.save_pretrained(folder)
    tokenizer(model.architecture.vocab_size).save_pretrained(folder)
    strings = characters(model.architecture.vocab_size)
    (folder / "tokens.json").write_text(json.dumps(strings, ensure_ascii=False), encoding="utf-8")


def tokenizer(size: int) -> Any:
    """A tokenizer of transformers with one character per token; another character reads as the last token.

    No token is special, so that none is left out of a text: generation_config.json says which one ends it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    strings = characters(size)
    vocabulary = {string: token for token, string in enumerate(strings)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=strings[-1]))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return library().PreTrainedTokenizerFast(
        tokenizer_object=inner,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
