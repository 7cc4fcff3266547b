"""Every property has killed something, for the right reason, and spares the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
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


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Record]:
    """By property and mutant: the kills that properties claim, and the stages before a defect."""
    wanted: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for slug, name in KILLS:
        wanted[CATALOGUE[name].spec].add((slug, name))
    stages = list(STAGED.values())
    for name, mutant in CATALOGUE.items():
        if mutant.stage in stages:
            before = [
                slug for slug, stage in STAGED.items() if stages.index(stage) < stages.index(mutant.stage)
            ]
            wanted[mutant.spec] |= {(slug, name) for slug in before}
    found: dict[tuple[str, str], Record] = {}
    for spec, pairs in wanted.items():
        names = sorted({name for _, name in pairs})
        nodes = [node(slug, f"mutant:{name}", spec) for slug, name in sorted(pairs)]
        file = tmp_path_factory.mktemp("kills") / "run.jsonl"
        for record in run(nodes, [f"mutant:{name}" for name in names], [spec], file):
            found[record.slug, record.implementation.removeprefix("mutant:")] = record
    return found


def test_every_property_claims_a_kill() -> None:
    """Every property names mutants that it must kill, and every mutant is named by some property."""
    assert not [slug for slug, (prop, _) in PROPERTIES.items() if not prop.kills]
    assert {name for _, name in KILLS} == set(CATALOGUE)


def test_every_claimed_kill_is_real(records: dict[tuple[str, str], Record]) -> None:
    """Each property fails each mutant that it claims, by a counterexample and not by a crash."""
    survived = [
        f"{slug} on {name}: {records[slug, name].outcome} {records[slug, name].reason}"
        for slug, name in KILLS
        if records[slug, name].outcome != "failed" or records[slug, name].reason.startswith("crashed")
    ]
    assert not survived


def test_stages_name_the_defective_one(records: dict[tuple[str, str], Record]) -> None:
    """The stage properties fail a mutant at its own stage, and none before it."""
    order = list(STAGED.values())
    for (slug, name), record in records.items():
        stage = CATALOGUE[name].stage
        if slug not in STAGED or stage not in order:
            continue
        if order.index(STAGED[slug]) < order.index(stage):
            # A trace that is misshapen at a later stage is refused as a whole, by that stage's name.
            assert record.outcome == "passed" or record.stage == stage, f"{slug} on {name}: {record.reason}"
        elif record.outcome == "failed":
            assert record.stage == stage, f"{slug} on {name}: {record.stage}"


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
    parts = ("parameters", "compute", "routing", "attention")
    for seed in range(1, 21):
        file = tmp_path / f"{seed}.jsonl"
        nodes = [f"suites/{part}" for part in parts]
        found = run(nodes, ["reference"], specs, file, "--seed", str(seed))
        wrong = [f"seed {seed}: {r.spec} {r.slug}: {r.reason}" for r in found if r.outcome != "passed"]
        assert not wrong
