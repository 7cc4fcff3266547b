"""The plugin end to end, on stub properties: how each ending of a property reads, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.conformance import canary  # this loads torch, which a process can do only once
from harness.results.runfile import read
from suites.selftest.stubs import ODD, QUICK, STUBS, VOID, write

pytest_plugins = ["pytester"]


def run(
    pytester: pytest.Pytester, *arguments: str, stubs: str = STUBS, caught: str = '(True, "caught")'
) -> tuple[pytest.RunResult, dict[str, dict[str, Any]]]:
    """A run on the stub properties, and the records of its run file by property."""
    write(pytester.path, stubs=stubs, canary=caught)
    result = pytester.runpytest(*QUICK, "--run-file=run.jsonl", *arguments)
    lines = [json.loads(line) for line in (pytester.path / "run.jsonl").read_text().splitlines()]
    return result, {line["slug"]: line for line in lines if line["kind"] == "record"}


def test_what_passes_is_recorded_with_its_input_and_exits_0(pytester: pytest.Pytester) -> None:
    """A conforming implementation passes, and is not asked for what it lacks or what does not apply."""
    result, records = run(pytester, "--impl", ODD + "good")
    assert result.ret == 0
    assert {slug: r["outcome"] for slug, r in records.items()} == {
        "stub.finite": "passed",
        "stub.shape": "passed",
        "stub.cached": "unsupported",
    }
    assert records["stub.cached"]["reason"] == "the model declares no capability 'cache'"
    assert records["stub.shape"]["facts"] == {"shape": [2, 3]}
    assert len(records["stub.shape"]["input_digest"]) == 64
    result.stdout.fnmatch_lines(["*2 passed, 1 unsupported*", "*(exit code 0)"])


def test_a_broken_property_reads_as_one_paragraph(pytester: pytest.Pytester) -> None:
    """A violation shows its counterexample, stage, property and clause, and no traceback."""
    result, records = run(pytester, "--impl", ODD + "nan")
    assert result.ret == 1
    assert records["stub.finite"]["outcome"] == "failed"
    assert records["stub.finite"]["reason"] == "logit of token 0 is nan"
    assert records["stub.finite"]["stage"] == "combine"
    assert records["stub.finite"]["facts"]["token"] == 0
    result.stdout.fnmatch_lines(["*breaks stub.finite at the stage combine:", "logit of token 0 is nan"])
    result.stdout.no_fnmatch_line("*Error*")


@pytest.mark.parametrize(
    ("odd", "slug", "reason"),
    [
        ("raises", "stub.finite", "crashed: RuntimeError: out of luck (odd_implementations.py:*"),
        ("exits", "stub.finite", "crashed: SystemExit: 0 (odd_implementations.py:*"),
        ("hangs", "stub.finite", "timed out after 1.0 s"),
        ("shape", "stub.shape", "forward gave float32 of shape (2, 2, 11), not logits of shape (2, 3, 11)"),
        ("silent", "stub.finite", "forward gave None, not logits of shape (2, 3, 11)"),
        ("lies", "stub.cached", "the model declares more than it has: there is no method extend"),
        (
            "misspells",
            "stub.finite",
            "crashed: TypeError: capabilities is frozenset({'foward'}); it is a set of*",
        ),
        ("declares_text", "stub.finite", "crashed: TypeError: capabilities is 'forward'; it is a set of*"),
        ("declares_nothing", "stub.finite", "crashed: TypeError: capabilities is None; it is a set of*"),
        ("stuck", "stub.cached", "timed out after 1.0 s"),
        ("unbuildable", "stub.finite", "crashed: MemoryError: no room*"),
    ],
)
def test_misbehaviour_becomes_an_outcome(pytester: pytest.Pytester, odd: str, slug: str, reason: str) -> None:
    """Whatever an implementation does to one property, the others are run and the run file is complete."""
    result, records = run(pytester, "--impl", ODD + odd, "--timeout-property", "1")
    assert result.ret == 1
    assert set(records) == {"stub.finite", "stub.shape", "stub.cached"}
    assert records[slug]["outcome"] == "failed"
    pytest.LineMatcher([records[slug]["reason"]]).fnmatch_lines([reason.replace("[", "[[]")])
    read(pytester.path / "run.jsonl")


def test_the_traceback_is_there_for_the_asking(pytester: pytest.Pytester) -> None:
    """--tb=short shows an adapter's author where it crashed."""
    result, _ = run(pytester, "--impl", ODD + "raises", "--tb=short")
    result.stdout.fnmatch_lines(['*raise RuntimeError("out of luck*'])


def test_what_cannot_be_measured_voids_the_run(pytester: pytest.Pytester) -> None:
    """One void property ends the run in 69, but a new failure outweighs it."""
    result, records = run(pytester, "--impl", ODD + "good", stubs=STUBS + VOID)
    assert result.ret == 69
    assert records["stub.void"]["reason"] == "no margin is wide enough"
    result, _ = run(pytester, "--impl", ODD + "nan", stubs=STUBS + VOID)
    assert result.ret == 1


def test_nothing_supported_is_no_pass(pytester: pytest.Pytester) -> None:
    """A run in which every property is unsupported ends in 69."""
    result, records = run(pytester, "--impl", ODD + "good", "-k", "cached")
    assert set(records) == {"stub.cached"}
    assert result.ret == 69
    result.stdout.fnmatch_lines(["nothing was measured*"])


def test_a_canary_that_lives_voids_the_run(pytester: pytest.Pytester) -> None:
    """If the canary is not caught, even failures are not believed."""
    for odd in ("good", "nan"):
        result, _ = run(pytester, "--impl", ODD + odd, caught='(False, "it passed")')
        assert result.ret == 69
        result.stdout.fnmatch_lines(["the canary was not caught (it passed)*"])


def test_a_run_without_a_spec_says_what_it_left_out(pytester: pytest.Pytester) -> None:
    """Passing in a shape of its own does not read like agreeing with the reference."""
    result, _ = run(pytester, "--impl", ODD + "good")
    result.stdout.fnmatch_lines([f"{ODD}good: in its own shape it was not compared with*"])
    result, _ = run(pytester, "--impl", ODD + "good@dbrx")
    result.stdout.no_fnmatch_line("*in its own shape*")


def test_other_tests_are_left_alone(pytester: pytest.Pytester) -> None:
    """Tests without the mark pass and fail as ever, and their failure is not lost in a run that conforms."""
    plain = "\ndef test_plain():\n    assert 1 == 2\n"
    result, records = run(pytester, "--impl", ODD + "good", stubs=STUBS + plain)
    assert result.ret == 1
    assert len(records) == 3
    result.stdout.fnmatch_lines(["*assert 1 == 2*"])


def test_a_run_without_properties_needs_nothing_of_ours(pytester: pytest.Pytester) -> None:
    """In a run without properties there is no canary, no table and no exit code of ours."""
    write(pytester.path, stubs="def test_plain(): pass")
    result = pytester.runpytest(*QUICK)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*conformance*")


def test_properties_that_were_deselected_are_missed_only_if_they_were_asked_for(
    pytester: pytest.Pytester,
) -> None:
    """Choosing other tests with -k is a success of these, unless an implementation was to be tested."""
    write(pytester.path, stubs=STUBS + "\ndef test_plain(): pass\n")
    assert pytester.runpytest(*QUICK, "-k", "plain").ret == 0
    assert pytester.runpytest(*QUICK, "-k", "plain", "--impl", ODD + "good").ret == 69


def test_test_ids_name_implementation_and_spec(pytester: pytest.Pytester) -> None:
    """A test is called FILE::TEST[IMPLEMENTATION-SPEC], and is made only where its property applies."""
    write(pytester.path)
    impl = f"{ODD}good"
    result = pytester.runpytest(
        "--collect-only", "-q", "--impl", impl, "--impl", f"{impl}@dbrx", "--impl", impl
    )
    assert result.ret == 0
    tests = [line for line in result.outlines if "::test_" in line]
    assert tests[:2] == [f"test_stub.py::test_finite[{impl}-{spec}]" for spec in ("own", "dbrx")]
    assert len(tests) == 6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--impl", "refrence"), "*there is no implementation 'refrence', did you mean 'reference'?*"),
        (("--impl", f"{ODD}not_one"), "*returned a str without `build`*"),
        (("--impl", f"{ODD}good", "--spec", "mixtrl"), '*mixtrl: no such spec*did you mean "mixtral-8x7b"?*'),
        (("--impl", f"{ODD}good", "--spec", "gpt4-leak"), "*gpt4-leak*unknown*"),
        (("--impl", f"{ODD}good", "--baseline", "no.toml"), "*no.toml: cannot be read: No such file*"),
        (("--impl", f"{ODD}good", "--run-file", "."), "*cannot be written: Is a directory*"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_runs(
    pytester: pytest.Pytester, arguments: tuple[str, ...], sentence: str
) -> None:
    """An unusable implementation, spec, baseline or run file ends in one sentence and exit code 78."""
    write(pytester.path)
    result = pytester.runpytest(*QUICK, *arguments)
    assert result.ret == 78
    result.stderr.fnmatch_lines([sentence])
    assert "Traceback" not in result.stderr.str() + result.stdout.str()


def test_facts_reach_junit(pytester: pytest.Pytester) -> None:
    """The JUnit file of a run tells property, input digest and facts of each test."""
    run(pytester, "--impl", ODD + "good", "--junit-xml=junit.xml")
    text = (pytester.path / "junit.xml").read_text()
    assert '<property name="property" value="stub.shape"' in text
    assert '<property name="fact.shape" value="[2, 3]"' in text


def test_telemetry_is_attributed_to_each_property(pytester: pytest.Pytester) -> None:
    """With --telemetry each record tells its time and its devices, and the run what sampling cost."""
    result, records = run(pytester, "--impl", ODD + "good", "--telemetry")
    telemetry = records["stub.shape"]["telemetry"]
    assert telemetry["wall_s"] >= 0
    assert telemetry["devices"]
    result.stdout.re_match_lines([r"telemetry: [1-9]\d* samples took \d\.\d+ s, \d+\.\d+% of the run"])


def test_the_same_input_reaches_every_implementation(pytester: pytest.Pytester) -> None:
    """Digests of a property's inputs are equal for two implementations, and differ for two seeds."""
    digests = {}
    for odd, seed in (("good", "1"), ("nan", "1"), ("good", "2")):
        _, records = run(pytester, "--impl", ODD + odd, "--seed", seed)
        digests[odd, seed] = records["stub.finite"]["input_digest"]
    assert digests["good", "1"] == digests["nan", "1"] != digests["good", "2"]


def test_the_run_file_is_read_back_as_it_was_run(pytester: pytest.Pytester) -> None:
    """The header names seed, implementations, versions and machine; the footer counts the records."""
    run(pytester, "--impl", ODD + "good", "--seed", "7")
    found = read(Path("run.jsonl"))
    assert found.header.seed == 7
    assert found.header.implementations == (ODD + "good",)
    assert found.header.specs == {"own": None}
    assert found.header.versions["torch"]
    assert found.footer.counts["passed"] == 2
    assert found.footer.canary is not None
    assert found.footer.canary.caught


def test_a_baseline_is_written_met_and_outgrown(pytester: pytest.Pytester) -> None:
    """Written from a failing run it makes that run pass; when it no longer fits, it fails the run."""
    known = pytester.path / "known.toml"
    nan = ("--impl", ODD + "nan")
    wrote, _ = run(pytester, *nan, f"--write-baseline={known}")
    assert wrote.ret == 0
    wrote.stdout.fnmatch_lines(["wrote *known.toml: 1 added, 0 removed (exit code 0)"])
    met, records = run(pytester, *nan, f"--baseline={known}")
    assert met.ret == 0
    assert records["stub.finite"]["outcome"] == "expected"
    assert records["stub.finite"]["reason"] == "logit of token 0 is nan"
    known.write_text(known.read_text().replace("stub.finite", "stub.shape"))
    outgrown, records = run(pytester, *nan, f"--baseline={known}")
    assert outgrown.ret == 1
    assert [records[slug]["outcome"] for slug in ("stub.shape", "stub.finite")] == ["stale", "failed"]
    rewrote, _ = run(pytester, *nan, f"--write-baseline={known}")
    rewrote.stdout.fnmatch_lines(["*1 added, 1 removed*"])
    assert run(pytester, *nan, f"--baseline={known}")[0].ret == 0


def test_the_canary_is_caught_for_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary breaks its property; whatever else happens in its place counts as not caught."""
    caught, reason = canary.run(seed=1)
    assert caught
    assert "not all different" in reason
    monkeypatch.setattr(canary, "IMPLEMENTATION", "reference")
    assert canary.run(seed=1) == (False, "routing.selects-k-distinct passed on reference")
    monkeypatch.setattr(canary, "IMPLEMENTATION", f"{ODD}raises")
    assert canary.run(seed=1)[0] is False
    monkeypatch.setattr(canary, "IMPLEMENTATION", "mutant:absent")
    assert "could not be run: AdapterError" in canary.run(seed=1)[1]
    monkeypatch.setattr(canary, "PROPERTY", "routing.absent")
    assert canary.run(seed=1) == (False, "the suites have no property routing.absent in routing")
