"""The shrunken twin: an architecture at test size with its structure kept and its symmetries broken.

Sizes are chosen so that no two widths that could be swapped by mistake are equal (d_model, d_ff, 2 d_ff,
query, key and value widths, MLA's ranks), that the number of experts is no power of two and has two
digits, and that rope scaling has dimensions below, inside and above its ramp. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from harness.spec.architecture import Architecture, Attention, DType, Moe, Rope

N_HEADS, N_KV_HEADS, HEAD_DIM = 6, 2, 16
D_MODEL = {0: N_HEADS * HEAD_DIM, 1: 80, -1: 112}
"""By the sign of query width - d_model, which the twin keeps."""
D_FF, EXPERT_D_FF, SHARED_D_FF = 136, 60, 44
MLA: Mapping[str, int] = MappingProxyType(
    {"kv_lora_rank": 26, "qk_nope_head_dim": 14, "qk_rope_head_dim": 10, "v_head_dim": 18}
)
Q_LORA_RANK = 22
VOCAB_SIZE = 131
MAX_POSITIONS, ORIGINAL_MAX_POSITIONS, WINDOW = 128, 64, 8
N_GROUPS = 4
MAX_TOP_K = 3
MAX_PATTERN = 8
"""A longer pattern (one written out layer by layer) is cut to its kinds in order of appearance."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a twin that an engine's kernels may restrict; those of latent attention are fixed."""

    head_dim: int = HEAD_DIM
    d_model: tuple[int, int, int] = (D_MODEL[0], D_MODEL[1], D_MODEL[-1])
    """For a query width that equals d_model, is above it, is below it."""
    d_ff: int = D_FF
    expert_d_ff: int = EXPERT_D_FF
    shared_d_ff: int = SHARED_D_FF
    max_positions: int = MAX_POSITIONS


HARD = Sizes()
"""Hard to pass by accident: for models that are built and called in this process."""
SERVED = Sizes(
    head_dim=32,
    d_model=(N_HEADS * 32, 160, 224),
    d_ff=288,
    expert_d_ff=96,
    shared_d_ff=64,
    max_positions=1024,
)
"""For servers: widths are multiples of 32 and heads have 32 dimensions, as vLLM's kernels for CPUs need."""


def twin(
    architecture: Architecture,
    *,
    n_experts: int = 12,
    top_k: int | None = None,
    n_layers: int | None = None,
    vocab_size: int = VOCAB_SIZE,
    sizes: Sizes = HARD,
) -> Architecture:
    """The same kind of model, small: booleans, enumerations and rope factors kept, float32.

    Heads stay multi-head, grouped, multi-query or MLA; top_k is min(original, 3) unless given; there are
    layers enough to see every kind of layer and two of the MoE kind. Raises pydantic.ValidationError if
    the overrides do not fit together.
    """
    attention = _attention(architecture.attention, sizes)
    width = architecture.attention.n_heads * architecture.attention.head_dim
    moe = None if architecture.moe is None else _moe(architecture.moe, n_experts, top_k, sizes)
    dense = architecture.ffn
    least = [2, len(attention["pattern"])]
    if moe is not None:
        least.append(moe["first_dense"] + 2 * moe["period"])
    return Architecture.model_validate(
        architecture.model_dump()
        | {
            "d_model": sizes.d_model[(width > architecture.d_model) - (width < architecture.d_model)],
            "n_layers": n_layers or max(least),
            "vocab_size": vocab_size,
            "max_positions": sizes.max_positions,
            "attention": attention,
            "ffn": None if dense is None else dense.model_dump() | {"d_ff": sizes.d_ff},
            "moe": moe,
            "dtype": "float32",
        }
    )


def _attention(a: Attention, sizes: Sizes) -> dict[str, Any]:
    is_mha, is_mqa = a.n_kv_heads == a.n_heads, a.n_kv_heads == 1 < a.n_heads
    head_dim = sizes.head_dim if a.mla is None else MLA["qk_nope_head_dim"] + MLA["qk_rope_head_dim"]
    ratio = 1.0 if a.scale is None else a.scale * a.head_dim**0.5
    pattern = a.pattern if len(a.pattern) <= MAX_PATTERN else tuple(dict.fromkeys(a.pattern))
    mla = None
    if a.mla is not None:
        mla = dict(MLA) | {"q_lora_rank": None if a.mla.q_lora_rank is None else Q_LORA_RANK}
    return a.model_dump() | {
        "n_heads": N_HEADS,
        "n_kv_heads": N_HEADS if is_mha else 1 if is_mqa else N_KV_HEADS,
        "head_dim": head_dim,
        # 1e-6: a default written out as a decimal fraction is still the default.
        "scale": None if abs(ratio - 1) < 1e-6 else ratio / head_dim**0.5,
        "window": None if a.window is None else WINDOW,
        "pattern": pattern,
        "rope": None if a.rope is None else _rope(a.rope, a.head_dim, head_dim),
        "mla": mla,
    }


def _rope(rope: Rope, head_dim: int, small_head_dim: int) -> dict[str, Any]:
    made = rope.model_dump()
    if rope.dim is not None:
        # Rotation pairs dimensions, so the number stays even; at least one pair is rotated.
        made["dim"] = max(2, 2 * (rope.dim * small_head_dim // (2 * head_dim)))
    if rope.scaling is not None and rope.scaling.original_max_positions is not None:
        made["scaling"]["original_max_positions"] = ORIGINAL_MAX_POSITIONS
    return made


def _moe(moe: Moe, n_experts: int, top_k: int | None, sizes: Sizes) -> dict[str, Any]:
    # A float32 twin whose router were bfloat16 would route differently from its own oracle.
    router = moe.router.model_dump() | {"dtype": _at_least_float32(moe.router.dtype)}
    if moe.router.n_groups > 1:
        every = moe.router.topk_groups == moe.router.n_groups
        router |= {"n_groups": N_GROUPS, "topk_groups": N_GROUPS if every else min(moe.router.topk_groups, 2)}
    return moe.model_dump() | {
        "n_experts": n_experts,
        "top_k": top_k or min(moe.top_k, MAX_TOP_K),
        "expert": moe.expert.model_dump() | {"d_ff": sizes.expert_d_ff},
        "shared": None
        if moe.shared is None
        else moe.shared.model_dump() | {"d_ff": _shared_d_ff(moe, sizes)},
        "router": router,
        "first_dense": min(moe.first_dense, 1),
    }


def _shared_d_ff(moe: Moe, sizes: Sizes) -> int:
    # Shared experts that are so many routed ones stay so: some configs can say nothing but their number.
    whole = moe.shared is not None and moe.shared.d_ff % moe.expert.d_ff == 0
    return 3 * sizes.expert_d_ff if whole else sizes.shared_d_ff


def _at_least_float32(dtype: DType) -> DType:
    return "float64" if dtype == "float64" else "float32"
