"""What a run puts under test: each implementation on each spec, resolved before the first property runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from harness import spec as specs
from harness.spec.architecture import Architecture

if TYPE_CHECKING:
    from harness.conformance.case import Case, Shrink
    from harness.conformance.property import Property
    from harness.implementations.protocols import Implementation, Model

DEFAULT_IMPLEMENTATION = "reference"
DEFAULT_SPECS = ("mixtral-8x7b", "deepseek-v3", "gpt-oss-20b")
"""Softmax and sigmoid routers, dense layers before MoE layers, GQA and MLA, windows, sinks and biases."""
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
OWN_SHAPE = "own"
"""In the place of a spec's name: an implementation at a shape of its own choosing."""


@dataclass(frozen=True)
class Subject:
    """One implementation on one spec."""

    address: str
    """As given to --impl, less the user and password of a URL."""
    implementation: Implementation
    spec: str
    digest: str | None
    architecture: Architecture | None
    """At full size; None for the implementation's own shape."""

    @property
    def id(self) -> str:
        """As it stands in a test's brackets."""
        return f"{self.address}-{self.spec}"


def resolve(addresses: Sequence[str], spec_names: Sequence[str]) -> tuple[Subject, ...]:
    """Every implementation on every spec; an address that ends in @SPEC is on that spec alone.

    Without implementations: the reference. Without specs: the implementation's own shape if it builds
    without an architecture, else DEFAULT_SPECS. Raises SpecError or AdapterError.
    """
    from harness.implementations.registry import resolve as implementation_at

    loaded = [specs.load(name) for name in dict.fromkeys(spec_names)]
    found: dict[str, Subject] = {}
    for text in addresses or (DEFAULT_IMPLEMENTATION,):
        address, only = _pair(text)
        implementation, shown = implementation_at(address), _CREDENTIALS.sub("", address)
        mine = [specs.load(only)] if only else loaded
        if not mine and not implementation.needs_architecture:
            own = Subject(shown, implementation, OWN_SHAPE, None, None)
            found.setdefault(own.id, own)
        elif not mine:
            mine = [specs.load(name) for name in DEFAULT_SPECS]
        for spec in mine:
            one = Subject(shown, implementation, spec.name, spec.digest, spec.architecture)
            found.setdefault(one.id, one)
    return tuple(found.values())


def _pair(text: str) -> tuple[str, str]:
    """Address and spec of ADDRESS@SPEC; the @ of a URL is its own. Raises SpecError."""
    address, at, spec = text.rpartition("@")
    if not at or "://" in text:
        return text, ""
    if not spec:
        raise specs.SpecError(f"{text}: no spec stands after the @; say ADDRESS@SPEC, or ADDRESS alone")
    return address, spec


def case(subject: Subject, prop: Property, seed: int, shrink: Shrink | None = None) -> Case:
    """What the property's test function is called with.

    Raises pydantic.ValidationError where what `shrink` says is no architecture.
    """
    from harness.conformance.case import Case, Shrink, replaced

    shrink = shrink or Shrink()
    full = subject.architecture
    twin = None if full is None else specs.twin(full)
    return Case(
        implementation=subject.implementation,
        slug=prop.slug,
        seed=seed,
        spec_name=subject.spec,
        full=full,
        architecture=replaced(twin, shrink.fields) if twin is not None and shrink.fields else twin,
        shrink=shrink,
    )


def need(
    subject: Subject, prop: Property, seed: int, declared: dict[str, frozenset[str] | BaseException]
) -> None:
    """Raise Unsupported unless the subject's model declares what the property needs.

    `declared` remembers what is learned here, by subject: a model that cannot be built is built once, and
    what it raised is raised again for every property.
    """
    import pytest
    import torch

    from harness.conformance.case import model_seed
    from harness.implementations.protocols import Unsupported

    if subject.id not in declared:
        twin = None if subject.architecture is None else specs.twin(subject.architecture)
        try:
            model = subject.implementation.build(
                twin, device="cpu", dtype=torch.float32, seed=model_seed(seed)
            )
            declared[subject.id] = _capabilities(model)
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001  # it becomes the outcome
            declared[subject.id] = error
    capabilities = declared[subject.id]
    if isinstance(capabilities, BaseException):
        raise capabilities
    missing = [name for name in prop.needs if name not in capabilities]
    if missing:
        raise Unsupported(f"the model declares no capability {', '.join(map(repr, missing))}")


def _capabilities(model: Model) -> frozenset[str]:
    """What a model declares. Raises TypeError where that is no set of capabilities: a word of it that is
    misspelt would read as something that the model lacks."""
    from harness.implementations.protocols import Capability

    declared: Any = model.capabilities
    known = get_args(Capability)
    if isinstance(declared, str) or not isinstance(declared, Iterable) or set(declared) - set(known):
        raise TypeError(f"capabilities is {declared!r}; it is a set of {', '.join(known)}")
    return frozenset(declared)
