"""The reference with one known defect each: what the properties must catch.

Each defect shipped in a real engine (`Mutant.origin`), reduced to a small patch of one stage of the reference.
"""

from __future__ import annotations

from harness.mutants import attention, experts, loading, losses, routing
from harness.mutants.defect import Mutant, MutantImplementation

MUTANTS: dict[str, Mutant] = {
    mutant.name: mutant
    for group in (routing.MUTANTS, experts.MUTANTS, losses.MUTANTS, attention.MUTANTS, loading.MUTANTS)
    for mutant in group
}


def names() -> tuple[str, ...]:
    """Names of the mutants, sorted."""
    return tuple(sorted(MUTANTS))


def make(name: str) -> MutantImplementation:
    """The implementation "mutant:NAME"; raises KeyError for a name that is none of `names`."""
    return MutantImplementation(MUTANTS[name])


__all__ = ["MUTANTS", "Mutant", "MutantImplementation", "make", "names"]
