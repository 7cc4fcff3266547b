"""The same pass in pieces, with padding, across window edges: always the logits of the full pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.reference import Cache, ReferenceModel, build
from suites.selftest.controls import CONTROLS, LENGTH, changed, generator, ragged, relative, small

CLOSE = 1e-9
"""float64, as against the oracle: the split only changes the order of sums."""
SPLITS = ([17], [10, 7], [7, 1, 9], [16, 1], [1] * 17)


def in_pieces(model: ReferenceModel, tokens: Tensor, mask: Tensor | None, split: list[int]) -> Tensor:
    """Logits of tokens fed in pieces of the given lengths."""
    cache: Cache | None = None
    pieces = []
    for piece, end in zip(tokens.split(split, dim=1), torch.tensor(split).cumsum(0).tolist(), strict=True):
        logits, cache = model.extend(piece, cache, mask=None if mask is None else mask[:, :end])
        pieces.append(logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", CONTROLS)
def test_any_split_is_the_full_pass(name: str, split: list[int]) -> None:
    """Prefill and decode in any pieces, padded left and right, give the full pass's logits."""
    architecture = small(name)
    tokens, mask = ragged(architecture, 5)
    model = build(architecture, dtype=torch.float64, generator=generator(6))
    with torch.no_grad():
        assert relative(in_pieces(model, tokens, mask, split)[mask], model(tokens, mask=mask)[mask]) < CLOSE


@pytest.mark.parametrize("name", CONTROLS)
def test_padding_changes_nothing(name: str) -> None:
    """A sequence alone has the logits that it has in a batch, padded on either side."""
    architecture = small(name)
    tokens, mask = ragged(architecture, 7)
    model = build(architecture, dtype=torch.float64, generator=generator(8))
    with torch.no_grad():
        batch = model(tokens, mask=mask)
        for row in range(len(tokens)):
            alone = model(tokens[row : row + 1, mask[row]])[0]
            assert relative(batch[row, mask[row]], alone) < CLOSE
    assert batch.isfinite().all()


@pytest.mark.parametrize("length", [3, 4, 5])
def test_the_window_ends_where_it_should(length: int) -> None:
    """With window 4 and one layer, the last token feels the token three before it, and not four before."""
    architecture = changed(small("llama-3.1-8b", n_layers=1), attention={"window": 4, "pattern": ("window",)})
    model = build(architecture, dtype=torch.float64, generator=generator(9))
    tokens = torch.randint(architecture.vocab_size, (1, length), generator=generator(10))
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % architecture.vocab_size
    with torch.no_grad():
        changed_by = (model(tokens)[0, -1] - model(other)[0, -1]).abs().max()
    # Beyond the window nothing is computed from the token at all: exactly equal.
    assert (changed_by > 0) == (length <= 4)


def test_a_window_counts_real_tokens() -> None:
    """Padding inside a window takes no place in it: the last row, split after its right padding, agrees."""
    architecture = changed(small("llama-3.1-8b"), attention={"window": 3, "pattern": ("window", "full")})
    model = build(architecture, dtype=torch.float64, generator=generator(11))
    tokens = torch.randint(architecture.vocab_size, (1, 9), generator=generator(12))
    mask = torch.tensor([[True] * 4 + [False] * 2 + [True] * 3])
    with torch.no_grad():
        have = in_pieces(model, tokens, mask, [6, 3])[mask]
        assert relative(have, model(tokens[mask][None])[0]) < CLOSE


def test_a_cache_remembers_its_padding() -> None:
    """Without a mask the new tokens are real and the past's padding stays padding."""
    architecture = small("mixtral-8x7b")
    tokens, mask = ragged(architecture, 13)
    mask[2] = True
    model = build(architecture, dtype=torch.float64, generator=generator(14))
    with torch.no_grad():
        _, cache = model.extend(tokens[:, :10], None, mask=mask[:, :10])
        logits, cache = model.extend(tokens[:, 10:], cache)
        assert relative(logits, model(tokens, mask=mask)[:, 10:]) < CLOSE
    assert cache.length == LENGTH
    assert torch.equal(cache.real, mask)


def test_a_cache_is_not_changed_by_what_follows() -> None:
    """Two continuations of one cache do not disturb each other."""
    architecture = small("gpt-oss-20b")
    tokens, _ = ragged(architecture, 15)
    model = build(architecture, dtype=torch.float64, generator=generator(16))
    with torch.no_grad():
        _, cache = model.extend(tokens[:, :8], None)
        first, _ = model.extend(tokens[:, 8:], cache)
        model.extend(tokens[:, 8:].flip(1), cache)
        again, _ = model.extend(tokens[:, 8:], cache)
    assert torch.equal(first, again)


def test_latent_attention_caches_the_latent() -> None:
    """Under latent attention a layer keeps kv_lora_rank + qk_rope_head_dim numbers per token."""
    architecture = small("deepseek-v3")
    mla = architecture.attention.mla
    assert mla is not None
    tokens, _ = ragged(architecture, 17)
    _, cache = build(architecture).extend(tokens, None)
    kept = cache.layers[0].keys.numel() + cache.layers[0].values.numel()
    assert kept == tokens.numel() * (mla.kv_lora_rank + mla.qk_rope_head_dim)


BAD_INPUTS = {
    "tokens": lambda model, tokens: model(tokens[0]),
    "mask": lambda model, tokens: model(tokens, mask=torch.ones(3, 4, dtype=torch.bool)),
    "positions": lambda model, tokens: model(tokens, positions=torch.arange(17)),
}


@pytest.mark.parametrize("field", BAD_INPUTS)
def test_a_bad_shape_is_named(field: str) -> None:
    """A misshapen input is refused in a sentence that names it and the shape that is needed."""
    architecture = small("mixtral-8x7b")
    tokens, _ = ragged(architecture, 18)
    with pytest.raises(ValueError, match=rf"{field} ha(s|ve) shape .* needed"):
        BAD_INPUTS[field](build(architecture), tokens)
