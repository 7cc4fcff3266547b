"""Any decoder-only family of transformers under test, found by what its code announces about itself.

Letters: B sequences, S tokens per sequence, E experts, K top-k.

No code per family: the router is the class that the model records as `router_logits`, its parent is
the MoE block, a config is shrunken by the names of its attributes. The few that show only logits are in
`SHIMS`. What holds for a model (its capabilities) is tried out on two tokens, not looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.implementations import trace
from harness.implementations.huggingface_like import LikeModel, WeightMap, seeded
from harness.implementations.protocols import Capability, Unsupported
from harness.implementations.registry import describe
from harness.implementations.transformers import continuous, export, shrink
from harness.implementations.transformers.generation import Generation
from harness.implementations.transformers.library import model_class
from harness.implementations.transformers.weights import FamilyMap
from harness.spec.architecture import Architecture


def _sigmoid_of_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = logits.topk(k, dim=-1)
    return indices, values.sigmoid()


def _softmax_of_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = logits.topk(k, dim=-1)
    return indices, values.softmax(dim=-1)


SHIMS = {"llama4_text": _sigmoid_of_top_k, "jetmoe": _softmax_of_top_k}
"""Families whose selection is not to be seen from outside: logits [T, E] and K to indices and weights, as
their block's code says. Scores and selection of these are therefore not under test, only what follows."""

CORRECTION_SPREAD = 0.1
"""Standard deviation of a correction bias drawn for a family's own shape: transformers starts it at 0."""


GROUPED_MM_ALIGNMENT = 16
"""Bytes; torch's kernel refuses other strides ("strides should be multiple of 16 bytes")."""

MOST_PARAMETERS = 10_000_000
"""Beyond this a family is not at test size."""


@dataclass(frozen=True)
class TransformersImplementation:
    """`transformers:NAME[,experts=...][,attention=...]`.

    attention "auto" is eager in float32. In float64, where eager attention makes NaN of left padding, for
    its softmax is in float32, it is sdpa if the family has that.
    """

    family: str
    experts: str = "eager"
    attention: str = "auto"

    @classmethod
    def of(cls, family: str, *, experts: str, attention: str) -> TransformersImplementation:
        """Raises AdapterError if transformers is missing, or has no causal language model of that name."""
        model_class(family)
        return cls(family, experts, attention)

    @property
    def name(self) -> str:
        """As addressed, with the options that are not the default."""
        experts = "" if self.experts == "eager" else f",experts={self.experts}"
        attention = "" if self.attention == "auto" else f",attention={self.attention}"
        return f"transformers:{self.family}{experts}{attention}"

    @property
    def needs_architecture(self) -> bool:
        """False: a family can always be shrunken."""
        return False

    def build(
        self, architecture: Architecture | None, *, device: str, dtype: torch.dtype, seed: int
    ) -> LikeModel:
        """A fresh model in eval mode. Raises Unsupported naming what the family cannot express or run."""
        weight_map: WeightMap | None = None
        if architecture is None:
            config = shrink.shrunken(self.family)
        else:
            config = export.config(architecture, self.family)
            weight_map = FamilyMap.of(architecture, self.family)
        if architecture is None:
            # A size that the recipe does not know by name stays as published: see before memory is taken.
            size = sum(p.numel() for p in self._module(config, "meta", dtype, seed).parameters())
            if size > MOST_PARAMETERS:
                raise Unsupported(
                    f"{self.family} keeps {size:,} parameters: the shrink recipe misses some size"
                )
        module = self._module(config, device, dtype, seed)
        model = LikeModel(
            module=module,
            vocab_size=int(config.vocab_size),
            capabilities=frozenset(),
            sites=self._sites(module),
            weight_map=weight_map,
        )
        if architecture is None:
            _draw_correction_biases(model.parameters(), seed)
        found = _capabilities(model, architecture)
        if device == "meta" or not hasattr(module, "generate"):
            return replace(model, capabilities=found)

        def make_draft(drafted: Architecture, weights: Mapping[str, Tensor]) -> nn.Module:
            draft = self.build(drafted, device=device, dtype=dtype, seed=seed)
            draft.load_weights(weights)
            return draft.module

        generator = torch.Generator().manual_seed(seed)
        decoding = Generation(module, model.vocab_size, make_draft, generator)
        return replace(model, decoding=decoding, capabilities=found | _decodes(module))

    def _module(self, config: Any, device: str, dtype: torch.dtype, seed: int) -> nn.Module:
        cls = model_class(self.family)
        if self.experts != "eager" and not cls._can_set_experts_implementation():
            raise Unsupported(f"transformers:{self.family} has one way to run experts, not {self.experts}")
        if self.experts == "grouped_mm" and dtype == torch.float64:
            raise Unsupported("torch's grouped_mm has no float64 kernel: say experts=eager")

        attention = self.attention
        if attention == "auto":
            attention = "sdpa" if dtype == torch.float64 and cls._supports_sdpa else "eager"

        def make() -> nn.Module:
            module: nn.Module = cls._from_config(
                config, dtype=dtype, attn_implementation=attention, experts_implementation=self.experts
            )
            return module

        try:
            module = seeded(make, seed, device)
        except Exception as error:
            raise Unsupported(f"{self.name} cannot be built: {describe(error)}") from error
        if self.experts == "grouped_mm":
            _require_alignment(module, dtype)
        return module.to(device).eval()

    def _sites(self, module: nn.Module) -> tuple[trace.Site, ...]:
        recorded = _recorded_routers(module)
        shim = SHIMS.get(self.family)
        k = _top_k(module)
        derive = None if shim is None or k is None else lambda logits: shim(logits, k)

        def is_router(name: str, candidate: nn.Module) -> bool:
            # An attention module may route too (jetmoe): that is not a mixture of feed-forwards.
            in_attention = "attn" in name or "attention" in name
            return not in_attention and any(isinstance(candidate, cls) for cls in recorded)

        def logits_at(router: nn.Module) -> int:
            return next(at for cls, at in recorded.items() if isinstance(router, cls))

        return trace.sites(module, is_router, logits_at=logits_at, derive=derive)


def _require_alignment(module: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in module.named_parameters():
        if ".experts." not in name or parameter.dim() != 3:
            continue
        for width in parameter.shape[1:]:
            if width * dtype.itemsize % GROUPED_MM_ALIGNMENT:
                raise Unsupported(
                    f"torch's grouped_mm needs rows of a multiple of {GROUPED_MM_ALIGNMENT} bytes, "
                    f"and {name} has a width of {width} in {str(dtype).removeprefix('torch.')}"
                )


def _recorded_routers(module: nn.Module) -> dict[type[nn.Module], int]:
    """Classes that the model says its router logits come from, and at which place of their output."""
    found: dict[type[nn.Module], int] = {}
    for part in module.modules():
        recorders = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, (list, tuple)) else (recorders,):
            cls = getattr(recorder, "target_class", recorder)
            # A bare class stands for place 1, as in transformers.utils.output_capturing.
            if isinstance(cls, type) and not cls.__name__.endswith("Attention"):
                found[cls] = getattr(recorder, "index", 1)
    return found


def _top_k(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    k = getattr(config, "num_experts_per_tok", None)
    return k if isinstance(k, int) else None


def _capabilities(model: LikeModel, architecture: Architecture | None) -> frozenset[Capability]:
    """What the code of the model announces, and what two tokens show of it; a crash is for the suites to
    find, so only what is plainly not offered is left out. On the meta device there is nothing to try.

    Raises Unsupported if a family does not run at all at its shrunken size.
    """
    found: set[Capability] = {"parameters", "forward", "gradients"}
    if model.weight_map is not None:
        found.add("weights")
    module: Any = model.module
    if hasattr(module.config, "use_cache") and not getattr(module, "_is_stateful", False):
        found.add("cache")
    device = next(module.parameters()).device
    if device.type == "meta":
        return frozenset(found)
    tokens = torch.tensor([[0, 1]], device=device)
    if architecture is None:
        try:
            with torch.no_grad():
                model.forward(tokens)
        except Exception as error:
            raise Unsupported(f"the family does not run when shrunken: {describe(error)}") from error
    if model.sites and _offered(lambda: model.routing(tokens)):
        found.add("routing")
    pools_layers = architecture is None or architecture.auxiliary_loss.balance == "huggingface"
    if model.sites and pools_layers and _offered(lambda: model.auxiliary_loss(tokens)):
        found.add("auxiliary_loss")
    return frozenset(found)


def _decodes(module: Any) -> frozenset[Capability]:
    """Stateful families refuse an assistant; the paged cache refuses some kinds of layers when it starts."""
    found: set[Capability] = {"generate", "enumerable"}
    if not getattr(module, "_is_stateful", False):
        found.add("speculate")
    if continuous.is_offered(module):
        found |= {"serve", "limits"}
    return frozenset(found)


def _offered(call: Callable[[], Any]) -> bool:
    try:
        with torch.no_grad():
            call()
    except (Unsupported, trace.TraceError):
        return False
    except Exception:  # noqa: BLE001  # it is offered, and a crash is for the suites to find
        return True
    return True


def _draw_correction_biases(parameters: Mapping[str, Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in parameters.items():
        if name.endswith("correction_bias") and tensor.device.type != "meta":
            with torch.no_grad():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(CORRECTION_SPREAD * noise)
