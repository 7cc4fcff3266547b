"""One line of a run file: its header, a record per property, its footer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

Outcome = Literal["passed", "failed", "unsupported", "expected", "stale", "void"]
OUTCOMES: tuple[Outcome, ...] = ("passed", "failed", "unsupported", "expected", "stale", "void")
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Key(NamedTuple):
    """What identifies a record within a run, and an entry within a baseline."""

    implementation: str
    spec: str
    slug: str

    def __str__(self) -> str:
        return f"{self.slug} of {self.implementation} on {self.spec}"


class Line(BaseModel):
    """Frozen, and strict about what it does not know: a file of another making is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Header(Line):
    """The first line: what was run, with what, where."""

    kind: Literal["header"] = "header"
    schema_version: Literal[1] = 1
    harness: str
    """Version of moe-harness."""
    versions: dict[str, str | None]
    """Python and the libraries that decide numbers; None where one is not installed."""
    machine: dict[str, Any]
    started: str
    """UTC, ISO 8601."""
    seed: int
    implementations: tuple[str, ...]
    specs: dict[str, Digest | None]
    """sha256 of each spec's file; None for an implementation's own shape."""
    options: dict[str, Any] = {}


class Record(Line):
    """How one property of one implementation on one spec ended."""

    kind: Literal["record"] = "record"
    slug: str
    clause: str
    level: Literal["MUST", "SHOULD"]
    implementation: str
    spec: str
    spec_digest: Digest | None
    seed: int
    outcome: Outcome
    reason: str = ""
    """The counterexample, or why it could not be measured; empty if, and only if, it passed."""
    stage: str = ""
    """Where in the router's stage trace it broke, when that is known."""
    input_digest: Digest | None = None
    """sha256 of what was drawn as input; None if nothing was."""
    crashed: bool = False
    """It failed by an exception, a malformed answer or by taking too long: not by a counterexample."""
    facts: dict[str, Any] = {}
    duration_s: Seconds
    implementation_s: Seconds | None = None
    """Of it, what passed inside of calls of the implementation: the rest is the harness's. None: unknown."""
    telemetry: dict[str, Any] = {}

    @property
    def key(self) -> Key:
        """What identifies this record within its run."""
        return Key(self.implementation, self.spec, self.slug)

    @property
    def failing(self) -> bool:
        """Whether the property was broken, expected or not."""
        return self.outcome in ("failed", "expected")

    @property
    def passing(self) -> bool:
        """Whether the property held, whatever a baseline said."""
        return self.outcome in ("passed", "stale")


class Canary(Line):
    """How the implementation that must fail did."""

    caught: bool
    reason: str
    """Its counterexample; or why it was not caught."""


class OnNull(Line):
    """How one property ended on the implementation that computes nothing: no result of the run."""

    slug: str
    outcome: Literal["passed", "failed", "crashed", "unsupported", "void"]
    reason: str
    harness_s: Seconds
    """Processor time outside of the implementation; what ends early here takes longer elsewhere."""


class Null(Line):
    """What the null implementation shows: what a constant satisfies, and what the harness takes."""

    measured: tuple[OnNull, ...]
    left: tuple[str, ...] = ()
    """Properties that its budget of time did not reach."""

    @property
    def passed(self) -> tuple[str, ...]:
        """The properties that a constant satisfies."""
        return tuple(one.slug for one in self.measured if one.outcome == "passed")

    @property
    def vacuous(self) -> bool:
        """Whether it passed several properties, and none told it from a right answer; who asks for a single
        one by its name is told what that one is worth, and gets its outcome."""
        told = any(one.outcome in ("failed", "void") for one in self.measured)
        return len(self.passed) > 1 and not told


class Footer(Line):
    """The last line: without it the run did not end, and is not a result."""

    kind: Literal["footer"] = "footer"
    finished: str
    """UTC, ISO 8601."""
    counts: dict[Outcome, int]
    canary: Canary | None
    """None if no canary ran, for instance because nothing else did."""
    null: Null | Literal["off"] | None = None
    """off: by --no-null. None: it did not run, as in the files of earlier versions."""


def count(records: Sequence[Record]) -> dict[Outcome, int]:
    """How many records ended in each outcome; every outcome is named."""
    return {outcome: sum(r.outcome == outcome for r in records) for outcome in OUTCOMES}


def jsonable(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite, and whatever is unknown, as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in value]
    if hasattr(value, "tolist"):  # a tensor or an array
        return jsonable(value.tolist())
    return str(value)
