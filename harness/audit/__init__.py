"""Can the claims of a spec be true together? Verdicts, smallest conflicts, dimensions that are left."""

from harness.audit.assume import assume
from harness.audit.deciders import Decider, Pair
from harness.audit.explain import explain
from harness.audit.report import Audit, audit
from harness.audit.solve import Solution, solve
from harness.audit.sources import Disagreement
from harness.audit.verdicts import Conflict, Finding, Member, Release, Verdict

__all__ = [
    "Audit",
    "Conflict",
    "Decider",
    "Disagreement",
    "Finding",
    "Member",
    "Pair",
    "Release",
    "Solution",
    "Verdict",
    "assume",
    "audit",
    "explain",
    "solve",
]
