"""Smallest sets of claims that no completion satisfies together, from the patterns that occur.

A set is in conflict if, and only if, it meets the complement of every pattern: each completion then breaks
one of its members. The smallest such sets are the minimal hitting sets of those complements (Reiter 1987, A
theory of diagnosis from first principles), found one complement after the other (Berge 1989, Hypergraphs,
chapter 2). Sets are bits of an int.
"""

from __future__ import annotations

from collections.abc import Iterable


def minimal(sets: Iterable[int]) -> list[int]:
    """Those sets that contain no other one, smallest first."""
    kept: list[int] = []
    for one in sorted(set(sets), key=lambda bits: (bits.bit_count(), bits)):
        if not any(other & one == other for other in kept):
            kept.append(one)
    return kept


def minimal_conflicts(patterns: Iterable[int], members: int) -> list[int]:
    """All subsets of `members` that no pattern contains and of which every proper subset some pattern does.

    Smallest first; empty if some pattern contains all members.
    """
    broken = minimal(members & ~pattern for pattern in patterns)
    found = [0]
    for edge in broken:
        hit = [one for one in found if one & edge]
        missed = [one for one in found if not one & edge]
        bits = [1 << i for i in range(edge.bit_length()) if edge >> i & 1]
        found = minimal(hit + [one | bit for one in missed for bit in bits])
    return [one for one in found if one]


def members_of(bits: int) -> list[int]:
    """Positions of the bits that are set."""
    return [i for i in range(bits.bit_length()) if bits >> i & 1]
