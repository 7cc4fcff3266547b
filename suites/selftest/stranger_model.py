"""A mixture-of-experts language model of somebody else: it knows nothing of the harness, and is called
like a Hugging Face model. Its router returns logits alone, its experts are handed no indices.

Letters: B sequences, S tokens per sequence, D width, E experts, K top-k.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, LAYERS, EXPERTS, TOP_K, HIDDEN, MAX_POSITIONS = 97, 48, 3, 2, 10, 2, 40, 128


class Moe(nn.Module):
    """Softmax over the logits of the K best of E two-matrix experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        values, chosen = self.gate(x).topk(TOP_K, dim=-1)
        hidden = torch.einsum("ehd,bsd->bseh", self.up, x).relu()
        every = torch.einsum("edh,bseh->bsed", self.down, hidden)
        picked = every.gather(2, chosen[..., None].expand(*chosen.shape, WIDTH))
        return (values.softmax(-1)[..., None] * picked).sum(2)


class Layer(nn.Module):
    """Pre-norm attention and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.moe = Moe()

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """[B, S, D] under allowed [B, 1, S, S]."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -1e9)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.moe(self.norms[1](x))


class TinyMoe(nn.Module):
    """input_ids, attention_mask and position_ids [B, S] to an output with .logits [B, S, V]."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.place = nn.Embedding(MAX_POSITIONS, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> SimpleNamespace:
        """Logits of every position."""
        length = input_ids.shape[1]
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = torch.arange(length)[None] if position_ids is None else position_ids
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & real.bool()[:, None, None, :]
        x = self.embed(input_ids) + self.place(places)
        for layer in self.layers:
            x = layer(x, allowed)
        return SimpleNamespace(logits=self.head(x))
