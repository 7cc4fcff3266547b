"""Run files, baselines, gates and comparisons: what is refused, and what follows from what is not."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from harness.conformance import property as conformance
from harness.results import baseline as baselines
from harness.results import record as records
from harness.results import tables
from harness.results.baseline import BaselineError
from harness.results.compare import compare
from harness.results.gate import Detail, gate
from harness.results.header import header
from harness.results.record import OUTCOMES, Canary, Outcome, Record, jsonable
from harness.results.render import as_json, render
from harness.results.runfile import Run, RunFileError, RunWriter, combine, read

CAUGHT = Canary(caught=True, reason="token 0 chose expert 1 twice")


def record(slug: str = "a.b", outcome: Outcome = "passed", **fields: Any) -> Record:
    """A record with the fields that do not matter filled in."""
    given = {
        "slug": slug,
        "clause": "c",
        "level": "MUST",
        "implementation": "reference",
        "spec": "dbrx",
        "spec_digest": "0" * 64,
        "seed": 1,
        "outcome": outcome,
        "reason": "" if outcome == "passed" else "because",
        "duration_s": 0.5,
    }
    return Record.model_validate(given | fields)


def written(path: Path, *found: Record, canary: Canary | None = CAUGHT, seed: int = 1) -> Run:
    """A complete run of these records, written and read back."""
    digests = {r.spec: r.spec_digest for r in found}
    implementations = sorted({r.implementation for r in found})
    writer = RunWriter(
        path, header(seed=seed, implementations=implementations, specs=digests, options={"keyword": ""})
    )
    for one in found:
        writer.record(one)
    writer.finish(found, canary)
    return read(path)


def test_a_run_file_reads_back_as_written(tmp_path: Path) -> None:
    """Every field of every record survives, and the footer counts them by outcome."""
    found = (record(facts={"n": 1.5}), record("a.c", "failed", stage="select", input_digest="f" * 64))
    run = written(tmp_path / "run.jsonl", *found)
    assert run.records == found
    assert run.footer.counts == dict.fromkeys(OUTCOMES, 0) | {"passed": 1, "failed": 1}
    assert run.footer.canary == CAUGHT


def _without_footer(lines: list[str]) -> list[str]:
    return lines[:-1]


def _cut_off(lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1][:20]]


def _twice(lines: list[str]) -> list[str]:
    return [lines[0], lines[1], lines[1], *lines[2:]]


def _lost(lines: list[str]) -> list[str]:
    return [lines[0], *lines[2:]]


def _newer(lines: list[str]) -> list[str]:
    return [lines[0].replace('"schema_version": 1', '"schema_version": 2'), *lines[1:]]


def _invented(lines: list[str]) -> list[str]:
    return [lines[0], lines[1].replace('"passed"', '"good"'), *lines[2:]]


def _unknown(lines: list[str]) -> list[str]:
    return [lines[0], json.dumps(json.loads(lines[1]) | {"verdict": 1}), *lines[2:]]


def _two_runs(lines: list[str]) -> list[str]:
    return [*lines, *lines]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_without_footer, r":2: there is no footer, so this run was killed or interrupted"),
        (_cut_off, r":3: the line is cut off or is not JSON"),
        (_twice, r":3: a.b of reference on dbrx is already on line 2"),
        (_lost, r":2: the footer counts other records than the file holds"),
        (_newer, r":1: schema_version is 2; this harness reads 1"),
        (_invented, r":2: outcome: Input should be 'passed'"),
        (_unknown, r":2: verdict: Extra inputs are not permitted"),
        (_two_runs, r":3: kind: Input should be 'record'"),
        (lambda lines: [], r":1: there is no header"),
        (lambda lines: ["[]", *lines], r":1: a line of a run file is a JSON object"),
    ],
)
def test_what_is_no_complete_run_is_refused(
    tmp_path: Path, damage: Callable[[list[str]], list[str]], sentence: str
) -> None:
    """A damaged run file is refused in one sentence that names file and line."""
    path = tmp_path / "run.jsonl"
    written(path, record())
    path.write_text("".join(line + "\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(RunFileError, match=sentence) as refusal:
        read(path)
    assert str(refusal.value).startswith(f"{path}:")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_what_is_no_text_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """A folder, a missing file and a binary one are refused in one sentence."""
    path = tmp_path / "run"
    if content is not None:
        path.write_bytes(content)
    for where in (path, tmp_path):
        with pytest.raises(RunFileError, match=r"cannot be read|is not text"):
            read(where)


def test_facts_of_any_kind_can_be_written() -> None:
    """What JSON cannot hold becomes text, never an error and never a number that was not measured."""
    nested = {"nan": float("nan"), "inf": -float("inf"), "path": Path("p"), 3: (1, True, None)}
    assert jsonable(nested) == {"nan": "nan", "inf": "-inf", "path": "p", "3": [1, True, None]}


def test_outcomes_are_those_of_properties() -> None:
    """A record's outcomes are a property's outcomes, in the same words."""
    assert typing.get_args(records.Outcome) == typing.get_args(conformance.Outcome) == OUTCOMES


@pytest.mark.parametrize(
    ("outcomes", "canary", "code"),
    [
        (["passed", "unsupported"], CAUGHT, 0),
        (["passed", "expected"], CAUGHT, 0),
        (["passed", "failed"], CAUGHT, 1),
        (["passed", "stale"], CAUGHT, 1),
        (["passed", "void"], CAUGHT, 69),
        (["failed", "void"], CAUGHT, 1),
        (["unsupported"], CAUGHT, 69),
        ([], CAUGHT, 69),
        (["passed"], None, 69),
        (["passed"], Canary(caught=False, reason="it passed"), 69),
        (["failed"], Canary(caught=False, reason="it passed"), 69),
    ],
)
def test_the_exit_code_follows_from_the_outcomes(
    tmp_path: Path, outcomes: list[Outcome], canary: Canary | None, code: int
) -> None:
    """0 only if something passed, nothing new failed, nothing was void and the canary was caught."""
    found = [record(f"a.{i}", outcome) for i, outcome in enumerate(outcomes)]
    known = {r.key: baselines.Entry(r.key, "known") for r in found if r.outcome in ("expected", "stale")}
    run = written(tmp_path / "run.jsonl", *found, canary=canary)
    assert gate(run, known).code == code


def test_a_baseline_makes_failures_expected_and_passes_stale(tmp_path: Path) -> None:
    """Written from one run, a baseline accepts its failures, and refuses a run in which one passes."""
    path = tmp_path / "baseline.toml"
    failing = written(tmp_path / "1.jsonl", record("a.b", "failed"), record("a.c"))
    assert gate(failing, {}).code == 1
    assert baselines.write(path, failing.records) == (1, 0)
    known = baselines.load(path)
    assert gate(failing, known).code == 0
    fixed = written(tmp_path / "2.jsonl", record("a.b"), record("a.c"))
    verdict = gate(fixed, known)
    assert verdict.code == 1
    assert verdict.details == (Detail("stale", record("a.b").key, baselines.STALE),)


def test_a_run_under_a_baseline_can_be_judged_without_it(tmp_path: Path) -> None:
    """An expected failure is a failure again under an empty baseline, and a stale entry passes."""
    run = written(tmp_path / "run.jsonl", record("a.b", "expected"), record("a.c", "stale"))
    assert gate(run, {}).details == (Detail("failed", record("a.b").key, "because"),)


def test_a_rewrite_keeps_what_people_wrote(tmp_path: Path) -> None:
    """Comments, reasons, issues and entries of other runs survive; a fixed failure goes, a new one comes."""
    path = tmp_path / "baseline.toml"
    baselines.write(path, [record("a.b", "failed"), record("a.c", "failed")])
    baselines.write(path, [record("a.b", "failed", implementation="other")])
    document = tomlkit.parse(path.read_text())
    document["expected"][0]["reason"] = "upstream rounds in bfloat16"  # type: ignore[index]
    document["expected"][0]["issue"] = "https://example.org/1"  # type: ignore[index]
    path.write_text("# ours\n" + tomlkit.dumps(document))
    again = [record("a.b", "failed"), record("a.c"), record("a.d", "failed"), record("a.e", "void")]
    assert baselines.write(path, again) == (1, 1)
    entries = baselines.load(path)
    assert sorted((key.implementation, key.slug) for key in entries) == [
        ("other", "a.b"),
        ("reference", "a.b"),
        ("reference", "a.d"),
    ]
    kept = entries[record("a.b").key]
    assert (kept.reason, kept.issue) == ("upstream rounds in bfloat16", "https://example.org/1")
    assert path.read_text().startswith("# ours\n")


ENTRY = """
version = 1
[[expected]]
implementation = "reference"
spec = "dbrx"
property = "a.b"
outcome = "failed"
reason = "known"
"""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (ENTRY.replace("reason", "reson"), 'entry 1: reson: is unknown; did you mean "reason"?'),
        (ENTRY.replace("version = 1", "version = 2"), "version: it is 2; write version = 1"),
        (ENTRY.replace('"known"', '" "'), "entry 1: reason: is empty"),
        (ENTRY.replace('"failed"', '"void"'), "entry 1: outcome: is 'void'"),
        (ENTRY.replace('"dbrx"', "7"), "entry 1: spec: is 7; write a text"),
        (ENTRY.replace('spec = "dbrx"', ""), "entry 1: spec: is missing"),
        (ENTRY + ENTRY.replace("version = 1", ""), "entry 2: a.b of reference on dbrx is already listed"),
        (ENTRY.replace("[[expected]]", "[expected]"), "expected: write each entry as [[expected]]"),
        (ENTRY + "=", ":9: is not TOML"),
        ("extra = 1", "extra: is unknown; known are version, expected"),
    ],
)
def test_what_is_no_baseline_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    """A baseline that cannot be used is refused in one sentence that names file, entry and field."""
    path = tmp_path / "baseline.toml"
    path.write_text(text)
    with pytest.raises(BaselineError) as refusal:
        baselines.load(path)
    assert str(refusal.value).startswith(str(path))
    assert sentence in str(refusal.value)


def test_runs_are_compared_property_by_property(tmp_path: Path) -> None:
    """Added, removed, changed and unchanged are told apart; another spec file makes it incomparable."""
    before = written(
        tmp_path / "1.jsonl", record("a.same"), record("a.changed"), record("a.removed"), record("a.other")
    )
    after = written(
        tmp_path / "2.jsonl",
        record("a.same"),
        record("a.changed", "failed"),
        record("a.added"),
        record("a.other", "failed", spec_digest="1" * 64),
    )
    found = compare(before, after)
    assert [r.slug for r in found.added] == ["a.added"]
    assert [r.slug for r in found.removed] == ["a.removed"]
    assert [a.slug for a, _ in found.changed] == ["a.changed"]
    assert [a.slug for a, _ in found.incomparable] == ["a.other"]
    assert found.unchanged == 1
    table = tables.compared(found)
    assert table.title == "4 differ, 1 are unchanged"
    assert "| changed" in render(table, "markdown")


def test_parallel_runs_are_combined_only_if_they_are_comparable(tmp_path: Path) -> None:
    """Runs of two implementations make one run; the same property twice or another seed is refused."""
    one = written(tmp_path / "1.jsonl", record())
    two = written(
        tmp_path / "2.jsonl", record(implementation="other"), canary=Canary(caught=False, reason="x")
    )
    both = combine([one, two])
    assert both.records == one.records + two.records
    assert both.header.implementations == ("reference", "other")
    assert both.footer.counts["passed"] == 2
    assert both.footer.canary == two.footer.canary
    with pytest.raises(RunFileError, match=r"is also in .*1\.jsonl"):
        combine([one, one])
    with pytest.raises(RunFileError, match="seed is 2, but 1"):
        combine([one, written(tmp_path / "3.jsonl", record("a.c"), seed=2)])
    with pytest.raises(RunFileError, match="spec dbrx is not the file"):
        combine([one, written(tmp_path / "4.jsonl", record("a.c", spec_digest="1" * 64))])


def test_the_matrix_has_a_row_per_property_and_a_column_per_subject() -> None:
    """What was not run on a subject is an empty cell, never a pass."""
    table = tables.matrix([record("a.b"), record("a.c", "failed", spec="olmoe-1b-7b")])
    assert table.headers == ("property", "reference on dbrx", "reference on olmoe-1b-7b")
    assert table.rows == (("a.b", "passed", ""), ("a.c", "", "failed"))
    assert as_json(table)["rows"][0]["reference on dbrx"] == "passed"
