"""From a string to an implementation: `reference`, `independent`, `null`, `mutant:NAME`,
`transformers:NAME[,key=value...]`, `openai:URL[,key=value...]`, or
`package.module:factory` for a stranger's own."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.implementations.protocols import Implementation

MAPPED_FAMILIES = ("dbrx", "deepseek_v3", "gpt2", "gpt_oss", "llama", "mixtral", "olmoe", "qwen3_moe")
"""Families of transformers that can be built from an architecture and loaded with the reference's weights."""

PLAIN = {
    "reference": ("harness.implementations.reference", "Reference"),
    "independent": ("harness.implementations.independent", "Independent"),
    "null": ("harness.implementations.null", "Null"),
}
"""Addresses that are one word: module and class."""

OPTIONS = {"experts": ("eager", "batched_mm", "grouped_mm"), "attention": ("auto", "eager", "sdpa")}
"""What may follow `transformers:NAME,`; the first of each is the default."""


class AdapterError(ValueError):
    """An implementation cannot be had under that address: one sentence saying why, and what would do."""


def names() -> tuple[str, ...]:
    """Addresses that `resolve` knows without being told more: the reference, the mutants and the mapped
    families of transformers. Imports neither torch nor transformers beyond what the mutants need."""
    return (*PLAIN, *(f"mutant:{name}" for name in _mutants()), *_families())


def resolve(address: str) -> Implementation:
    """The implementation under `address`.

    Raises AdapterError: nothing under that address, an option it does not have, a module that cannot be
    imported, a factory that fails, or an object that is no implementation.
    """
    kind, colon, rest = address.partition(":")
    if address in PLAIN:
        module, of = PLAIN[address]
        made: Implementation = getattr(importlib.import_module(module), of)()
        return made
    if kind == "mutant" and colon:
        return _mutant(rest)
    if kind == "transformers" and colon:
        return _transformers(rest)
    if kind == "openai" and colon:
        return _openai(rest)
    if not colon or not rest:
        hint = did_you_mean(address, names())
        raise AdapterError(
            f"there is no implementation {address!r}{hint}; "
            "say reference, independent, null, mutant:NAME, transformers:NAME, openai:URL or "
            "package.module:factory"
        )
    return _factory(kind, rest)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Ready to append to a sentence: the one of `known` that is close to `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _families() -> tuple[str, ...]:
    return tuple(f"transformers:{family}" for family in MAPPED_FAMILIES)


def _mutants() -> tuple[str, ...]:
    try:
        from harness import mutants
    except ImportError:
        return ()
    return tuple(mutants.names())


def _mutant(name: str) -> Implementation:
    known = _mutants()
    if name not in known:
        raise AdapterError(
            f"there is no mutant {name!r}{did_you_mean(name, known)}; "
            "`moe-harness list implementations` shows them all"
        )
    from harness import mutants

    return mutants.make(name)


def _transformers(rest: str) -> Implementation:
    family, *pairs = rest.split(",")
    chosen = {key: values[0] for key, values in OPTIONS.items()}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in OPTIONS:
            raise AdapterError(
                f"transformers:{rest} has no option {key!r}{did_you_mean(key, OPTIONS)}; "
                f"there are {', '.join(OPTIONS)}"
            )
        if not equals or value not in OPTIONS[key]:
            raise AdapterError(
                f"transformers:{rest}: {key} cannot be {value!r}{did_you_mean(value, OPTIONS[key])}; "
                f"it is one of {', '.join(OPTIONS[key])}"
            )
        chosen[key] = value
    from harness.implementations.transformers import TransformersImplementation, cross_attention

    if family in cross_attention.FAMILIES and not pairs:
        return cross_attention.CrossAttentionFamily(family)
    return TransformersImplementation.of(family, experts=chosen["experts"], attention=chosen["attention"])


def _openai(rest: str) -> Implementation:
    try:
        from harness.implementations.openai import connect
    except ModuleNotFoundError as error:
        if error.name != "httpx2":
            raise
        raise AdapterError("openai: needs 'httpx2', absent here; pip install 'moe-harness[http]'") from error
    return connect(rest)


def _factory(module_name: str, attribute: str) -> Implementation:
    address = f"{module_name}:{attribute}"
    if module_name.endswith(".py"):
        raise AdapterError(
            f"{address}: name the module, not the file: {module_name[:-3].replace('/', '.')}:{attribute}"
        )
    if str(Path.cwd()) not in sys.path:  # a console script, unlike `python -m`, does not look here
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            hint = did_you_mean(address, names())
            raise AdapterError(f"{address}: there is no module {missing!r} to import{hint}") from error
        raise AdapterError(f"{address}: importing {module_name} needs {missing!r}, absent here") from error
    except (Exception, SystemExit) as error:
        raise AdapterError(f"{address}: importing {module_name} failed with {describe(error)}") from error
    found = getattr(module, attribute, None)
    if found is None:
        public = [name for name in vars(module) if not name.startswith("_")]
        hint = did_you_mean(attribute, public)
        raise AdapterError(f"{address}: module {module_name} has no {attribute!r}{hint}")
    if not callable(found):
        raise AdapterError(f"{address}: {attribute} is a {type(found).__name__}, not a factory to call")
    try:
        return _checked(found(), address, f"{attribute}()")
    except AdapterError:
        raise
    except (Exception, SystemExit) as error:
        raise AdapterError(f"{address}: {attribute}() failed with {describe(error)}") from error


def _checked(made: object, address: str, what: str) -> Implementation:
    if not callable(getattr(made, "build", None)) or isinstance(made, type):
        raise AdapterError(
            f"{address}: {what} returned a {type(made).__name__} without `build`; "
            "see harness.implementations.protocols.Implementation"
        )
    for needed, type_ in (("name", str), ("needs_architecture", bool)):
        if not isinstance(getattr(made, needed, None), type_):
            raise AdapterError(
                f"{address}: what {what} returned has no {needed} of type {type_.__name__}; "
                "see harness.implementations.protocols.Implementation"
            )
    implementation: Implementation = made  # type: ignore[assignment]  # as far as can be checked unbuilt
    return implementation


def describe(error: BaseException) -> str:
    """An exception in one line: its type, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
