"""The canary: one property on an implementation that must fail it, in every run.

If it is not caught, nothing else that the run found can be believed.
"""

from __future__ import annotations

import pytest

from harness.conformance import subjects
from harness.conformance.catalogue import properties
from harness.conformance.verdict import verdict

PART, PROPERTY = "routing", "routing.selects-k-distinct"
IMPLEMENTATION = "mutant:canary"
SPEC = "mixtral-8x7b"


def run(seed: int) -> tuple[bool, str]:
    """Whether the canary was caught by breaking the property, and the counterexample or what happened."""
    try:
        prop, function = next(found for found in properties(PART) if found[0].slug == PROPERTY)
        (subject,) = subjects.resolve([IMPLEMENTATION], [SPEC])
        case = subjects.case(subject, prop, seed)
    except StopIteration:
        return False, f"the suites have no property {PROPERTY} in {PART}"
    except Exception as error:  # noqa: BLE001  # whatever keeps the canary from running voids the run
        return False, f"{IMPLEMENTATION} could not be run: {type(error).__name__}: {error}"
    try:
        function(case)
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001  # judged like any other
        ending = verdict(error)
    else:
        ending = verdict(None)
    if ending.outcome == "failed" and not ending.crashed:
        return True, ending.reason
    what = f"{PROPERTY} {ending.outcome} on {IMPLEMENTATION}"
    return False, f"{what}: {ending.reason}" if ending.reason else what
