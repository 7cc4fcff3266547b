"""Minimal conflicts and leave-one-out optima against brute force."""

from __future__ import annotations

import random
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from harness.audit.conflicts import members_of, minimal_conflicts
from harness.audit.optima import Optima


def subsets(n):
    """All sets of n members, as bits."""
    return [sum(1 << i for i in kept) for size in range(n + 1) for kept in combinations(range(n), size)]


@pytest.mark.parametrize("seed", range(40))
def test_minimal_conflicts_are_the_minimal_sets_that_no_pattern_contains(seed):
    """The minimal conflicts are exactly the unsatisfied sets of which every proper subset is satisfied."""
    draw = random.Random(seed)
    n = draw.randint(1, 7)
    patterns = [draw.getrandbits(n) for _ in range(draw.randint(1, 8))]
    broken = [s for s in subsets(n) if not any(p & s == s for p in patterns)]
    expected = {s for s in broken if not any(other != s and other & s == other for other in broken)}
    found = minimal_conflicts(patterns, (1 << n) - 1)
    assert set(found) == expected
    assert len(found) == len(set(found))


def test_a_pattern_that_holds_everything_leaves_no_conflict():
    """Where all members hold at some completion, there is no conflict."""
    assert minimal_conflicts([0b01, 0b11], 0b11) == []


def test_members_are_the_positions_of_the_set_bits():
    """A set's members are the places of its bits."""
    assert members_of(0b10110) == [1, 2, 4]


def block(names, kinds, patterns):
    """What `Optima` reads of a block: claims and patterns."""
    tests = [SimpleNamespace(claim=SimpleNamespace(id=name, kind=kinds[name])) for name in names]
    return SimpleNamespace(tests=tests, patterns=np.array(sorted(set(patterns)), dtype=np.int64))


def brute(blocks, kinds, claim):
    """Every combination of one pattern per block, scored as the definition says."""
    best, winners = None, []

    def scored(choice):
        held = {}
        for one, pattern in zip(blocks, choice, strict=True):
            for place, test in enumerate(one.tests):
                name = test.claim.id
                held[name] = held.get(name, True) and bool(pattern >> place & 1)
        others = [name for name, holds in held.items() if holds and name != claim]
        return (
            sum(kinds[name] == "claim" for name in others),
            sum(kinds[name] == "assumption" for name in others),
        )

    choices = [()]
    for one in blocks:
        choices = [(*choice, pattern) for choice in choices for pattern in one.patterns.tolist()]
    for choice in choices:
        score = scored(choice)
        if best is None or score > best:
            best, winners = score, []
        if score == best:
            winners.append(choice)
    return winners


@pytest.mark.parametrize("seed", range(200))
def test_optima_are_those_of_all_combinations_of_completions(seed):
    """What is admitted without a claim is what an exhaustive search over all blocks together admits."""
    draw = random.Random(seed)
    names = [f"c{i}" for i in range(6)]
    kinds = {name: draw.choice(["claim", "claim", "assumption"]) for name in names}
    blocks = []
    for _ in range(draw.randint(1, 3)):
        own = draw.sample(names, draw.randint(1, 4))
        blocks.append(block(own, kinds, [draw.getrandbits(len(own)) for _ in range(draw.randint(1, 6))]))
    claim = draw.choice([test.claim.id for test in blocks[0].tests])
    for place, admitted in Optima(blocks).admitted(claim).items():
        assert set(admitted.tolist()) == {choice[place] for choice in brute(blocks, kinds, claim)}
