"""The register of shipped defects: what went wrong in real engines, and the mutants that show it.

The files of `defects/` hold one entry per defect. A mutant shows it in one process, or
the entry says why none can.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

FOLDER = Path(__file__).parent / "defects"


class Defect(BaseModel):
    """One defect that shipped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[A-Z]\d+$")]
    """Stable: a letter for the part (B model, S speculation, K cache and prefixes, C company, X sampling,
    Y batch invariance, V vision) and a number."""
    shipped: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """Where: repository#issue or commit, the first one first."""
    cause: Annotated[str, Field(min_length=10)]
    """What was wrong, in a sentence."""
    kind: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    """The class of defect that it belongs to: defects of one kind are caught by the same properties."""
    mutants: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Names of the mutants that show it; empty only where `unshown` says why."""
    unshown: str = ""
    """Why no mutant shows it in one process."""


@lru_cache(maxsize=1)
def register() -> Mapping[str, Defect]:
    """Every defect by its id. Raises ValueError for an entry that is none, or an id that is there twice."""
    found: dict[str, Defect] = {}
    for path in sorted(FOLDER.glob("*.toml")):
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("defect", [])
        for defect in TypeAdapter(list[Defect]).validate_python(rows):
            if defect.id in found or bool(defect.mutants) == bool(defect.unshown):
                raise ValueError(
                    f"{path.name}: {defect.id} is there twice, or has not exactly one of mutants and unshown"
                )
            found[defect.id] = defect
    return found


def of_mutant(name: str) -> tuple[Defect, ...]:
    """The shipped defects that a mutant shows."""
    return tuple(defect for defect in register().values() if name in defect.mutants)


def of_kind(kind: str) -> tuple[Defect, ...]:
    """The shipped defects of one class."""
    return tuple(defect for defect in register().values() if defect.kind == kind)
