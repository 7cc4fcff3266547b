"""Run files of mutants, read back: what was measured before is not measured again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from harness.conformance.property import Property
from harness.mutants import CATALOGUE
from harness.results.kills.hunting import Plan, run_file
from harness.results.kills.judging import Hunted, judge
from harness.results.record import Record
from harness.results.runfile import RunFileError, read


def ended(name: str, plan: Plan, folder: Path, properties: Iterable[Property]) -> Hunted | None:
    """What the run of a mutant proves; None unless it is there and has ended."""
    try:
        run = read(run_file(folder, name))
    except RunFileError:
        return None
    canary = run.footer.canary
    why = "no canary ran" if canary is None else "" if canary.caught else canary.reason
    return judge(CATALOGUE[name], run.records, _claimants(name, plan, properties), canary=why)


def cut_off(name: str, plan: Plan, folder: Path, properties: Iterable[Property], why: str) -> Hunted:
    """What is known of a mutant whose run did not end: `why`, and the properties that ended before."""
    records = []
    path = run_file(folder, name)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(Record.model_validate_json(line))
        except ValidationError:  # the header, or a line that was being written
            continue
    return judge(CATALOGUE[name], records, _claimants(name, plan, properties), ending=why)


def _claimants(name: str, plan: Plan, properties: Iterable[Property]) -> list[str]:
    selected = (p for p in properties if not plan.selected or p.slug in plan.selected)
    return sorted(prop.slug for prop in selected if name in prop.kills)
