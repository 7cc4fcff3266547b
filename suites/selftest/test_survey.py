"""The survey: every MoE family of a library, in processes of their own, resumable, with one verdict."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli import app
from harness.results.survey import reading, running

without = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
FAKES = "suites.selftest.test_survey"


class Fake:
    """An implementation whose building goes wrong."""

    needs_architecture = False

    def __init__(self, name: str) -> None:
        self.name = f"{FAKES}:{name}"

    def build(self, architecture: object, *, device: str, dtype: object, seed: int) -> object:
        """Hang, or die."""
        del architecture, device, dtype, seed
        if self.name.endswith("hangs"):
            time.sleep(3600)
        os._exit(3)


def dies() -> Fake:
    """A family whose process dies."""
    return Fake("dies")


def hangs() -> Fake:
    """A family that does not end."""
    return Fake("hangs")


def test_a_family_that_hangs_or_dies_is_a_failure_and_the_others_go_on(tmp_path: Path) -> None:
    """Each has a sentence of its own, and is a record that fails the survey."""
    plan = running.Plan(limit_s=20.0, parts=("compute",))
    addresses = {name: f"{FAKES}:{name}" for name in ("hangs", "dies")}
    endings = dict(running.run(addresses, plan, tmp_path, jobs=2))
    assert "exit code 3" in endings["dies"]
    assert endings["hangs"] == "it did not end within 20 s" or not endings["hangs"]
    one = reading.surveyed(
        "dies", tmp_path, plan, {}, address="x", ending=endings["dies"], model="", shape="", overrides={}
    )
    assert one.status == "failing"
    assert reading.unexpected(one.records)[0].slug == reading.ENDS


@without
def test_two_families_give_a_page_and_json_and_are_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page names each family, JSON holds each property, and a second run measures nothing again."""
    monkeypatch.setattr(running, "FOLDER", tmp_path / "runs")
    words = ["survey", "transformers", "--family", "mixtral", "--family", "doge", "-o", str(tmp_path)]
    first = CliRunner().invoke(app, words)
    assert first.exit_code in (0, 1), first.output
    facts = json.loads((tmp_path / "survey-transformers.json").read_text())
    assert set(facts["families"]) == {"mixtral", "doge"}
    assert facts["families"]["mixtral"]["properties"]["attention.is-causal"]["outcome"] == "passed"
    assert facts["families"]["doge"]["missing"]["routing"]
    page = (tmp_path / "survey-transformers.md").read_text()
    assert "| mixtral" in page
    assert "MixtralForCausalLM" in page
    before = page
    again = CliRunner().invoke(app, words)
    assert "2 of 2 families are taken" in again.output
    assert (tmp_path / "survey-transformers.md").read_text() == before


@without
def test_an_unknown_family_is_refused() -> None:
    """With the name that was meant."""
    from harness.implementations.registry import AdapterError

    refused = CliRunner().invoke(app, ["survey", "transformers", "--family", "mixtrall"])
    assert isinstance(refused.exception, AdapterError)
    assert "did you mean 'mixtral'" in str(refused.exception)


@without
def test_at_least_seventy_families_are_found_in_the_library() -> None:
    """Out of what the models announce; models around a text model are told apart."""
    from harness.implementations.transformers.families import moe

    found = moe()
    assert len(found.families) >= 70
    assert not found.broken
    assert not set(found.families) & set(found.around)


@pytest.mark.slow
@without
def test_every_family_runs(tmp_path: Path) -> None:
    """The whole survey: at least 70 run, and nothing fails that is not in the baseline."""
    result = CliRunner().invoke(app, ["survey", "transformers", "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "survey-transformers.json").read_text())
    assert sum(one["status"] != "not run" for one in facts["families"].values()) >= 70
