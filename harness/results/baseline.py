"""Known failures: a TOML file that the tool writes, one entry per implementation, spec and property.

A failure that is not in it is new, an entry that no longer fails is stale, and both fail the gate.
Comments and reasons that people edit survive a rewrite.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
import tomlkit.exceptions
from tomlkit import TOMLDocument

from harness.results import files
from harness.results.record import Key, Outcome, Record

VERSION = 1
FIELDS = ("implementation", "spec", "property", "outcome", "reason", "issue")
REQUIRED = FIELDS[:5]
PREAMBLE = (
    "Known failures, written by `moe-harness check --write-baseline`.",
    "A reason may be edited, and an issue added; an entry that no longer fails must go.",
)

STALE = "passes now, but the baseline says that it fails"


class BaselineError(ValueError):
    """A baseline cannot be used: one sentence with file, entry and field."""


@dataclass(frozen=True)
class Entry:
    """One known failure."""

    key: Key
    reason: str
    issue: str = ""


Baseline = Mapping[Key, Entry]


def load(path: Path) -> Baseline:
    """The entries of a baseline. Raises BaselineError."""
    return _entries(path, _document(path))


def ensure_writable(path: Path) -> None:
    """Raise BaselineError unless `write` can bring a baseline there up to date."""
    if path.exists():
        load(path)
    try:
        files.ensure_writable(path)
    except OSError as error:
        raise BaselineError(f"{path}: cannot be written: {error.strerror}") from error


def apply(record: Record, baseline: Baseline) -> Record:
    """The record as the baseline makes it read: failed or expected, passed or stale."""
    known = record.key in baseline
    outcome: Outcome = record.outcome
    if record.failing:
        outcome = "expected" if known else "failed"
    elif record.passing:
        outcome = "stale" if known else "passed"
    if outcome == record.outcome:
        return record
    reason = STALE if outcome == "stale" else record.reason
    return record.model_copy(update={"outcome": outcome, "reason": "" if outcome == "passed" else reason})


def write(path: Path, records: Iterable[Record]) -> tuple[int, int]:
    """Bring a baseline up to date with a run, and return how many entries were added and removed.

    Entries that the run did not exercise stay. Raises BaselineError if what is there is no baseline, or
    if it cannot be written.
    """
    document = _document(path) if path.exists() else _new()
    known = _entries(path, document)
    ran = {record.key: record for record in records if record.failing or record.passing}
    fixed = {key for key in known if key in ran and not ran[key].failing}
    fresh = sorted(key for key, record in ran.items() if record.failing and key not in known)
    tables = document.setdefault("expected", tomlkit.aot())
    for index in reversed(range(len(tables))):
        if _key(tables[index]) in fixed:
            del tables[index]
    for key in fresh:
        table = tomlkit.table()
        reason = ran[key].reason
        for name, value in zip(REQUIRED, (*key, "failed", reason), strict=True):
            table[name] = value
        tables.append(table)
    try:
        path.write_text(tomlkit.dumps(document), encoding="utf-8")
    except OSError as error:
        raise BaselineError(f"{path}: cannot be written: {error.strerror}") from error
    return len(fresh), len(fixed)


def _new() -> TOMLDocument:
    document = tomlkit.document()
    for line in PREAMBLE:
        document.add(tomlkit.comment(line))
    document["version"] = VERSION
    return document


def _document(path: Path) -> TOMLDocument:
    try:
        return tomlkit.parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise BaselineError(f"{path}: is not text, so it is no baseline") from error
    except OSError as error:
        raise BaselineError(f"{path}: cannot be read: {error.strerror}") from error
    except tomlkit.exceptions.ParseError as error:
        raise BaselineError(f"{path}:{error.line}: is not TOML: {error}") from error


def _entries(path: Path, document: TOMLDocument) -> dict[Key, Entry]:
    _known_words(f"{path}", document, ("version", "expected"))
    if document.get("version") != VERSION:
        raise BaselineError(f"{path}: version: it is {document.get('version')}; write version = {VERSION}")
    tables = document.get("expected", [])
    if not isinstance(tables, list):
        raise BaselineError(f"{path}: expected: write each entry as [[expected]]")
    entries: dict[Key, Entry] = {}
    for number, table in enumerate(tables, start=1):
        entry = _entry(f"{path}: entry {number}", table)
        if entry.key in entries:
            raise BaselineError(f"{path}: entry {number}: {entry.key} is already listed; keep one of them")
        entries[entry.key] = entry
    return entries


def _entry(place: str, table: Any) -> Entry:
    if not isinstance(table, Mapping):
        raise BaselineError(f"{place}: write each entry as a [[expected]] table")
    _known_words(place, table, FIELDS)
    for name in FIELDS:
        value = table.get(name)
        if value is None and name in REQUIRED:
            raise BaselineError(f"{place}: {name}: is missing; every entry says {', '.join(REQUIRED)}")
        if value is not None and not isinstance(value, str):
            raise BaselineError(f"{place}: {name}: is {value!r}; write a text")
    if table["outcome"] != "failed":
        raise BaselineError(f'{place}: outcome: is {table["outcome"]!r}; only "failed" can be expected')
    if not table["reason"].strip():
        raise BaselineError(f"{place}: reason: is empty; say why the failure is accepted")
    return Entry(_key(table), str(table["reason"]), str(table.get("issue", "")))


def _key(table: Mapping[str, Any]) -> Key:
    return Key(str(table["implementation"]), str(table["spec"]), str(table["property"]))


def _known_words(place: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for word in table:
        if word not in known:
            close = difflib.get_close_matches(word, known, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"known are {', '.join(known)}"
            raise BaselineError(f"{place}: {word}: is unknown; {hint}")
