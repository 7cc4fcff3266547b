"""Defects of training that a first step, a first layer and few tokens hide."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from harness.mutants.defect import Method, mutant, routers, whole
from harness.mutants.losses import balance
from harness.mutants.training import V3, corrected
from harness.reference import ReferenceModel
from harness.spec.architecture import Architecture


def _later(model: ReferenceModel) -> Iterable[Any]:
    """The routers of all MoE layers but the first."""
    return list(routers(model))[1:]


def _per_sequence(architecture: Architecture) -> bool:
    return architecture.moe is not None and architecture.auxiliary_loss.balance == "sequence"


@mutant(whole, "update_biases", stage="balance", spec=V3, applies=corrected)
def every_second_update_is_lost(_: Any, update: Method) -> Method:
    """Of two updates of correction biases only the first is made."""
    calls = [0]

    def changed(rate: float) -> None:
        calls[0] += 1
        if calls[0] % 2:
            update(rate)

    return changed


@mutant(routers, "count", stage="balance", spec=V3, applies=corrected)
def loads_in_a_byte(router: Any, count: Method) -> Method:
    """The load of an expert is kept in one byte, and begins anew after 255 tokens."""

    def changed(selected: Tensor, real: Tensor) -> None:
        count(selected, real)
        router.load.copy_(router.load.to(torch.uint8))

    return changed


@mutant(_later, "perturb", stage="noise")
def noise_in_the_first_layer_only(_: Any, __: Method) -> Method:
    """Of the routers only the first draws its noise."""
    return lambda x: x


@balance(spec=V3, applies=_per_sequence)
def balance_counts_empty_sequences(_: Any, loss: Method) -> Method:
    """The mean of the balance loss over sequences counts those of padding alone."""
    return lambda scores, selected, real: loss(scores, selected, real) * real.any(1).double().mean()
