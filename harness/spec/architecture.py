"""What a spec may say about the shape of a model: frozen, validated values, full size or twin.

Every leaf is a plain value. Whether a leaf is published, leaked, inferred or unknown is the
business of `harness.spec.document`; theory and the reference only ever see an `Architecture`.
"""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
"""A dimension or a number of things: at least one."""
MAX_LAYERS = 10_000
"""Layers are walked one by one: a larger number is a mistake, and would look like a hang."""
Index = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

DType = Literal["float64", "float32", "bfloat16", "float16"]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "clamped_swiglu"]


class Model(BaseModel):
    """Frozen, with unknown keys refused: a typo is an error, never a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Norm(Model):
    """A normalisation: RMSNorm (no mean, no bias) or LayerNorm."""

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    eps: Positive = 1e-5
    bias: bool = False
    """LayerNorm only: a learned shift beside the learned scale."""

    @model_validator(mode="after")
    def _bias_needs_layernorm(self) -> Self:
        if self.bias and self.kind == "rmsnorm":
            raise ValueError('an RMSNorm has no bias; say kind = "layernorm"')
        return self


class RopeScaling(Model):
    """How rotary frequencies are stretched beyond the trained context.

    linear: positions / factor. llama3: by wavelength (Llama 3.1 model code). yarn: NTK by parts
    (Peng et al. 2023, arXiv 2309.00071); its factor on cos and sin is attention_factor if given, else
    m(mscale) / m(mscale_all_dim) if both are non-zero, else m(1), with m(x) = 0.1 x ln(factor) + 1
    (1 if factor <= 1). Under MLA with mscale_all_dim > 0 an absent attention.scale means
    m(mscale_all_dim)^2 / sqrt(head_dim) (DeepSeek-V3 model code); one that is given is taken as it is.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: Positive
    original_max_positions: Count | None = None
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: Finite = 0.0
    """yarn as in DeepSeek; 0: not given."""
    mscale_all_dim: Finite = 0.0
    """yarn as in DeepSeek; 0: not given."""
    attention_factor: Positive | None = None
    """yarn: an explicit factor on cos and sin, in place of the one derived from mscale."""
    truncate: bool = True
    """yarn: round the correction range to whole dimensions."""


class Rope(Model):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

    theta: Positive = 10000.0
    dim: Count | None = None
    """Rotated dimensions of each head; None: all of them (of the rope part, under MLA)."""
    layout: Literal["half", "interleaved"] = "half"
    scaling: RopeScaling | None = None


class Mla(Model):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_lora_rank: Count | None = None
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count


class Attention(Model):
    """Multi-head, grouped-query (1 < n_kv_heads < n_heads) or multi-query (n_kv_heads = 1)."""

    n_heads: Count
    n_kv_heads: Count
    head_dim: Count
    """Width of one query/key head; under MLA its nope and rope parts together."""
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "head", "width"] = "none"
    """RMSNorm of queries and keys: none, per head (Qwen3), or over the full width (OLMoE)."""
    qkv_clip: Positive | None = None
    """Clamp of query, key and value projections to [-clip, clip] (DBRX)."""
    sinks: bool = False
    """One learned logit per head that joins the softmax and takes no value (gpt-oss)."""
    scale: Positive | None = None
    """Factor on query-key products; None: 1 / sqrt(head_dim) (under MLA with yarn: see RopeScaling)."""
    window: Count | None = None
    """A token on a window layer attends to itself and the window - 1 tokens before it."""
    pattern: Annotated[tuple[Literal["full", "window"], ...], Field(strict=False)] = ("full",)
    """Kinds of layer, repeated from layer 0 until the last one."""
    rope: Rope | None = None
    mla: Mla | None = None

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if not self.pattern:
            raise ValueError("pattern needs at least one kind of layer")
        if "window" in self.pattern and self.window is None:
            raise ValueError("pattern has window layers, but window is not given")
        if self.window is not None and "window" not in self.pattern:
            raise ValueError("window is given, but pattern has no window layer")
        mla = self.mla
        if mla is not None and self.head_dim != mla.qk_nope_head_dim + mla.qk_rope_head_dim:
            raise ValueError("under MLA head_dim must be qk_nope_head_dim + qk_rope_head_dim")
        if mla is not None and self.n_kv_heads != self.n_heads:
            raise ValueError("under MLA n_kv_heads must equal n_heads")
        return self


class FeedForward(Model):
    """One feed-forward network: two matrices, or three when gated (SwiGLU, arXiv 2002.05202)."""

    d_ff: Count
    gated: bool = True
    activation: Activation = "silu"
    bias: bool = False
    clamp: Positive | None = None
    """clamped_swiglu only (gpt-oss): the limit on gate (from above) and up (both sides)."""

    @model_validator(mode="after")
    def _clamp_fits(self) -> Self:
        if (self.clamp is not None) != (self.activation == "clamped_swiglu"):
            raise ValueError('clamp belongs to activation = "clamped_swiglu", and to it alone')
        if self.activation == "clamped_swiglu" and not self.gated:
            raise ValueError("clamped_swiglu needs gated = true")
        return self


class Router(Model):
    """From a token's hidden state to top-k experts and their combine weights."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    order: Literal["before_topk", "after_topk"] = "before_topk"
    """Scores over all experts and then top-k, or top-k of the logits and then scores of those."""
    normalise: bool = True
    """Divide the selected weights by their sum (norm_topk_prob)."""
    bias: bool = False
    """A bias in the router's linear layer: it changes the logits."""
    correction_bias: bool = False
    """A per-expert bias that selects but never weighs (DeepSeek-V3, arXiv 2412.19437, eq. 16)."""
    n_groups: Count = 1
    topk_groups: Count = 1
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    scaling_factor: Positive = 1.0
    dtype: DType = "float32"
    """In which scores are computed."""
    capacity_factor: Positive | None = None
    """None: dropless. Else an expert keeps ceil(tokens * top_k / n_experts * factor) tokens."""
    drop_policy: Literal["position", "probability"] = "position"
    """Who stays when an expert overflows: the earliest tokens, or those of highest weight."""
    jitter: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """In training the router's input, and nothing else, is multiplied elementwise by numbers drawn uniformly
    from [1 - jitter, 1 + jitter] (Switch, arXiv 2101.03961, section 2.2)."""

    @model_validator(mode="after")
    def _order_fits(self) -> Self:
        if self.topk_groups > self.n_groups:
            raise ValueError(f"topk_groups {self.topk_groups} exceeds n_groups {self.n_groups}")
        if self.order == "after_topk" and (self.score != "softmax" or self.n_groups > 1):
            raise ValueError('order = "after_topk" is defined for softmax without groups')
        return self


class Moe(Model):
    """A mixture-of-experts feed-forward, and which layers have one."""

    n_experts: Count
    top_k: Count
    expert: FeedForward
    """One routed expert."""
    shared: FeedForward | None = None
    """Shared experts as one network: d_ff is their width together."""
    shared_gate: bool = False
    """A learned sigmoid gate on the shared experts' output (Qwen2-MoE)."""
    router: Router = Router()
    first_dense: Index = 0
    """Layers 0 .. first_dense - 1 have a dense feed-forward."""
    period: Count = 1
    offset: Index = 0
    """From first_dense on, layer i is a MoE layer if i % period == offset."""

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        r = self.router
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} exceeds n_experts {self.n_experts}")
        if self.n_experts % r.n_groups:
            raise ValueError(f"n_experts {self.n_experts} is not a multiple of n_groups {r.n_groups}")
        if self.top_k > self.n_experts // r.n_groups * r.topk_groups:
            raise ValueError("top_k exceeds the experts of topk_groups groups")
        if self.offset >= self.period:
            raise ValueError(f"offset {self.offset} must be below period {self.period}")
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate is true, but there is no shared expert")
        return self


class AuxiliaryLoss(Model):
    """Router losses beside the language-model loss, each under its named convention.

    switch: E * sum_i f_i P_i per layer with f_i = c_i / (T K) (Switch, arXiv 2101.03961, eq. 4).
    huggingface: the same with f_i = c_i / T and f, P pooled over layers before the product.
    sequence: per sequence, normalised scores (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).
    z: mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).
    """

    balance: Literal["none", "switch", "huggingface", "sequence"] = "none"
    balance_coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    z_coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class Architecture(Model):
    """A decoder-only transformer: everything that fixes its parameters and its forward pass."""

    d_model: Count
    n_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    vocab_size: Count
    max_positions: Count
    tie_embeddings: bool = False
    positions: Literal["rope", "learned", "none"] = "rope"
    norm: Norm = Norm()
    parallel_block: bool = False
    """Attention and feed-forward read one shared norm and are added together (PaLM, GPT-J)."""
    attention: Attention
    ffn: FeedForward | None = None
    """The dense feed-forward of every layer that is not a MoE layer."""
    moe: Moe | None = None
    auxiliary_loss: AuxiliaryLoss = AuxiliaryLoss()
    dtype: DType = "bfloat16"
    """Of the weights as published: it sets bytes, not arithmetic."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if (self.positions == "rope") != (self.attention.rope is not None):
            raise ValueError('attention.rope must be given if, and only if, positions = "rope"')
        dense = [i for i in range(self.n_layers) if not self.is_moe_layer(i)]
        if dense and self.ffn is None:
            raise ValueError(f"layer {dense[0]} is dense, but there is no [architecture.ffn]")
        if not dense and self.ffn is not None:
            raise ValueError("every layer is a MoE layer, so [architecture.ffn] would be unused")
        if self.moe is not None and len(dense) == self.n_layers:
            raise ValueError("no layer is a MoE layer: first_dense, period and offset leave none")
        return self

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) routes to experts."""
        moe = self.moe
        return moe is not None and layer >= moe.first_dense and layer % moe.period == moe.offset

    def is_window_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) attends through a sliding window."""
        pattern = self.attention.pattern
        return pattern[layer % len(pattern)] == "window"

    @property
    def n_moe_layers(self) -> int:
        """How many layers route to experts."""
        return sum(self.is_moe_layer(i) for i in range(self.n_layers))


def without_none(annotation: Any) -> Any:
    """T of `T | None`."""
    if get_origin(annotation) in (Union, UnionType):
        return Union[tuple(a for a in get_args(annotation) if a is not NoneType)]  # noqa: UP007 (built at run time)
    return annotation


def part_type(annotation: Any) -> type[BaseModel] | None:
    """The nested model that a field's annotation names, or None if the field is a leaf."""
    kind = without_none(annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
