"""Audit, plan and simulate as careless people use them: refused in a sentence, or answered soundly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from harness.spec import load, names
from harness.spec.hardware import hardware_names
from suites.selftest.stubs import command

TRAIN = ("plan", "mixtral-8x7b", "--hardware", "h100", "--gpus", "16", "--goal", "train", "--limit", "2")
SERVE = (*TRAIN[:-3], "serve", "--limit", "2")
SIMULATE = ("simulate", "mixtral-8x7b", "--requests", "20")
AUDIT = ("audit", "gpt4-leak")
USAGE, CONFIG = 4, 78


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code and the one sentence that a command ends in."""
    code = command(*arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moe-harness: ")
    assert err.count("\n") == 1
    return code, err


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints as JSON, strictly: neither NaN nor infinity."""

    def strange(constant: str) -> None:
        raise AssertionError(f"{constant} in the JSON of {' '.join(arguments)}")

    assert command(*arguments, "--format", "json") == 0
    return json.loads(capsys.readouterr().out, parse_constant=strange)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((*TRAIN, "--slo", "tpot=1"), "--slo means nothing with --goal train; leave it out"),
        ((*TRAIN, "--prompt", "5"), "--prompt means nothing with --goal train"),
        ((*TRAIN, "--skew", "0"), "--skew means nothing with --goal train"),
        ((*SERVE, "--batch-tokens", "5"), "--batch-tokens means nothing with --goal serve"),
        ((*SERVE, "--context", "5"), "--context means nothing with --goal serve"),
        ((*SERVE, "--tokens", "5"), "--tokens means nothing with --goal serve"),
        ((*TRAIN, "--efficiency", "cache=0.5"), "--efficiency cache means nothing with --goal train"),
        ((*SERVE, "--overlap", "expert=1"), "--overlap means nothing with --goal serve"),
        (
            ("simulate", "mixtral-8x7b", "--example"),
            "--example has a server of its own; leave mixtral-8x7b out",
        ),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot change the answer is no part of the question: usage, exit code 4."""
    code, said = refused(capsys, *arguments)
    assert code == USAGE
    assert sentence in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((*SERVE, "--slo", "tpot=1", "--slo", "tpot=2"), "--slo tpot is both 1 and 2; give it once"),
        ((*TRAIN, "--try", "zero_stage=1", "--try", "zero_stage=3"), "--try zero_stage is both 1 and 3"),
        ((*TRAIN, "--overlap", "data=1", "--overlap", "data=0"), "--overlap data is both 1 and 0"),
        (
            (*TRAIN, "--efficiency", "compute=1", "--efficiency", "compute=0.5"),
            "both 1 and 0.5; give it once",
        ),
        (
            (*SIMULATE, "--rate", "1", "--set", "n_layers=3", "--set", "architecture.n_layers=4"),
            "--set n_layers is both 3 and 4; give it once",
        ),
        ((*SIMULATE, "--rate", "1", "--slo", "ttft=1", "--slo", "ttft=9"), "--slo ttft is both 1 and 9"),
        (
            (*AUDIT, "--assume", "training.gpu_hour_usd=1", "--assume", "gpu_hour_usd=2"),
            "training.gpu_hour_usd is assumed twice",
        ),
    ],
)
def test_what_is_said_twice_is_refused(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last of two values does not win in silence, whichever way the name is written."""
    code, said = refused(capsys, *arguments)
    assert code == CONFIG
    assert sentence in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((*SERVE, "--prompt", "32768", "--output", "1"), "32,769 tokens, and the model has 32,768 positions"),
        ((*TRAIN, "--context", "32769"), "a sequence of 32,769 tokens, and the model has 32,768 positions"),
        ((*SERVE, "--gpu-hour-usd", "1e308"), "1e+308 USD is no price of an hour; give 0 to 1,000,000"),
        ((*TRAIN, "--gpu-hour-usd", "inf"), "inf USD is no price"),
        ((*SIMULATE, "--rate", "1", "--gpu-hour-usd", "inf"), "inf USD is no price"),
        ((*SERVE, "--skew", "1e300"), "a skew of 1e+300 is none; give 0 to 10"),
        ((*SIMULATE, "--rate", "1", "--skew", "inf"), "a skew of inf is none"),
        ((*SERVE, "--slo", "tpot=30ms"), 'tpot cannot be "30ms"; give a number'),
        ((*TRAIN, "--efficiency", "layer_seconds=1e300"), "give seconds from 0 to 3600"),
        ((*TRAIN, "--efficiency", "latency=1e300"), "give how many times the link's own, from 0 to 1e+06"),
        ((*SIMULATE, "--rate", "1", "--efficiency", "memory=1e-308"), "is no share; give 1e-06 to 1"),
        ((*SIMULATE, "--rate", "1", "--efficiency", "measured:mine"), 'no engine "mine"; known are mean'),
        (
            (*SIMULATE, "--rate", "1", "--set", "d_model=1e300"),
            "parameters; give dimensions of at most 1e+15",
        ),
        ((*TRAIN, "--set", "d_model=1e300"), "parameters; give dimensions of at most 1e+15"),
        ((*SIMULATE, "--rate", "1", "--prompt", "lognormal:.:1"), "is no length"),
        (
            (*SIMULATE, "--rate", "1", "--prompt", f"lognormal:{'9' * 400}:1"),
            "a mean of inf tokens; give 1 to",
        ),
        (
            (*SIMULATE, "--rate", "1", "--prompt", f"lognormal:9:{'9' * 400}"),
            "deviation of inf means; give at most 100",
        ),
        (
            (*SIMULATE, "--rate", "1", "--draft-length", "2", "--acceptance", "1", "--draft-cost", "1e300"),
            "2 drafted tokens, each at 1e+300 of a pass, cannot be; give 0 or more at 0 to 100",
        ),
        (
            (*SIMULATE, "--rate", "1", "--chunk", "100000000"),
            "72.0 GB for it; give a smaller chunk of prompts",
        ),
        ((*AUDIT, "--assume", "acceptance=2"), "assumptions.acceptance: 2 is no share; give 0 to 1"),
        ((*AUDIT, "--assume", "load=0.4,2"), "assumptions.load: 2 is no share; give 0 to 1"),
        ((*AUDIT, "--assume", "matmul_efficiency=-1"), "-1 is no value of assumptions.matmul_efficiency"),
        ((*AUDIT, "--assume", "network_share=-5"), "give a number of at least 0"),
        ((*AUDIT, "--assume", "loss_law=99"), "there is no such law of loss; give loss_law 1 to 4"),
        ((*AUDIT, "--assume", "loss_law=1.5"), "there is no such law of loss; give loss_law 1 to 4"),
        ((*AUDIT, "--assume", "gpus=0"), "cannot be computed: divide by zero"),
    ],
)
def test_a_number_that_nothing_can_have_is_refused(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither an overflow nor a figure beyond its domain reads as a result or as a bug: exit code 78."""
    code, said = refused(capsys, *arguments)
    assert code == CONFIG
    assert sentence in said


def test_a_model_of_few_positions_is_trained_in_sequences_that_it_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where no context is given, it is 8,192 or what the model has positions for."""
    for name, context in (("gpt3-175b", "2,048"), ("mixtral-8x7b", "8,192")):
        found = answered(capsys, "plan", name, "--hardware", "h100", "--gpus", "256", "--goal", "train")
        assert f"sequences of {context}, on 256 x h100" in found["title"]


def test_a_title_says_what_was_changed(capsys: pytest.CaptureFixture[str]) -> None:
    """A spec with leaves set, other rates and another format than the spec's are not the spec's answer."""
    changed = ("--set", "n_layers=16", "--efficiency", "compute=0.5")
    title = answered(capsys, *TRAIN, *changed, "--precision", "int8")["title"]
    assert title.startswith("mixtral-8x7b with n_layers=16, int8, ")
    assert title.endswith("at compute 0.5")
    assert answered(capsys, *SERVE, *changed)["title"].startswith("mixtral-8x7b with n_layers=16, ")
    title = answered(capsys, *SIMULATE, "--rate", "inf", *changed)["title"]
    assert title.startswith("mixtral-8x7b with n_layers=16 in bfloat16 on 8 h100 ")
    assert "at compute 0.5, 20 requests of 1024 and 256 tokens all at once" in title


def test_training_by_measured_constants_names_those_that_it_uses(capsys: pytest.CaptureFixture[str]) -> None:
    """What was fitted to serving alone is no part of a training plan's title."""
    for line, named in ((TRAIN, False), (SERVE, True)):
        title = answered(capsys, *line, "--efficiency", "measured")["title"]
        assert "compute 0." in title
        assert ("kernel_seconds" in title) is named


def test_a_format_that_is_given_twice_is_tried_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Equal precisions do not double the layouts that are counted."""
    once, twice = (answered(capsys, *SERVE, *("--precision", "bfloat16") * n) for n in (1, 2))
    assert once == twice


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt-oss-20b", "mixtral-8x7b"])
def test_no_plan_computes_faster_than_its_hardware(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is multiplied stays below the peak; PaLM's count may pass it, and the table says so."""
    for hardware, context in (("b200", "8192"), ("tpu-v4", "32768")):
        line = (
            "plan",
            name,
            "--hardware",
            hardware,
            "--gpus",
            "256",
            "--goal",
            "train",
            "--context",
            context,
        )
        found = answered(capsys, *line, "--set", "max_positions=131072", "--every", "--limit", "200")
        rows = found["ranked"] + found["front"]["layouts"] + found["excluded"]
        assert all(0 < one["mfu_causal"] < 1 for one in rows)
        assert all(one["mfu_causal"] < one["mfu"] for one in rows)
        assert "over 100 %" in found["definitions"]["MFU (PaLM)"]


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mixtral-8x7b"])
def test_no_first_token_comes_before_its_prompt_can_be_read(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt is not divided over data-parallel ranks.

    TTFT is at least the FLOP of its attention's matrices over the peak of the ranks that share them.
    """
    architecture, prompt = load(name).architecture, 4096
    attention = architecture.attention
    width = 2 * attention.head_dim * (attention.n_heads + attention.n_kv_heads)
    flop = 2 * prompt * architecture.n_layers * architecture.d_model * width
    line = ("plan", name, "--hardware", "h100", "--gpus", "64", "--goal", "serve", "--precision", "bfloat16")
    found = answered(capsys, *line, "--prompt", str(prompt), "--rank", "cost", "--limit", "50")
    for one in found["ranked"] + found["front"]["layouts"]:
        ranks = one["tensor_parallel"] * one["pipeline_parallel"]
        assert one["ttft"] >= flop / (ranks * 989.4e12)


def test_limits_name_the_unit_of_what_they_gain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of limits gives a TPOT in seconds under a header that says so; the others are in ms."""
    monkeypatch.delenv("COLUMNS", raising=False)  # which would wrap the headers
    assert command(*SERVE) == 0
    shown = capsys.readouterr().out
    assert "the best of those: TPOT, s" in shown
    assert "TPOT, ms" in shown


TINY = """
title = "a small model"
[training]
tokens = [1e9, 2e9]
[assumptions.spare]
value = 1
values = [1, 2]
why = "for the test"
[architecture]
d_model = 64
n_layers = {layers}
vocab_size = 100
max_positions = 64
[architecture.attention]
n_heads = 4
n_kv_heads = {groups}
head_dim = {width}
rope = {{ theta = 1e4{rope} }}
{attention}
{feed}
"""
DENSE = "[architecture.ffn]\nd_ff = 128"
EXPERTS = "[architecture.moe]\nn_experts = {0}\ntop_k = {1}\n[architecture.moe.expert]\nd_ff = {2}\n"
LATENT = """
[architecture.attention.mla]
kv_lora_rank = 16
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
"""
PLAIN = {"layers": 2, "groups": 4, "width": 16, "rope": "", "attention": "", "feed": DENSE}
OWN: dict[str, dict[str, Any]] = {
    "one layer": PLAIN | {"layers": 1},
    "multi-query": PLAIN | {"groups": 1},
    "windows": PLAIN | {"attention": 'window = 1\npattern = ["window", "full"]'},
    "one expert": PLAIN | {"groups": 2, "feed": EXPERTS.format(1, 1, 7)},
    "every expert": PLAIN | {"groups": 2, "feed": EXPERTS.format(5, 5, 7)},
    "latent": PLAIN | {"width": 24, "rope": ", dim = 8", "attention": LATENT},
}


@pytest.mark.parametrize("kind", OWN)
def test_small_specs_of_every_kind_are_answered(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command gives finite, positive figures on models with next to nothing in them."""
    path = tmp_path / "own.toml"
    path.write_text(TINY.format(**OWN[kind]))
    for line in (("describe", "--context", "16"), ("audit",), ("solve",)):
        answered(capsys, line[0], str(path), *line[1:])
    place = (str(path), "--hardware", "h100", "--gpus", "4", "--goal")
    trained = answered(
        capsys, "plan", *place, "train", "--batch-tokens", "4096", "--context", "16", "--tokens", "1e9"
    )
    served = answered(capsys, "plan", *place, "serve", "--prompt", "8", "--output", "4")
    for one in trained["ranked"] + served["ranked"]:
        assert all(value >= 0 for value in one.values() if isinstance(value, int | float))
    for way in (("--rate", "5"), ("--concurrency", "3", "--batching", "static")):
        lengths = ("--prompt", "uniform:1-20", "--output", "uniform:1-9", "--requests", "50", "--gpus", "1")
        found = answered(capsys, "simulate", str(path), *lengths, *way)
        assert found["overall"]["completed"] == 50
        assert all(value >= 0 for value in found["overall"].values())


@pytest.mark.parametrize("hardware", hardware_names())
def test_any_spec_on_any_hardware_is_a_plan_or_a_sentence(
    hardware: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No shipped pair ends in a bug, in a figure that is none, or in a row that breaks its own limits."""
    for name in (one for one in names() if not load(one).unknowns):
        line = ("plan", name, "--hardware", hardware, "--gpus", "16", "--goal", "serve", "--format", "json")
        code = command(*line)
        out, err = capsys.readouterr()
        assert code in (0, CONFIG), err
        if code:
            assert re.search(r"needs [\d.,]+ GB|positions|cannot be divided", err)
            continue
        for one in json.loads(out, parse_constant=pytest.fail)["ranked"]:
            assert not one["ruled_out_by"]
            assert one["gpus"] <= 16
            assert one["tpot"] > 0
            assert 0 < one["usd_per_1k"] < 1e6
