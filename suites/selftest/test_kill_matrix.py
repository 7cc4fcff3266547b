"""Every property has killed something, for the right reason, and spares the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from harness.conformance.catalogue import properties
from harness.mutants import CATALOGUE
from harness.results.record import Record
from harness.results.runfile import read

ROOT = Path(__file__).resolve().parents[2]
PROPERTIES = {prop.slug: (prop, function) for prop, function in properties()}
KILLS = [(slug, name) for slug, (prop, _) in PROPERTIES.items() for name in prop.kills]
STAGED = {
    "routing.projects-the-input": "proj",
    "routing.scores-the-logits": "score",
    "routing.selects-the-best": "select",
    "routing.weighs-the-selected": "weigh",
    "routing.combines-the-experts": "combine",
}
"""In the order of the stages: each judges its own on the implementation's input to it."""
ENGINE_STAGES = frozenset(
    [
        "law",
        "greedy",
        "stop",
        "logprobs",
        "seed",
        "acceptance",
        "counters",
        "isolation",
        "settings",
        "pages",
        "prefix",
        "preempt",
        "rollback",
        "schedule",
        "fault",
    ]
)


def node(slug: str, implementation: str, spec: str) -> str:
    """The test of one property on one implementation and spec, as pytest addresses it."""
    function = PROPERTIES[slug][1]
    path = "/".join(function.__module__.split("."))
    return f"{path}.py::{function.__name__}[{implementation}-{spec}]"


def run(
    nodes: Iterable[str], implementations: Sequence[str], specs: Sequence[str], file: Path, *more: str
) -> tuple[Record, ...]:
    """The records of a run of those tests through the plugin."""
    options = [part for name in implementations for part in ("--impl", name)]
    options += [part for name in specs for part in ("--spec", name)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes, *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--run-file", str(file), *more],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return read(file).records


def shown_as(stage: str) -> set[str]:
    """What a defect of a stage of the engine may show as, to those who see only its answers: a wrong rule of
    acceptance is a wrong law, a wrong rollback changes greedy tokens too, and a law may leave no token."""
    return {stage, "law"} | {"rollback": {"greedy"}, "law": {"fault"}}.get(stage, set())


def wanted(spec: str) -> set[tuple[str, str]]:
    """Properties and mutants to run on a spec: the claimed kills, and the stages before each defect."""
    pairs = {(slug, name) for slug, name in KILLS if CATALOGUE[name].spec == spec}
    stages = list(STAGED.values())
    for name, mutant in CATALOGUE.items():
        if mutant.spec == spec and mutant.stage in stages:
            before = stages[: stages.index(mutant.stage)]
            pairs |= {(slug, name) for slug, stage in STAGED.items() if stage in before}
    return pairs


def test_every_property_claims_a_kill() -> None:
    """Every property names mutants that it must kill, and every mutant is named by some property."""
    assert not [slug for slug, (prop, _) in PROPERTIES.items() if not prop.kills]
    assert {name for _, name in KILLS} == set(CATALOGUE)


@pytest.mark.parametrize("spec", sorted({mutant.spec for mutant in CATALOGUE.values()}))
def test_every_claimed_kill_is_real(spec: str, tmp_path: Path) -> None:
    """Each property fails each mutant that it claims, by a counterexample that names the defective stage."""
    pairs = sorted(wanted(spec))
    nodes = [node(slug, f"mutant:{name}", spec) for slug, name in pairs]
    mutants = [f"mutant:{name}" for name in sorted({name for _, name in pairs})]
    found = run(nodes, mutants, [spec], tmp_path / "run.jsonl")
    records = {(r.slug, r.implementation.removeprefix("mutant:")): r for r in found}
    assert sorted(records) == pairs
    named = {name for (_, name), one in records.items() if one.stage in shown_as(CATALOGUE[name].stage)}
    engines = {name for _, name in pairs if CATALOGUE[name].stage in ENGINE_STAGES}
    assert sorted(engines - named) == [], "no property names the stage at which these are wrong"
    for (slug, name), record in records.items():
        what = f"{slug} on {name}: {record.outcome} {record.stage} {record.reason}"
        claimed = (slug, name) in KILLS
        if claimed:
            assert record.outcome == "failed", what
            assert not record.reason.startswith("crashed"), what
        if slug in STAGED:
            # Before the defect a stage is right; a misshapen trace is refused by the name of its stage.
            assert record.outcome == "passed" or record.stage == CATALOGUE[name].stage, what


@pytest.mark.slow
def test_the_reference_never_fails(tmp_path: Path) -> None:
    """Twenty runs with twenty seeds on all kinds of architecture: not one property fails the reference."""
    specs = (
        "mixtral-8x7b",
        "deepseek-v3",
        "gpt-oss-20b",
        "olmoe-1b-7b",
        "dbrx",
        "qwen3-30b-a3b",
        "llama-3.1-8b",
        "gpt3-175b",
        "palm-540b",
    )
    parts = ("parameters", "compute", "routing", "attention", "decoding", "serving")
    for seed in range(1, 21):
        file = tmp_path / f"{seed}.jsonl"
        nodes = [f"suites/{part}" for part in parts]
        found = run(nodes, ["reference"], specs, file, "--seed", str(seed))
        wrong = [f"seed {seed}: {r.spec} {r.slug}: {r.reason}" for r in found if r.outcome != "passed"]
        assert not wrong
