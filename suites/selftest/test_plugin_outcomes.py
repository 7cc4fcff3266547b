"""The plugin end to end, on stub properties: how each ending of a property reads, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.conformance import canary, case, subjects, verdict  # noqa: F401  # torch loads once a process
from harness.results import reports  # noqa: F401
from harness.results.runfile import read

pytest_plugins = ["pytester"]

ODD = "suites.selftest.odd_implementations:"
CANARY = """
from harness.conformance import canary
canary.run = lambda seed: {canary}
pytest_plugins = ["harness.plugin"]
"""
STUBS = '''
import torch
from harness.conformance import Void, Violation, conformance, require

@conformance("stub.finite", clause="c", needs=("forward",))
def test_finite(case):
    """Logits are finite."""
    logits = case.model().forward(case.tokens(2, 3))
    require(bool(torch.isfinite(logits).all()), "logit of token 0 is nan", stage="combine", token=0)

@conformance("stub.shape", clause="c", needs=("forward",))
def test_shape(case):
    """Logits have the shape of the tokens."""
    tokens = case.tokens(2, 3)
    shape = tuple(case.model().forward(tokens).shape[:2])
    case.note("shape", shape)
    assert shape == (2, 3), f"logits are {shape}, not (2, 3)"

@conformance("stub.cached", clause="c", needs=("cache",), level="SHOULD")
def test_cached(case):
    """There is a cache."""
    case.model().extend(case.tokens(2, 3), None)

@conformance("stub.elsewhere", clause="c", needs=(), applies=lambda architecture: False)
def test_elsewhere(case):
    """Applies to nothing."""
'''
VOID = '''
@conformance("stub.void", clause="c", needs=())
def test_void(case):
    """Cannot be measured."""
    raise Void("no margin is wide enough")
'''


def run(
    pytester: pytest.Pytester, *arguments: str, stubs: str = STUBS, canary: str = '(True, "caught")'
) -> tuple[pytest.RunResult, dict[str, dict[str, Any]]]:
    """A run on the stub properties, and the records of its run file by property."""
    pytester.makeconftest(CANARY.format(canary=canary))
    pytester.makepyfile(test_stub=stubs)
    result = pytester.runpytest("--run-file=run.jsonl", *arguments)
    lines = [json.loads(line) for line in (pytester.path / "run.jsonl").read_text().splitlines()]
    return result, {line["slug"]: line for line in lines if line["kind"] == "record"}


def test_what_passes_is_recorded_with_its_input_and_exits_0(pytester: pytest.Pytester) -> None:
    """A conforming implementation passes, lacks what it does not declare, and is not asked what does not apply."""
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
    result.stdout.fnmatch_lines(["*2 passed, 1 unsupported*", "exit code 0"])


def test_a_broken_property_reads_as_one_paragraph(pytester: pytest.Pytester) -> None:
    """A violation shows its counterexample, stage, property and clause, and no traceback."""
    result, records = run(pytester, "--impl", ODD + "nan")
    assert result.ret == 1
    assert records["stub.finite"]["outcome"] == "failed"
    assert records["stub.finite"]["reason"] == "logit of token 0 is nan"
    assert records["stub.finite"]["stage"] == "combine"
    assert records["stub.finite"]["facts"] == {"token": 0}
    result.stdout.fnmatch_lines(["*breaks stub.finite at the stage combine:", "logit of token 0 is nan"])
    result.stdout.no_fnmatch_line("*Error*")


@pytest.mark.parametrize(
    ("odd", "slug", "reason"),
    [
        ("raises", "stub.finite", "crashed: RuntimeError: out of luck (odd_implementations.py:*"),
        ("exits", "stub.finite", "crashed: SystemExit: 0 (odd_implementations.py:*"),
        ("hangs", "stub.finite", "timed out after 0.3 s"),
        ("shape", "stub.shape", "logits are (2, 2), not (2, 3)*"),
        ("lies", "stub.cached", "crashed: AttributeError: 'Odd' object has no attribute 'extend'*"),
        ("unbuildable", "stub.finite", "crashed: MemoryError: no room*"),
    ],
)
def test_misbehaviour_becomes_an_outcome(pytester: pytest.Pytester, odd: str, slug: str, reason: str) -> None:
    """Whatever an implementation does to one property, the others are run and the run file is complete."""
    result, records = run(pytester, "--impl", ODD + odd, "--timeout-property", "0.3")
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
        result, _ = run(pytester, "--impl", ODD + odd, canary='(False, "it passed")')
        assert result.ret == 69
        result.stdout.fnmatch_lines(["the canary was not caught (it passed)*"])


def test_other_tests_are_left_alone(pytester: pytest.Pytester) -> None:
    """Tests without the mark pass and fail as ever, and their failure is not lost in a run that conforms."""
    plain = "\ndef test_plain():\n    assert 1 == 2\n"
    result, records = run(pytester, "--impl", ODD + "good", stubs=STUBS + plain)
    assert result.ret == 1
    assert len(records) == 3
    result.stdout.fnmatch_lines(["*assert 1 == 2*"])


def test_a_run_without_properties_needs_nothing_of_ours(pytester: pytest.Pytester) -> None:
    """In a run without properties there is no canary, no table and no exit code of ours."""
    pytester.makeconftest(CANARY.format(canary="(True, '')"))
    pytester.makepyfile("def test_plain(): pass")
    result = pytester.runpytest()
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*conformance*")


def test_test_ids_name_implementation_and_spec(pytester: pytest.Pytester) -> None:
    """A test is called FILE::TEST[IMPLEMENTATION-SPEC], and is made only where its property applies."""
    pytester.makeconftest(CANARY.format(canary="(True, '')"))
    pytester.makepyfile(test_stub=STUBS)
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
    pytester.makeconftest(CANARY.format(canary="(True, '')"))
    pytester.makepyfile(test_stub=STUBS)
    result = pytester.runpytest(*arguments)
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
    """With --telemetry each record tells its wall time and host time, and devices or why there are none."""
    _, records = run(pytester, "--impl", ODD + "good", "--telemetry")
    telemetry = records["stub.shape"]["telemetry"]
    assert telemetry["wall_s"] >= 0
    assert telemetry["devices"]


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
