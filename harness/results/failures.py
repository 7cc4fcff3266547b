"""What a maintainer needs beside a counterexample: shapes, a smaller case, defects of the class, a script."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.conformance.case import Case
    from harness.conformance.property import Property
    from harness.conformance.shrinking import Shrunken
    from harness.conformance.subjects import Subject
    from harness.results.record import Record

SHRINK_S = 3.0
"""Seconds for a smaller case of one failure, by default."""
MANY = 5
"""Times as long for all failures of a process."""
MOST_CITED, MOST_SHOWN = 5, 2
"""Defects of the class, in a run file and a script, and in a terminal."""
RELATIONS = {"class": "of this class", "stage": "at this stage", "property": "also caught by it"}
"""How a shipped defect is related to a failure, nearest first: in a run file, and in words."""
REMOTE = "openai:"
"""Addresses of what is not asked again without need: each question costs, and counts against the run's one
probability of a false alarm."""


@dataclass
class Reporter:
    """What the failures of one process share."""

    shrink_s: float = SHRINK_S
    """Seconds for a smaller case of one failure, MANY times as long for all of them. 0: none is sought."""
    folder: Path | None = None
    """For a script of each failure; None: none is written."""
    spent_s: float = 0.0

    def explained(
        self,
        record: Record,
        error: BaseException | None,
        *,
        prop: Property,
        subject: Subject,
        case: Case | None,
        function: Callable[[Case], object],
    ) -> Record:
        """The record of a new failure, with what follows from `error` among its facts, and its script
        written; any other record as it is."""
        if record.outcome != "failed" or error is None or case is None:
            return record
        from harness.conformance.shrinking import is_counterexample
        from harness.results import reproduce
        from harness.results.record import jsonable

        # The convention finder looks at more than what failed, whose name the counterexample begins with.
        variant = str(record.facts.get("what", "")).partition(", layer ")[0]
        shapes = case.looked_at.get(variant, case.shapes())
        facts: dict[str, Any] = {"statement": prop.statement, "shapes": shapes}
        smaller: Shrunken | str = ""
        if is_counterexample(error):
            named = record.facts.get("implements", ())
            facts["same_class"] = same_class(prop.kills, record.stage, tuple(named))
            smaller = self._shrunken(record, prop, subject, function)
            if smaller:
                facts["shrunken"] = smaller if isinstance(smaller, str) else _told(smaller)
        record = record.model_copy(update={"facts": {**record.facts, **jsonable(facts)}})
        if self.folder is None:
            return record
        script = reproduce.script(record, subject, function, smaller)
        name = reproduce.file_name(record)
        try:
            (self.folder / name).write_text(script, encoding="utf-8")
        except OSError as problem:  # the record is worth more than its script
            told = {"script_not_written": f"{self.folder / name}: cannot be written: {problem.strerror}"}
        else:
            told = {"script": str(self.folder / name)}
        return record.model_copy(update={"facts": {**record.facts, **told}})

    def _shrunken(
        self, record: Record, prop: Property, subject: Subject, function: Callable[[Case], object]
    ) -> Shrunken | str:
        """A smaller case, or why there is none; empty where none is wanted."""
        from harness.conformance.shrinking import shrunken

        if not self.shrink_s:
            return ""
        if subject.address.startswith(REMOTE):
            return "not shrunken: a server is not asked again"
        left = min(self.shrink_s, MANY * self.shrink_s - self.spent_s)
        if left <= 0:
            return "not shrunken: the failures before it took all the time there is for that"
        begun = time.perf_counter()
        try:
            return shrunken(function, prop, subject, record.seed, stage=record.stage, budget_s=left)
        finally:
            self.spent_s += time.perf_counter() - begun


def same_class(kills: tuple[str, ...], stage: str, named: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """Defects that shipped: where, what was wrong, and how each is related to this one. First those of the
    mutants that the convention finder `named`, then those of the stage, then what else the property catches.

    The register has them, or else the mutants' own citations; MOST_CITED at most, and each only once.
    """
    try:
        from harness.mutants import CATALOGUE, defects
    except ImportError:  # mutants need not be installed
        return []
    parts = [part for names in named for part in names.split(" + ")]
    known = [CATALOGUE[name] for name in dict.fromkeys((*parts, *kills)) if name in CATALOGUE]
    found: dict[str, list[dict[str, str]]] = {relation: [] for relation in RELATIONS}
    cited: set[str] = set()
    for mutant in known:
        same = "stage" if stage and mutant.stage == stage else "property"
        shipped = [(one.id, ", ".join(one.shipped), one.cause) for one in defects.of_mutant(mutant.name)]
        if mutant.origin and not shipped:
            shipped = [(mutant.name, mutant.origin, mutant.defect)]
        for identity, where, cause in shipped:
            if identity not in cited:
                cited.add(identity)
                relation = "class" if mutant.name in parts else same
                found[relation].append({"relation": relation, "shipped": where, "cause": cause})
    return [row for rows in found.values() for row in rows][:MOST_CITED]


def paragraph(record: Record) -> str:
    """A failure in a few lines: the counterexample first, the smaller one, what is known of the class."""
    facts = record.facts
    lines = [record.reason, str(facts.get("statement", "")), _checked(record), _boundary(facts)]
    match facts.get("shrunken"):
        case {"reason": reason, "shapes": shapes}:
            lines.append(f"smaller ({shown(shapes)}): {reason}")
        case str(why):
            lines.append(why)
    cited = facts.get("same_class", ())[:MOST_SHOWN]
    lines += [f"{RELATIONS[one['relation']]}: {one['shipped']}: {one['cause']}" for one in cited]
    if "script" in facts:
        lines.append(f"reproduce: python {facts['script']}")
    lines.append(str(facts.get("script_not_written", "")))
    return "\n".join(line for line in lines if line)


def shown(shapes: Mapping[str, Any]) -> str:
    """Shapes in a line, such as "B 3, S 13, T 39, 2 layers, float32"."""
    named = {"layers": "{} layers", "dtype": "{}"}
    if shapes.get("layers") == 1:
        named["layers"] = "{} layer"
    return ", ".join(named.get(name, name + " {}").format(value) for name, value in shapes.items())


def _checked(record: Record) -> str:
    shapes = shown(record.facts.get("shapes", {}))
    said = f"checks {record.clause} ({record.level}), seed {record.seed}"
    return f"{said}; {shapes}" if shapes else said


def _boundary(facts: Mapping[str, Any]) -> str:
    match facts.get("boundary"):
        case {"gap": gap, "rounding_explains": bound}:
            return f"its last expert leads the next one by {gap:.3g}, where rounding explains {bound:.3g}"
    return ""


def _told(smaller: Shrunken) -> dict[str, Any]:
    """What was found, for the run file."""
    from harness.conformance.shrinking import as_dict

    attempt = smaller.attempt
    return {
        "shrink": as_dict(smaller.shrink),
        "shapes": attempt.case.shapes() if attempt.case is not None else {},
        "reason": attempt.ending.reason,
        "facts": dict(attempt.ending.facts),
        "smallest": smaller.finished,
    }
