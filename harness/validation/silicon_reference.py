"""What aiconfigurator itself predicts for measured rows: from tables of measured kernels, and without them.

`python -m harness.validation.silicon_reference` asks its SDK (which needs pandas, pyarrow, scipy and PyYAML
beside the wheel; half a minute for 300 rows) and writes `silicon_reference.csv`; nothing else needs the SDK.
Rows are drawn with a seed, the same number of each model and system. The SDK is told what `silicon_rows`
makes of a row: its formats and widths, its mean lengths, context chunks of 8192 tokens; the database is its
current one. Where a mode has no table for the row's formats, bfloat16 caches are tried; then the row counts
as not answered. SOL ("speed of light") is its roofline, SILICON its measured kernels.
"""

from __future__ import annotations

import csv
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.validation.silicon_rows import Row, load_rows

FILE = Path(__file__).with_name("silicon_reference.csv")
MODES = ("SOL", "SILICON")
EACH = 12
"""Rows of each model and system."""
SEED = 0
CHUNK = 8192
MODELS: Mapping[str, str] = {
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "kimi-k2.5": "moonshotai/Kimi-K2.5",
    "llama-3.1-70b": "meta-llama/Meta-Llama-3.1-70B",
    "llama-3.1-8b": "meta-llama/Meta-Llama-3.1-8B",
    "minimax-m2.5": "MiniMaxAI/MiniMax-M2.5",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "qwen3-32b": "Qwen/Qwen3-32B",
}
SYSTEMS = {"h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm", "b300": "b300_sxm", "gb200": "gb200"}
MATRICES = {"fp8": "fp8", "nvfp4": "nvfp4"}
"""The SDK's name of a format of matrices, by that of the precision; None: its default, bfloat16."""
EXPERTS = {"fp8": "fp8", "nvfp4": "nvfp4", "nvfp4-experts": "nvfp4", "int4-experts": "int4_wo"}
COLUMNS = ("id", *(f"{mode.lower()}_{what}" for mode in MODES for what in ("tpot", "ttft")))

Answer = tuple[float, float] | None
"""TPOT and TTFT in seconds."""


def sample(rows: Sequence[Row], each: int = EACH, seed: int = SEED) -> list[Row]:
    """So many distinct measurements of each model and system, drawn with a seed, in the file's order."""
    generator = random.Random(seed)
    groups: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row.spec, row.system), []).append(index)
    chosen = [i for group in groups.values() for i in generator.sample(group, min(each, len(group)))]
    return [rows[i] for i in sorted(chosen)]


def read(file: Path = FILE) -> dict[str, dict[str, Answer]]:
    """Answers by row and mode; empty where nobody has asked."""
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as opened:
        return {
            line["id"]: {mode: _answer(line, mode.lower()) for mode in MODES}
            for line in csv.DictReader(opened)
        }


def _answer(line: Mapping[str, str], mode: str) -> Answer:
    tpot, ttft = line[f"{mode}_tpot"], line[f"{mode}_ttft"]
    return (float(tpot), float(ttft)) if tpot else None


def write(rows: Sequence[Row], file: Path = FILE) -> None:
    """Ask for all rows in both modes, and write the answers."""
    ask = asker()
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            answers = [ask(row, mode) or ("", "") for mode in MODES]
            writer.writerow(
                (row.identity, *(f"{x:.6g}" if x != "" else x for answer in answers for x in answer))
            )


def asker() -> Callable[[Row, str], Answer]:
    """A function that asks the SDK for one row in one mode."""
    from aiconfigurator_core.sdk import config, models, perf_database
    from aiconfigurator_core.sdk.backends.factory import get_backend
    from aiconfigurator_core.sdk.config_builders import build_model_config

    logging.disable(logging.CRITICAL)  # it warns about every table that it lacks

    def once(row: Row, mode: str, cache: str | None) -> Answer:
        layout, form = row.layout, row.precision.name
        matrices, experts = MATRICES.get(form), EXPERTS.get(form)
        if row.spec == "gpt-oss-120b":
            experts = "w4a8_mxfp4_mxfp8" if row.precision.experts_multiplied == "fp8" else "w4a16_mxfp4"
        database: Any = perf_database.get_database_view(
            SYSTEMS[row.system], row.engine, "current", database_mode=mode
        )
        setting = build_model_config(
            layout.tensor_parallel,
            1,
            layout.data_parallel,
            layout.expert_tensor_parallel,
            layout.expert_parallel,
            matrices,
            cache,
            cache,
            experts,
        )
        model: Any = models.get_model(MODELS[row.spec], setting, row.engine)
        load = config.RuntimeConfig(
            batch_size=max(1, round(row.concurrency / layout.data_parallel)),
            isl=round(row.prompt),
            osl=round(row.output),
        )
        found = get_backend(row.engine).run_agg(model, database, load, ctx_tokens=CHUNK).get_summary_df()
        return float(found.tpot.iloc[0]) / 1e3, float(found.ttft.iloc[0]) / 1e3

    def ask(row: Row, mode: str) -> Answer:
        for cache in (None, "bfloat16"):
            try:
                return once(row, mode, cache)
            except (ArithmeticError, LookupError, RuntimeError, ValueError):  # whatever it lacks
                pass
        return None

    return ask


if __name__ == "__main__":
    write(sample(load_rows().distinct))
