"""Architecture -> TOML text that `harness.spec.load` reads back as the same architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tomlkit
from pydantic import BaseModel
from tomlkit.items import Table

from harness.spec.architecture import Architecture
from harness.spec.document import Source, Status

SCHEMA = "spec.schema.json"


@dataclass(frozen=True)
class Statement:
    """How a leaf is known, where it is not simply published."""

    status: Status
    why: str


def to_toml(
    architecture: Architecture,
    *,
    name: str,
    title: str,
    sources: Sequence[Source] = (),
    statements: Mapping[str, Statement] | None = None,
    comments: Sequence[str] = (),
) -> str:
    """A spec file: leaves that equal their default are left out.

    statements: by the dotted path of a leaf ("dtype", "attention.rope.theta"); such a leaf is always
    written. comments: lines put at the top, below the name of the schema.
    """
    document = tomlkit.document()
    document.add(tomlkit.comment(f":schema {SCHEMA}"))
    for line in comments:
        document.add(tomlkit.comment(line))
    document.add("name", tomlkit.item(name))
    document.add("title", tomlkit.item(title))
    if sources:
        tables = tomlkit.aot()
        for source in sources:
            table = tomlkit.table()
            for key in ("id", "title", "url", "note"):
                if getattr(source, key):
                    table.add(key, getattr(source, key))
            tables.append(table)
        document.add("source", tables)
    document.add("architecture", _table(architecture, "", statements or {}))
    text = tomlkit.dumps(document)
    # tomlkit puts a space after the hash, which editors do not take for a schema.
    return text.replace(f"# :schema {SCHEMA}", f"#:schema {SCHEMA}", 1)


def _table(part: BaseModel, path: str, statements: Mapping[str, Statement]) -> Table:
    """A TOML table of what differs from the defaults: leaves first, then the tables below."""
    table, below = tomlkit.table(), tomlkit.table()
    for name, field in type(part).model_fields.items():
        value, place = getattr(part, name), path + name
        if place in statements:
            table.add(name, _stated(value, statements[place]))
        elif field.is_required() or value != field.default:
            if isinstance(value, BaseModel):
                below.add(name, _table(value, f"{place}.", statements))
            else:
                table.add(name, _plain(value))
    for name, inner in below.items():
        table.add(name, inner)
    return table


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _stated(value: Any, statement: Statement) -> Any:
    inline = tomlkit.inline_table()
    inline.update({"value": _plain(value), "status": statement.status, "why": statement.why})
    return inline
