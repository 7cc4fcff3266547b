"""A failure as a script that needs nothing but the harness and the implementation."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pprint import pformat
from typing import TYPE_CHECKING, Any

from harness.results import files
from harness.results.failures import RELATIONS, shown
from harness.results.gate import CONFIG, FAILED, OK, VOID
from harness.results.header import versions
from harness.results.record import Record

if TYPE_CHECKING:
    from harness.conformance.case import Case
    from harness.conformance.property import Property
    from harness.conformance.shrinking import Attempt, Shrunken
    from harness.conformance.subjects import Subject
    from harness.spec.architecture import Architecture

INDEX = "README.md"
LONGEST = 120
"""Characters of a file's name, so that every file system takes it."""
TIMEOUT_S = 120.0
"""A property that takes longer has failed, as it has in a run by default."""
MANY = 12
"""Values of a row of logits that are printed: the first ones, and as many around what differs most."""
TEMPLATE = '''\
"""{title}

{text}

Exit code: 1 while the defect is there, 0 where the property holds, 69 where it cannot be measured.
"""

import sys

from harness.results.reproduce import main

IMPLEMENTATION = {implementation!r}{note}
PROPERTY = {slug!r}
SUITE = {suite!r}
SEED = {seed}
SPEC = {spec!r}
ARCHITECTURE = {architecture}
SHRINK = {shrink}

if __name__ == "__main__":
    sys.exit(
        main(
            IMPLEMENTATION,
            PROPERTY,
            suite=SUITE,
            seed=SEED,
            spec=SPEC,
            architecture=ARCHITECTURE,
            shrink=SHRINK,
        )
    )
'''


class FolderError(ValueError):
    """Scripts cannot be written into a folder: one sentence."""


def ensure_writable(folder: Path) -> None:
    """Make the folder. Raises FolderError unless files can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.ensure_writable(folder / ".writable")
    except OSError as error:
        told = "Not a directory" if folder.exists() and not folder.is_dir() else error.strerror
        raise FolderError(f"{folder}: scripts cannot be written there: {told}") from error


def file_name(record: Record) -> str:
    """PROPERTY-IMPLEMENTATION-SPEC.py, where a colon is an underscore; whatever else file systems may not
    take is left out, and a digest then keeps two names apart."""
    whole = "-".join((record.slug, record.implementation, record.spec)).replace(":", "_")
    safe = re.sub(r"[^\w.-]+", "_", whole, flags=re.ASCII).lstrip(".")[:LONGEST]
    digest = "" if safe == whole else "-" + hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{safe}{digest}.py"


def script(
    record: Record,
    subject: Subject,
    function: Callable[..., object],
    smaller: Shrunken | str,
) -> str:
    """The text of the script that runs one property again, on the smaller case where there is one."""
    from harness.conformance.shrinking import as_dict

    whole = subject.architecture
    plain = not re.match(r"reference$|mutant:|transformers:|openai:", subject.address)
    return TEMPLATE.format(
        title=_safe(f"{record.implementation} on {record.spec} breaks {record.slug}"),
        text=_safe("\n".join(_text(record))),
        implementation=subject.address,
        note="  # a module that Python finds from the folder where this is run" if plain else "",
        slug=record.slug,
        suite=_suite(function),
        seed=record.seed,
        spec=record.spec,
        architecture=None if whole is None else f"r'''{_wrapped(whole)}'''",
        shrink="{}"
        if isinstance(smaller, str)
        else pformat(as_dict(smaller.shrink), width=100, sort_dicts=False),
    )


def _wrapped(architecture: Architecture) -> str:
    text = json.dumps(architecture.model_dump(mode="json"))  # no string of it has a space
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def _safe(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _text(record: Record) -> Iterable[str]:
    facts, smaller = record.facts, record.facts.get("shrunken")
    yield f"{facts.get('statement', '')}"
    yield (
        f"Clause {record.clause} ({record.level})" + (f", stage {record.stage}" if record.stage else "") + "."
    )
    yield ""
    yield f"Found with {shown(facts.get('shapes', {}))}:"
    yield f"  {record.reason}"
    if isinstance(smaller, Mapping):
        yield f"Here, smaller, with {shown(smaller['shapes'])}:"
        yield f"  {smaller['reason']}"
        facts = smaller["facts"]
    elif smaller:
        yield f"{smaller}."
    for name in ("index", "observed", "expected", "difference", "tolerance", "boundary"):
        if name in facts:
            yield f"{name}: {facts[name]}"
    cited = record.facts.get("same_class", ())
    if cited:
        yield ""
        yield "Shipped defects:"
        yield from (f"- {RELATIONS[one['relation']]}, {one['shipped']}: {one['cause']}" for one in cited)
    yield ""
    have = (f"{name} {version}" for name, version in versions().items() if version)
    yield f"Written by moe-harness with {', '.join(have)}."


def index(records: Iterable[Record]) -> str:
    """The page that lists the scripts of a run."""
    rows = [(Path(r.facts["script"]).name, r) for r in records if "script" in r.facts]
    lines = ["# Failures, each with a script that shows it", ""]
    lines += [
        "Each exits 1 while the defect is there, 0 where the property holds, 69 where it cannot be measured."
    ]
    lines += ["It needs `moe-harness` and the implementation."]
    for name, record in rows:
        at = f", stage {record.stage}" if record.stage else ""
        lines += ["", f"## {record.slug} of {record.implementation} on {record.spec}"]
        lines += ["", f"`python {name}` ({record.clause}{at})", "", f"    {record.reason}"]
    return "\n".join(lines) + "\n"


def indexed(folder: Path, records: Iterable[Record]) -> str:
    """Write the index of the records' scripts; a sentence on what there is."""
    written = [record for record in records if "script" in record.facts]
    if not written:
        return f"no new failure: no script was written to {folder}"
    try:
        (folder / INDEX).write_text(index(written), encoding="utf-8")
    except OSError as error:
        return f"{folder / INDEX}: cannot be written: {error.strerror}"
    return f"scripts that reproduce failures: {len(written)}, listed in {folder / INDEX}"


def main(
    implementation: str,
    slug: str,
    *,
    suite: str,
    seed: int,
    spec: str,
    architecture: str | None,
    shrink: Mapping[str, Any],
) -> int:
    """Run one property, print how it ended; the exit code is 1 where it fails, 0 where it holds, 69 where it
    cannot be measured and 78 where implementation or property cannot be had.

    suite: a part of the shipped suites, or the file of a property that does not ship. architecture: at full
    size, JSON text; None for the implementation's own shape.
    """
    from pydantic import ValidationError

    from harness.conformance import shrinking, subjects
    from harness.implementations.registry import AdapterError, resolve
    from harness.spec.architecture import Architecture

    try:
        prop, function = _property(slug, suite)
        whole = None if architecture is None else Architecture.model_validate_json(architecture)
        subject = subjects.Subject(implementation, resolve(implementation), spec, None, whole)
        size = shrinking.of_dict(shrink)
    except (AdapterError, LookupError, OSError, TypeError, ValidationError) as error:
        print(str(error).strip().splitlines()[0], file=sys.stderr)
        return CONFIG
    ended = _attempt(prop, function, subject, seed, size)
    outcome = ended.ending.outcome
    print(f"{slug} {outcome} on {implementation}, {spec}, seed {seed}")
    print(prop.statement)
    if ended.case is not None:
        print(shown(ended.case.shapes()))
    if outcome == "passed":
        return OK
    print(ended.ending.reason)
    _print_facts(ended)
    return FAILED if outcome == "failed" else VOID


def _attempt(
    prop: Property, function: Callable[[Case], object], subject: Subject, seed: int, shrink: Any
) -> Attempt:
    from harness.conformance import shrinking, subjects
    from harness.conformance.conventions import unexplained

    try:
        subjects.need(subject, prop, seed, {})
    except Exception as error:  # noqa: BLE001  # judged like any other
        return shrinking.failed(error)
    try:
        # Of a case that is so small, any convention might be the reason.
        with unexplained(), shrinking.time_limit(TIMEOUT_S):
            return shrinking.attempt(function, prop, subject, seed, shrink)
    except shrinking.OutOfTime:
        return shrinking.failed(TimeoutError(f"it did not end in {TIMEOUT_S:.0f} s"))


def _print_facts(ended: Attempt) -> None:
    for name, value in ended.ending.facts.items():
        print(f"{name}: {value}")
    values, at = getattr(ended.error, "values", None), ended.ending.facts.get("index")
    tokens = None if ended.case is None else ended.case.drawn_tokens
    if values is None or tokens is None or values[0].dim() != 3 or at is None:
        return
    first = max(0, min(at[-1] - MANY // 2, values[0].shape[-1] - MANY))
    print(f"tokens: {tokens.tolist()}")
    for name, value in zip(("observed", "expected"), values, strict=True):
        row = value[tuple(at[:-1])][first : first + MANY].tolist()
        print(f"{name} logits {first} to {first + len(row) - 1} there: {[float(f'{x:.6g}') for x in row]}")


def _suite(function: Callable[..., object]) -> str:
    """The part of the shipped suites, such as "routing"; of a property that does not ship, its file."""
    from harness._resources import suites_dir

    path, shipped = Path(function.__code__.co_filename).resolve(), suites_dir().resolve()
    return path.relative_to(shipped).parts[0] if path.is_relative_to(shipped) else str(path)


def _property(slug: str, suite: str) -> tuple[Property, Callable[..., Any]]:
    """Raises LookupError where there is no such property, OSError where there is no such file."""
    from harness.conformance import catalogue

    found = catalogue.of_file(Path(suite)) if suite.endswith(".py") else catalogue.properties(suite)
    for prop, function in found:
        if prop.slug == slug:
            return prop, function
    raise LookupError(f"there is no property {slug} in {suite}")
