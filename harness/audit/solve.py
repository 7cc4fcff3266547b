"""The dimensions that the claims on an architecture leave, from those that give up the fewest of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.audit.assemble import assemble
from harness.audit.assume import pin_table
from harness.audit.axes import architecture_axes
from harness.audit.blocks import Block, evaluate
from harness.audit.conflicts import minimal
from harness.audit.quantities import ARCHITECTURE, LINKS, QUANTITIES
from harness.audit.wording import cell, completion, number, typed
from harness.spec import Spec, SpecError
from harness.spec.errors import did_you_mean, sentence
from harness.theory.describe import Table

_SHOWN = (*LINKS, "parameters.expert", "parameters.attention")


@dataclass(frozen=True)
class Option:
    """A largest set of claims that can hold together: what it gives up, and the completions it leaves."""

    gives_up: tuple[str, ...]
    completions: int


@dataclass(frozen=True)
class Found:
    """One completion: its leaves, what theory makes of them, and the claims that it gives up."""

    leaves: Mapping[str, int | bool | float]
    counts: Mapping[str, float]
    gives_up: tuple[str, ...]


@dataclass(frozen=True)
class Solution:
    """Completions that satisfy as many claims on the architecture as can hold together."""

    spec: Spec
    searched: int
    impossible: tuple[str, ...]
    """Claims that no completion satisfies at all; nothing gives them up for another one."""
    options: tuple[Option, ...]
    """Those that give up the fewest claims, then fewer sources' claims than our assumptions first."""
    rows: tuple[Found, ...]
    """At most `limit`, evenly from every option."""
    distinct: Mapping[str, tuple[int | bool | float, ...]]
    """Leaf -> the values that it takes over all completions of the options."""

    @property
    def completions(self) -> int:
        """How many completions the options leave together."""
        return sum(option.completions for option in self.options)

    def as_dict(self) -> dict[str, Any]:
        """Ready for json.dumps."""
        return {
            "name": self.spec.name,
            "digest": self.spec.digest,
            "assumed": {pin.axis: list(pin.values) for pin in self.spec.pins},
            "searched": self.searched,
            "completions": self.completions,
            "impossible": list(self.impossible),
            "options": [{"gives_up": list(o.gives_up), "completions": o.completions} for o in self.options],
            "distinct": {path: list(values) for path, values in self.distinct.items()},
            "rows": [
                {"leaves": dict(row.leaves), "counts": dict(row.counts), "gives_up": list(row.gives_up)}
                for row in self.rows
            ],
        }

    def tables(self) -> list[Table]:
        """Options, values of each leaf, and completions."""
        found = f"{self.completions:,} of {self.searched:,} completions"
        title = f"{self.spec.name}: {found} give up the fewest claims"
        if self.impossible:
            title += f" (no completion satisfies {', '.join(self.impossible)})"
        options = [(", ".join(o.gives_up) or "nothing", o.completions) for o in self.options]
        spread = [
            (path, len(values), ", ".join(map(cell, values[:12])) + (", ..." if len(values) > 12 else ""))
            for path, values in self.distinct.items()
        ]
        paths = list(self.distinct)
        rows = [
            (
                *(cell(row.leaves[path]) for path in paths),
                *(number(row.counts[name]) for name in _SHOWN),
                ", ".join(row.gives_up) or "nothing",
            )
            for row in self.rows
        ]
        heads = tuple(path.rpartition(".")[2] for path in paths)
        counts = tuple(name.rpartition(".")[2] for name in _SHOWN)
        return [
            *([pin_table(self.spec)] if self.spec.pins else []),
            Table(title, ("gives up", "completions"), tuple(options)),
            Table("Values over all of them", ("leaf", "distinct", "values"), tuple(spread)),
            Table(
                f"Completions: {len(self.rows)} of {self.completions:,}",
                (*heads, *counts, "gives up"),
                tuple(rows),
            ),
        ]


def solve(spec: Spec, limit: int = 40, keep: Collection[str] = ()) -> Solution:
    """Search the architecture's completions for those that give up the fewest claims and assumptions.

    `keep`: ids of claims that have to hold. Raises SpecError if one of these is no claim on the architecture,
    or if they cannot hold together.
    """
    found = [block for block in assemble(spec).blocks if block.name == ARCHITECTURE]
    block = found[0] if found else evaluate(ARCHITECTURE, spec, architecture_axes(spec, frozenset()), (), ())
    names = list(dict.fromkeys(test.claim.id for test in block.tests))
    sets = _claim_sets(block, names)
    for claim in keep:
        if claim not in names:
            wrong = f'"{claim}" is no claim that is judged on the architecture'
            raise SpecError(sentence(spec.path, None, "claim", wrong, did_you_mean(claim, names)))
    possible = [one for one in sets if all(one >> names.index(claim) & 1 for claim in keep)]
    if not possible:
        wrong = f"no completion satisfies {', '.join(keep)} together"
        raise SpecError(sentence(spec.path, None, "claim", wrong, "keep fewer claims"))
    hopeless = sum(1 << i for i in range(len(names)) if not any(one >> i & 1 for one in sets))
    broken = [((1 << len(names)) - 1) & ~one & ~hopeless for one in possible]
    least = min(one.bit_count() for one in minimal(broken))
    ours = sum(1 << names.index(test.claim.id) for test in _assumptions(block, names))
    fewest = {one for one in broken if one.bit_count() == least}
    ranked = sorted(fewest, key=lambda one: ((one & ~ours).bit_count(), one))
    return _solution(spec, block, names, ranked, hopeless, limit)


def _assumptions(block: Block, names: list[str]) -> list[Any]:
    tests = {test.claim.id: test for test in block.tests if test.claim.kind == "assumption"}
    return [tests[name] for name in names if name in tests]


def _claim_sets(block: Block, names: list[str]) -> list[int]:
    """The patterns of a block as sets of claims; a claim holds where any of its figures does."""
    places = [names.index(test.claim.id) for test in block.tests]
    return [
        sum(1 << i for i in {place for bit, place in enumerate(places) if pattern >> bit & 1})
        for pattern in block.patterns.tolist()
    ]


def _solution(
    spec: Spec, block: Block, names: list[str], ranked: list[int], hopeless: int, limit: int
) -> Solution:
    everything = (1 << len(names)) - 1
    sets = np.array(_claim_sets(block, names), dtype=np.int64)
    rows: list[Found] = []
    options: list[Option] = []
    distinct: dict[str, set[float]] = {}
    share = max(1, -(-limit // max(1, len(ranked))))
    for one in ranked:
        given_up = tuple(name for i, name in enumerate(names) if one >> i & 1)
        values, patterns = block.select(block.patterns[sets == everything & ~one & ~hopeless])
        options.append(Option(given_up, len(patterns)))
        for name, array in values.axes.items():
            distinct.setdefault(name.removeprefix("architecture."), set()).update(np.unique(array).tolist())
        counts = {name: values.of(QUANTITIES[name], {}).low for name in _SHOWN}
        for place in range(min(share, len(patterns), limit - len(rows))):
            here = {name: float(array[place]) for name, array in values.axes.items()}
            there = {name: float(np.broadcast_to(a, patterns.shape)[place]) for name, a in counts.items()}
            rows.append(Found(completion(spec, here), there, given_up))
    impossible = tuple(name for i, name in enumerate(names) if hopeless >> i & 1)
    spread = {path: tuple(typed(spec, path, v) for v in sorted(values)) for path, values in distinct.items()}
    return Solution(spec, block.completions, impossible, tuple(options), tuple(rows), spread)
