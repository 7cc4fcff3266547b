"""The properties of the shipped suites, found by importing them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
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
        for value in vars(module).values():
            for mark in getattr(value, "pytestmark", ()):
                if mark.name == "conformance":
                    yield mark.args[0], value
