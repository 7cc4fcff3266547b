"""What the claims on the architecture leave of its counts, for the blocks that take these as given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.audit.axes import Axis
from harness.audit.blocks import Block, Patterns
from harness.audit.optima import Optima
from harness.audit.quantities import ARCHITECTURE

Spans = Mapping[str, tuple[float, float]]
"""Link -> the least and the largest value that are left of it."""

_STEPS = 5
"""Values of a link, ends included, that are tried between what all the architecture's claims leave of it."""


def spans_at(block: Block, wanted: Sequence[Patterns]) -> list[Spans]:
    """For each of these sets of patterns: the span of every link of the block over their completions."""
    whole = [len(patterns) == len(block.patterns) for patterns in wanted]
    some = [patterns for patterns, all_ in zip(wanted, whole, strict=True) if not all_]
    if not some:
        return [block.spans for _ in wanted]
    union = np.unique(np.concatenate(some))
    values, patterns = block.select(union)
    place = np.searchsorted(union, patterns)
    ends = {}
    for link in block.spans:
        array = np.broadcast_to(values[link], patterns.shape)
        low, high = np.full(len(union), np.inf), np.full(len(union), -np.inf)
        np.minimum.at(low, place, array)
        np.maximum.at(high, place, array)
        ends[link] = low, high
    return [
        block.spans
        if all_
        else {
            link: (float(low[there].min()), float(high[there].max()))
            for there in [np.searchsorted(union, one)]
            for link, (low, high) in ends.items()
        }
        for one, all_ in zip(wanted, whole, strict=True)
    ]


def left_alone(block: Block) -> dict[str, tuple[float, ...]]:
    """Link -> values to try: what the block's own claims leave of it, all of them, and without each one."""
    optima = Optima([block])
    claims = dict.fromkeys(test.claim.id for test in block.tests)
    found = spans_at(block, [optima.admitted(claim, 0)[0] for claim in ("", *claims)])
    return {
        link: tuple(
            {*np.linspace(*found[0][link], _STEPS).tolist(), *(end for one in found for end in one[link])}
        )
        for link in block.spans
    }


def left_by(blocks: Sequence[Block], optima: Optima, claims: Sequence[str]) -> dict[str, Spans]:
    """Claim -> what the architecture's claims but this one leave of each link at the optimum."""
    for place, block in enumerate(blocks):
        if block.name == ARCHITECTURE and block.spans:
            wanted = [optima.admitted(claim, place)[place] for claim in claims]
            return dict(zip(claims, spans_at(block, wanted), strict=True))
    return {claim: {} for claim in claims}


def tried(axis: Axis, span: tuple[float, float]) -> tuple[float, float]:
    """The tried values of a link next to the ends of a span, so that nothing in it is left out."""
    values = np.array(axis.values)
    first = int(np.searchsorted(values, span[0], side="right")) - 1
    last = int(np.searchsorted(values, span[1], side="left"))
    return float(values[max(first, 0)]), float(values[min(last, len(values) - 1)])
