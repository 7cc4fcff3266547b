"""The transformers library, imported on first use, offline and quiet."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from harness.implementations.registry import AdapterError, did_you_mean

PINNED = "5.23.0"
"""The version that the adapters are written against (the extra `moe-harness[transformers]`)."""


@cache
def library() -> Any:
    """The module. Raises AdapterError if it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise AdapterError(
            f"transformers cannot be imported ({error}): pip install 'moe-harness[transformers]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def config_class(family: str) -> Any:
    """The config class of a model_type. Raises AdapterError if transformers knows no such one."""
    known = library().CONFIG_MAPPING
    if family not in known:
        raise AdapterError(
            f"transformers {library().__version__} has no model_type {family!r}"
            f"{did_you_mean(family, known.keys())}"
        )
    try:
        return known[family]
    except Exception as error:  # a family may need a package that is not installed
        raise AdapterError(f"transformers cannot load the config of {family!r}: {error}") from error


def model_class(family: str) -> Any:
    """The class with a language-model head of a model_type. Raises AdapterError if there is none."""
    mapping = library().MODEL_FOR_CAUSAL_LM_MAPPING
    configuration = config_class(family)
    if configuration not in mapping:
        raise AdapterError(
            f"transformers:{family} has no causal language model: "
            "only decoder-only families with an output head can be put under test"
        )
    return mapping[configuration]
