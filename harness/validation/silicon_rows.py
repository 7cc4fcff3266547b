"""Measured serving rows of the wheel aiconfigurator-core 0.12.0 (Apache-2.0), read with what they mean.

`systems/silicon_sample.csv` collects runs of three public benchmarks under one header, and its columns do not
mean the same in all of them. What a row says is taken so, and every exception is counted:

  concurrency  `silicon_concurrency` of the source, which clients kept in flight; where the source has none,
               `batch_size`. `batch_size` itself is the concurrency of one attention rank, or of 1/n of one.
  lengths      the serving benchmark draws prompts and outputs between 0.8 and 1 of the stated length
               (`--random-range-ratio 0.8`, README of InferenceMAX), the gap analysis sends exact ones
  devices      where `moe_tp_size` = `moe_ep_size` = n > 1 the columns hold products: "tensor 8, expert 8",
               that is 8 devices with whole experts, stands as a tensor width of 64. With attention in data
               parallel, n ranks each run whole attention. Beyond 8 devices (racks) attention is data
               parallel and experts lie over all. Else devices = tensor x data ways, or the product of the
               experts' ways where that is more.
  formats      what the published checkpoints hold: NVFP4 of a mixture keeps attention in bfloat16, gpt-oss
               is always MXFP4 experts (multiplied in FP8 where there are FP4 units), NVFP4 comes with an FP8
               cache
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from harness.spec import SpecError
from harness.theory.layout import Layout
from harness.theory.precision import PRECISIONS, Precision

PACKAGE = "aiconfigurator_core"
SPECS: Mapping[str, str] = {
    "deepseek-ai/DeepSeek-R1": "deepseek-v3",
    "deepseek-ai/DeepSeek-V3": "deepseek-v3",
    "nvidia/DeepSeek-R1-NVFP4": "deepseek-v3",
    "nvidia/DeepSeek-V3.1-NVFP4": "deepseek-v3",
    "MiniMaxAI/MiniMax-M2.5": "minimax-m2.5",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "moonshotai/Kimi-K2.5": "kimi-k2.5",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "nvidia/Qwen3-32B-NVFP4": "qwen3-32b",
}
"""The spec of a model; fine-tunings and quantisations of one architecture share it."""
WITHOUT_SPEC: Mapping[str, str] = {
    "Qwen/Qwen3.5-397B-A17B": "layers of linear attention, which a spec cannot express",
    "zhipuai/GLM-5": "an indexer that selects what attention reads, which a spec cannot express",
}
SYSTEMS: Mapping[str, str] = {
    "h100_sxm": "h100",
    "h200_sxm": "h200",
    "b200_sxm": "b200",
    "b300_sxm": "b300",
    "gb200": "gb200",
}
MIXTURES_IN_BFLOAT16 = Precision("nvfp4-experts", "bfloat16", "fp4", "fp8", "bfloat16", "fp4")
"""NVFP4 checkpoints of mixtures: their `exclude_modules` name attention."""
ISLAND = 8
"""More devices than this are a rack's, and run attention in data parallel."""
MEAN_LENGTH = 0.9
"""Of lengths drawn uniformly between 0.8 and 1 of the stated one."""
EXACT_LENGTHS = "aic-auto-gap-analysis"
"""In the source of rows that were measured with exact lengths."""


@dataclass(frozen=True)
class Row:
    """One measurement. Tokens and seconds."""

    identity: str
    model: str
    spec: str
    system: str
    engine: str
    precision: Precision
    layout: Layout
    concurrency: float
    prompt: float
    output: float
    ttft: float
    tpot: float
    source: str
    """What measured it: "serving benchmark" or "gap analysis"."""
    version: str
    measured: str
    """Year and month."""

    @property
    def measurement(self) -> tuple[str, str, float, float]:
        """What repeated entries of one measurement share."""
        return self.spec, self.system, self.ttft, self.tpot


@dataclass(frozen=True)
class Rows:
    """What of the file can be predicted, and why the rest cannot."""

    answered: tuple[Row, ...]
    aggregated: int
    """Rows that are measured on one kind of device group, answered or not."""
    left_out: Mapping[str, int]
    """Reason -> rows."""

    @property
    def distinct(self) -> tuple[Row, ...]:
        """The answered rows without repetitions of one measurement under other names."""
        return tuple({row.measurement: row for row in reversed(self.answered)}.values())[::-1]


def path() -> Path:
    """Where the wheel's table lies. Raises SpecError with what to install."""
    found = find_spec(PACKAGE)  # not imported: only its data are read
    if found is None or not found.submodule_search_locations:
        right = 'run: pip install "moe-harness[silicon]"'
        raise SpecError(f"the measured rows are in aiconfigurator-core, which is not installed; {right}")
    table = Path(found.submodule_search_locations[0]) / "systems" / "silicon_sample.csv"
    if not table.is_file():
        right = "give version 0.12.0, which has it"
        raise SpecError(f"the installed aiconfigurator-core has no {table.name}; {right}")
    return table


def load_rows(file: Path | None = None) -> Rows:
    """All rows of the wheel, or of another file of its form. Raises SpecError where it has another form."""
    file = file or path()
    with file.open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        missing = {"mode", "silicon_data_source", "silicon_tpot_ms"} - set(reader.fieldnames or ())
        if missing:
            right = "give silicon_sample.csv of aiconfigurator-core 0.12.0"
            raise SpecError(f"{file} has no column {', '.join(sorted(missing))}; {right}")
        return parse(list(reader))


def parse(raw: Sequence[Mapping[str, str]]) -> Rows:
    """Rows out of the file's columns."""
    left_out: Counter[str] = Counter()
    answered: list[Row] = []
    for one in raw:
        if one["mode"] != "agg":
            left_out["disaggregated: prefill and decoding on devices of their own"] += 1
        elif one["model_path"] not in SPECS:
            left_out[f"{one['model_path']}: {WITHOUT_SPEC.get(one['model_path'], 'no spec')}"] += 1
        elif one["system"] not in SYSTEMS:
            left_out[f"{one['system']}: no such hardware in specs/hardware.toml"] += 1
        else:
            answered.append(_row(one))
    aggregated = sum(one["mode"] == "agg" for one in raw)
    return Rows(tuple(answered), aggregated, dict(left_out))


def _row(one: Mapping[str, str]) -> Row:
    source = one["silicon_data_source"]
    exact = EXACT_LENGTHS in source
    share = 1.0 if exact else MEAN_LENGTH
    concurrency = re.search(r"silicon_concurrency=(\d+)", source)
    measured = re.search(r"measured=(\d{4}-\d\d)", source)
    spec = SPECS[one["model_path"]]
    try:
        return Row(
            identity=one["id"],
            model=one["model_path"],
            spec=spec,
            system=SYSTEMS[one["system"]],
            engine=one["backend"],
            precision=precision_of(spec, one["precision"], one["system"]),
            layout=layout_of(one, exact),
            concurrency=float(concurrency[1] if concurrency else one["batch_size"]),
            prompt=share * float(one["isl"]),
            output=share * float(one["osl"]),
            ttft=float(one["silicon_ttft_ms"]) / 1e3,
            tpot=float(one["silicon_tpot_ms"]) / 1e3,
            source="gap analysis" if exact else "serving benchmark",
            version=one["backend_version"],
            measured=measured[1] if measured else "",
        )
    except ValueError as error:
        wrong = f'row "{one["id"]}" of the measured rows holds what is no number ({error})'
        raise SpecError(f"{wrong}; give the file as the wheel has it") from None


def precision_of(spec: str, stated: str, system: str) -> Precision:
    """The formats of a checkpoint by what the row calls its precision."""
    mixture = spec in {"deepseek-v3", "kimi-k2.5", "minimax-m2.5", "qwen3-235b-a22b"}
    if spec == "gpt-oss-120b":
        stored = PRECISIONS["mxfp4-experts"]
        return replace(stored, experts_multiplied="fp8") if system[:2] in ("b2", "b3", "gb") else stored
    if stated == "fp4":
        return MIXTURES_IN_BFLOAT16 if mixture else PRECISIONS["nvfp4"]
    names = {"fp8": "fp8", "int4": "int4-experts", "bf16": "bfloat16", "": "bfloat16"}
    if stated not in names:
        raise ValueError(f"no precision {stated!r}")
    return PRECISIONS[names[stated]]


def layout_of(one: Mapping[str, str], exact: bool) -> Layout:
    """The layout by the five columns of widths, of which blanks and zeros mean 1."""
    tensor, data, width, experts = (
        max(int(float(one[name] or 0)), 1)
        for name in ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    )
    if not exact:
        if width == experts > 1:
            devices = width
        elif data > 1:
            devices = data
        else:
            devices = tensor
        if data > 1 or devices > ISLAND:
            return _layout(1, devices, devices)
        return _layout(devices, 1, devices if experts > 1 else 1)
    devices = max(tensor * data, width * experts)
    return _layout(tensor, devices // tensor, experts)


def _layout(tensor: int, data: int, experts: int) -> Layout:
    return Layout(
        tensor_parallel=tensor,
        data_parallel=data,
        expert_parallel=experts,
        expert_tensor_parallel=max(tensor * data // experts, 1),
    )
