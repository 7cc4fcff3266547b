"""The run file: JSON Lines, appended as properties end; and the readers' refusal of anything less than a run.

header, one record per property, footer. The footer is written only when the run has ended of its own
accord, so a run that was killed or interrupted cannot be read as a result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from harness.results.record import SCHEMA_VERSION, Canary, Footer, Header, Key, Line, Null, Record, count

AnyLine = TypeVar("AnyLine", bound=Line)


class RunFileError(ValueError):
    """A file is not a complete run: one sentence with file, line and what is wrong."""


@dataclass(frozen=True)
class Run:
    """A complete run."""

    path: Path
    header: Header
    records: tuple[Record, ...]
    footer: Footer


class RunWriter:
    """Appends to a run file, each line on disk before the next property begins."""

    def __init__(self, path: Path, header: Header) -> None:
        """Start the file anew. Raises RunFileError if it cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise RunFileError(f"{path}: cannot be written: {error.strerror}") from error
        self._write(header)

    def record(self, record: Record) -> None:
        """Append one property's record."""
        self._write(record)

    def finish(
        self,
        records: Sequence[Record],
        canary: Canary | None,
        null: Null | Literal["off"] | None = None,
    ) -> None:
        """End the run: from now on the file is a result."""
        self._write(Footer(finished=now(), counts=count(records), canary=canary, null=null))
        self.close()

    def close(self) -> None:
        """Close the file; without `finish` it stays an unfinished run."""
        self._file.close()

    def _write(self, line: Line) -> None:
        self._file.write(json.dumps(line.model_dump(mode="json"), allow_nan=False) + "\n")
        self._file.flush()


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(path: Path) -> Run:
    """The run in a file.

    Raises RunFileError: not a file, not text, no header or an unknown schema version, a line that is cut
    off or not as written, the same property twice, no footer, a footer that counts other records.
    """
    lines = _lines(path)
    header = _header(path, lines)
    if len(lines) < 2 or lines[-1].get("kind") != "footer":
        raise RunFileError(
            f"{path}:{len(lines)}: there is no footer, so this run was killed or interrupted and is not a "
            "result; run it again"
        )
    records = tuple(_parse(path, i, Record, line) for i, line in enumerate(lines[1:-1], start=2))
    footer = _parse(path, len(lines), Footer, lines[-1])
    _no_duplicates(path, records)
    if count(records) != {**count(()), **footer.counts}:
        raise RunFileError(f"{path}:{len(lines)}: the footer counts other records than the file holds")
    return Run(path, header, records, footer)


def combine(runs: Sequence[Run]) -> Run:
    """Several runs as one, as parallel jobs leave them.

    Raises RunFileError if a property is in two of them, or if they differ in what makes their records
    comparable: harness version, seed, library versions, the digest of a spec.
    """
    if not runs:
        raise RunFileError("there is no run to combine; name at least one run file")
    first = runs[0]
    digests: dict[str, str | None] = {}
    owners: dict[Key, Path] = {}
    for run in runs:
        for name in ("harness", "seed", "versions"):
            ours, theirs = getattr(first.header, name), getattr(run.header, name)
            if ours != theirs:
                raise RunFileError(
                    f"{run.path}: {name} is {theirs}, but {ours} in {first.path}; combine runs of one set-up"
                )
        for spec, digest in run.header.specs.items():
            if digests.setdefault(spec, digest) != digest:
                raise RunFileError(f"{run.path}: spec {spec} is not the file that the other runs used")
        for record in run.records:
            if record.key in owners:
                raise RunFileError(f"{run.path}: {record.key} is also in {owners[record.key]}")
            owners[record.key] = run.path
    records = tuple(record for run in runs for record in run.records)
    implementations = tuple(dict.fromkeys(i for run in runs for i in run.header.implementations))
    header = first.header.model_copy(update={"implementations": implementations, "specs": digests})
    return Run(
        first.path,
        header,
        records,
        first.footer.model_copy(
            update={
                "counts": count(records),
                "canary": _worst(run.footer.canary for run in runs),
                "null": _emptiest(run.footer.null for run in runs),
            }
        ),
    )


def _worst(canaries: Iterable[Canary | None]) -> Canary | None:
    seen = list(canaries)
    return next((c for c in seen if c is None or not c.caught), seen[0])


def _emptiest(nulls: Iterable[Null | Literal["off"] | None]) -> Null | Literal["off"] | None:
    """The one that voids its run, or the first that there is."""
    seen = list(nulls)
    ran = [null for null in seen if isinstance(null, Null)]
    return next((null for null in ran if null.vacuous), ran[0] if ran else seen[0])


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunFileError(f"{path}: is not text, so it is no run file") from error
    except OSError as error:
        raise RunFileError(f"{path}: cannot be read: {error.strerror}") from error
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunFileError(
                f"{path}:{number}: the line is cut off or is not JSON, so this is no complete run file"
            ) from error
        if not isinstance(value, dict):
            raise RunFileError(f"{path}:{number}: a line of a run file is a JSON object")
        lines.append(value)
    return lines


def _header(path: Path, lines: list[dict[str, Any]]) -> Header:
    if not lines or lines[0].get("kind") != "header":
        raise RunFileError(f"{path}:1: there is no header, so this is no run file")
    version = lines[0].get("schema_version")
    if version != SCHEMA_VERSION:
        raise RunFileError(f"{path}:1: schema_version is {version}; this harness reads {SCHEMA_VERSION}")
    return _parse(path, 1, Header, lines[0])


def _parse(path: Path, number: int, kind: type[AnyLine], line: dict[str, Any]) -> AnyLine:
    try:
        return kind.model_validate(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "line"
        raise RunFileError(f"{path}:{number}: {field}: {first['msg']}") from error


def _no_duplicates(path: Path, records: tuple[Record, ...]) -> None:
    seen: dict[Key, int] = {}
    for number, record in enumerate(records, start=2):
        if record.key in seen:
            raise RunFileError(f"{path}:{number}: {record.key} is already on line {seen[record.key]}")
        seen[record.key] = number
