"""An encoder-decoder whose decoder is under test: the source that it reads follows from its first token.

Letters: B sequences, S tokens per sequence, R tokens of a source, V vocabulary.

A sequence's source must not depend on its company, nor on later tokens, and must differ between sequences,
or nobody could tell whether rows of cross-attention leak. So each first token has a source of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.implementations.transformers.headless import Output

SOURCE_LENGTHS = (3, 7)
"""Of sources, in tokens: at least, at most. The shorter ones are padded on the right."""


@dataclass(frozen=True)
class Past:
    """The decoder's cache, and what it goes on reading."""

    cache: Any
    encoded: Any
    mask: Tensor


class Decoding(nn.Module):
    """`whole`, called like a decoder. The last entry of its vocabulary is padding, and no token of it."""

    def __init__(self, whole: nn.Module, seed: int) -> None:
        super().__init__()
        self.whole = whole
        config: Any = whole.config
        self.config, self.vocab_size = config, int(config.vocab_size) - 1
        generator = torch.Generator().manual_seed(seed)
        low, high = SOURCE_LENGTHS
        sources = torch.randint(self.vocab_size, (self.vocab_size, high), generator=generator)
        lengths = torch.randint(low, high + 1, (self.vocab_size, 1), generator=generator)
        real = torch.arange(high) < lengths
        self.register_buffer("sources", sources.where(real, self.vocab_size))
        self.register_buffer("real", real)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> Output:
        """Logits [B, S, V] of the decoder's tokens [B, S]; positions are its own affair."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        new = mask[:, -input_ids.shape[1] :].bool()
        tokens = input_ids.where(new, self.vocab_size)
        if past_key_values is None:
            first = input_ids.gather(1, new.int().argmax(1, keepdim=True))[:, 0]
            source_mask = self.get_buffer("real")[first].long()
            encoded = self.whole.get_encoder()(self.get_buffer("sources")[first], attention_mask=source_mask)  # type: ignore[operator]
            past_key_values = Past(None, encoded, source_mask)
        output = self.whole(
            encoder_outputs=past_key_values.encoded,
            attention_mask=past_key_values.mask,
            decoder_input_ids=tokens,
            decoder_attention_mask=attention_mask,
            past_key_values=past_key_values.cache,
            use_cache=use_cache,
            **{name: value for name, value in more.items() if name == "output_router_logits"},
        )
        past = Past(output.past_key_values, past_key_values.encoded, past_key_values.mask)
        return Output(output.logits[..., : self.vocab_size], past if use_cache else None)
