"""The documents beside one another: where they differ, what theory admits of it, and how each one fares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.audit.figures import printed
from harness.audit.verdicts import Outcome, Verdict
from harness.spec import Spec
from harness.theory.describe import Table

OUTCOMES: tuple[Outcome, ...] = (
    "consistent",
    "undetermined",
    "contradicts",
    "not quantitative",
    "not yet judged",
)
"""The best first; what is not judged last."""
SILENT = "-"


@dataclass(frozen=True)
class Disagreement:
    """A claim for which the sources print figures that do not mean the same."""

    claim: str
    verdicts: tuple[Verdict, ...]
    """One for each figure."""

    @property
    def admits(self) -> str:
        """Which of the readings theory admits: some of them, none, or that it leaves them open."""
        judged = [v for v in self.verdicts if v.outcome in OUTCOMES[:3]]
        if not judged:
            return self.verdicts[0].outcome
        parts = [str(v.figure) for v in judged if v.outcome == "consistent"]
        parts += [f"open: {v.figure}" for v in judged if v.outcome == "undetermined"]
        if parts:
            return "; ".join(parts)
        slips = [f"{v.figure.readings[0].value} {' or '.join(v.slips)}" for v in judged if v.slips]
        return "; ".join(dict.fromkeys(["none", *slips]))


def documents(spec: Spec) -> tuple[str, ...]:
    """Ids of the sources that print what claims state, in the order of the file."""
    cited = {s for c in spec.claims if c.kind == "claim" for r in c.readings for s in r.sources}
    return tuple(source for source in spec.sources if source in cited)


def disagreements(verdicts: Iterable[Verdict]) -> tuple[Disagreement, ...]:
    """Claims with several figures; that a document is silent is no difference."""
    found = _by_claim(verdicts)
    return tuple(Disagreement(claim, tuple(several)) for claim, several in found.items() if len(several) > 1)


def prints(verdicts: Sequence[Verdict], document: str) -> str:
    """What a document prints for the claim of these verdicts."""
    readings = [r for v in verdicts for r in v.figure.readings if document in r.sources]
    return "; ".join(map(printed, readings)) or SILENT


def disagreement_table(spec: Spec, found: Sequence[Disagreement]) -> Table:
    """One row for each claim on which documents differ, and one column for each document."""
    names = documents(spec)
    rows = [(one.claim, *(prints(one.verdicts, name) for name in names), one.admits) for one in found]
    title = f"Where the sources differ, and what theory admits ({SILENT} is silent)"
    return Table(title, ("claim", *names, "theory admits"), tuple(rows))


def counts(spec: Spec, verdicts: Iterable[Verdict]) -> dict[str, dict[str, int]]:
    """How often there is each outcome, by what is counted.

    "figures" of the sources, and "claims" of theirs "by best figure" and "by worst figure"; for each document
    the claims by the worst figure that it prints, with those on which it is "silent"; our "assumptions" by
    figure.
    """
    verdicts = list(verdicts)
    by_claim = _by_claim(verdicts)
    stated = {c.id: by_claim[c.id] for c in spec.claims if c.kind == "claim"}
    ours = [v for v in verdicts if v.claim.kind == "assumption"]
    found = {
        "figures": _tally(v.outcome for several in stated.values() for v in several),
        "claims by best figure": _tally(_best(several) for several in stated.values()),
        "claims by worst figure": _tally(_worst(several) for several in stated.values()),
    }
    for name in documents(spec):
        said = [[v for v in several if name in v.figure.sources] for several in stated.values()]
        worst = _tally(_worst(several) for several in said if several)
        found[name] = {**worst, "silent": sum(not several for several in said)}
    return found | ({"assumptions": _tally(v.outcome for v in ours)} if ours else {})


def count_table(spec: Spec, verdicts: Iterable[Verdict]) -> Table:
    """Verdicts down; figures, claims and documents across."""
    found = counts(spec, verdicts)
    names = list(found)
    rows: list[tuple[object, ...]] = [
        (outcome, *(found[name][outcome] for name in names)) for outcome in OUTCOMES
    ]
    rows.append(("silent", *(found[name].get("silent", SILENT) for name in names)))
    rows.append(("all", *(sum(found[name].values()) for name in names)))
    headers = ("verdict", *(("our assumptions" if name == "assumptions" else name) for name in names))
    title = "Verdicts on the sources' figures, on their claims, and on each document's claims by worst figure"
    return Table(title, headers, tuple(rows))


def _best(several: Iterable[Verdict]) -> Outcome:
    return min((v.outcome for v in several), key=OUTCOMES.index)


def _worst(several: Sequence[Verdict]) -> Outcome:
    """Of the figures that are judged, if any is."""
    judged = [v for v in several if v.outcome in OUTCOMES[:3]]
    return max((v.outcome for v in judged or several), key=OUTCOMES.index)


def _tally(outcomes: Iterable[Outcome]) -> dict[str, int]:
    found = list(outcomes)
    return {outcome: found.count(outcome) for outcome in OUTCOMES}


def _by_claim(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.claim.id, []).append(verdict)
    return found
