"""Where the reference's weights are in a model of transformers, in both directions, to the bit.

Letters: D d_model, H heads, h head_dim, F d_ff, E experts. Canonical names and layouts are those of
`harness.reference.weights`; every layout here only moves elements about, so it is exact for weights and
for gradients alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.implementations.huggingface_like import LEARNED_BUFFERS
from harness.implementations.protocols import Unsupported
from harness.reference import weights as canonical_weights
from harness.spec.architecture import Architecture

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How several canonical tensors make one of theirs, and back (given the canonical shapes)."""

    pack: Callable[[Sequence[Tensor]], Tensor]
    unpack: Callable[[Tensor, Sequence[Shape]], Sequence[Tensor]]


def _split(joined: Tensor, shapes: Sequence[Shape], dim: int) -> Sequence[Tensor]:
    return torch.split(joined, [shape[dim] for shape in shapes], dim)


SAME = Layout(lambda ours: ours[0], lambda theirs, _: [theirs])
TRANSPOSED = Layout(lambda ours: ours[0].mT, lambda theirs, _: [theirs.mT])
ROWS = Layout(
    lambda ours: torch.cat(list(ours), 0),
    lambda theirs, shapes: _split(theirs, shapes, 0),
)
"""Matrices or biases on top of each other: one linear layer of them all."""
ROWS_TRANSPOSED = Layout(
    lambda ours: torch.cat(list(ours), 0).mT,
    lambda theirs, shapes: _split(theirs.mT, shapes, 0),
)
"""The same under a matrix that multiplies from the right (GPT-2's Conv1D)."""
GATE_UP = Layout(
    lambda ours: torch.cat(list(ours), 1),
    lambda theirs, shapes: _split(theirs, shapes, 1),
)
"""[E, F, D] twice into [E, 2F, D]: all of gate, then all of up."""
GATE_UP_ALTERNATING = Layout(
    lambda ours: torch.stack(list(ours), 2).flatten(1, 2).mT,
    lambda theirs, _: [theirs[..., 0::2].mT, theirs[..., 1::2].mT],
)
"""[E, F, D] twice into [E, D, 2F], gate and up by turns (gpt-oss)."""
BIAS_ALTERNATING = Layout(
    lambda ours: torch.stack(list(ours), 2).flatten(1, 2),
    lambda theirs, _: [theirs[..., 0::2], theirs[..., 1::2]],
)
"""[E, F] twice into [E, 2F] by turns."""
EXPERTS_FLAT = Layout(
    lambda ours: ours[0].flatten(0, 1),
    lambda theirs, shapes: [theirs.reshape(shapes[0])],
)
"""[E, F, D] into [E F, D] (DBRX)."""
EXPERTS_FLAT_TRANSPOSED = Layout(
    lambda ours: ours[0].mT.flatten(0, 1),
    lambda theirs, shapes: [theirs.reshape(shapes[0][0], shapes[0][2], shapes[0][1]).mT],
)
"""[E, D, F] into [E F, D] (DBRX's third matrix)."""

Rule = tuple[str, tuple[str, ...], Layout]
"""Their name, our names, the layout; `{i}` is the layer. A rule whose canonical tensors an architecture
does not have is left out; what no rule covers is refused."""


def _linear(theirs: str, ours: str, layout: Layout = SAME) -> list[Rule]:
    return [(f"{theirs}.weight", (f"{ours}.weight",), layout), (f"{theirs}.bias", (f"{ours}.bias",), SAME)]


_T, _C = "model.layers.{i}", "layers.{i}"
_LLAMA: list[Rule] = [
    *_linear("model.embed_tokens", "embedding"),
    *_linear("model.norm", "final_norm"),
    *_linear("lm_head", "unembedding"),
    *_linear(f"{_T}.input_layernorm", f"{_C}.attention_norm"),
    *_linear(f"{_T}.post_attention_layernorm", f"{_C}.ffn_norm"),
    *(r for x in "qkvo" for r in _linear(f"{_T}.self_attn.{x}_proj", f"{_C}.attention.{x}")),
    *(r for x in "qk" for r in _linear(f"{_T}.self_attn.{x}_norm", f"{_C}.attention.{x}_norm")),
    *(r for x in ("gate", "up", "down") for r in _linear(f"{_T}.mlp.{x}_proj", f"{_C}.ffn.{x}")),
]
_EXPERTS: list[Rule] = [
    (f"{_T}.mlp.experts.gate_up_proj", (f"{_C}.moe.experts.gate", f"{_C}.moe.experts.up"), GATE_UP),
    (f"{_T}.mlp.experts.down_proj", (f"{_C}.moe.experts.down",), SAME),
]
_MIXTRAL: list[Rule] = [*_LLAMA, *_EXPERTS, *_linear(f"{_T}.mlp.gate", f"{_C}.moe.router")]
_GPT_OSS: list[Rule] = [
    *_LLAMA,
    (f"{_T}.self_attn.sinks", (f"{_C}.attention.sinks",), SAME),
    *_linear(f"{_T}.mlp.router", f"{_C}.moe.router"),
    (
        f"{_T}.mlp.experts.gate_up_proj",
        (f"{_C}.moe.experts.gate", f"{_C}.moe.experts.up"),
        GATE_UP_ALTERNATING,
    ),
    (
        f"{_T}.mlp.experts.gate_up_proj_bias",
        (f"{_C}.moe.experts.gate_bias", f"{_C}.moe.experts.up_bias"),
        BIAS_ALTERNATING,
    ),
    (f"{_T}.mlp.experts.down_proj", (f"{_C}.moe.experts.down",), TRANSPOSED),
    (f"{_T}.mlp.experts.down_proj_bias", (f"{_C}.moe.experts.down_bias",), SAME),
]
_DEEPSEEK_V3: list[Rule] = [
    *_MIXTRAL,
    *_linear(f"{_T}.self_attn.q_a_proj", f"{_C}.attention.q_a"),
    *_linear(f"{_T}.self_attn.q_a_layernorm", f"{_C}.attention.q_a_norm"),
    *_linear(f"{_T}.self_attn.q_b_proj", f"{_C}.attention.q_b"),
    *_linear(f"{_T}.self_attn.kv_a_proj_with_mqa", f"{_C}.attention.kv_a"),
    *_linear(f"{_T}.self_attn.kv_a_layernorm", f"{_C}.attention.kv_a_norm"),
    *_linear(f"{_T}.self_attn.kv_b_proj", f"{_C}.attention.kv_b"),
    (f"{_T}.mlp.gate.e_score_correction_bias", (f"{_C}.moe.router.correction_bias",), SAME),
    *(
        rule
        for x in ("gate", "up", "down")
        for rule in _linear(f"{_T}.mlp.shared_experts.{x}_proj", f"{_C}.moe.shared.{x}")
    ),
]
_G, _QKV = "transformer.h.{i}", ("q", "k", "v")
_GPT2: list[Rule] = [
    *_linear("transformer.wte", "embedding"),
    *_linear("transformer.wpe", "positions"),
    *_linear("transformer.ln_f", "final_norm"),
    *_linear("lm_head", "unembedding"),
    *_linear(f"{_G}.ln_1", f"{_C}.attention_norm"),
    *_linear(f"{_G}.ln_2", f"{_C}.ffn_norm"),
    (f"{_G}.attn.c_attn.weight", tuple(f"{_C}.attention.{x}.weight" for x in _QKV), ROWS_TRANSPOSED),
    (f"{_G}.attn.c_attn.bias", tuple(f"{_C}.attention.{x}.bias" for x in _QKV), ROWS),
    *_linear(f"{_G}.attn.c_proj", f"{_C}.attention.o", TRANSPOSED),
    *_linear(f"{_G}.mlp.c_fc", f"{_C}.ffn.up", TRANSPOSED),
    *_linear(f"{_G}.mlp.c_proj", f"{_C}.ffn.down", TRANSPOSED),
]
_B = "transformer.blocks.{i}"
_DBRX: list[Rule] = [
    *_linear("transformer.wte", "embedding"),
    *_linear("transformer.norm_f", "final_norm"),
    *_linear("lm_head", "unembedding"),
    *_linear(f"{_B}.norm_attn_norm.norm_1", f"{_C}.attention_norm"),
    *_linear(f"{_B}.norm_attn_norm.norm_2", f"{_C}.ffn_norm"),
    (
        f"{_B}.norm_attn_norm.attn.Wqkv.weight",
        tuple(f"{_C}.attention.{x}.weight" for x in _QKV),
        ROWS,
    ),
    *_linear(f"{_B}.norm_attn_norm.attn.out_proj", f"{_C}.attention.o"),
    *_linear(f"{_B}.ffn.router.layer", f"{_C}.moe.router"),
    (f"{_B}.ffn.experts.mlp.w1", (f"{_C}.moe.experts.gate",), EXPERTS_FLAT),
    (f"{_B}.ffn.experts.mlp.v1", (f"{_C}.moe.experts.up",), EXPERTS_FLAT),
    (f"{_B}.ffn.experts.mlp.w2", (f"{_C}.moe.experts.down",), EXPERTS_FLAT_TRANSPOSED),
]

RULES: Mapping[str, list[Rule]] = {
    "llama": _LLAMA,
    "mixtral": _MIXTRAL,
    "qwen3_moe": _MIXTRAL,
    "olmoe": _MIXTRAL,
    "gpt_oss": _GPT_OSS,
    "deepseek_v3": _DEEPSEEK_V3,
    "gpt2": _GPT2,
    "dbrx": _DBRX,
}


@dataclass(frozen=True)
class FamilyMap:
    """The rules of one family that hold for one architecture, each tensor of it in exactly one."""

    family: str
    rules: tuple[Rule, ...]
    shapes: Mapping[str, Shape]
    """Of the canonical tensors."""

    @classmethod
    def of(cls, architecture: Architecture, family: str) -> FamilyMap:
        """Raises Unsupported naming the canonical tensors that the family has no place for."""
        shapes = canonical_weights.shapes(architecture)
        every = (
            (theirs.format(i=i), tuple(name.format(i=i) for name in ours), layout)
            for theirs, ours, layout in RULES[family]
            for i in (range(architecture.n_layers) if "{i}" in theirs else (0,))
        )
        rules = tuple(rule for rule in every if all(name in shapes for name in rule[1]))
        covered = [name for _, ours, _ in rules for name in ours]
        homeless = sorted(set(shapes) - set(covered))
        if homeless:
            raise Unsupported(f"transformers:{family} has no place for {', '.join(homeless[:3])}")
        return cls(family, rules, shapes)

    def load(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Copy the canonical weights in. KeyError: missing or unused; ValueError: misshapen."""
        self._require(weights, self.shapes, "canonical weights")
        for name, shape in self.shapes.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, it must be {shape}")
        targets = learned(module)
        self._require(targets, {theirs for theirs, _, _ in self.rules}, f"tensors of {self.family}")
        with torch.no_grad():
            for theirs, ours, layout in self.rules:
                value = layout.pack([weights[name] for name in ours])
                if value.shape != targets[theirs].shape:
                    raise ValueError(
                        f"{theirs} has shape {tuple(targets[theirs].shape)}, "
                        f"but {', '.join(ours)} give {tuple(value.shape)}"
                    )
                targets[theirs].copy_(value)

    def canonical(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors under canonical names and layouts. KeyError: missing or unused."""
        self._require(named, {theirs for theirs, _, _ in self.rules}, f"tensors of {self.family}")
        found: dict[str, Tensor] = {}
        for theirs, ours, layout in self.rules:
            parts = layout.unpack(named[theirs], [self.shapes[name] for name in ours])
            found.update(zip(ours, parts, strict=True))
        return {name: found[name] for name in self.shapes}

    @staticmethod
    def _require(have: Mapping[str, Tensor], want: Mapping[str, Shape] | set[str], what: str) -> None:
        missing, unused = sorted(set(want) - set(have)), sorted(set(have) - set(want))
        if missing:
            raise KeyError(f"missing among the {what}: {', '.join(missing[:3])}")
        if unused:
            raise KeyError(f"unused among the {what}: {', '.join(unused[:3])}")


def learned(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, and the buffers that training updates, by the module's own names."""
    buffers = {name: x for name, x in module.named_buffers() if name.endswith(LEARNED_BUFFERS)}
    return {**dict(module.named_parameters()), **buffers}
