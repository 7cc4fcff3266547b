"""Bad input through the command line: one sentence that names file and field, and never a traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from suites.selftest.stubs import ODD, QUICK, ROOT, command, write
from suites.selftest.test_results import record, written
from suites.selftest.tiny_configs import tiny

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("whole_lines")

SPEC = (ROOT / "specs" / "mixtral-8x7b.toml").read_text()
CLAIM = """
[[claim]]
id = "layers"
statement = "It has 32 layers."
readings = [{ value = "32", unit = "layers", sources = ["paper"] }]
"""
UNKNOWN = '{ status = "unknown", why = "not told", domain = { min = 5000, max = 6000, step = 7 } }'
NO_DOMAIN = '{ status = "unknown", why = "not told" }'


def _swapped(old: str, new: str) -> Callable[[Path], None]:
    assert old in SPEC
    return lambda path: path.write_text(SPEC.replace(old, new)) and None


SPECS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a typo": (_swapped("top_k = 2", "topk = 2"), r':\d+: architecture\.moe\.topk: .*did you mean "top_k"'),
    "a wrong type": (_swapped("top_k = 2", 'top_k = "two"'), r":\d+: architecture\.moe\.top_k: "),
    "a negative count": (_swapped("n_layers = 32", "n_layers = -1"), r":\d+: architecture\.n_layers: "),
    "an unknown without a domain": (
        _swapped("n_heads = 32", f"n_heads = {NO_DOMAIN}"),
        r":\d+: architecture\.attention\.n_heads: an unknown has no domain",
    ),
    "an impossible domain": (
        _swapped("top_k = 2", f"top_k = {UNKNOWN}"),
        r":\d+: architecture\.moe: impossible domain: no completion",
    ),
    "not a number": (_swapped("eps = 1e-5", "eps = nan"), r":\d+: architecture\.norm\.eps: is not a finite"),
    "a claim twice": (
        lambda path: path.write_text(SPEC + CLAIM + CLAIM),
        r':\d+: claim\[\d+\]\.id: duplicate id "layers"',
    ),
    "a source that is not there": (
        lambda path: path.write_text(SPEC + CLAIM.replace('"paper"', '"papper"')),
        r':\d+: claim\[\d+\]\.readings\[0\]\.sources: .*did you mean "paper"',
    ),
    "a file that is cut short": (
        lambda path: path.write_text(SPEC[: SPEC.index("1000000.0") - 8]),
        r":\d+: ",
    ),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), r":1: byte 0xff is not UTF-8"),
    "a config.json": (lambda path: path.write_text(json.dumps(tiny("mixtral"))), r":1: .*not valid TOML"),
    "a directory": (Path.mkdir, r": is a directory"),
    "no file": (lambda path: None, r": no such spec"),
}


@pytest.fixture(params=SPECS)
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """The path of a spec that cannot be used, and what must be said about it."""
    make, sentence = SPECS[request.param]
    path = tmp_path / "mine.toml"
    make(path)
    return str(path), re.escape(str(path)) + sentence


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 78) -> str:
    """The one sentence that a command ends in."""
    assert command(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moe-harness: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "arguments", [("describe",), ("audit",), ("solve",), ("spec", "validate"), ("spec", "show")]
)
def test_a_spec_that_cannot_be_used_is_refused(
    bad: tuple[str, str], arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that reads a spec names the file, the line and the field."""
    path, sentence = bad
    assert re.search(sentence, refused(capsys, *arguments, path))


def test_two_mistakes_are_two_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything of a kind that is wrong with a spec is said at once, in the order of its lines."""
    path = tmp_path / "mine.toml"
    path.write_text(SPEC.replace("top_k = 2", "topk = 2").replace("n_layers = 32", 'n_layers = "32"'))
    assert command("describe", str(path)) == 78
    first, second = capsys.readouterr().err.splitlines()
    assert "architecture.n_layers" in first
    assert "architecture.moe.topk" in second


def test_a_run_on_such_a_spec_does_not_begin(bad: tuple[str, str], pytester: pytest.Pytester) -> None:
    """The suites end in the same sentence and exit code 78 before anything is built."""
    path, sentence = bad
    write(pytester.path)
    result = pytester.runpytest(*QUICK, "--impl", f"{ODD}good", "--spec", path, "--run-file=run.jsonl")
    assert result.ret == 78
    assert re.search(sentence, result.stderr.str())
    assert "Traceback" not in result.stdout.str() + result.stderr.str()
    assert not (pytester.path / "run.jsonl").exists()


CONFIG = tiny("mixtral")
CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "an unknown family": (
        json.dumps(CONFIG | {"model_type": "mamba9"}),
        r':\d+: model_type: unknown family "mamba9"',
    ),
    "no family": (json.dumps({k: v for k, v in CONFIG.items() if k != "model_type"}), r": model_type: "),
    "a field of another meaning": (json.dumps(CONFIG | {"experts_per_tokn": 2}), r":1: experts_per_tokn: "),
    "a wrong type": (json.dumps(CONFIG | {"hidden_size": "wide"}), r":1: hidden_size: "),
    "not a number": (json.dumps(CONFIG | {"rms_norm_eps": float("nan")}), r":1: rms_norm_eps: "),
    "infinity": (json.dumps(CONFIG | {"rope_theta": float("inf")}), r":1: rope_theta: "),
    "a count of 0": (json.dumps(CONFIG | {"num_local_experts": 0}), r":1: num_local_experts: "),
    "a file that is cut short": (json.dumps(CONFIG)[:-20], r":\d+: is not JSON"),
    "an empty file": ("", r":1: ends in the middle of its JSON"),
    "a list": ("[1]", r":1: .*one object"),
    "a number": ("7", r":1: .*one object"),
    "no text": (b"\xff\xfe\x00", r":"),
    "a key twice": ('{"model_type": "mixtral", "model_type": "llama"}', r": model_type: stands twice"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_cannot_be_imported_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An import names the file and the field, and writes nothing."""
    content, sentence = CONFIGS[kind]
    path, output = tmp_path / "config.json", tmp_path / "mine.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(capsys, "spec", "import", str(path), "-o", str(output))
    assert re.search(re.escape(str(path)) + sentence, said)
    assert not output.exists()


def test_a_config_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder and a path without a file are told apart."""
    assert f"{tmp_path}: is a directory" in refused(capsys, "spec", "import", str(tmp_path))
    assert "No such file" in refused(capsys, "spec", "import", str(tmp_path / "config.json"))


RUNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no footer": (lambda path: path.write_text(_lines(path)[0]), "there is no footer"),
    "cut short": (lambda path: path.write_text(path.read_text()[:-30]), "cut off"),
    "no run": (lambda path: path.write_text(SPEC), ":1: "),
    "empty": (lambda path: path.write_text(""), "there is no header"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe"), "is not text"),
    "not a number": (
        lambda path: path.write_text(path.read_text().replace('"duration_s": 0.5', '"duration_s": NaN')),
        ":2: duration_s: ",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    "no file": (Path.unlink, "No such file"),
}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


@pytest.mark.parametrize("kind", RUNS)
def test_what_is_no_run_is_refused_by_every_reader(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """gate, compare and summary name the file and the line, and print no table."""
    damage, sentence = RUNS[kind]
    good, path = tmp_path / "good.jsonl", tmp_path / "run.jsonl"
    written(good, record())
    written(path, record())
    damage(path)
    for arguments in (
        ("gate", str(path)),
        ("compare", str(path), str(good)),
        ("compare", str(good), str(path)),
        ("summary", str(good), str(path)),
    ):
        said = refused(capsys, *arguments, "--format", "json")
        assert str(path) in said
        assert sentence in said


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("version = 2", "version: it is 2"),
        ("[[expected", ":1: is not TOML"),
        (b"\xff", "is not text"),
        (None, "No such"),
    ],
)
def test_a_gate_with_a_bad_baseline_is_no_pass(
    content: str | bytes | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A baseline that cannot be used ends in a sentence that names it."""
    run, baseline = tmp_path / "run.jsonl", tmp_path / "known.toml"
    written(run, record())
    if content is not None:
        baseline.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(capsys, "gate", str(run), "--baseline", str(baseline))
    assert str(baseline) in said
    assert sentence in said


@pytest.mark.parametrize("where", ["folder", "file/below"])
def test_an_output_that_cannot_be_written_is_refused(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder, or a path below a file, is named in one sentence, and before anything is measured."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    config, output = tmp_path / "config.json", str(tmp_path / where)
    config.write_text(json.dumps(CONFIG))
    wanted = [("spec", "import", str(config), "-o", output), ("bench", "layer", "-o", output)]
    if where != "folder":
        wanted.append(("report", "--output", output))
    for arguments in wanted:
        assert str(tmp_path / where.partition("/")[0]) in refused(capsys, *arguments)


@pytest.mark.parametrize("where", ["folder", "file/below"])
@pytest.mark.parametrize("option", ["--run-file", "--write-baseline"])
def test_a_run_that_could_not_be_kept_does_not_begin(
    option: str, where: str, pytester: pytest.Pytester
) -> None:
    """What a run is to write is tried before its first property."""
    write(pytester.path)
    (pytester.path / "folder").mkdir()
    (pytester.path / "file").write_text("")
    result = pytester.runpytest(*QUICK, "--impl", f"{ODD}good", option, where)
    assert result.ret == 78
    result.stderr.fnmatch_lines([f"*{where}: cannot be *"])
    result.stdout.no_fnmatch_line("*test_stub*")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--impl", ""), 78, "there is no implementation ''"),
        (("--impl", f"{ODD}quits"), 78, r"quits\(\) failed with SystemExit: 0"),
        (("--impl", f"{ODD}good@"), 78, "no spec stands after the @"),
        (("--spec", ""), 78, '"" names no spec'),
        (
            ("--spec", "gpt4-leak"),
            78,
            r"gpt4-leak\.toml:\d+: architecture: d_model, .* are unknown; give every",
        ),
        (("--seed", "abc"), 4, "argument --seed: invalid int value: 'abc'"),
        (
            ("--timeout-property", "soon"),
            4,
            "argument --timeout-property: it is 'soon'; give a number of seconds",
        ),
        (
            ("--timeout-property", "-1"),
            4,
            "argument --timeout-property: it is '-1'; give a number of seconds",
        ),
        (("--run-file",), 4, "argument --run-file: expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_run_with_bad_options_does_not_begin(
    arguments: tuple[str, ...], code: int, sentence: str, pytester: pytest.Pytester
) -> None:
    """Options that mean nothing end in a sentence: 4 as pytest has it, 78 for what cannot be used."""
    write(pytester.path)
    result = pytester.runpytest(*QUICK, *arguments)
    assert result.ret == code
    assert re.search(sentence, result.stderr.str())
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


@pytest.mark.parametrize("seed", ["0", "-3", str(10**30)])
def test_any_whole_number_is_a_seed(seed: str, pytester: pytest.Pytester) -> None:
    """Zero, negative and very large seeds draw inputs and build models like any other."""
    write(pytester.path)
    on = ("--impl", f"{ODD}good", "--impl", "reference", "--spec", "mixtral-8x7b")
    assert pytester.runpytest(*QUICK, *on, f"--seed={seed}").ret == 0
