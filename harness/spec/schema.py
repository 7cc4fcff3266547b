"""What a TOML file may hold: pydantic models derived from `Architecture`, and the JSON Schema of them.

Every leaf T of the architecture becomes "T, or a table saying how T is known"; nothing about the
architecture is written down twice.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    WithJsonSchema,
    create_model,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from harness.spec.architecture import Architecture, part_type, without_none
from harness.spec.document import Status

T = TypeVar("T")
Scalar = bool | int | float | str
Fact = Scalar | list[Scalar]
KnownStatus = Literal["published", "leaked", "inferred"]

CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Table(BaseModel):
    """A TOML table: unknown keys are refused."""

    model_config = CONFIG


class DomainTable(Table):
    """The values a leaf may take: listed, arithmetic (min, max, step), or factors `of` another leaf."""

    values: list[Scalar] | None = Field(None, description="Listed values; with `of`: factors on that leaf.")
    min: int | float | None = Field(None, description="First value of an arithmetic domain.")
    max: int | float | None = Field(None, description="Last value, included if the steps reach it.")
    step: int | float | None = Field(None, description="Distance between values, above 0.")
    of: str | None = Field(None, description="Dotted path of the leaf on which `values` are factors.")
    also: list[Scalar] = Field([], description="Literal values beside the factors.")


class Stated(Table, Generic[T]):
    """A leaf with the way it is known."""

    value: T | None = Field(None, description="Absent if, and only if, status is unknown.")
    status: Status | None = Field(None, description="Default: the document's default_status.")
    domain: DomainTable | None = Field(None, description="What an unknown ranges over.")
    sources: list[str] = Field([], description="Ids of [[source]] tables.")
    why: str = Field("", description="Why it is unknown, or how it was inferred.")


class SourceTable(Table):
    """A document that the spec cites."""

    id: str = Field(min_length=1)
    title: str
    url: str = ""
    note: str = ""


class ReadingTable(Table):
    """One value as some of the sources print it."""

    value: str = Field(description='As printed: "~1.8e12", "<30", "90-100", "yes".')
    unit: str = ""
    sources: list[str] = Field(min_length=1, description="Ids of [[source]] tables.")


class ClaimTable(Table):
    """One statement of the sources about one quantity."""

    id: str = Field(min_length=1)
    statement: str
    quantity: str = Field("", description="Name of a quantity the audit knows, or empty.")
    readings: list[ReadingTable] = []
    assumes: list[str] = []
    given: dict[str, Fact] = Field({}, description="The claim's own constants: gpus, convention, ...")
    kind: Literal["claim", "assumption"] = "claim"
    note: str = ""


_NUMBER = {"type": "number", "minimum": 0}
_ENTRY = {"anyOf": [_NUMBER, {"type": "array", "items": _NUMBER, "minItems": 1}]}
Entry = Annotated[int | float | list[int | float] | None, WithJsonSchema(_ENTRY)]
"""A number, or a list of those that it may be."""


class Facts(Table):
    """Each entry is a number of at least 0, or a list of those that it may be."""

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, entry: Any) -> Any:
        """One sentence in place of one for each branch of the union."""
        values = entry if isinstance(entry, list) else [entry]
        if not values or not all(type(value) in (int, float) and value >= 0 for value in values):
            raise PydanticCustomError(
                "numbers", "Input should be a number of at least 0, or a list of those that it may be"
            )
        return entry


class TrainingTable(Facts):
    """The training run."""

    tokens: Entry = None
    text_epochs: Entry = None
    code_epochs: Entry = None
    context: Entry = None
    batch_tokens: Entry = None
    gpus: Entry = None
    days: Entry = None
    gpu_hour_usd: Entry = None
    tensor_parallel: Entry = None
    pipeline_parallel: Entry = None
    zero_stage: Entry = None
    gpu_memory: Entry = Field(None, description="Bytes of one GPU.")
    peak_flops: Entry = Field(None, description="FLOP/s of one GPU.")


_NAME = "^[a-z][a-z0-9_]*$"


def _argument(name: Any) -> Any:
    if not re.match(_NAME, str(name)):
        raise PydanticCustomError("name", "Input should be lower-case letters, digits and _, a letter first")
    return name


Name = Annotated[str, Field(pattern=_NAME), BeforeValidator(_argument)]
"""Of an assumption: an argument of the closed forms that take it."""


class AssumptionTable(Table):
    """A number that no source gives and theory needs; quantities take it as "assumptions.NAME"."""

    value: float = Field(description="The one that is assumed.")
    values: list[float] = Field([], description="What is tried beside it, to see where a verdict turns.")
    unit: str = ""
    sources: list[str] = Field([], description="Ids of [[source]] tables.")
    why: str = Field(min_length=1, description="Why this value, and these.")


class ServingTable(Facts):
    """One inference cluster."""

    tensor_parallel: Entry = None
    pipeline_parallel: Entry = None
    head_share: Entry = Field(None, description="What the head node holds, of an ordinary node's share.")
    context: Entry = None
    batch: Entry = None
    bytes_per_parameter: Entry = None


def _leaf_type(field: FieldInfo) -> Any:
    annotation = without_none(field.annotation)
    return Annotated[(annotation, *field.metadata)] if field.metadata else annotation


def _form(value: Any) -> str:
    return "stated" if isinstance(value, dict) else "plain"


def _table_of(model: type[BaseModel]) -> type[BaseModel]:
    """The TOML form of a part of the architecture: each leaf T becomes T | Stated[T]."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        part = part_type(field.annotation)
        if part is not None:
            kind: Any = _table_of(part)
        else:
            leaf = _leaf_type(field)
            kind = Annotated[
                Annotated[leaf, Tag("plain")] | Annotated[Stated[leaf], Tag("stated")],  # type: ignore[valid-type]
                Discriminator(_form),
            ]
        fields[name] = (kind, ... if field.is_required() else field.default)
    made: type[BaseModel] = create_model(
        f"{model.__name__}Table", __base__=Table, __doc__=model.__doc__, **fields
    )
    return made


@cache
def document_model() -> type[BaseModel]:
    """The pydantic model of a whole TOML file."""
    return create_model(
        "Document",
        __base__=Table,
        __doc__="A spec: one TOML file on one model.",
        name=(str, Field("", description="Default: the file's name without .toml.")),
        title=(str, ...),
        default_status=(KnownStatus, "published"),
        source=(list[SourceTable], []),
        architecture=(_table_of(Architecture), ...),
        training=(TrainingTable, TrainingTable()),
        serving=(ServingTable, ServingTable()),
        assumptions=(dict[Name, AssumptionTable], {}),
        claim=(list[ClaimTable], []),
    )


@cache
def leaf_types() -> dict[str, Any]:
    """Dotted path -> type of every leaf of an Architecture, in field order."""

    def walk(model: type[BaseModel], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, field in model.model_fields.items():
            part = part_type(field.annotation)
            if part is not None:
                found |= walk(part, f"{prefix}{name}.")
            else:
                found[prefix + name] = _leaf_type(field)
        return found

    return walk(Architecture, "")


@cache
def leaf_adapter(path: str) -> TypeAdapter[Any]:
    """Validator of one leaf's values. Raises KeyError on a path that is no leaf."""
    return TypeAdapter(leaf_types()[path], config=ConfigDict(strict=True, allow_inf_nan=False))


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a spec file."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return head | document_model().model_json_schema()


def write_schema(folder: Path) -> Path:
    """Write spec.schema.json into `folder` and return its path."""
    path = folder / "spec.schema.json"
    path.write_text(json.dumps(json_schema(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path
