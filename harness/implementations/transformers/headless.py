"""A text model without a head, as the text part of a model that sees has: with a fixed random one.

Letters: B sequences, S tokens per sequence, D d_model, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.implementations.transformers.shrink import INITIALIZER_RANGE

EMBEDDED = ("Qwen3OmniMoeTalkerModel",)
"""Models that are only ever given embeddings, and fail on token ids: here they are given those of the ids."""


@dataclass(frozen=True)
class Output:
    """What a language model answers, as far as the harness reads it."""

    logits: Tensor
    """[B, S, V]."""
    past_key_values: Any = None


class Headed(nn.Module):
    """`backbone` under a linear head that is no parameter: it is not the family's, and nothing trains it."""

    def __init__(self, backbone: nn.Module, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        config: Any = backbone.config
        self.config = config
        self._is_stateful = getattr(backbone, "_is_stateful", False)
        self._known = set(inspect.signature(type(backbone).forward).parameters)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
        self.register_buffer("head", INITIALIZER_RANGE * drawn)

    def forward(self, **inputs: Any) -> Output:
        """Logits out of the last hidden state."""
        any_word = "kwargs" in self._known
        known = {name: value for name, value in inputs.items() if any_word or name in self._known}
        if type(self.backbone).__name__ in EMBEDDED:
            known["inputs_embeds"] = self.backbone.get_input_embeddings()(known.pop("input_ids"))  # type: ignore[operator]
        output = self.backbone(**known)
        hidden = output.last_hidden_state
        logits = nn.functional.linear(hidden, self.get_buffer("head").to(hidden.dtype))
        return Output(logits, getattr(output, "past_key_values", None))
