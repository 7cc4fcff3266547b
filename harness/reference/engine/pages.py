"""Keys and values in pages, and the prefixes that requests share (arXiv 2309.06180, section 4).

Letters: B sequences, P tokens of the longest past, N tokens, G key/value heads, W width of a head's keys or
values. A slot is the place of one token: page * page_size + its place in the page.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from harness.reference.trace import Cache, LayerCache
from harness.spec.architecture import Architecture

Key = tuple[str, tuple[int, ...]]
"""A salt, and every token from the first of the prompt to the last of the page: compared exactly."""


def widths(a: Architecture) -> tuple[tuple[int, int], tuple[int, int]]:
    """[G, W] of one token's keys and of its values in one layer, as `harness.reference.trace` has them."""
    mla = a.attention.mla
    if mla is not None:
        return (1, mla.qk_rope_head_dim), (1, mla.kv_lora_rank)
    return ((a.attention.n_kv_heads, a.attention.head_dim),) * 2


class PagePool:
    """`pages` pages of `page_size` tokens each, for every layer.

    A page is free, or held by as many sequences as `references` says, or cached: full, under its key, held by
    nobody, and given to the next who asks for its prefix, or for any page when no free one is left (the least
    recently used first). A page of a key is never written again while it has that key.
    """

    def __init__(
        self, a: Architecture, pages: int, page_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        keys, values = widths(a)
        slots = pages * page_size
        # Zeros, as a weight of 0 times what lies in fresh memory can be NaN
        self.keys = [torch.zeros(slots, *keys, device=device, dtype=dtype) for _ in range(a.n_layers)]
        self.values = [torch.zeros(slots, *values, device=device, dtype=dtype) for _ in range(a.n_layers)]
        self.pages, self.page_size, self.device = pages, page_size, device
        self.free = list(reversed(range(pages)))
        self.references = [0] * pages
        self.shared: dict[Key, int] = {}
        self.key_of: dict[int, Key] = {}
        self.cached: OrderedDict[int, None] = OrderedDict()
        """Pages with a key that nobody holds, least recently used first."""

    @property
    def used(self) -> int:
        """Pages that some sequence holds."""
        return self.pages - self.available

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and cached ones that nobody holds."""
        return len(self.free) + len(self.cached)

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.page_size)

    def key(self, tokens: Sequence[int], salt: str) -> Key:
        """Under which a full page is shared whose last token is the last of `tokens`."""
        return salt, tuple(tokens)

    def find(self, tokens: Sequence[int], salt: str) -> list[int]:
        """Pages that hold the longest known prefix of `tokens`, nothing taken yet.

        The last token is left out even where it is known: its logits are wanted, so it is computed.
        """
        found = []
        for end in range(self.page_size, len(tokens), self.page_size):
            page = self.shared.get(self.key(tokens[:end], salt))
            if page is None:
                break
            found.append(page)
        return found

    def hold(self, page: int) -> None:
        """One more sequence holds a page that has a key."""
        self.references[page] += 1
        self.cached.pop(page, None)

    def take(self) -> int:
        """A page for one sequence alone; the oldest cached one where none is free.

        Raises LookupError where all are held.
        """
        if not self.free:
            self.evict()
        page = self.free.pop()
        self.references[page] = 1
        return page

    def evict(self) -> None:
        """The least recently used of the cached pages becomes free; LookupError where there is none."""
        if not self.cached:
            raise LookupError(f"all {self.pages} pages are held")
        page, _ = self.cached.popitem(last=False)
        del self.shared[self.key_of.pop(page)]
        self.free.append(page)

    def release(self, pages: Sequence[int]) -> None:
        """One sequence holds them no more. Its last pages are evicted first: the rest is of use without."""
        for page in reversed(pages):
            self.references[page] -= 1
            if self.references[page] == 0:
                if page in self.key_of:
                    self.cached[page] = None
                else:
                    self.free.append(page)

    def publish(self, page: int, tokens: Sequence[int], salt: str) -> None:
        """A full page, whose last token is the last of `tokens`, may be shared; the first of a key stays."""
        key = self.key(tokens, salt)
        if key not in self.shared and page not in self.key_of:
            self.shared[key] = page
            self.key_of[page] = key

    def slots(self, pages: Sequence[int], start: int, end: int) -> Tensor:
        """Slots [end - start] int64 of the tokens from `start` to before `end` of the holder of `pages`."""
        first = torch.tensor(pages, dtype=torch.int64) * self.page_size
        return (first[:, None] + torch.arange(self.page_size)).flatten()[start:end]

    def gather(self, pages: Sequence[Sequence[int]], lengths: Sequence[int]) -> Cache:
        """The past of B sequences, of `lengths` tokens each, as a cache padded on the right to [B, P].

        Padding is zero, so that not even a NaN of a neighbour is multiplied into anything.
        """
        past = max(lengths, default=0)
        real = torch.arange(past)[None] < torch.tensor(lengths)[:, None]
        slots = torch.zeros(len(lengths), past, dtype=torch.int64)
        for row, (held, length) in enumerate(zip(pages, lengths, strict=True)):
            slots[row, :length] = self.slots(held, 0, length)
        slots, real = slots.to(self.device), real.to(self.device)
        padding = ~real[..., None, None]
        layers = (
            LayerCache(keys[slots].masked_fill_(padding, 0), values[slots].masked_fill_(padding, 0))
            for keys, values in zip(self.keys, self.values, strict=True)
        )
        return Cache(tuple(layers), real)

    def write(self, slots: Tensor, cache: Cache, rows: Tensor, columns: Tensor) -> None:
        """Put the keys and values at [rows, columns] of a cache into slots; all three are [N]."""
        slots, rows, columns = (part.to(self.device) for part in (slots, rows, columns))
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            keys[slots] = layer.keys[rows, columns]
            values[slots] = layer.values[rows, columns]
