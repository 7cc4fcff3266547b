"""The MoE families of transformers, found in the library: a model that announces router logits has routers.

A family is a model_type. What runs is its causal language model; or its encoder and decoder; or, where the
library has no language model of it, the text model alone, to which `headless` gives a head.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from harness.implementations.registry import AdapterError, describe, did_you_mean
from harness.implementations.transformers.library import config_class, library

Shape = Literal["decoder", "headless", "encoder-decoder"]
ANNOUNCED = "router_logits"
"""The key of `_can_record_outputs` under which a model says where its routers are."""


@dataclass(frozen=True)
class Family:
    """One model_type and the class that runs of it."""

    name: str
    config: Any
    model: Any
    shape: Shape


@dataclass(frozen=True)
class Found:
    """What the installed transformers has of MoE families."""

    families: Mapping[str, Family]
    around: Mapping[str, str]
    """Models around a text model, such as those that see: name -> name of the text model."""
    broken: Mapping[str, str]
    """Modules of the library that cannot be imported: name -> why."""


def family(name: str) -> Family:
    """The family of that name, an MoE or not. Raises AdapterError if there is none that can run."""
    known = library().CONFIG_MAPPING
    configuration = config_class(name) if name in known else None
    if configuration is not None and (found := _with_head(name, configuration)) is not None:
        return found
    if name in (others := moe().families):
        return others[name]
    if configuration is None:
        hint = did_you_mean(name, [*known.keys(), *others])
        raise AdapterError(f"transformers {library().__version__} has no model_type {name!r}{hint}")
    raise AdapterError(
        f"transformers:{name} has no causal language model: "
        "only families that decode, and text models with experts, can be put under test"
    )


@cache
def moe() -> Found:
    """Every MoE family; imports each module of the library that says so."""
    families: dict[str, Family] = {}
    around: dict[str, str] = {}
    broken: dict[str, str] = {}
    for module in _modules():
        try:
            classes = list(_announcing(importlib.import_module(module)))
        except Exception as error:  # noqa: BLE001  # one that needs a package that is absent hides no other
            broken[module.rpartition(".")[2]] = describe(error)
            continue
        for configuration, _ in classes:
            name = configuration.model_type
            if (inner := configuration.sub_configs.get("text_config")) is not None:
                around.setdefault(name or configuration.__name__, getattr(inner, "model_type", ""))
            elif name not in families and "vocab_size" in _fields(configuration):
                families[name] = _with_head(name, configuration) or _own(name, configuration, classes)
    return Found(dict(sorted(families.items())), dict(sorted(around.items())), broken)


def _modules() -> Iterator[str]:
    root = Path(library().__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        if ANNOUNCED in path.read_text(encoding="utf-8"):
            yield f"transformers.models.{path.parent.name}.{path.stem}"


def _announcing(module: Any) -> Iterator[tuple[Any, Any]]:
    """(config class, model class) of each model of a module that announces router logits."""
    base = library().PreTrainedModel
    for model in dict.fromkeys(v for v in vars(module).values() if isinstance(v, type)):
        if not issubclass(model, base) or model.__module__ != module.__name__:
            continue
        configuration = getattr(model, "config_class", None)
        announced = getattr(model, "_can_record_outputs", None) or {}
        if ANNOUNCED in announced and isinstance(configuration, type):
            yield configuration, model


def _fields(configuration: Any) -> set[str]:
    return {name for cls in configuration.__mro__ for name in getattr(cls, "__annotations__", ())}


def _with_head(name: str, configuration: Any) -> Family | None:
    """The language model that the library maps to a config."""
    shapes: tuple[tuple[str, Shape], ...] = (
        ("MODEL_FOR_CAUSAL_LM_MAPPING", "decoder"),
        ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "encoder-decoder"),
    )
    for mapping, shape in shapes:
        if configuration in (models := getattr(library(), mapping)):
            return Family(name, configuration, models[configuration], shape)
    return None


def _own(name: str, configuration: Any, classes: list[tuple[Any, Any]]) -> Family:
    """The model that the library maps to nothing: with a head if there is one."""
    mine = [model for config, model in classes if config is configuration]
    headed = [model for model in mine if model.__name__.endswith("ForCausalLM")]
    whole = [model for model in mine if not model.__name__.lower().endswith("pretrainedmodel")]
    return Family(name, configuration, (headed or whole)[0], "decoder" if headed else "headless")
