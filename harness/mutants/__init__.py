"""The reference with one known defect each: what the properties must catch.

Most of these defects shipped in a real engine (`Mutant.origin`); each is reduced to a small patch of one
stage of the reference.
"""

from __future__ import annotations

from harness.mutants import (  # noqa: F401  # each enters its mutants in the catalogue
    acceptance,
    attention,
    beyond,
    cache,
    capacity,
    company,
    dense,
    drafts,
    endings,
    experts,
    extent,
    faults,
    layouts,
    loading,
    losses,
    own,
    pages,
    prefixes,
    routing,
    sampling,
    scheduling,
    slots,
    steps,
    training,
    vision,
    windows,
)
from harness.mutants.defect import CATALOGUE, Mutant, MutantImplementation

__all__ = ["CATALOGUE", "Mutant", "MutantImplementation", "make", "names"]


def names() -> tuple[str, ...]:
    """Names of the mutants, sorted."""
    return tuple(sorted(CATALOGUE))


def make(name: str) -> MutantImplementation:
    """The implementation "mutant:NAME"; raises KeyError for a name that is none of `names`."""
    return MutantImplementation(CATALOGUE[name])
