"""Every property has killed something, for the right reason, and spares the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.conformance import subjects
from harness.conformance.catalogue import properties
from harness.mutants import CATALOGUE
from harness.mutants.defects import register
from harness.results.false_alarms import SPECS
from harness.results.kills.stages import STAGED
from harness.results.runfile import read
from harness.spec import twin
from suites.selftest.stubs import ROOT, moe_harness

CLAIMS = {prop.slug: prop.kills for prop, _ in properties()}
POISONOUS = ("idle-experts-poison",)
PARTS = 10
PART = "MOE_HARNESS_PART"
"""The environment variable that names another part than that of the day: K/N."""


def test_every_property_claims_a_kill() -> None:
    """Every property names mutants that it must kill, and every mutant is named by some property."""
    assert not [slug for slug, kills in CLAIMS.items() if not kills]
    assert {name for kills in CLAIMS.values() for name in kills} == set(CATALOGUE)


def test_the_register_names_mutants_that_there_are() -> None:
    """The register of shipped defects can be read, and every mutant that it names is in the catalogue."""
    named = {name for defect in register().values() for name in defect.mutants}
    assert sorted(named - set(CATALOGUE)) == []


def test_every_stage_of_the_router_has_its_property() -> None:
    """The properties that judge one stage each are properties of the suites."""
    assert set(STAGED) <= set(CLAIMS)


@pytest.mark.parametrize("name", sorted(name for name, one in CATALOGUE.items() if one.side == "model"))
def test_a_mutant_leaves_the_reference_finite(name: str) -> None:
    """Wrong models go on talking: logits of each are finite, but where a NaN is what the defect shows as."""
    (subject,) = subjects.resolve([f"mutant:{name}"], [CATALOGUE[name].spec])
    assert subject.architecture is not None
    model: Any = subject.implementation.build(
        twin(subject.architecture), device="cpu", dtype=torch.float32, seed=1
    )
    tokens = torch.arange(18).view(2, 9)
    with torch.no_grad():
        logits = model.forward(tokens)
    assert bool(logits.isfinite().all()) == (name not in POISONOUS)


def measured(part: str, folder: Path) -> dict[str, Any]:
    """The kill matrix of a part of the mutants, as the command writes it; it must end without a complaint."""
    done = moe_harness("mutants", "--part", part, "--output", str(folder), cwd=folder)
    print(f"part {part}\n{done.stdout}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    matrix: dict[str, Any] = json.loads((folder / "kill-matrix.json").read_text())
    return matrix


def as_claimed(matrix: dict[str, Any]) -> None:
    """Each property fails each mutant that it claims, and one of them names the stage that is wrong."""
    assert matrix["broken"] == []
    assert [one["mutant"] for one in matrix["mutants"] if one["status"] != "killed"] == []
    killed = {(cell["property"], cell["mutant"]) for cell in matrix["cells"] if cell["outcome"] == "killed"}
    names = {one["mutant"] for one in matrix["mutants"]}
    assert {(slug, name) for slug, kills in CLAIMS.items() for name in kills if name in names} <= killed


def test_claimed_kills_are_real(tmp_path: Path) -> None:
    """Of a tenth of the mutants, another one each day, every claimed kill is one, and the stage is named.

    The part is the day of the year modulo ten, so that ten days see all; MOE_HARNESS_PART=K/N names another.
    """
    day = datetime.now(UTC).timetuple().tm_yday
    as_claimed(measured(os.environ.get(PART) or f"{day % PARTS + 1}/{PARTS}", tmp_path))


@pytest.mark.slow
def test_every_claimed_kill_is_real(tmp_path: Path) -> None:
    """Of all mutants every claimed kill is one, and every property that is believed has killed."""
    matrix = measured("1/1", tmp_path)
    as_claimed(matrix)
    assert [one["property"] for one in matrix["properties"] if not one["score"]] == []


@pytest.mark.slow
def test_the_reference_never_fails(tmp_path: Path) -> None:
    """Twenty runs with twenty seeds on all kinds of architecture: not one property fails the reference."""
    on = [word for spec in SPECS for word in ("--spec", spec)]
    for seed in range(1, 21):
        file = tmp_path / f"{seed}.jsonl"
        options = ("--impl", "reference", *on, "--seed", str(seed), "--run-file", str(file))
        command = [sys.executable, "-m", "harness", "check", "-q", *options]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
        found = read(file).records
        wrong = [f"seed {seed}: {r.spec} {r.slug}: {r.reason}" for r in found if r.outcome != "passed"]
        assert not wrong
