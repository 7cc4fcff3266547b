"""The properties of the shipped suites, found by importing them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from harness._resources import in_wheel, suites_dir
from harness.conformance.property import Property

OF_THE_HARNESS = "selftest"
"""The one folder of the suites that holds no properties."""


def properties(part: str = "") -> Iterator[tuple[Property, Callable[..., Any]]]:
    """Each property of one part of the suites ("routing"), or of all, with its test function."""
    folder = suites_dir()
    package = "harness.suites" if in_wheel() else "suites"
    if not in_wheel() and str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    for path in sorted(folder.glob(f"{part or '*'}/**/test_*.py")):
        inside = path.relative_to(folder).with_suffix("").parts
        if inside[0] == OF_THE_HARNESS:
            continue
        module = importlib.import_module(".".join((package, *inside)))
        yield from _marked(module)


def of_file(path: Path) -> Iterator[tuple[Property, Callable[..., Any]]]:
    """Each property of a file that does not ship. Raises OSError where there is none, LookupError where it is
    no Python file; and whatever the file raises."""
    made = importlib.util.spec_from_file_location(path.stem, path)
    if made is None or made.loader is None:
        raise LookupError(f"{path}: is no Python file")
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    yield from _marked(module)


def _marked(module: ModuleType) -> Iterator[tuple[Property, Callable[..., Any]]]:
    for value in vars(module).values():
        for mark in getattr(value, "pytestmark", ()):
            if mark.name == "conformance":
                yield mark.args[0], value
