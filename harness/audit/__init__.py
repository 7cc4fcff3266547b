"""Can the claims of a spec be true together? Verdicts, smallest conflicts, dimensions that are left."""

from harness.audit.explain import explain
from harness.audit.report import Audit, Disagreement, audit
from harness.audit.solve import Solution, solve
from harness.audit.verdicts import Conflict, Finding, Member, Release, Verdict

__all__ = [
    "Audit",
    "Conflict",
    "Disagreement",
    "Finding",
    "Member",
    "Release",
    "Solution",
    "Verdict",
    "audit",
    "explain",
    "solve",
]
