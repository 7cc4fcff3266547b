"""What if: a spec with other values in the place of what it assumes, tries or states.

"gpu_hour_usd=1.10" pins the axis training.gpu_hour_usd to one value, and restates every claim of the kind
assumption on it; "gpus=20000,25000" tries two. A name is an assumption, an entry of [training] or [serving],
a leaf of the architecture, or the quantity of a claim of the kind assumption: in full, or its last part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import isfinite

from pydantic import BaseModel

from harness.audit.units import UNITS
from harness.audit.wording import exact, listed, number
from harness.spec import Architecture, Claim, Leaf, Pin, Reading, Spec, SpecError
from harness.spec.document import Value, leaf_paths
from harness.spec.domains import domain_of, witness
from harness.spec.errors import did_you_mean, sentence, wrong_and_right
from harness.spec.schema import ServingTable, TrainingTable, leaf_types
from harness.theory.describe import Table

OPTION = "--assume"
"""What a changed reading cites in the place of a source."""
_TABLES: dict[str, type[BaseModel]] = {"training": TrainingTable, "serving": ServingTable}


def assume(spec: Spec, texts: Sequence[str]) -> Spec:
    """The spec with every "NAME=VALUE" or "NAME=VALUE,VALUE" put in, and noted in its `pins`.

    Raises SpecError on a name that the spec does not have, on two that it may mean, on a value that the axis
    cannot have, and where no completion is left.
    """
    for text in texts:
        name, values = _parsed(text)
        axis = _meant(spec, name, text)
        if axis in {pin.axis for pin in spec.pins}:
            raise _error(text, f"{axis} is assumed twice", f"give all its values in one: {name}=1,2")
        spec = _pinned(spec, axis, values, text)
    if any(pin.axis.startswith("architecture.") for pin in spec.pins):
        found, errors = witness(spec)
        if found is None:
            wrong, right = wrong_and_right(errors[0])
            raise _error(" ".join(texts), f"no completion is left that makes a model ({wrong})", right)
    return spec


def _error(text: str, wrong: str, right: str) -> SpecError:
    return SpecError(sentence(f"{OPTION} {text}", None, "", wrong, right))


def _parsed(text: str) -> tuple[str, tuple[Value, ...]]:
    name, sign, rest = (part.strip() for part in text.partition("="))
    if not sign or not name or not rest:
        raise _error(text, "it is no assumption", "give NAME=VALUE, or NAME=VALUE,VALUE to try several")
    return name, tuple(dict.fromkeys(_value(part.strip()) for part in rest.split(",")))


def _value(text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _known(spec: Spec) -> Iterator[str]:
    """Names that the spec has, in full."""
    yield from (f"assumptions.{name}" for name in spec.assumptions)
    for table, entries in (("training", spec.training), ("serving", spec.serving)):
        yield from (f"{table}.{name}" for name in entries)
    yield from (f"architecture.{path}" for path in spec.leaves)
    yield from (claim.quantity for claim in spec.claims if claim.kind == "assumption" and claim.quantity)


def _possible() -> Iterator[str]:
    """Names that a spec may have."""
    for table, model in _TABLES.items():
        yield from (f"{table}.{name}" for name in model.model_fields)
    yield from (f"architecture.{path}" for path in leaf_paths(Architecture))


def _meant(spec: Spec, name: str, text: str) -> str:
    """The axis or quantity that a name stands for."""
    known = list(dict.fromkeys(_known(spec)))
    for names in (known, list(_possible())):
        found = [one for one in names if one == name] or [one for one in names if one.endswith(f".{name}")]
        if len(found) > 1:
            raise _error(text, f"{name} may be {' or '.join(found)}", "give the name in full")
        if found:
            return found[0]
    words = {one.rpartition(".")[2]: one for one in known}
    near = get_close_matches(name, {*words, *known}, n=1, cutoff=0.6)
    ours = [word for word, one in words.items() if not one.startswith("architecture.")]
    right = did_you_mean(name, near or ours)
    raise _error(text, f"{spec.name} assumes nothing that is called {name}", right)


def _pinned(spec: Spec, axis: str, values: tuple[Value, ...], text: str) -> Spec:
    table, _, key = axis.partition(".")
    claims = [claim for claim in spec.claims if claim.kind == "assumption" and claim.quantity == axis]
    before: tuple[Value, ...] = tuple(reading.value for claim in claims for reading in claim.readings)
    if table == "architecture" and key in leaf_types():
        spec, before = _with_leaf(spec, key, values, text)
    else:
        numbers = tuple(sorted(_number(spec, value, axis, text) for value in values))
        if table == "assumptions":
            old = spec.assumptions[key]
            before = old.values
            new = replace(old, value=float(numbers[0]), values=tuple(map(float, numbers)))
            spec = replace(spec, assumptions={**spec.assumptions, key: new})
        elif table == "training":
            before = _listed(spec.training.get(key))
            spec = replace(spec, training={**spec.training, key: _entry(numbers)})
        elif table == "serving":
            before = _listed(spec.serving.get(key))
            spec = replace(spec, serving={**spec.serving, key: _entry(numbers)})
        values = numbers
    restated = {claim.id: _restated(claim, values) for claim in claims}
    pin = Pin(axis, values, before, tuple(restated))
    every = tuple(restated.get(claim.id, claim) for claim in spec.claims)
    return replace(spec, claims=every, pins=(*spec.pins, pin))


def _number(spec: Spec, value: Value, axis: str, text: str) -> int | float:
    table, _, key = axis.partition(".")
    counted = min(spec.assumptions[key].values) >= 0 if table == "assumptions" else table in _TABLES
    least = 0.0 if counted else -float("inf")
    if isinstance(value, bool | str | tuple) or not isfinite(value) or value < least:
        right = "give a number of at least 0" if counted else "give a number"
        raise _error(text, f"{value!s} is no value of {axis}", right)
    return value


def _entry(numbers: tuple[int | float, ...]) -> object:
    return numbers[0] if len(numbers) == 1 else list(numbers)


def _listed(entry: object) -> tuple[Value, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, list) else (entry,)  # type: ignore[return-value]  # the loader's


def _with_leaf(spec: Spec, path: str, values: tuple[Value, ...], text: str) -> tuple[Spec, tuple[Value, ...]]:
    """The spec with one leaf known, or unknown among several values; and what it ranged over."""
    domain, problem = domain_of(path, {"values": list(values)})
    if problem is not None:
        raise _error(text, f"architecture.{path}: {problem[1]}", problem[2])
    old = spec.leaves.get(path) or Leaf(path, "inferred", None)
    before = () if old.value is None else (old.value,)
    if old.domain is not None:
        before = tuple(dict.fromkeys((*old.domain.given(), *before))) if old.domain.of is None else ()
    one = values[0] if len(values) == 1 else None
    leaf = replace(
        old,
        status="unknown" if one is None else "inferred",
        value=one,
        domain=domain,
        sources=(),
        why="assumed on the command line",
    )
    template = spec.filled({} if one is None else {path: one})
    if one is None:
        *parents, last = path.split(".")
        table = template
        for parent in parents:
            table = table.setdefault(parent, {})
        table.pop(last, None)
    return replace(spec, leaves={**spec.leaves, path: leaf}, template=template), before


def _restated(claim: Claim, values: Sequence[Value]) -> Claim:
    """The claim with these values in the unit that it is printed in, each of them exactly."""
    unit = claim.readings[0].unit if claim.readings else ""
    factor = UNITS[unit].factor if unit in UNITS else 1.0
    texts = [exact(float(value) / factor) for value in values if isinstance(value, int | float)]
    readings = tuple(Reading(text, unit, (OPTION,)) for text in texts)
    return replace(claim, readings=readings, given={**claim.given, "exact": True})


def assumption_table(spec: Spec) -> Table:
    """What no source says and theory needs."""
    pinned = {pin.axis for pin in spec.pins}
    rows = [
        (
            one.name,
            number(one.value),
            ", ".join(map(number, one.values)),
            one.unit,
            one.why + (f" (changed by {OPTION})" if f"assumptions.{one.name}" in pinned else ""),
            ", ".join(one.sources),
        )
        for one in spec.assumptions.values()
    ]
    title = f"Assumptions, which {OPTION} NAME=VALUE changes"
    return Table(title, ("name", "value", "tried", "unit", "why", "sources"), tuple(rows))


def pin_table(spec: Spec) -> Table:
    """What the command line assumes."""
    rows = [
        (pin.axis, _shown(pin.values), _shown(pin.before) or "nothing", ", ".join(pin.restates))
        for pin in spec.pins
    ]
    title = f"Not what the file says: changed by {OPTION}"
    return Table(title, ("name", "assumed", "in place of", "restated claims"), tuple(rows))


def _shown(values: Sequence[Value]) -> str:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return listed(numbers) if numbers and len(numbers) == len(values) else ", ".join(map(str, values))
