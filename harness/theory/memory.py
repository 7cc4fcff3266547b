"""Bytes of weights and of the KV cache.

Letters: L n_layers, G n_kv_heads, h head_dim, S tokens in the cache per sequence, B sequences, W window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from harness.spec.architecture import Architecture, DType
from harness.theory import parameters
from harness.theory.flops import n_window_layers

BYTES: Mapping[DType, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element."""

LatentCache = Literal["latent", "expanded"]


def weight_bytes(architecture: Architecture, dtype: DType | None = None) -> int:
    """Bytes of all parameters at `dtype` (default: the architecture's own); buffers are left out."""
    return parameters.total(architecture) * BYTES[dtype or architecture.dtype]


def cached_width(architecture: Architecture, mla: LatentCache = "latent") -> int:
    """Elements that one token leaves in one layer's cache: 2 G h, whatever the number of query heads.

    Under MLA one latent and one rotary key for all heads (DeepSeek-V2, arXiv 2405.04434, table 1), or, where
    an implementation caches them "expanded", full keys and values.
    """
    attention = architecture.attention
    if attention.mla is None:
        return 2 * attention.n_kv_heads * attention.head_dim
    if mla == "latent":
        return attention.mla.kv_lora_rank + attention.mla.qk_rope_head_dim
    return attention.n_kv_heads * (attention.head_dim + attention.mla.v_head_dim)


def kv_cache_bytes_per_token(
    architecture: Architecture, dtype: DType | None = None, mla: LatentCache = "latent"
) -> int:
    """Bytes that one more token adds to the cache while no window is full."""
    element = BYTES[dtype or architecture.dtype]
    return architecture.n_layers * cached_width(architecture, mla) * element


def kv_cache_bytes(
    architecture: Architecture,
    seq: int,
    batch: int = 1,
    dtype: DType | None = None,
    mla: LatentCache = "latent",
) -> int:
    """Bytes of the cache of B sequences of S tokens; a window layer keeps at most W tokens."""
    windowed, window = n_window_layers(architecture), architecture.attention.window
    kept = seq if window is None else min(seq, window)
    tokens = (architecture.n_layers - windowed) * seq + windowed * kept
    return batch * tokens * cached_width(architecture, mla) * BYTES[dtype or architecture.dtype]
