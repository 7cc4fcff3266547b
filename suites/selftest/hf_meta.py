"""transformers' side of the import: models on the meta device, counted by the components of our theory.

The count shares nothing with the importer: it reads the names and shapes of transformers' own tensors.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from harness.cli.progress import progress
from harness.results import report
from harness.spec.huggingface import Row, survey
from harness.theory import parameters
from harness.theory.describe import Table
from suites.selftest.stubs import ROOT

transformers: Any = importlib.import_module("transformers") if find_spec("transformers") else None

PAGE, COMMAND = "import.md", "python -m suites.selftest.hf_meta"
VERSIONS = {"aiconfigurator-core": "0.12.0", "transformers": "5.23.0"}
"""Where the files are from and who counts: the page is the same wherever these are."""
OUTCOMES = {
    "exact": "every component has as many parameters as transformers' own model, on the meta device",
    "refused": "no spec can say what the file says, and the field is named",
    "wrong": "a spec was made, and it counts something else",
}

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


@dataclass(frozen=True)
class Compared:
    """One file: what the import counts and what transformers counts, or the field that it refuses."""

    file: str
    model_type: str
    outcome: Literal["exact", "refused", "wrong"]
    parameters: str = ""
    transformers: str = ""
    field: str = ""
    reason: str = ""


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


def installed() -> dict[str, str | None]:
    """Versions of what is compared; None where one is not installed."""
    found: dict[str, str | None] = dict.fromkeys(VERSIONS)
    for name in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def comparison(folder: Path, step: Callable[[str], object] = lambda _: None) -> list[Compared]:
    """Every file of a folder, by name. step: called after each of them."""
    found = []
    for row in survey(folder):
        found.append(_compared(folder, row))
        step(row.model_type)
    return found


def page(found: Sequence[Compared]) -> report.Page:
    """The page of `results/` about a comparison."""
    versions = ", ".join(f"{name} {version}" for name, version in installed().items())
    outcomes, fields = Counter(one.outcome for one in found), Counter(one.field for one in found if one.field)
    return report.Page(
        PAGE,
        "Import of published config.json files",
        COMMAND,
        (
            Table(
                f"{len(found)} files, {versions}",
                ("outcome", "files", "that is"),
                tuple((outcome, outcomes[outcome], meaning) for outcome, meaning in OUTCOMES.items()),
            ),
            Table(
                "What was refused, by the field that is named",
                ("field", "files"),
                tuple(fields.most_common()),
            ),
            Table(
                "File by file",
                ("file", "model_type", "outcome", "parameters", "transformers", "field", "reason"),
                tuple(astuple(one) for one in found),
            ),
        ),
    )


def main() -> None:
    """Write `results/import.md`."""
    folder = published()
    if folder is None or transformers is None:
        sys.exit("this needs transformers, and `pip install --no-deps aiconfigurator-core==0.12.0`")
    total = sum(1 for _ in survey(folder))
    with progress("import", total=total) as state:
        found = comparison(folder, state.step)
    print(report.write(ROOT / "results", page(found)))


def _compared(folder: Path, row: Row) -> Compared:
    file = row.file.removesuffix("_config.json")
    if row.architecture is None:
        return Compared(file, row.model_type, "refused", field=row.field, reason=row.reason.partition(";")[0])
    theirs = by_component(model(json.loads((folder / row.file).read_text())))
    ours = Counter(parameters.by_component(row.architecture))
    return Compared(
        file,
        row.model_type,
        "exact" if +ours == theirs else "wrong",
        f"{ours.total():,}",
        f"{theirs.total():,}",
    )


if __name__ == "__main__":
    main()
