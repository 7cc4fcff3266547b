"""Defects of what is learned and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import Mutant, instead, whole
from harness.reference import ReferenceModel, weights
from harness.spec.architecture import Architecture

Method = Callable[..., Any]


def _anywhere(_: Architecture) -> bool:
    return True


def _lenient(model: Any, load: Method) -> Method:
    def changed(values: Any) -> None:
        own = model.parameters_by_name()
        load({name: values[name] if _fits(values.get(name), x) else x.detach().clone() for name, x in own.items()})

    return changed


def _fits(value: Tensor | None, own: Tensor) -> bool:
    return value is not None and value.shape == own.shape


def _without_experts(model: Any, load: Method) -> Method:
    def changed(values: Any) -> None:
        own = model.parameters_by_name()
        load({n: own[n].detach().clone() if ".experts." in n and n in own else v for n, v in values.items()})

    return changed


def _in_bfloat16(_: Any, load: Method) -> Method:
    return lambda values: load({name: value.to(torch.bfloat16) for name, value in values.items()})


def _counted(change: Callable[[ReferenceModel, dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[ReferenceModel], None]:
    """A patch of what the model says that it learns; what it loads stays as it was."""

    def patch(model: Any) -> None:
        named = model.parameters_by_name
        model.load_weights = lambda values: weights.load(named(), values)
        model.parameters_by_name = lambda: change(model, dict(named()))

    return patch


def _head_beside_table(model: ReferenceModel, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return named | {"unembedding.weight": named["embedding.weight"]}


def _one_dense_layer_more(model: ReferenceModel, named: dict[str, Tensor]) -> dict[str, Tensor]:
    first = next(i for i, block in enumerate(model.blocks) if block.moe is not None)
    return {name: x for name, x in named.items() if not name.startswith(f"layers.{first}.moe.")}


def _one_expert_short(_: ReferenceModel, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[:-1] if ".experts." in name else x for name, x in named.items()}


def _matrices_swapped(_: ReferenceModel, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.transpose(1, 2) if ".experts." in n and x.dim() == 3 else x for n, x in named.items()}


def _moe(architecture: Architecture) -> bool:
    return architecture.moe is not None


MUTANTS = (
    Mutant("loads-what-it-finds", instead(whole, "load_weights", _lenient), "param", "Megatron-LM#5844", "missing, unknown and misshapen tensors are passed over", "mixtral-8x7b", _anywhere),
    Mutant("experts-not-loaded", instead(whole, "load_weights", _without_experts), "param", "torchtitan#3626", "all expert weights are silently left as they were", "mixtral-8x7b", _moe),
    Mutant("loads-in-bfloat16", instead(whole, "load_weights", _in_bfloat16), "param", "Megatron-LM 8dd03a39cc", "weights pass through bfloat16", "mixtral-8x7b", _anywhere),
    Mutant("head-beside-tied-table", _counted(_head_beside_table), "param", "torchtitan#3764", "a tied table is counted, and saved, twice", "gpt3-175b", lambda a: a.tie_embeddings),
    Mutant("dense-layers-off-by-one", _counted(_one_dense_layer_more), "param", "gpt-fast ebd10d3", "one MoE layer too few is counted", "deepseek-v3", _moe),
    Mutant("one-expert-short", _counted(_one_expert_short), "param", "maxtext#678", "one expert too few is counted", "mixtral-8x7b", _moe),
    Mutant("expert-matrices-swapped", _counted(_matrices_swapped), "param", "transformers#47671", "hidden and feed-forward widths change places", "dbrx", _moe),
)
