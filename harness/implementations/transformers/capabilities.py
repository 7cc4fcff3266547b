"""What a family can do: what its code announces, and what two tokens show of it.

A crash is for the suites to find, so only what is plainly not offered is left out, each with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from harness.implementations import trace
from harness.implementations.huggingface_like import LikeModel
from harness.implementations.protocols import Capability, Unsupported
from harness.implementations.registry import describe
from harness.implementations.transformers import continuous, routers
from harness.spec.architecture import Architecture


def declared(model: LikeModel, architecture: Architecture | None) -> LikeModel:
    """The model with its capabilities, and why it has not the others. On meta there is nothing to try.

    Raises Unsupported if a family does not run at all at its shrunken size.
    """
    module: Any = model.module
    found: set[Capability] = {"parameters", "forward", "gradients", "train"}
    missing: dict[str, str] = {}
    if model.weight_map is not None:
        found.add("weights")
    else:
        missing["weights"] = "it has a shape of its own, which no reference weights fit"
    device = next(module.parameters()).device
    if device.type == "meta":
        found.add("cache")
        return replace(model, capabilities=frozenset(found), missing=missing)
    tokens = torch.tensor([[0, 1]], device=device)
    if architecture is None:
        try:
            model = replace(model, sites=routers.called(module, model.sites, lambda: model.forward(tokens)))
        except Exception as error:
            raise Unsupported(f"the family does not run when shrunken: {describe(error)}") from error
    pools_layers = architecture is None or architecture.auxiliary_loss.balance == "huggingface"
    no_experts = "" if model.sites else "no module of it announces router logits"
    own_pool = "" if pools_layers else "its balance loss pools layers"
    tried: tuple[tuple[Capability, str, Callable[[], Any]], ...] = (
        ("cache", "", lambda: model.extend(tokens, None)),
        ("routing", no_experts, lambda: model.routing(tokens)),
        ("auxiliary_loss", no_experts or own_pool, lambda: model.auxiliary_loss(tokens)),
    )
    for capability, known, call in tried:
        if why := known or _refusal(call):
            missing[capability] = why
        else:
            found.add(capability)
    return replace(model, capabilities=frozenset(found), missing=missing)


def decodes(module: Any) -> frozenset[Capability]:
    """Stateful families refuse an assistant; the paged cache refuses some kinds of layers when it starts."""
    found: set[Capability] = {"generate", "enumerable"}
    if not getattr(module, "_is_stateful", False):
        found.add("speculate")
    if continuous.is_offered(module):
        found |= {"serve", "limits"}
    return frozenset(found)


def _refusal(call: Callable[[], Any]) -> str:
    """Why something is not offered, or nothing where it is."""
    try:
        with torch.no_grad():
            call()
    except (Unsupported, trace.TraceError) as error:
        return str(error)
    except Exception:  # noqa: BLE001  # it is offered, and a crash is for the suites to find
        return ""
    return ""
