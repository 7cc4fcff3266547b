"""The documents beside one another: where they differ, what theory admits of it, and how each one fares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
"""The best first: a claim with several figures counts as the best of them."""
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
    """How many claims have each outcome: of all "claims", by document, and of our "assumptions".

    A claim counts once in each, as the best of the figures there; each count is over all claims, so that a
    document also has those on which it is "silent".
    """
    by_claim = _by_claim(verdicts)
    stated = {c.id: by_claim[c.id] for c in spec.claims if c.kind == "claim"}
    ours = {c.id: by_claim[c.id] for c in spec.claims if c.kind == "assumption"}
    found = {"claims": _tally(stated)}
    for name in documents(spec):
        said = {claim: [v for v in several if name in v.figure.sources] for claim, several in stated.items()}
        found[name] = {**_tally(said), "silent": sum(not several for several in said.values())}
    return found | ({"assumptions": _tally(ours)} if ours else {})


def count_table(spec: Spec, verdicts: Iterable[Verdict]) -> Table:
    """Verdicts down, documents across."""
    found = counts(spec, verdicts)
    names = list(found)
    rows: list[tuple[object, ...]] = [
        (outcome, *(found[name][outcome] for name in names)) for outcome in OUTCOMES
    ]
    rows.append(("silent", *(found[name].get("silent", SILENT) for name in names)))
    rows.append(("all", *(sum(found[name].values()) for name in names)))
    headers = ("verdict", *(("our assumptions" if name == "assumptions" else name) for name in names))
    return Table(
        "Claims by verdict; one with several figures counts as the best of them", headers, tuple(rows)
    )


def _tally(claims: Mapping[str, Sequence[Verdict]]) -> dict[str, int]:
    best = [min((v.outcome for v in several), key=OUTCOMES.index) for several in claims.values() if several]
    return {outcome: best.count(outcome) for outcome in OUTCOMES}


def _by_claim(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.claim.id, []).append(verdict)
    return found
