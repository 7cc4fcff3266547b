"""TOML file -> Spec, or SpecError with one sentence per thing that is wrong."""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from harness._resources import specs_dir
from harness.spec import domains
from harness.spec.architecture import part_type, without_none
from harness.spec.document import Assumption, Claim, Domain, Leaf, Reading, Source, Spec
from harness.spec.errors import SpecError, did_you_mean, dotted, sentence, show, wrong_and_right
from harness.spec.hardware import HARDWARE
from harness.spec.locate import Path as KeyPath
from harness.spec.locate import lines_of, nearest
from harness.spec.schema import document_model, leaf_types


def names() -> tuple[str, ...]:
    """Names of the shipped specs, sorted; the file of hardware beside them is none."""
    return tuple(sorted(path.stem for path in specs_dir().glob("*.toml") if path.stem != HARDWARE))


def load(name_or_path: str | Path) -> Spec:
    """Load a shipped spec by name ("mixtral-8x7b") or any file by path. Raises SpecError."""
    path = Path(name_or_path)
    if not str(name_or_path).strip():
        raise SpecError(f'"{name_or_path}" names no spec; give a file, or one of {", ".join(names())}')
    if isinstance(name_or_path, str) and name_or_path in names():
        path = specs_dir() / f"{name_or_path}.toml"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        right = f"give a file, or a shipped spec: {did_you_mean(path.stem, names())}"
        raise SpecError(sentence(path, None, "", "no such spec", right)) from None
    except IsADirectoryError:
        raise SpecError(sentence(path, None, "", "is a directory", "give one TOML file")) from None
    except (OSError, ValueError) as error:
        wrong = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise SpecError(sentence(path, None, "", wrong, "give a readable TOML file")) from None
    return parse(data, path)


def parse(data: bytes, path: Path) -> Spec:
    """The spec in the bytes of a file; `path` is for messages and for the default name."""
    try:
        return _Reader(path, data).spec()
    except RecursionError:
        wrong, right = "is nested too deeply", "no table of a spec lies more than six levels down"
        raise SpecError(sentence(path, None, "", wrong, right)) from None


class _Reader:
    """One reading of one file, collecting every error before it raises."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self.digest = hashlib.sha256(data).hexdigest()
        self.errors: list[tuple[int, str]] = []
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            wrong = f"byte 0x{data[error.start]:02x} is not UTF-8"
            raise SpecError(sentence(path, line, "", wrong, "save the file as UTF-8")) from None
        try:
            self.raw: dict[str, Any] = tomllib.loads(text)
        except ValueError as error:
            raise SpecError(_syntax(path, text, str(error))) from None
        self.lines = lines_of(text)

    def note(self, place: KeyPath, wrong: str, right: str) -> None:
        line = nearest(self.lines, place)
        self.errors.append((line, sentence(self.path, line, dotted(place), wrong, right)))

    def stop_if_wrong(self) -> None:
        if self.errors:
            raise SpecError("\n".join(dict.fromkeys(text for _, text in sorted(self.errors))))

    def spec(self) -> Spec:
        """The spec; raises SpecError after the first kind of check that found anything."""
        for place in _not_finite(self.raw, ()):
            self.note(place, "is not a finite number", 'give a finite number, or status = "unknown"')
        self.stop_if_wrong()
        try:
            document: Any = document_model().model_validate(self.raw)
        except ValidationError as error:
            self.translate(error)
            self.stop_if_wrong()
            raise
        leaves, template = self.leaves(self.raw["architecture"], document.default_status)
        spec = Spec(
            name=document.name or self.path.stem,
            title=document.title,
            path=self.path,
            digest=self.digest,
            leaves={leaf.path: leaf for leaf in leaves},
            sources={s.id: Source(s.id, s.title, s.url, s.note) for s in document.source},
            claims=tuple(self.claim(c, i) for i, c in enumerate(document.claim)),
            training=document.training.model_dump(exclude_unset=True),
            serving=document.serving.model_dump(exclude_unset=True),
            lines={
                f"{table}.{key}": nearest(self.lines, (table, key))
                for table in ("training", "serving", "assumptions")
                for key in self.raw.get(table, {})
            },
            template=template,
            assumptions={name: self.assumption(name, a) for name, a in document.assumptions.items()},
        )
        self.check_references(spec)
        self.stop_if_wrong()
        self.check_possible(spec)
        self.stop_if_wrong()
        return spec

    def translate(self, error: ValidationError) -> None:
        """Note each pydantic error at its place in the file."""
        misspelt: set[KeyPath] = set()
        refused: dict[tuple[KeyPath, str], list[str]] = {}
        for one in sorted(error.errors(), key=lambda one: one["type"] == "missing"):
            place, siblings = _place(one["loc"])
            if one["type"] == "extra_forbidden":
                free = set(siblings) - set(_at(self.raw, place[:-1]) or ())
                guess = did_you_mean(str(place[-1]), free or siblings)
                misspelt.update((*place[:-1], key) for key in free if f'"{key}"' in guess)
                self.note(place, "unknown key", guess)
            elif one["type"] == "missing":
                if place not in misspelt:
                    self.note(place, "is missing", "give it a value")
            else:
                wrong, right = wrong_and_right(dict(one))
                refused.setdefault((place, wrong), []).append(right)
        for (place, wrong), rights in refused.items():
            # Each branch of a union refuses by itself: one sentence for all of them.
            self.note(
                place, wrong, " or ".join([rights[0], *(r.removeprefix("it should be ") for r in rights[1:])])
            )

    def leaves(self, tree: Mapping[str, Any], default: str) -> tuple[list[Leaf], dict[str, Any]]:
        """Leaves in file order, and the tree of their plain values without the unknown ones."""
        leaves: list[Leaf] = []

        def walk(table: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
            values: dict[str, Any] = {}
            for key, entry in table.items():
                here = (*path, key)
                if isinstance(entry, Mapping) and ".".join(here) not in leaf_types():
                    values[key] = walk(entry, here)
                    continue
                leaf = self.leaf(here, entry if isinstance(entry, Mapping) else {"value": entry}, default)
                leaves.append(leaf)
                if leaf.value is not None:
                    values[key] = leaf.value
            return values

        return leaves, walk(tree, ())

    def leaf(self, path: tuple[str, ...], entry: Mapping[str, Any], default: str) -> Leaf:
        """One leaf; what it says about itself must agree."""
        place = ("architecture", *path)
        status, value, why = entry.get("status", default), entry.get("value"), entry.get("why", "")
        domain: Domain | None = None
        if "domain" in entry:
            domain, problem = domains.domain_of(".".join(path), entry["domain"])
            if problem is not None:
                key, wrong, right = problem
                self.note((*place, *key.split(".")), wrong, right)
        if status == "unknown":
            if value is not None:
                self.note((*place, "value"), "an unknown has a value", "drop the value, or the status")
            if "domain" not in entry:
                self.note(place, "an unknown has no domain", "add domain = { min = , max = , step = }")
            if not why.strip():
                self.note(place, "an unknown has no why", 'add why = "..."')
        elif value is None:
            self.note(place, f"is {status}, but has no value", 'add value, or status = "unknown"')
        line = nearest(self.lines, place)
        if isinstance(value, list):
            value = tuple(value)
        return Leaf(".".join(path), status, value, domain, tuple(entry.get("sources", ())), why, line)

    def claim(self, c: Any, index: int) -> Claim:
        return Claim(
            id=c.id,
            statement=c.statement,
            quantity=c.quantity,
            readings=tuple(Reading(r.value, r.unit, tuple(r.sources)) for r in c.readings),
            assumes=tuple(c.assumes),
            given=c.given,
            kind=c.kind,
            note=c.note,
            line=nearest(self.lines, ("claim", index)),
        )

    def assumption(self, name: str, a: Any) -> Assumption:
        tried = tuple(sorted({float(value) for value in (*a.values, a.value)}))
        line = nearest(self.lines, ("assumptions", name))
        return Assumption(name, float(a.value), tried, a.unit, tuple(a.sources), a.why, line)

    def check_references(self, spec: Spec) -> None:
        """Ids are unique, cited sources exist, `of` leads to a leaf and never back."""
        for table in ("source", "claim"):
            seen: dict[str, int] = {}
            for i, entry in enumerate(self.raw.get(table, [])):
                line = nearest(self.lines, (table, i))
                if entry["id"] in seen:
                    wrong = f"duplicate id {show(entry['id'])}"
                    right = f"line {seen[entry['id']]} has it already: give every id once"
                    self.note((table, i, "id"), wrong, right)
                seen.setdefault(entry["id"], line)
        for leaf in spec.leaves.values():
            self.check_sources(spec, ("architecture", *leaf.path.split("."), "sources"), leaf.sources)
        for assumption in spec.assumptions.values():
            self.check_sources(spec, ("assumptions", assumption.name, "sources"), assumption.sources)
        for i, claim in enumerate(spec.claims):
            for k, reading in enumerate(claim.readings):
                place = ("claim", i, "readings", k)
                self.check_sources(spec, (*place, "sources"), reading.sources)
                if reading.value.strip().lower().lstrip("+-~") in ("nan", "inf", "infinity"):
                    self.note((*place, "value"), "is not a finite number", "give the figure as printed")
        try:
            domains.ordered({leaf.path: leaf for leaf in spec.unknowns})
        except ValueError as cycle:
            path = str(cycle).split(" -> ")[0].split(".")
            wrong = f"of runs in a circle: {cycle}"
            self.note(("architecture", *path, "domain"), wrong, "give one leaf of it values")

    def check_sources(self, spec: Spec, place: KeyPath, cited: Sequence[str]) -> None:
        for source in cited:
            if source not in spec.sources:
                wrong = f"cites {show(source)}, which no [[source]] defines"
                self.note(place, wrong, did_you_mean(source, spec.sources))

    def check_possible(self, spec: Spec) -> None:
        """Some completion validates; without unknowns: the architecture does."""
        found, problems = domains.witness(spec)
        if found is not None:
            return
        for one in problems:
            place = ("architecture", *(str(part) for part in one["loc"]))
            wrong, right = wrong_and_right(one)
            if spec.unknowns:
                wrong = f"impossible domain: no completion that validates was found ({wrong})"
                right = "widen a domain under it or correct a known value"
            self.note(place, wrong, right)


def _syntax(path: Path, text: str, message: str) -> str:
    """tomllib's message with its line as ours."""
    at = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    line = int(at[1]) if at and at[1] else text.rstrip().count("\n") + 1
    wrong = "not valid TOML: " + (message[: at.start()] if at else message)
    if at and not at[1]:
        return sentence(path, line, "", wrong + " at the end of the file", "complete it: it looks cut short")
    return sentence(path, line, f"column {at[2]}" if at else "", wrong, "correct the syntax there")


def _not_finite(value: Any, place: KeyPath) -> Iterator[KeyPath]:
    """Paths of every NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _not_finite(one, (*place, key))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _not_finite(one, (*place, index))


def _at(tree: Any, place: KeyPath) -> Any:
    for part in place:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _place(loc: Sequence[str | int]) -> tuple[KeyPath, list[str]]:
    """A pydantic location as a path in the TOML file, and the keys known in its last table.

    Pydantic also names the branch of a union that it took ("plain", "stated", "int"): those are no keys.
    """
    kinds: list[Any] = [document_model()]
    place: list[str | int] = []
    siblings: list[str] = []
    for depth, part in enumerate(loc):
        if part == "[key]":
            continue
        model = next((k for k in kinds if part_type(k) is not None), None)
        table = next((k for k in kinds if get_origin(k) is dict), None)
        if isinstance(part, int):
            place.append(part)
        elif table is not None:  # its keys are the file's own
            place.append(part)
            kinds = _branches(get_args(table)[1])
        elif model is not None and part not in ("plain", "stated"):
            fields = model.model_fields
            siblings = list(fields)
            place.append(part)
            kinds = _branches(fields[part].annotation) if part in fields else []
        elif part == "stated":
            kinds = [k for k in kinds if part_type(k) is not None]
        elif depth == len(loc) - 1 and not kinds:
            place.append(part)
    return tuple(place), siblings


def _branches(annotation: Any) -> list[Any]:
    """The models that an annotation may hold: itself, its union members, its elements."""
    kind = without_none(annotation)
    if part_type(kind) is not None or not get_args(kind) or get_origin(kind) is dict:
        return [kind]
    return [leaf for inner in get_args(kind) for leaf in _branches(inner)]
