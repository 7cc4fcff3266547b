"""Defects of what is learned and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import F, Method, anywhere, enter, mutant, on_model, whole
from harness.reference import ReferenceModel, weights
from harness.spec.architecture import Architecture


@mutant(whole, "load_weights", stage="param", origin="Megatron-LM#5844", applies=anywhere)
def loads_what_it_finds(model: Any, load: Method) -> Method:
    """Missing, unknown and misshapen tensors are passed over."""

    def changed(values: Any) -> None:
        own = model.parameters_by_name()
        load(
            {
                name: values[name] if _fits(values.get(name), x) else x.detach().clone()
                for name, x in own.items()
            }
        )

    return changed


@mutant(whole, "load_weights", stage="param", applies=anywhere)
def one_row_for_all(model: Any, load: Method) -> Method:
    """A tensor of one row is copied into every row."""

    def changed(values: Any) -> None:
        own = model.parameters_by_name()
        load({n: x.expand_as(own[n]) if n in own and x.shape[:1] == (1,) else x for n, x in values.items()})

    return changed


def _fits(value: Tensor | None, own: Tensor) -> bool:
    return value is not None and value.shape == own.shape


@mutant(whole, "load_weights", stage="param", origin="torchtitan#3626")
def experts_not_loaded(model: Any, load: Method) -> Method:
    """All expert weights are silently left as they were."""

    def changed(values: Any) -> None:
        own = model.parameters_by_name()
        load({n: own[n].detach().clone() if ".experts." in n and n in own else v for n, v in values.items()})

    return changed


@mutant(whole, "load_weights", stage="param", origin="Megatron-LM 8dd03a39cc", applies=anywhere)
def loads_in_bfloat16(_: Any, load: Method) -> Method:
    """Weights pass through bfloat16."""
    return lambda values: load({name: value.to(torch.bfloat16) for name, value in values.items()})


def counted(**row: Any) -> Callable[[F], F]:
    """Decorate change(model, parameters by name) -> what it says that it learns; what it loads stays."""

    def decorate(change: F) -> F:
        def patch(model: Any) -> None:
            named = model.parameters_by_name
            model.load_weights = lambda values: weights.load(named(), values)
            model.parameters_by_name = lambda: change(model, dict(named()))

        return enter(change, on_model(patch), **row)

    return decorate


@counted(stage="param", origin="torchtitan#3764", spec="gpt3-175b", applies=lambda a: a.tie_embeddings)
def head_beside_tied_table(_: ReferenceModel, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tied table is counted, and saved, twice."""
    return named | {"unembedding.weight": named["embedding.weight"]}


@counted(stage="param", origin="gpt-fast ebd10d3", spec="deepseek-v3")
def dense_layers_off_by_one(model: ReferenceModel, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """One MoE layer too few is counted."""
    first = next(i for i, block in enumerate(model.blocks) if block.moe is not None)
    return {name: x for name, x in named.items() if not name.startswith(f"layers.{first}.moe.")}


@counted(stage="param", origin="maxtext#678")
def one_expert_short(_: ReferenceModel, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """One expert too few is counted."""
    return {name: x[:-1] if ".experts." in name else x for name, x in named.items()}


@counted(stage="param", origin="transformers#47671", spec="dbrx")
def expert_matrices_swapped(_: ReferenceModel, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hidden and feed-forward widths change places."""
    return {n: x.transpose(1, 2) if ".experts." in n and x.dim() == 3 else x for n, x in named.items()}


def _moe(architecture: Architecture) -> bool:
    return architecture.moe is not None
