"""Measured serving rows, predicted: what a row means, what a fit may know, and how far it comes."""

from __future__ import annotations

import csv
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from harness.spec import SpecError, load
from harness.spec.hardware import load_hardware
from harness.theory.efficiency import IDEAL
from harness.theory.kernels import kernels
from harness.theory.layout import Layout
from harness.theory.passes import decode, prefill
from harness.theory.precision import PRECISIONS
from harness.theory.roofline import pricer
from harness.validation import silicon, silicon_constants, silicon_reference, silicon_residual, silicon_rows
from harness.validation.silicon_constants import ENGINES, RANGES, Constants, efficiency, measured
from harness.validation.silicon_fit import NAMES, Held, fit, hold, left_out, measured_rows, predict
from harness.validation.silicon_rows import Row, layout_of, load_rows, parse, precision_of

BAR = 20.0
AIM = 12.0


@cache
def held() -> Held:
    """All rows, fitted and left out once for all tests; skips where the wheel or scipy are not installed."""
    pytest.importorskip("scipy")
    pytest.importorskip(silicon_rows.PACKAGE)
    return hold()


def line(**changes: str) -> dict[str, str]:
    """One line of the file: DeepSeek-V3 in FP8 on 8 H200."""
    return {
        "id": "one",
        "silicon_data_source": "db-dump; silicon_concurrency=16; measured=2026-01-02T00:00:00.000Z",
        "backend": "sglang",
        "backend_version": "0.5.9",
        "model_path": "deepseek-ai/DeepSeek-V3",
        "system": "h200_sxm",
        "precision": "fp8",
        "mode": "agg",
        "isl": "1000",
        "osl": "500",
        "batch_size": "2",
        "tp_size": "8",
        "attention_dp_size": "1",
        "moe_tp_size": "8",
        "moe_ep_size": "1",
        "silicon_ttft_ms": "200",
        "silicon_tpot_ms": "20",
    } | changes


def ways(layout: Layout) -> tuple[int, int, int, int]:
    """Tensor, data, expert and expert-tensor ways."""
    return (
        layout.tensor_parallel,
        layout.data_parallel,
        layout.expert_parallel,
        layout.expert_tensor_parallel,
    )


def handmade(count: int = 24) -> tuple[Row, ...]:
    """Rows of two models, three widths and many batches, with times of no meaning."""
    rows = []
    for index in range(count):
        model = ("deepseek-ai/DeepSeek-V3", "openai/gpt-oss-120b")[index % 2]
        tensor = str((8, 4, 2)[index % 3])
        rows.append(
            line(
                id=str(index),
                model_path=model,
                tp_size=tensor,
                moe_tp_size=tensor,
                silicon_data_source=f"db-dump; silicon_concurrency={4 * (index + 1)}",
                silicon_tpot_ms=str(20 + index),
            )
        )
    return parse(rows).answered


@pytest.mark.parametrize(
    ("columns", "exact", "expected"),
    [
        ({}, False, (8, 1, 1, 8)),
        ({"tp_size": "64", "moe_ep_size": "8"}, False, (8, 1, 8, 1)),
        ({"tp_size": "1", "attention_dp_size": "64", "moe_ep_size": "8"}, False, (1, 8, 8, 1)),
        (
            {"tp_size": "4", "attention_dp_size": "4", "moe_tp_size": "1", "moe_ep_size": "16"},
            False,
            (1, 4, 4, 1),
        ),
        ({"tp_size": "36", "moe_tp_size": "36"}, False, (1, 36, 36, 1)),
        ({"tp_size": "8", "moe_tp_size": "1", "moe_ep_size": "8"}, False, (8, 1, 8, 1)),
        (
            {"tp_size": "2", "attention_dp_size": "0", "moe_tp_size": "0", "moe_ep_size": "0"},
            True,
            (2, 1, 1, 2),
        ),
        (
            {"tp_size": "2", "attention_dp_size": "", "moe_tp_size": "4", "moe_ep_size": "1"},
            True,
            (2, 2, 1, 4),
        ),
        (
            {"tp_size": "8", "attention_dp_size": "", "moe_tp_size": "2", "moe_ep_size": "4"},
            True,
            (8, 1, 4, 2),
        ),
    ],
)
def test_widths_that_lie_are_read_as_what_they_mean(
    columns: dict[str, str], exact: bool, expected: tuple[int, int, int, int]
) -> None:
    """Products, blanks and zeros of the width columns become the ways that the devices really have."""
    assert ways(layout_of(line(**columns), exact)) == expected


def test_a_row_says_concurrency_lengths_and_times() -> None:
    """Concurrency comes from the source, lengths from how they were drawn, milliseconds become seconds."""
    (drawn,) = parse([line()]).answered
    assert (drawn.concurrency, drawn.prompt, drawn.output) == (16, 900, 450)
    assert (drawn.ttft, drawn.tpot, drawn.measured) == (0.2, 0.02, "2026-01")
    source = "source_file=/somewhere/aic-auto-gap-analysis/data/x.csv"
    (exact,) = parse([line(silicon_data_source=source)]).answered
    assert (exact.concurrency, exact.prompt, exact.output) == (2, 1000, 500)


def test_rows_that_cannot_be_answered_are_counted_by_reason() -> None:
    """Every line of the file is answered or counted under a reason."""
    lines = [
        line(),
        line(mode="disagg"),
        line(model_path="zhipuai/GLM-5"),
        line(model_path="Qwen/Qwen3.5-397B-A17B"),
        line(model_path="someone/new"),
        line(system="l40s"),
    ]
    rows = parse(lines)
    assert len(rows.answered) == 1
    assert rows.aggregated == 5
    assert len(rows.answered) + sum(rows.left_out.values()) == len(lines)
    assert any("indexer" in reason for reason in rows.left_out)
    assert any("linear attention" in reason for reason in rows.left_out)
    assert "someone/new: no spec" in rows.left_out


def test_repetitions_of_one_measurement_count_once() -> None:
    """DeepSeek-R1 and V3 entries with the same times are one measurement; other times make another."""
    same = line(id="two", model_path="deepseek-ai/DeepSeek-R1")
    other = line(id="three", silicon_tpot_ms="21")
    rows = parse([line(), same, other])
    assert [row.identity for row in rows.distinct] == ["one", "three"]
    assert measured_rows(rows.answered).distinct.tolist() == [True, False, True]


def test_formats_are_those_of_the_checkpoints() -> None:
    """gpt-oss is MXFP4 under any label, and NVFP4 leaves the attention of mixtures alone."""
    assert precision_of("gpt-oss-120b", "fp4", "h100_sxm") == PRECISIONS["mxfp4-experts"]
    assert precision_of("gpt-oss-120b", "fp8", "b200_sxm").experts_multiplied == "fp8"
    assert precision_of("deepseek-v3", "fp4", "b200_sxm").matrices == "bfloat16"
    assert precision_of("llama-3.1-70b", "fp4", "b200_sxm").matrices == "fp4"
    assert precision_of("llama-3.1-8b", "", "h100_sxm") == PRECISIONS["bfloat16"]


def test_bad_files_are_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing wheel, another file and a cell that is no number each say what would be right."""
    monkeypatch.setattr(silicon_rows, "PACKAGE", "no_such_package_here")
    with pytest.raises(SpecError, match=r"pip install .moe-harness\[silicon\]."):
        load_rows()
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(SpecError, match="no column mode, silicon_data_source, silicon_tpot_ms"):
        load_rows(other)
    broken = tmp_path / "broken.csv"
    with broken.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, line())
        writer.writeheader()
        writer.writerow(line(isl="many"))
    with pytest.raises(SpecError, match='row "one" of the measured rows holds what is no number'):
        load_rows(broken)


def test_constants_that_nobody_fitted_are_refused(tmp_path: Path) -> None:
    """A file without the constants says which command writes it; so does an engine that has none."""
    empty = tmp_path / "silicon.json"
    empty.write_text("{}")
    with pytest.raises(SpecError, match=r"python -m harness\.validation\.silicon"):
        silicon_constants.read(empty)
    with pytest.raises(SpecError, match=r'no engine "vlm".*vllm'):
        measured("vlm")


def test_measured_efficiencies_are_slower_than_the_data_sheet() -> None:
    """Shipped constants lie in their ranges, and a measured step takes longer than an ideal one."""
    assert all(
        RANGES[name].low <= getattr(silicon_constants.read(), name) <= RANGES[name].high for name in NAMES
    )
    architecture, hardware = load("llama-3.1-70b").architecture, load_hardware("h200")
    layout, step = Layout(tensor_parallel=8), decode(architecture, 16, 2048)
    ideal = pricer(architecture, hardware, layout, PRECISIONS["fp8"], IDEAL).of(step)
    times = [pricer(architecture, hardware, layout, PRECISIONS["fp8"], measured(e)).of(step) for e in ENGINES]
    assert min(times) > ideal
    assert (
        min(times)
        < pricer(architecture, hardware, layout, PRECISIONS["fp8"], measured()).of(step)
        < max(times)
    )


def test_kernels_follow_the_layers() -> None:
    """A dense layer is 10 kernels, 12 where both halves quantise; latents, experts and norms have more."""
    bfloat16, fp8 = PRECISIONS["bfloat16"], PRECISIONS["fp8"]
    assert kernels(load("llama-3.1-8b").architecture, bfloat16) == 32 * 10
    assert kernels(load("llama-3.1-8b").architecture, fp8) == 32 * 12
    assert kernels(load("qwen3-32b").architecture, bfloat16) == 64 * 11
    assert kernels(load("deepseek-v3").architecture, bfloat16) == 61 * 10 + 3 * 4 + 58 * (8 + 3)


def test_prompts_are_launched_kernel_by_kernel() -> None:
    """Only a pass that holds prompts pays for launching."""
    architecture, hardware = load("llama-3.1-8b").architecture, load_hardware("h100")
    slow = replace(IDEAL, launch_seconds=1e-5)
    at = [pricer(architecture, hardware, Layout(), PRECISIONS["bfloat16"], one) for one in (IDEAL, slow)]
    step, prompt = decode(architecture, 4, 100), prefill(architecture, 1, 100)
    assert at[1].of(step) == at[0].of(step)
    assert at[1].of(prompt) - at[0].of(prompt) == pytest.approx(320e-5)
    assert at[1].step(step + prompt).overhead == pytest.approx(320e-5)


def test_terms_put_together_are_the_pricer() -> None:
    """The fit's quick form gives what `Pricer.of` gives with the same constants, on rows of every kind."""
    data = held().data
    picked = np.random.default_rng(0).choice(len(data.rows), 60, replace=False)
    constants = silicon_constants.read()
    quick = data.terms.seconds(data.terms.decoding, constants)
    joined = data.terms.seconds(data.terms.mixed, constants)
    for index in picked:
        row = data.rows[index]
        architecture = load(row.spec).architecture
        priced = pricer(
            architecture,
            load_hardware(row.system),
            row.layout,
            row.precision,
            efficiency(constants, row.engine),
        )
        running = float(data.terms.running[index])
        ranks = row.layout.data_parallel
        step = decode(architecture, running, row.prompt + row.output / 2).spread(running, ranks)
        joining = prefill(architecture, max((running - 1) / row.output, ranks), row.prompt)
        # 1e-9: the same sums in another order.
        assert quick[index] == pytest.approx(float(priced.of(step)), rel=1e-9)
        assert joined[index] == pytest.approx(float(priced.of(step + joining)), rel=1e-9)


def test_a_fit_finds_the_constants_that_made_the_times() -> None:
    """Times made by known constants come back within 1 %, whatever the fit started from."""
    pytest.importorskip("scipy")
    data = measured_rows(handmade(60))
    true = replace(
        Constants(**{name: one.start for name, one in RANGES.items()}), kernel_sglang=6e-6, memory=0.7
    )
    made = replace(data, tpot=data.terms.tpot(true))
    found = fit(made)
    # 1 %: the loss is flat near its minimum, and some constants hardly matter to these rows.
    assert np.allclose(predict(made, found).tpot, made.tpot, rtol=0.01)


def test_left_out_rows_have_no_part_in_their_constants() -> None:
    """Making one model's times absurd changes the others' fits, and not the fit that predicts that model."""
    pytest.importorskip("scipy")
    data = measured_rows(handmade())
    groups = data.values("spec")
    absurd = np.where(groups == "gpt-oss-120b", 50.0, 1.0)
    _, before = left_out(data, "spec")
    _, after = left_out(replace(data, tpot=data.tpot * absurd, ttft=data.ttft * absurd), "spec")
    assert before["gpt-oss-120b"] == after["gpt-oss-120b"]
    assert before["deepseek-v3"] != after["deepseek-v3"]


def test_two_keys_leave_out_what_has_either() -> None:
    """With model and system left out, absurd times of either leave a row's constants as they were."""
    pytest.importorskip("scipy")
    lines = [
        line(
            id=f"{model}{system}{clients}",
            model_path=model,
            system=system,
            silicon_tpot_ms=str(clients),
            silicon_data_source=f"db-dump; silicon_concurrency={clients}",
        )
        for model in ("deepseek-ai/DeepSeek-V3", "MiniMaxAI/MiniMax-M2.5")
        for system in ("h200_sxm", "b200_sxm")
        for clients in (4, 16, 64)
    ]
    data = measured_rows(parse(lines).answered)
    either = (data.values("spec") == "deepseek-v3") | (data.values("system") == "h200")
    absurd = np.where(either, 50.0, 1.0)
    _, before = left_out(data, "spec", "system")
    _, after = left_out(replace(data, tpot=data.tpot * absurd), "spec", "system")
    assert len(before) == 4
    assert before["deepseek-v3, h200"] == after["deepseek-v3, h200"]
    assert before["minimax-m2.5, b200"] != after["minimax-m2.5, b200"]


def test_nothing_cannot_be_fitted() -> None:
    """A choice without rows is the caller's mistake."""
    data = measured_rows(handmade(4))
    with pytest.raises(ValueError, match="no rows"):
        fit(data, np.zeros(4, bool))


def test_every_aggregated_row_of_a_spec_is_answered() -> None:
    """Of 5,221 rows, the aggregated ones of models that have a spec get finite, positive predictions."""
    rows = held().rows
    assert len(rows.answered) + sum(rows.left_out.values()) == 5221
    assert (rows.aggregated, len(rows.answered)) == (3619, 3182)
    for one in (held().without_model, held().without_system, held().without_both, held().everything):
        assert np.isfinite(one.tpot).all()
        assert (one.tpot > 0).all()
        assert np.isfinite(one.ttft).all()
        assert (one.ttft > 0).all()


def test_tpot_is_within_the_bar() -> None:
    """Over all answered rows, without the model's own in the fit, TPOT MdAPE is at most 20 %, even 12 %."""
    data = held().data
    without_model = silicon_residual.mdape(held().without_model.tpot, data.tpot)
    without_system = silicon_residual.mdape(held().without_system.tpot, data.tpot)
    assert without_model <= min(BAR, AIM)
    assert without_system <= BAR
    assert silicon_residual.mdape(held().without_both.tpot, data.tpot) <= BAR


def test_the_shipped_constants_are_those_of_the_command() -> None:
    """Fitting again gives the file, to the digits that it holds."""
    again, shipped = held().constants, silicon_constants.read()
    for one in fields(Constants):
        # 2 %: another build of scipy or numpy ends its search elsewhere on a flat floor.
        assert getattr(shipped, one.name) == pytest.approx(getattr(again, one.name), rel=0.02), one.name


def test_the_report_says_what_was_computed() -> None:
    """Its tables hold every answered row once for each grouping, and the reference's rows are real ones."""
    tables = {table.title: table for table in silicon.report(held())}
    count = len(held().rows.answered)
    for title, table in tables.items():
        assert all(len(row) == len(table.headers) for row in table.rows), title
        if title.startswith("By "):
            assert sum(row[1] for row in table.rows) == count  # type: ignore[misc]
    beside = next(table for title, table in tables.items() if title.startswith("Beside aiconfigurator"))
    assert [row[:2] for row in beside.rows] == [(m, t) for m in ("SOL", "SILICON") for t in ("TPOT", "TTFT")]
    known = {row.identity for row in held().rows.answered}
    assert set(silicon_reference.read()) <= known
    assert [r.identity for r in silicon_reference.sample(held().rows.distinct)] == list(
        silicon_reference.read()
    )
