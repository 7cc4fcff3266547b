"""A spec document: one TOML file on one model, with its unknowns, its claims and their sources.

The architecture's leaves may be plain values or tables that say how a value is known:

    n_layers = { value = 120, status = "leaked", sources = ["A", "B", "C", "D"], domain = { min = 96, max = 144, step = 12 } }
    d_model  = { status = "unknown", domain = { min = 4096, max = 20480, step = 256 }, why = "no source gives a width" }

A plain value is *published* (or *leaked*, ...: `default_status`). A completion assigns every unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness.spec.architecture import Architecture

Status = Literal["published", "leaked", "inferred", "unknown"]


class SpecError(ValueError):
    """A spec, config or baseline cannot be used: one sentence with file, line and field."""


@dataclass(frozen=True)
class Domain:
    """The values a leaf may take: listed, or arithmetic, or copied from / in ratio to another leaf.

    `values`: listed literals. `of`: the dotted path of another leaf; then each of `values` is a
    factor on it (d_ff = 4 x d_model is of = "d_model", values = [4]; multi-head attention is
    n_kv_heads of = "attention.n_heads", values = [1]). `also`: literals beside those (n_kv_heads = 1).
    """

    values: tuple[int | float | bool | str, ...]
    of: str | None = None
    also: tuple[int | float | bool | str, ...] = ()


@dataclass(frozen=True)
class Leaf:
    """How one leaf of the architecture is known."""

    path: str
    """Dotted: "attention.n_heads"."""
    status: Status
    value: int | float | bool | str | None
    """None if, and only if, the status is unknown."""
    domain: Domain | None = None
    """What it ranges over when it is unknown, or when a claim about it is left out."""
    sources: tuple[str, ...] = ()
    why: str = ""
    line: int = 0


@dataclass(frozen=True)
class Source:
    """A document that a spec cites."""

    id: str
    title: str
    url: str = ""
    note: str = ""


@dataclass(frozen=True)
class Reading:
    """One value as some of the sources print it: '~1.8e12', '<30', '90-100', '>10', 'yes'."""

    value: str
    unit: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """One statement of the sources about one quantity.

    `quantity` names a quantity of `harness.audit.quantities` (or is "" where none can exist), `given`
    holds the claim's own constants (gpus, gpu_hour_usd, bytes_per_parameter, convention, ...).
    """

    id: str
    statement: str
    quantity: str
    readings: tuple[Reading, ...]
    assumes: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    kind: Literal["claim", "assumption"] = "claim"
    """An assumption (d_ff = 4 d_model, q width = d_model) is ours, not a source's: it may be dropped."""
    note: str = ""
    line: int = 0


@dataclass(frozen=True)
class Spec:
    """A validated document."""

    name: str
    title: str
    path: Path
    digest: str
    """sha256 of the file's bytes."""
    leaves: Mapping[str, Leaf]
    sources: Mapping[str, Source]
    claims: tuple[Claim, ...]
    training: Mapping[str, Any]
    serving: Mapping[str, Any]
    template: Mapping[str, Any]
    """[architecture] with statuses stripped and unknown leaves absent."""

    @property
    def unknowns(self) -> tuple[Leaf, ...]:
        """The leaves without a value, in file order."""
        return tuple(leaf for leaf in self.leaves.values() if leaf.status == "unknown")

    @property
    def architecture(self) -> Architecture:
        """The architecture; raises SpecError naming the unknowns if there are any."""
        raise NotImplementedError

    def complete(self, values: Mapping[str, Any]) -> Architecture:
        """The architecture with `values` (dotted path -> value) put in, validated."""
        raise NotImplementedError

    def vectorised(self, values: Mapping[str, Any]) -> Architecture:
        """The same unvalidated, so that values may be float64 numpy arrays that broadcast."""
        raise NotImplementedError


def load(name_or_path: str | Path) -> Spec:
    """Load a shipped spec by name ("mixtral-8x7b") or any file by path. Raises SpecError."""
    raise NotImplementedError


def names() -> tuple[str, ...]:
    """Names of the shipped specs, sorted."""
    raise NotImplementedError
