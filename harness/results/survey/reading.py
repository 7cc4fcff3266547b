"""What a survey found: per family its run, or why there is none; one verdict over all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from harness.results import baseline as baselines
from harness.results.baseline import Baseline
from harness.results.gate import Verdict, judge
from harness.results.record import Canary, Record
from harness.results.runfile import RunFileError, read
from harness.results.survey.running import Plan, facts_file, run_file

ENDS = "survey.the-family-ends"
"""In the place of a property: that a family's process comes to its end within its time."""

Status = Literal["clean", "failing", "not run"]


@dataclass(frozen=True)
class Surveyed:
    """One family."""

    family: str
    model: str
    """The class that ran."""
    shape: str
    """decoder, headless or encoder-decoder."""
    overrides: Mapping[str, Any]
    """What its config was given beside the recipe."""
    records: tuple[Record, ...]
    """Under the baseline."""
    canary: Canary | None
    facts: Mapping[str, Any]
    why: str = ""
    """Why nothing of it ran; empty if it did."""

    @property
    def status(self) -> Status:
        """clean: nothing failed, expected or not."""
        if self.why:
            return "not run"
        return "failing" if any(record.failing for record in self.records) else "clean"


@dataclass(frozen=True)
class Survey:
    """All of them."""

    library: str
    """Name and version."""
    families: tuple[Surveyed, ...]
    around: Mapping[str, str]
    broken: Mapping[str, str]

    @cached_property
    def records(self) -> tuple[Record, ...]:
        """Of every family that ran."""
        return tuple(record for one in self.families for record in one.records)

    @property
    def slugs(self) -> tuple[str, ...]:
        """The properties that ran somewhere, in order."""
        return tuple(sorted({record.slug for record in self.records}))

    def of(self, status: Status) -> tuple[Surveyed, ...]:
        """The families of one status."""
        return tuple(one for one in self.families if one.status == status)

    @property
    def verdict(self) -> Verdict:
        """One verdict over every record: void if a canary lived anywhere."""
        canaries = [one.canary for one in self.families if one.canary is not None]
        worst = next((one for one in canaries if not one.caught), canaries[0] if canaries else None)
        return judge(self.records, worst)


def surveyed(
    family: str,
    folder: Path,
    plan: Plan,
    baseline: Baseline,
    *,
    address: str,
    ending: str,
    model: str,
    shape: str,
    overrides: Mapping[str, Any],
) -> Surveyed:
    """One family out of its files, or out of the sentence that says why there are none."""
    records: tuple[Record, ...] = ()
    canary, facts, why = None, dict[str, Any](), ""
    if ending:
        records = (baselines.apply(_did_not_end(address, plan, ending), baseline),)
    else:
        run, facts = read(run_file(folder, family)), _facts(facts_file(folder, family))
        records = tuple(baselines.apply(record, baseline) for record in run.records)
        canary, why = run.footer.canary, str(facts.get("unsupported", ""))
    return Surveyed(family, model, shape, overrides, () if why else records, canary, facts, why)


def ended(family: str, folder: Path) -> bool:
    """Whether a family has a complete result already."""
    try:
        read(run_file(folder, family))
        _facts(facts_file(folder, family))
    except RunFileError:
        return False
    return True


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunFileError(f"{path}: is not the facts of a family: {error}") from error
    return facts


def _did_not_end(address: str, plan: Plan, ending: str) -> Record:
    return Record(
        slug=ENDS,
        clause="survey",
        level="MUST",
        implementation=address,
        spec="own",
        spec_digest=None,
        seed=plan.seed,
        outcome="failed",
        reason=ending,
        crashed=True,
        duration_s=0.0,
    )


def unexpected(records: Sequence[Record]) -> tuple[Record, ...]:
    """Those that fail a survey."""
    return tuple(record for record in records if record.outcome in ("failed", "stale", "void"))
