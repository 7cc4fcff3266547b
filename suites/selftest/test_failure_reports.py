"""What a failure tells beside its counterexample: facts, a smaller case, defects that shipped, a script."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.conformance import Violation, shrinking, subjects
from harness.conformance.case import Shrink
from harness.conformance.catalogue import properties
from harness.conformance.comparison import Clearance, agree, same_experts
from harness.conformance.shrinking import Shrunken
from harness.results import failures, reports, reproduce
from harness.results.failures import Reporter
from harness.results.record import Record
from suites.selftest.stubs import ODD, QUICK, STUBS, environment, pytest_in, write

pytest_plugins = ["pytester"]

PLENTY_S = 300.0
BROKEN = (
    ("routing.selects-the-best", "mutant:group-score-max", "deepseek-v3"),
    ("attention.is-causal", "mutant:sees-the-next-token", "mixtral-8x7b"),
    ("decoding.plain-sampling-has-the-target-law", "mutant:top-k-keeps-one-more", "mixtral-8x7b"),
)
STUBBORN = '''
import torch
from harness.conformance import conformance, require

@conformance("stub.stubborn", clause="c", needs=("forward",))
def test_stubborn(case):
    """Two sequences of three tokens are never right."""
    shape = tuple(case.tokens(2, 3).shape)
    require(shape != (2, 3), "two by three")
'''


def failing(slug: str, address: str, spec: str, reporter: Reporter) -> Record:
    """The record of a property that fails, with all that `reporter` has to say."""
    prop, function = next(found for found in properties(slug.partition(".")[0]) if found[0].slug == slug)
    (subject,) = subjects.resolve([address], [spec])
    case = subjects.case(subject, prop, 1)
    with pytest.raises(Violation) as ending:
        function(case)
    plan, error = reports.planned(prop, subject, 1), ending.value
    record = reports.ended(plan, error, {}, case=case, duration_s=0.0, telemetry={})
    return reporter.explained(record, error, prop=prop, subject=subject, case=case, function=function)


def run_script(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and output of a script, run in this process."""
    path = folder / "script.py"
    path.write_text(text)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr()
    return int(ending.value.code or 0), shown.out + shown.err


@pytest.mark.parametrize(("slug", "address", "spec"), BROKEN)
def test_a_script_shows_the_counterexample_while_the_defect_is_there(
    slug: str, address: str, spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run, it ends in 1 with the counterexample that was reported; on the reference it ends in 0."""
    record = failing(slug, address, spec, Reporter(PLENTY_S, tmp_path))
    text = Path(record.facts["script"]).read_text()
    smaller = record.facts["shrunken"]
    code, shown = run_script(text, tmp_path, capsys)
    assert (code, smaller["reason"] in shown) == (1, True)
    code, shown = run_script(text.replace(repr(address), "'reference'"), tmp_path, capsys)
    assert (code, "passed on reference" in shown) == (0, True)


def test_a_script_needs_nothing_but_the_harness(tmp_path: Path) -> None:
    """In a process and a folder of its own it finds all that it needs, and prints no traceback."""
    record = failing(*BROKEN[0], Reporter(0, tmp_path))
    done = subprocess.run(
        [sys.executable, Path(record.facts["script"]).name],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert record.reason.partition(";")[0] in done.stdout


def test_logits_are_shown_with_the_tokens_that_give_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where whole logits differ, the script prints the token ids and both rows."""
    record = failing(
        "attention.is-causal", "mutant:sees-the-next-token", "mixtral-8x7b", Reporter(0, tmp_path)
    )
    _, shown = run_script(Path(record.facts["script"]).read_text(), tmp_path, capsys)
    assert "\ntokens: [[" in shown
    assert "\nobserved logits " in shown
    assert "\nexpected logits " in shown


def test_what_cannot_be_measured_is_no_reproduction(capsys: pytest.CaptureFixture[str]) -> None:
    """69 where a defect has no place in the architecture, 78 where there is no such thing at all."""
    (subject,) = subjects.resolve(["reference"], ["mixtral-8x7b"])
    assert subject.architecture is not None
    case: dict[str, Any] = {
        "suite": "routing",
        "seed": 1,
        "spec": "mixtral-8x7b",
        "architecture": subject.architecture.model_dump_json(),
        "shrink": {},
    }
    slug = "routing.selects-the-best"
    assert reproduce.main("mutant:group-score-max", slug, **case) == 69
    assert reproduce.main("mutant:group-score-mix", slug, **case) == 78
    assert "did you mean 'group-score-max'?" in capsys.readouterr().err
    assert reproduce.main("reference", "routing.selects-the-test", **case) == 78
    assert reproduce.main("reference", slug, **{**case, "architecture": "{}"}) == 78
    assert reproduce.main("reference", slug, **{**case, "shrink": {"depth": 1}}) == 78
    assert "Traceback" not in capsys.readouterr().err


def test_the_smaller_case_fails_in_the_same_way_and_is_always_the_same() -> None:
    """It is smaller, breaks the property at the same stage, is found again, and the reference holds it."""
    slug, address, spec = BROKEN[0]
    prop, function = next(found for found in properties("routing") if found[0].slug == slug)
    (subject,) = subjects.resolve([address], [spec])
    (sound,) = subjects.resolve(["reference"], [spec])
    found = [
        shrinking.shrunken(function, prop, subject, 1, stage="select", budget_s=PLENTY_S) for _ in range(2)
    ]
    one, other = found
    assert isinstance(one, Shrunken)
    assert isinstance(other, Shrunken)
    assert one.finished
    assert (one.shrink, one.attempt.ending) == (other.shrink, other.attempt.ending)
    assert one.attempt.ending.stage == "select"
    assert one.attempt.case is not None
    shapes = one.attempt.case.shapes()
    assert (shapes["B"], shapes["S"], shapes["layers"]) == (1, 1, 2)
    assert shrinking.attempt(function, prop, sound, 1, one.shrink).ending.outcome == "passed"
    again = shrinking.of_dict(json.loads(json.dumps(shrinking.as_dict(one.shrink))))
    assert again == one.shrink


def test_what_a_property_asks_for_stays_when_its_case_shrinks() -> None:
    """Sizes that a property gives by itself are not overridden, all others are."""
    prop, _ = next(found for found in properties("routing") if found[0].slug == BROKEN[0][0])
    (subject,) = subjects.resolve(["reference"], ["mixtral-8x7b"])
    case = subjects.case(
        subject, prop, 1, Shrink(batch=1, length=2, fields={"moe__n_experts": 4, "d_model": 8})
    )
    assert tuple(case.tokens(3, 17).shape) == (1, 2)
    made = case.twin(n_experts=16)
    assert made.moe is not None
    assert (made.moe.n_experts, made.d_model, case.shape.d_model) == (16, 8, 8)


def test_time_is_limited_and_other_timers_go_on() -> None:
    """What never ends is ended, and a timer that was running before is as it was."""
    before = signal.getsignal(signal.SIGALRM)
    outer = signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with pytest.raises(shrinking.OutOfTime), shrinking.time_limit(0.01):
            signal.pause()
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        assert signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)


def test_a_budget_that_is_spent_is_said_to_be(tmp_path: Path) -> None:
    """Where there was no time for it, the record says so, and the script shows the case as it was found."""
    record = failing(*BROKEN[0], Reporter(1e-6, tmp_path))
    assert record.facts["shrunken"] == "not shrunken: nothing smaller was found to fail in 1e-06 s"
    assert "SHRINK = {}" in Path(record.facts["script"]).read_text()
    reporter = Reporter(1.0, spent_s=5.0)
    told = failing(*BROKEN[0], reporter).facts["shrunken"]
    assert told == "not shrunken: the failures before it took all the time there is for that"


def test_a_comparison_tells_what_it_compared() -> None:
    """Index, expected, observed, difference and tolerance are facts; of experts also the gap that decides."""
    with pytest.raises(Violation) as ending:
        agree(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), 0.25, what="x")
    expected = {"index": [1], "observed": 2.0, "expected": 2.5, "difference": 0.5, "tolerance": 0.25}
    assert ending.value.facts == {**expected, "what": "x", "share_differing": 0.5, "compared": 2}
    by = Clearance(torch.tensor([0.5, 0.25]), torch.tensor([0.125, 0.125]))
    with pytest.raises(Violation) as ending:
        same_experts(torch.tensor([[0, 1], [0, 2]]), torch.tensor([[1, 0], [1, 2]]), what="x", clearance=by)
    assert ending.value.facts["index"] == [1]
    assert ending.value.facts["boundary"] == {"gap": 0.25, "rounding_explains": 0.125}


def test_defects_of_the_class_come_first() -> None:
    """Of what shipped, that of the convention found leads, then those of the stage; five are told at most."""
    prop, _ = next(found for found in properties("routing") if found[0].slug == BROKEN[0][0])
    told = failures.same_class(prop.kills, "select", ("group-score-max",))
    relations = [one["relation"] for one in told]
    assert relations[0] == "class"
    assert relations == sorted(relations, key=list(failures.RELATIONS).index)
    assert 1 < len(told) <= failures.MOST_CITED
    assert all(one["shipped"] and one["cause"] for one in told)
    assert "class" not in [one["relation"] for one in failures.same_class(prop.kills, "select")]


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        ("mutant:canary", "a.b-mutant_canary-dbrx.py"),
        ("openai:http://localhost:1/v1", "a.b-openai_http__localhost_1_v1-dbrx-*.py"),
        ("../../x y", "a.b-.._.._x_y-dbrx-*.py"),
        ("x" * 400, "a.b-" + "x" * 116 + "-*.py"),
    ],
)
def test_names_of_scripts_are_safe(implementation: str, name: str) -> None:
    """Whatever an implementation is called, the file lies in the folder, and two have two names."""
    record = Record(
        slug="a.b",
        clause="c",
        level="MUST",
        implementation=implementation,
        spec="dbrx",
        spec_digest=None,
        seed=1,
        outcome="failed",
        reason="?",
        duration_s=0,
    )
    pytest.LineMatcher([reproduce.file_name(record)]).fnmatch_lines([name.replace("[", "[[]")])
    assert "/" not in reproduce.file_name(record)
    other = record.model_copy(update={"implementation": implementation + "/"})
    assert reproduce.file_name(other) != reproduce.file_name(record)


def facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Facts by property, of the run file in a folder."""
    lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return {line["slug"]: line["facts"] for line in lines if line["kind"] == "record"}


def test_a_run_writes_a_script_for_each_failure_and_lists_them(
    pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder holds a script of the one property that fails, shrunken, and a page that names it."""
    write(pytester.path, stubs=STUBS)
    run = ("--impl", ODD + "nan", "--run-file=run.jsonl", "--reproduce=repro")
    result = pytester.runpytest(*QUICK, *run)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "logit of token 0 is nan",
            "Logits are finite.",
            "checks c (MUST), seed 1; B 2, S 3, T 6, V 11, float32",
            "smaller (B 1, S 1, T 1, V 11, float32): logit of token 0 is nan",
            "reproduce: python repro/stub.finite-*.py",
            "scripts that reproduce failures: 1, listed in repro/README.md",
        ]
    )
    (script,) = Path("repro").glob("*.py")
    assert script.name in Path("repro/README.md").read_text()
    assert facts(pytester.path)["stub.finite"]["shrunken"]["shrink"] == {"batch": 1, "length": 1}
    code, shown = run_script(script.read_text(), pytester.path, capsys)
    assert (code, "logit of token 0 is nan" in shown) == (1, True)
    sound = script.read_text().replace(f"{ODD}nan", f"{ODD}good")
    assert run_script(sound, pytester.path, capsys)[0] == 0


def test_a_crash_has_a_script_and_no_smaller_case(
    pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]
) -> None:
    """What failed by an exception is run again as it was."""
    write(pytester.path)
    pytester.runpytest(*QUICK, "--impl", ODD + "raises", "--run-file=run.jsonl", "--reproduce=repro")
    assert "shrunken" not in facts(pytester.path)["stub.finite"]
    (script,) = Path("repro").glob("stub.finite*.py")
    code, shown = run_script(script.read_text(), pytester.path, capsys)
    assert (code, "crashed: RuntimeError: out of luck" in shown) == (1, True)


def test_where_nothing_smaller_fails_the_report_says_so(pytester: pytest.Pytester) -> None:
    """A property that only fails as it is is reported as it is."""
    write(pytester.path, stubs=STUBBORN)
    result = pytester.runpytest(*QUICK, "--impl", ODD + "good")
    result.stdout.fnmatch_lines(["two by three", "not shrunken: nothing smaller fails where this does"])


def test_what_is_expected_or_not_wanted_is_not_shrunken(pytester: pytest.Pytester) -> None:
    """A failure that a baseline expects, and any under --shrink-seconds 0, is left as it is."""
    write(pytester.path)
    run = ("--impl", ODD + "nan", "--run-file=run.jsonl", "--reproduce=repro")
    pytester.runpytest(*QUICK, *run, "--shrink-seconds=0", "--write-baseline=known.toml")
    assert "shrunken" not in facts(pytester.path)["stub.finite"]
    result = pytester.runpytest(*QUICK, *run, "--baseline=known.toml", "--reproduce=another")
    assert result.ret == 0
    assert "shrunken" not in facts(pytester.path)["stub.finite"]
    result.stdout.fnmatch_lines(["no new failure: no script was written to another"])
    assert list(Path("another").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--reproduce=test_stub.py"], 78, "*test_stub.py: scripts cannot be written there: Not a directory"),
        (["--reproduce=test_stub.py/x"], 78, "*test_stub.py/x: scripts cannot be written there: Not a dir*"),
        (["--shrink-seconds=-1"], 4, "*--shrink-seconds: it is '-1'; give a number of seconds*"),
        (["--shrink-seconds=long"], 4, "*--shrink-seconds: it is 'long'; give a number of seconds*"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_run(
    pytester: pytest.Pytester, arguments: list[str], code: int, sentence: str
) -> None:
    """A folder that is none, or seconds that are none, end in one sentence."""
    write(pytester.path)
    result = pytester.runpytest(*QUICK, "--impl", ODD + "nan", *arguments)
    assert result.ret == code
    result.stderr.fnmatch_lines([sentence])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_an_interrupt_while_shrinking_interrupts_the_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is not taken for a crash: the run ends in 2, and its file is no result."""

    def interrupted(*_: object, **__: object) -> Shrunken:
        raise KeyboardInterrupt

    monkeypatch.setattr(shrinking, "shrunken", interrupted)
    write(pytester.path)
    run = (*QUICK, "--impl", ODD + "nan", "--run-file=run.jsonl")
    result = pytester.runpytest_inprocess(*run, no_reraise_ctrlc=True)
    assert result.ret == 2
    assert '"footer"' not in Path("run.jsonl").read_text()
    result.stdout.no_fnmatch_line("*INTERNALERROR*")


def test_parallel_workers_write_scripts_that_one_page_lists(tmp_path: Path) -> None:
    """Under -n 2 each worker writes its own, and the controlling process lists them."""
    write(tmp_path)
    implementations = ("--impl", f"{ODD}nan", "--impl", f"{ODD}shape")
    done = pytest_in(tmp_path, *implementations, "-n", "2", "--reproduce=repro")
    assert done.returncode == 1
    scripts = [path.name for path in (tmp_path / "repro").glob("*.py")]
    page = (tmp_path / "repro" / "README.md").read_text()
    assert scripts
    assert all(name in page for name in scripts)
    assert f"scripts that reproduce failures: {len(scripts)}, listed in" in done.stdout
