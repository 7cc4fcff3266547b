"""A spec document: one TOML file on one model, with its unknowns, its claims and their sources.

The architecture's leaves may be plain values or tables that say how a value is known:

    n_layers = { value = 120, status = "leaked", sources = ["A"], domain = { values = [96, 120] } }
    d_model = { status = "unknown", domain = { min = 4096, max = 20480, step = 256 }, why = "no width given" }
    d_ff = { status = "unknown", domain = { of = "d_model", values = [2, 4], also = [8192] }, why = "..." }

A plain value is *published* (or *leaked*, ...: `default_status`). A completion assigns every unknown.
Beside [architecture] a file holds title, [[source]] (id, title, url), [[claim]] (id, statement, quantity,
readings = [{ value, unit, sources }], given, assumes, kind, note), facts in [training] and [serving] (a
number, or a list of those that it may be), and in [assumptions.NAME] what no source says and theory needs:

    [assumptions.failure_rate]
    value = 2e-5
    values = [5e-6, 1e-5, 2e-5, 5e-5] # what is tried, to see where a verdict turns
    unit = "1/h"
    why = "failures of one GPU and hour in the run of Llama 3"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from harness.spec.architecture import Architecture, part_type
from harness.spec.errors import SpecError, did_you_mean, dotted, sentence, wrong_and_right

Status = Literal["published", "leaked", "inferred", "unknown"]
Value = int | float | bool | str | tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """The values a leaf may take: listed, or arithmetic, or copied from / in ratio to another leaf.

    `values`: listed literals. `of`: the dotted path of another leaf; then each of `values` is a
    factor on it (d_ff = 4 x d_model is of = "d_model", values = [4]; multi-head attention is
    n_kv_heads of = "attention.n_heads", values = [1]). `also`: literals beside those (n_kv_heads = 1).
    """

    values: tuple[Value, ...]
    of: str | None = None
    also: tuple[Value, ...] = ()

    def given(self, base: float | None = None) -> tuple[Value, ...]:
        """The literal values, once the leaf that `of` names is `base`; a product that is whole is an int."""
        if self.of is None or base is None:
            return self.values + self.also
        products = [float(base * v) for v in self.values if isinstance(v, (int, float))]
        scaled: list[Value] = [int(p) if p.is_integer() else p for p in products]
        return tuple(dict.fromkeys((*scaled, *self.also)))


@dataclass(frozen=True)
class Leaf:
    """How one leaf of the architecture is known."""

    path: str
    """Dotted: "attention.n_heads"."""
    status: Status
    value: Value | None
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
class Assumption:
    """A number that no source gives and theory needs: an axis "assumptions.NAME"."""

    name: str
    value: float
    """The one that is assumed; a derivation is shown there."""
    values: tuple[float, ...]
    """All that are tried, in ascending order, `value` among them."""
    unit: str = ""
    sources: tuple[str, ...] = ()
    why: str = ""
    line: int = 0


@dataclass(frozen=True)
class Pin:
    """What a caller puts in the place of what a spec says of one axis."""

    axis: str
    """"training.gpus", "assumptions.failure_rate", "architecture.d_model"."""
    values: tuple[Value, ...]
    before: tuple[Value, ...]
    """What the spec tries there."""
    restates: tuple[str, ...] = ()
    """Claims of the kind assumption that now state these values."""


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
    lines: Mapping[str, int] = field(default_factory=dict)
    """Where each entry of [training], [serving] and [assumptions] stands: "training.tokens" -> line."""
    assumptions: Mapping[str, Assumption] = field(default_factory=dict)
    """By name."""
    pins: tuple[Pin, ...] = ()
    """How this spec differs from its file (`harness.audit.assume`)."""

    @property
    def unknowns(self) -> tuple[Leaf, ...]:
        """The leaves without a value, in file order."""
        return tuple(leaf for leaf in self.leaves.values() if leaf.status == "unknown")

    @property
    def architecture(self) -> Architecture:
        """The architecture; raises SpecError naming the unknowns if there are any."""
        return self.complete({})

    def complete(self, values: Mapping[str, Any]) -> Architecture:
        """The architecture with `values` (dotted path -> value) put in, validated.

        Values may also replace leaves that are not unknown. Raises SpecError.
        """
        missing = [leaf.path for leaf in self.unknowns if leaf.path not in values]
        if missing:
            line = self.leaves[missing[0]].line
            wrong = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} unknown"
            raise SpecError(sentence(self.path, line, "architecture", wrong, "give every unknown a value"))
        try:
            return Architecture.model_validate(self.filled(values))
        except ValidationError as error:
            raise SpecError("\n".join(self._sentences(error))) from None

    def vectorised(self, values: Mapping[str, Any]) -> Architecture:
        """The same unvalidated, so that values may be float64 numpy arrays that broadcast."""
        made = _construct(Architecture, self.filled(values))
        assert isinstance(made, Architecture)
        return made

    def filled(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The template with `values` put in; raises SpecError on a path that is no leaf."""
        known = leaf_paths(Architecture)
        tree = _copied(self.template)
        for path, value in values.items():
            if path not in known:
                wrong, right = f'"{path}" is no leaf of the architecture', did_you_mean(path, known)
                raise SpecError(sentence(self.path, None, "architecture", wrong, right))
            *parents, last = path.split(".")
            table = tree
            for parent in parents:
                table = table.setdefault(parent, {})
            table[last] = value
        return tree

    def _sentences(self, error: ValidationError) -> Iterator[str]:
        """One sentence per error of a completion, at the line of the nearest leaf in the file."""
        for one in error.errors():
            place = [str(part) for part in one["loc"]]
            leaves = self.leaves.values()
            under = [leaf.line for leaf in leaves if leaf.path.split(".")[: len(place)] == place]
            wrong, right = wrong_and_right(one)
            if one["type"] == "missing":
                wrong, right = "is missing", "give it a value"
            field = dotted(["architecture", *place])
            yield sentence(self.path, min(under, default=None), field, wrong, right)


def leaf_paths(model: type[BaseModel], prefix: str = "") -> tuple[str, ...]:
    """Dotted paths of every leaf of a model, in field order."""
    paths: list[str] = []
    for name, info in model.model_fields.items():
        part = part_type(info.annotation)
        paths += [prefix + name] if part is None else leaf_paths(part, f"{prefix}{name}.")
    return tuple(paths)


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _construct(model: type[BaseModel], tree: Mapping[str, Any]) -> BaseModel:
    """model_construct, parts included; a list becomes the tuple that validation would make of it."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        part = part_type(model.model_fields[key].annotation)
        if part is not None:
            values[key] = _construct(part, value)
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    return model.model_construct(**values)
