"""The command line: no torch where none is needed, one sentence for every mistake, pytest for every run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import cli
from harness.results.runfile import read
from suites.selftest.stubs import ODD, ROOT, command, environment, moe_harness

MIXTRAL = str(ROOT / "specs" / "mixtral-8x7b.toml")


pytestmark = pytest.mark.usefixtures("whole_lines")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("describe", "mixtral-8x7b"),
        ("describe", "gpt4-leak", "--json"),
        ("audit", "gpt4-leak"),
        ("solve", "gpt4-leak"),
        ("plan", "mixtral-8x7b", "--hardware", "h100", "--gpus", "64", "--goal", "train"),
        ("plan", "dbrx", "--hardware", "h100", "--gpus", "8", "--goal", "serve"),
        ("spec", "validate", MIXTRAL),
        ("list", "specs"),
    ],
    ids=lambda arguments: "-".join(arguments[:2]).replace("--", ""),
)
def test_what_needs_no_torch_imports_none(arguments: tuple[str, ...]) -> None:
    """Describing, auditing and checking a spec start no tensor library."""
    program = (
        "import sys\nfrom harness.cli import main\ntry:\n    main()\nfinally:\n    "
        "print(sorted({'torch', 'transformers', 'pytest'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_describe_gives_the_same_facts_as_text_markdown_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The exact count of Mixtral is in all three formats."""
    shown = []
    for form in ("plain", "markdown", "json"):
        assert command("describe", "mixtral-8x7b", "--format", form) == 0
        shown.append(capsys.readouterr().out)
    assert "46,702,792,704" in shown[0]
    assert "| total" in shown[1]
    assert json.loads(shown[2])["parameters"]["total"] == 46702792704


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("describe", "mixtrl"), 78, 'did you mean "mixtral-8x7b"?'),
        (("describe", "mixtral-8x7b", "--context", "0"), 4, "--context"),
        (("describe",), 4, "Missing argument 'SPEC'"),
        (("descrbe",), 4, "No such command 'descrbe'"),
        (("audit", "nothing-leaked"), 78, "nothing-leaked: no such spec"),
        (("solve", "nothing-leaked"), 78, "nothing-leaked: no such spec"),
        (("spec", "validate", "."), 78, ".: is a directory"),
        (("spec", "import", "absent.json"), 78, "absent.json"),
        (("spec", "show", "absent"), 78, "absent: no such spec"),
        (("gate", "absent.jsonl"), 78, "absent.jsonl: cannot be read"),
        (("compare", MIXTRAL, MIXTRAL), 78, "mixtral-8x7b.toml:1: the line is cut off or is not JSON"),
        (("list", "everything"), 4, "everything"),
    ],
    ids=lambda value: "-".join(value[:3]) if isinstance(value, tuple) and len(value[0]) < 20 else None,
)
def test_a_mistake_ends_in_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    """A mistake of the user's is one line on stderr, nothing on stdout, and pytest's 4 or our 78."""
    assert command(*arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("moe-harness: ")
    assert sentence in shown.err
    assert shown.err.count("\n") == 1


def test_a_bug_of_ours_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An unforeseen exception is exit code 70 and a sentence that says how to see the traceback."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a count was 0")

    monkeypatch.setattr("harness.spec.load", broken)
    assert command("describe", "dbrx") == 70
    shown = capsys.readouterr().err
    assert shown == (
        "moe-harness: a bug of the harness, ZeroDivisionError: a count was 0; --debug shows the traceback\n"
    )
    with pytest.raises(ZeroDivisionError):
        cli.main(["describe", "dbrx", "--debug"])


def in_shell(line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `moe-harness` is this checkout's, by way of `python -m harness`."""
    alias = f'moe-harness() {{ {sys.executable} -m harness "$@"; }}'
    return subprocess.run(
        ["bash", "-c", f"{alias}\n{line}"], env=environment(), capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("arguments", ["describe dbrx", "audit gpt4-leak", "audit gpt4-leak --format json"])
def test_a_closed_pipe_is_no_error(arguments: str) -> None:
    """`moe-harness audit gpt4-leak | head -1` prints a line and nothing else."""
    done = in_shell(f"moe-harness {arguments} | head -1")
    assert done.stdout.count("\n") == 1
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_is_gone_makes_no_success() -> None:
    """Under pipefail a command whose output no one read ends as the shell has it, never in 0 or 1."""
    done = in_shell("set -o pipefail; moe-harness describe dbrx | sleep 0")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("redirection", "code", "sentence"),
    [
        (">/dev/full", 78, "moe-harness: the output: cannot be used: No space left on device\n"),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
    ],
)
def test_where_the_output_goes_is_no_bug(redirection: str, code: int, sentence: str) -> None:
    """A full disk is told in one sentence, and closed descriptors do not matter."""
    done = in_shell(f"moe-harness describe dbrx {redirection}")
    assert (done.returncode, done.stderr) == (code, sentence)


def test_a_spec_is_imported_validated_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `spec show` prints is the file, and `spec validate` accepts it."""
    assert command("spec", "show", "dbrx") == 0
    copy = tmp_path / "copy.toml"
    copy.write_text(capsys.readouterr().out)
    assert copy.read_bytes() == (ROOT / "specs" / "dbrx.toml").read_bytes()
    assert command("spec", "validate", str(copy), MIXTRAL) == 0
    assert capsys.readouterr().out.count(": valid (") == 2


CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def test_a_config_is_imported_exactly_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config.json becomes a spec whose count is exact; an unknown family is refused by name."""
    config, spec = tmp_path / "config.json", tmp_path / "mine.toml"
    config.write_text(json.dumps(CONFIG))
    assert command("spec", "import", str(config), "-o", str(spec)) == 0
    assert command("describe", str(spec), "--json") == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 46702792704
    config.write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    assert command("spec", "import", str(config)) == 78
    assert "model_type" in capsys.readouterr().err
    assert command("spec", "import", str(config), "-o", str(tmp_path / "no" / "where.toml")) == 78


def test_a_bench_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`bench layer` puts the reference beside its floor, on a machine that it names."""
    page = tmp_path / "layer.md"
    assert (
        command("bench", "layer", "--tokens", "16", "--dtype", "float32", "--rounds", "2", "-o", str(page))
        == 0
    )
    shown = capsys.readouterr().out
    assert "two plain matmuls" in shown
    assert "torch" in shown
    assert "| float32 |" in page.read_text().replace("  ", " ")


def test_lists_name_what_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Specs, implementations and properties are listed with what a user needs to choose."""
    for what, found in (
        ("specs", "gpt4-leak"),
        ("implementations", "transformers:mixtral"),
        ("properties", "routing.selects-k-distinct"),
    ):
        assert command("list", what, "--format", "markdown") == 0
        assert f"| {found} " in capsys.readouterr().out


def test_check_is_pytest_on_the_suites(tmp_path: Path) -> None:
    """`check` hands its arguments to pytest, its exit code back, and the canary is caught in earnest."""
    done = moe_harness(
        "check",
        "--impl",
        f"{ODD}good",
        "-k",
        "capabilities or causal",
        "--run-file",
        str(tmp_path / "run.jsonl"),
    )
    found = read(tmp_path / "run.jsonl")
    assert found.footer.canary is not None
    assert found.footer.canary.caught, found.footer.canary.reason
    assert done.returncode in (0, 1), done.stdout
    assert f"(exit code {done.returncode})" in done.stdout
    assert moe_harness("check", "--impl", "refrence").returncode == 78
    assert moe_harness("check", "--no-such-option").returncode == 4
