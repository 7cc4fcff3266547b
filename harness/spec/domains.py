"""Domains of unknown leaves: reading them, and showing that at least one completion exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from harness.spec.architecture import Architecture
from harness.spec.document import Domain, Leaf, Spec, Value
from harness.spec.errors import did_you_mean, show, wrong_and_right
from harness.spec.schema import leaf_adapter, leaf_types

MAX_VALUES = 100_000
"""Of one arithmetic domain."""
MAX_TRIES = 20_000
"""Completions that the search for a first one validates: about a second."""

Problem = tuple[str, str, str]
"""(key below the leaf, what is wrong, what would be right)."""
Read = tuple[Domain | None, Problem | None]
"""A domain, or why there is none."""


def domain_of(path: str, table: Mapping[str, Any]) -> Read:
    """The domain that a [domain] table of the leaf `path` describes."""
    arithmetic = [key for key in ("min", "max", "step") if key in table]
    listed, of = table.get("values"), table.get("of")
    if arithmetic and (listed is not None or of is not None):
        return None, ("domain", f"{arithmetic[0]} stands beside values or of", "give one of these forms")
    if "also" in table and of is None:
        return None, ("domain.also", "also stands without of", "put these into values")
    if of is not None:
        return _factors(path, of, listed or [], table.get("also", []))
    if arithmetic:
        return _steps(path, table, arithmetic)
    if not listed:
        return None, ("domain", "no value is possible", "list values, or give min, max and step")
    return _checked(path, Domain(_plain(listed)), "domain.values")


def _steps(path: str, table: Mapping[str, Any], given: Sequence[str]) -> Read:
    if len(given) < 3:
        return None, ("domain", f"only {' and '.join(given)} given", "give min, max and step")
    low, high, step = table["min"], table["max"], table["step"]
    if step <= 0:
        return None, ("domain.step", f"step is {step}", "a step must be above 0")
    if low > high:
        return None, ("domain.min", f"no value is possible: min {low} exceeds max {high}", "swap them")
    count = int((high - low) / step + 1e-9) + 1  # 1e-9: steps of 0.1 must still reach their max
    if count > MAX_VALUES:
        return None, ("domain.step", f"the domain has {count} values", f"give at most {MAX_VALUES}")
    return _checked(path, Domain(tuple(low + i * step for i in range(count))), "domain.min")


def _factors(path: str, of: str, factors: Sequence[Any], also: Sequence[Any]) -> Read:
    if of not in leaf_types():
        return None, ("domain.of", f'"{of}" is no leaf of the architecture', did_you_mean(of, leaf_types()))
    if not factors:
        return None, ("domain", "of stands without values", "list the factors on that leaf in values")
    for factor in factors:
        if isinstance(factor, (bool, str)) or factor <= 0:
            return None, ("domain.values", f"got {show(factor)} as a factor", "a factor is a number above 0")
    return _checked(path, Domain(tuple(factors), of, _plain(also)), "domain.also")


def _plain(values: Sequence[Any]) -> tuple[Value, ...]:
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def _checked(path: str, domain: Domain, key: str) -> Read:
    """The domain, if every literal in it is a value that the leaf may have."""
    for value in domain.also if domain.of else domain.values:
        problem = _refusal(path, value)
        if problem is not None:
            wrong, right = problem
            return None, (key, f"{wrong} among the values", right)
    return domain, None


def _refusal(path: str, value: Value) -> tuple[str, str] | None:
    try:
        leaf_adapter(path).validate_python(value)
    except ValidationError as error:
        return wrong_and_right(dict(error.errors()[0]))
    return None


def ordered(unknowns: Mapping[str, Leaf]) -> list[str]:
    """Paths so that every domain's `of` comes before it. Raises ValueError naming a cycle."""
    order: list[str] = []

    def visit(path: str, trail: tuple[str, ...]) -> None:
        """Append what `path` depends on, then `path`."""
        if path in trail:
            raise ValueError(" -> ".join((*trail[trail.index(path) :], path)))
        domain = unknowns[path].domain if path in unknowns else None
        if path in order or domain is None:
            return
        if domain.of is not None:
            visit(domain.of, (*trail, path))
        order.append(path)

    for path in unknowns:
        visit(path, ())
    return order


def candidates(spec: Spec, path: str, values: Mapping[str, Value]) -> tuple[Value, ...]:
    """What the unknown `path` may be once `values` are assigned; products that are no such value drop out."""
    domain = spec.leaves[path].domain
    assert domain is not None
    if domain.of is None:
        return domain.values
    base = values.get(domain.of, value_at(spec.template, domain.of))
    found = domain.given(base) if isinstance(base, (int, float)) else domain.also
    return tuple(value for value in found if _refusal(path, value) is None)


def witness(spec: Spec) -> tuple[dict[str, Value] | None, list[dict[str, Any]]]:
    """One completion that validates, or None and the pydantic errors that the last try ended in.

    Backtracking that jumps: a failed try names the part that failed, so an unknown that has no say in
    that part is not varied, and an impossible part is found out without counting through the others.
    """
    unknowns = {leaf.path: leaf for leaf in spec.unknowns}
    tries = 0
    last: list[dict[str, Any]] = []

    def search(values: dict[str, Value], rest: Sequence[str]) -> tuple[dict[str, Value] | None, set[str]]:
        """A completion, or the unknowns of which one must change."""
        nonlocal tries, last
        if not rest:
            tries += 1
            last = problems(spec, values)
            return (values, set()) if not last else (None, _blamed(unknowns, last))
        path, blamed = rest[0], _bases(unknowns, rest[0])
        for value in candidates(spec, path, values):
            found, conflict = search(values | {path: value}, rest[1:])
            if found is not None or path not in conflict or tries >= MAX_TRIES:
                return found, conflict
            blamed |= conflict - {path}
        last = last or [{"loc": path.split("."), "type": "value_error", "msg": "no factor gives a value"}]
        return None, blamed

    return search({}, ordered(unknowns))[0], last


def problems(spec: Spec, values: Mapping[str, Value]) -> list[dict[str, Any]]:
    """Pydantic's errors on the architecture with `values` put in."""
    try:
        Architecture.model_validate(spec.filled(values))
    except ValidationError as error:
        return [dict(one) for one in error.errors()]
    return []


def _blamed(unknowns: Mapping[str, Leaf], last: list[dict[str, Any]]) -> set[str]:
    """The unknowns below the part where a problem arose: the fewest, over all problems."""
    places = [".".join(str(part) for part in one["loc"]) for one in last]
    below = [{p for p in unknowns if not at or p == at or p.startswith(at + ".")} for at in places]
    return min(below, key=len)


def _bases(unknowns: Mapping[str, Leaf], path: str) -> set[str]:
    domain = unknowns[path].domain
    return {domain.of} if domain is not None and domain.of is not None and domain.of in unknowns else set()


def value_at(tree: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path of nested tables, or None."""
    found: Any = tree
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
