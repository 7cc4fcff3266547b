"""How many parameters an architecture has, by component, in total and active for one token.

Letters: D d_model, V vocab_size, F d_ff, E n_experts.

The components are those of a transformer's state dict (Vaswani et al. 2017, arXiv 1706.03762; SwiGLU's
third matrix: Shazeer 2020, arXiv 2002.05202; latent attention: DeepSeek-V2, arXiv 2405.04434, eq. 9-17).
"Parameter" means what a gradient trains: a router's correction bias (DeepSeek-V3, arXiv 2412.19437, eq. 16)
is updated by a rule of its own, is kept as a buffer, and is counted by `buffers` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from harness.spec.architecture import Architecture, Attention, FeedForward

COMPONENTS: Mapping[str, str] = {
    "embedding": "token embedding V x D; a tied unembedding is this same table",
    "positions": "learned position embeddings",
    "attention.projections": "query, key, value and output matrices (under MLA with their low-rank factors)",
    "attention.biases": "biases of those matrices",
    "attention.norms": "norms of queries and keys, or of the latents under MLA",
    "attention.sinks": "one learned logit per head",
    "router.weight": "the routers' matrices E x D",
    "router.bias": "biases of those matrices (a correction bias is a buffer)",
    "experts.weights": "routed experts' matrices",
    "experts.biases": "routed experts' biases",
    "shared.weights": "shared experts' matrices",
    "shared.biases": "shared experts' biases",
    "shared.gate": "gate on the shared experts' output",
    "ffn.weights": "matrices of the dense feed-forward layers",
    "ffn.biases": "their biases",
    "norms": "norms of the residual stream, the final one included",
    "unembedding": "output matrix V x D; 0 where it is tied to the embedding",
}
"""Every architecture has all of these keys, some of them 0."""


@dataclass(frozen=True)
class Convention:
    """A named answer to the question which components a published count includes."""

    name: str
    description: str
    components: frozenset[str]


_ALL = frozenset(COMPONENTS)
_MATRICES = frozenset(
    {
        "attention.projections",
        "router.weight",
        "experts.weights",
        "shared.weights",
        "shared.gate",
        "ffn.weights",
        "unembedding",
    }
)

CONVENTIONS: Mapping[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention("all", "every parameter, both embeddings included", _ALL),
        Convention(
            "no-input-embedding",
            "all but the tables that are looked up: token embedding (unless tied) and positions",
            _ALL - {"embedding", "positions"},
        ),
        Convention(
            "no-embeddings",
            "all but token embedding, positions and unembedding",
            _ALL - {"embedding", "positions", "unembedding"},
        ),
        Convention("no-router", "all but the routers", _ALL - {"router.weight", "router.bias"}),
        Convention(
            "matmul",
            "matrices that multiply a token's state, a tied unembedding too: no norms, no biases",
            _MATRICES,
        ),
        Convention(
            "matmul-no-unembedding",
            "the same without the unembedding: N of Kaplan et al. 2020 (arXiv 2001.08361, eq. 2.1)",
            _MATRICES - {"unembedding"},
        ),
        Convention("experts", "routed experts' matrices alone", frozenset({"experts.weights"})),
    )
}


def n_moe_layers(architecture: Architecture) -> int:
    """Layers that route to experts; equals Architecture.n_moe_layers, in closed form."""
    moe = architecture.moe
    if moe is None:
        return 0
    count = congruent(architecture.n_layers, moe.period, moe.offset)
    count -= congruent(moe.first_dense, moe.period, moe.offset)
    return (count > 0) * count


def congruent(n: int, period: int, offset: int) -> int:
    """How many i in 0 .. n - 1 have i % period == offset."""
    return (n - offset + period - 1) // period


def matrix_parameters(d_model: int, ffn: FeedForward) -> int:
    """Matrices of one feed-forward network: two of D x F, three when gated."""
    return (2 + ffn.gated) * d_model * ffn.d_ff


def _bias_parameters(d_model: int, ffn: FeedForward) -> int:
    return ffn.bias * ((1 + ffn.gated) * ffn.d_ff + d_model)


def latent_expansion(attention: Attention) -> int:
    """Parameters of the matrix that makes one layer's keys and values out of latents; 0 without MLA."""
    mla = attention.mla
    if mla is None:
        return 0
    return mla.kv_lora_rank * attention.n_heads * (mla.qk_nope_head_dim + mla.v_head_dim)


def _attention(d_model: int, attention: Attention) -> dict[str, int]:
    """Components of one layer's attention."""
    mla, heads, width = attention.mla, attention.n_heads, attention.head_dim
    if mla is not None:
        rank, latent = mla.q_lora_rank or 0, mla.kv_lora_rank + mla.qk_rope_head_dim
        query = heads * width * (rank or d_model) + d_model * rank
        projections = query + d_model * latent + latent_expansion(attention)
        projections += heads * mla.v_head_dim * d_model
        biases = attention.qkv_bias * (rank + latent)  # as in DeepSeek's code: on the down-projections only
        norms = rank + mla.kv_lora_rank
    else:
        queries, keys = heads * width, attention.n_kv_heads * width
        projections = d_model * (2 * queries + 2 * keys)
        biases = attention.qkv_bias * (queries + 2 * keys)
        norms = {"none": 0, "head": 2 * width, "width": queries + keys}[attention.qk_norm]
    return {
        "attention.projections": projections,
        "attention.biases": biases + attention.o_bias * d_model,
        "attention.norms": norms,
        "attention.sinks": attention.sinks * heads,
    }


def _count(architecture: Architecture, experts_per_layer: int) -> dict[str, int]:
    """By component, with `experts_per_layer` routed experts counted in each MoE layer."""
    d, layers, moe, dense = architecture.d_model, architecture.n_layers, architecture.moe, architecture.ffn
    routed = n_moe_layers(architecture)
    table = architecture.vocab_size * d
    learned = architecture.positions == "learned"
    counts = dict.fromkeys(COMPONENTS, 0)
    counts["embedding"] = table
    counts["positions"] = learned * architecture.max_positions * d
    counts["unembedding"] = (1 - architecture.tie_embeddings) * table
    counts["norms"] = (1 + architecture.norm.bias) * d * ((2 - architecture.parallel_block) * layers + 1)
    for name, one_layer in _attention(d, architecture.attention).items():
        counts[name] = layers * one_layer
    if dense is not None:
        counts["ffn.weights"] = (layers - routed) * matrix_parameters(d, dense)
        counts["ffn.biases"] = (layers - routed) * _bias_parameters(d, dense)
    if moe is not None:
        counts["router.weight"] = routed * moe.n_experts * d
        counts["router.bias"] = routed * moe.router.bias * moe.n_experts
        counts["experts.weights"] = routed * experts_per_layer * matrix_parameters(d, moe.expert)
        counts["experts.biases"] = routed * experts_per_layer * _bias_parameters(d, moe.expert)
        counts["shared.gate"] = routed * moe.shared_gate * d
        if moe.shared is not None:
            counts["shared.weights"] = routed * matrix_parameters(d, moe.shared)
            counts["shared.biases"] = routed * _bias_parameters(d, moe.shared)
    return counts


def by_component(architecture: Architecture) -> dict[str, int]:
    """Parameters of every component, under the keys of COMPONENTS; they add up to `total`."""
    return _count(architecture, architecture.moe.n_experts if architecture.moe else 0)


def active_by_component(architecture: Architecture) -> dict[str, int]:
    """The same for one token's forward pass: top-k routed experts in place of all of them."""
    return _count(architecture, architecture.moe.top_k if architecture.moe else 0)


def buffers(architecture: Architecture) -> dict[str, int]:
    """State beside the parameters that training moves without a gradient: the correction biases."""
    moe = architecture.moe
    if moe is None or not moe.router.correction_bias:
        return {"router.correction_bias": 0}
    return {"router.correction_bias": n_moe_layers(architecture) * moe.n_experts}


def _under(architecture: Architecture, counts: Mapping[str, int], convention: str) -> int:
    if convention not in CONVENTIONS:
        raise ValueError(f"no counting convention {convention!r}; there are {', '.join(CONVENTIONS)}")
    included = CONVENTIONS[convention].components
    count = sum(counts[name] for name in COMPONENTS if name in included)
    # A tied table multiplies as the unembedding: who counts the unembedding counts it, once.
    table_is_missing = "unembedding" in included and "embedding" not in included
    return count + table_is_missing * architecture.tie_embeddings * counts["embedding"]


def total(architecture: Architecture, convention: str = "all") -> int:
    """Parameters counted under `convention` (a key of CONVENTIONS). Raises ValueError on another name."""
    return _under(architecture, by_component(architecture), convention)


def active(architecture: Architecture, convention: str = "all") -> int:
    """Parameters that one token's forward pass uses; otherwise as `total`."""
    return _under(architecture, active_by_component(architecture), convention)


def part(architecture: Architecture, prefix: str) -> int:
    """All components under a prefix: "attention" adds its projections, biases, norms and sinks.

    Raises ValueError if no component is called so.
    """
    counts = by_component(architecture)
    names = [name for name in counts if name == prefix or name.startswith(prefix + ".")]
    if not names:
        raise ValueError(f"no component {prefix!r}; there are {', '.join(counts)}")
    return sum(counts[name] for name in names)


def one_expert(architecture: Architecture) -> int:
    """Parameters of one routed expert's matrices and biases, over all MoE layers; 0 if there is none."""
    counts = _count(architecture, 1)
    return counts["experts.weights"] + counts["experts.biases"]


def conventions_matching(
    architecture: Architecture,
    holds: Callable[[int], bool],
    count: Callable[[Architecture, str], int] = active,
) -> tuple[str, ...]:
    """The conventions under which `count` (`active` or `total`) gives a figure that `holds`.

    `holds` says whether a count reads as the published figure, e.g. `lambda n: n in interval("37B")`.
    """
    return tuple(name for name in CONVENTIONS if holds(count(architecture, name)))
