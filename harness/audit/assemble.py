"""From a spec to blocks of completions: which claims are judged over which axes, and which cannot be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from math import inf, isfinite
from typing import Any

from harness.audit.axes import Axis, architecture_axes, leaf_axis, ordered, table_axis
from harness.audit.blocks import Block, Test, evaluate, link_axis
from harness.audit.figures import Figure, Unjudged, figures_of
from harness.audit.links import left_alone
from harness.audit.quantities import ARCHITECTURE, LINKS, QUANTITIES, argument
from harness.audit.quantity import Quantity, is_axis
from harness.spec import Architecture, Claim, Spec, SpecError
from harness.spec.document import leaf_paths
from harness.spec.errors import did_you_mean, sentence, show
from harness.spec.printed import interval, is_figure

_LEAVES = frozenset(f"architecture.{path}" for path in leaf_paths(Architecture))


@dataclass(frozen=True)
class Case:
    """A spec laid out for judging."""

    spec: Spec
    figures: Mapping[str, tuple[Figure, ...]]
    """By claim."""
    unjudged: Mapping[str, Unjudged]
    """Claim -> why no block tests it, whatever its figures are."""
    blocks: tuple[Block, ...]
    foreign: tuple[tuple[str, Test], ...]
    """Figures in a unit of another dimension than their quantity's, with the block of the quantity."""

    def shown(self, test: Test) -> Figure:
        """The figure that a test puts to its quantity."""
        return next(figure for figure in self.figures[test.claim.id] if figure.readings == test.readings)


def assemble(spec: Spec) -> Case:
    """Lay out every claim, and evaluate every block. Raises SpecError on a claim that names things wrong."""
    figures = {claim.id: figures_of(spec, claim) for claim in spec.claims}
    unjudged: dict[str, Unjudged] = {}
    members: dict[str, list[tuple[Claim, Quantity]]] = {}
    variables: list[Claim] = []
    for claim in spec.claims:
        quantity = QUANTITIES.get(claim.quantity)
        reason = _reason(spec, claim, quantity)
        if reason is not None:
            unjudged[claim.id] = reason
        elif all(figure.unjudged for figure in figures[claim.id]):
            continue
        elif quantity is not None:
            _check_given(spec, claim, quantity)
            quantity = quantity.bound(claim.given)
            members.setdefault(quantity.block, []).append((claim, quantity))
        else:
            variables.append(claim)
    prefix = "architecture."
    named = [claim.quantity for claim in variables if claim.quantity.startswith(prefix)]
    stated = frozenset(name.removeprefix(prefix) for name in named)
    whole = architecture_axes(spec, stated)
    names = {block: _axis_names(quantities, whole) for block, quantities in members.items()}
    if any(link in axes for axes in names.values() for link in LINKS):
        names.setdefault(ARCHITECTURE, tuple(axis.name for axis in whole))
    for claim in variables:
        homes = [block for block, axes in names.items() if claim.quantity in axes] or [claim.quantity]
        for block in homes:
            names.setdefault(block, (claim.quantity,))
            members.setdefault(block, []).append((claim, _variable(claim.quantity, block)))
    for block, axes in names.items():
        if block != ARCHITECTURE:
            linked = [claim for claim in spec.claims if _is_link(claim) and claim.quantity in axes]
            judged = [claim for claim in linked if claim.id not in unjudged]
            members[block] += [(claim, _variable(claim.quantity, block)) for claim in judged]
    tests = {block: _tests(found, figures) for block, found in members.items()}
    foreign = tuple((block, test) for block, found in tests.items() for test in found if not test.fits)
    fitting = {block: [test for test in found if test.fits] for block, found in tests.items()}
    blocks = _evaluated(spec, figures, whole, stated, fitting, names)
    return Case(spec, figures, unjudged, blocks, foreign)


def _evaluated(
    spec: Spec,
    figures: Mapping[str, tuple[Figure, ...]],
    whole: tuple[Axis, ...],
    stated: frozenset[str],
    tests: Mapping[str, list[Test]],
    names: Mapping[str, tuple[str, ...]],
) -> tuple[Block, ...]:
    """The blocks; first that of the architecture, which computes the spans of the others' links."""
    links = [
        link for link in LINKS if any(link in axes for block, axes in names.items() if block != ARCHITECTURE)
    ]
    blocks: list[Block] = []
    spans: Mapping[str, tuple[float, float]] = {}
    left: Mapping[str, tuple[float, ...]] = {}
    try:
        if ARCHITECTURE in tests or links:
            blocks.append(evaluate(ARCHITECTURE, spec, whole, tests.get(ARCHITECTURE, []), links))
            spans, left = blocks[0].spans, left_alone(blocks[0])
        for name, axes in names.items():
            if name != ARCHITECTURE:
                made = {axis: _axis(spec, axis, stated, spans, left, figures) for axis in axes}
                while bases := [a.of for a in made.values() if a.of and a.of not in made]:
                    made |= {base: _axis(spec, base, stated, spans, left, figures) for base in bases}
                blocks.append(evaluate(name, spec, ordered(made.values()), tests[name], ()))
    except ValueError as error:
        if isinstance(error, SpecError):
            raise
        wrong, _, right = str(error).partition("; ")
        raise SpecError(sentence(spec.path, None, "audit", wrong, right)) from None
    return tuple(blocks)


def _axis(
    spec: Spec,
    name: str,
    stated: frozenset[str],
    spans: Mapping[str, tuple[float, float]],
    left: Mapping[str, tuple[float, ...]],
    figures: Mapping[str, tuple[Figure, ...]],
) -> Axis:
    if name in LINKS:
        claims = [claim.id for claim in spec.claims if claim.quantity == name and _is_link(claim)]
        found = [figure for claim in claims for figure in figures[claim]]
        intervals = [figure.interval for figure in found if figure.interval is not None]
        ends = [(i.low, i.high) for i in intervals if -inf < i.low and i.high < inf]
        return link_axis(name, spans[name], ends, left[name])
    if name.startswith("architecture."):
        path = name.removeprefix("architecture.")
        return leaf_axis(spec, spec.leaves[path], stated=path in stated)
    axis = table_axis(spec, name)
    assert axis is not None  # _reason keeps claims without their axes out
    return axis


def _tests(
    members: Iterable[tuple[Claim, Quantity]], figures: Mapping[str, tuple[Figure, ...]]
) -> list[Test]:
    return [
        Test(claim, figure.readings, quantity, figure.interval, figure.unit)
        for claim, quantity in members
        for figure in figures[claim.id]
        if figure.interval is not None
    ]


def _is_link(claim: Claim) -> bool:
    """Whether a claim states the value of a link: other blocks take the count of everything."""
    return claim.quantity in LINKS and claim.given.get("convention") == "all"


def _axis_names(members: Iterable[tuple[Claim, Quantity]], whole: tuple[Axis, ...]) -> tuple[str, ...]:
    names: list[str] = []
    for _, quantity in members:
        if quantity.block == ARCHITECTURE:
            return tuple(axis.name for axis in whole)
        names += quantity.axes
    return tuple(dict.fromkeys(names))


def _variable(name: str, block: str) -> Quantity:
    """An axis as a quantity: what a claim on its value is put to."""
    short = argument(name)
    dimension = "parameters" if name in LINKS else ""
    return Quantity(name, dimension, block, (name,), (), (), "exact", lambda **values: values[short], short)


def _reason(spec: Spec, claim: Claim, quantity: Quantity | None) -> Unjudged | None:
    """Why no figure of a claim can be judged, if so."""
    name = claim.quantity
    if not name:
        return Unjudged("not quantitative", claim.note or "no quantity of the theory stands for it")
    if not claim.readings:
        return Unjudged("not quantitative", "no source prints a value")
    if quantity is not None:
        free = [axis for axis in quantity.axes if argument(axis) not in claim.given]
        missing = [axis for axis in free if not _has_axis(spec, axis)]
        if missing:
            return Unjudged("not yet judged", f"the spec does not say what {', '.join(missing)} may be")
    elif not is_axis(name):
        return Unjudged("not yet judged", f"theory does not know the quantity {name} yet{_near(spec, name)}")
    elif name.startswith("architecture.") and name not in _LEAVES:
        right = did_you_mean(name, {*QUANTITIES, *_LEAVES})
        wrong = f'"{name}" is no leaf of the architecture'
        raise SpecError(sentence(spec.path, claim.line, f"{claim.id}.quantity", wrong, right))
    elif not _has_axis(spec, name):
        return Unjudged("not yet judged", f"the spec does not say what {name} may be{_near(spec, name)}")
    return None


def _near(spec: Spec, name: str) -> str:
    """A misspelt quantity is no quantity of the future."""
    near = get_close_matches(name, {*QUANTITIES, *spec.lines}, n=1, cutoff=0.85)
    return f"; is it {near[0]}?" if near and near[0] != name else ""


def _has_axis(spec: Spec, name: str) -> bool:
    if name == ARCHITECTURE or name in LINKS:
        return True
    table, _, key = name.partition(".")
    known: Mapping[str, Any] = {
        "architecture": spec.leaves,
        "training": spec.training,
        "serving": spec.serving,
        "assumptions": spec.assumptions,
    }[table]
    return key in known


def _check_given(spec: Spec, claim: Claim, quantity: Quantity) -> None:
    """The claim's constants are those that the quantity takes."""
    taken = (*quantity.given, *quantity.optional, *(argument(axis) for axis in quantity.axes), "exact")
    for name in claim.given:
        if name not in taken:
            wrong = f"{name} is no constant of {quantity.name}"
            raise SpecError(
                sentence(spec.path, claim.line, f"{claim.id}.given", wrong, did_you_mean(name, taken))
            )
    for name, value in claim.given.items():
        if isinstance(value, str) and is_axis(value):
            if not _has_axis(spec, value):
                wrong, right = f"the spec has no {value}", did_you_mean(value, spec.lines)
            elif quantity.block == ARCHITECTURE:
                wrong, right = f"{quantity.name} depends on the architecture alone", "give a number"
            else:
                continue
            raise SpecError(sentence(spec.path, claim.line, f"{claim.id}.given.{name}", wrong, right))
        kind, right = _KINDS.get(name, (None, "give a number, or a figure as it is printed"))
        if not (isinstance(value, kind) if kind else _is_number(value)):
            wrong = f"got {show(value)}"
            raise SpecError(sentence(spec.path, claim.line, f"{claim.id}.given.{name}", wrong, right))
    for name in quantity.given:
        if name not in claim.given:
            wrong = f"{quantity.name} needs the constant {name}"
            raise SpecError(sentence(spec.path, claim.line, f"{claim.id}.given", wrong, f"add {name} = "))


_KINDS: Mapping[str, tuple[type, str]] = {
    "convention": (str, "give the name of a convention"),
    "exact": (bool, "give true or false"),
    "lengths": (list, "give a list of tokens, one number for each sequence"),
}
"""Constants that are no numbers."""


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return is_figure(value) and isfinite(interval(value).low) and isfinite(interval(value).high)
    return isinstance(value, int | float) and not isinstance(value, bool)
