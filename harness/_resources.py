"""Where the shipped specs and suites lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def specs_dir() -> Path:
    """The folder of the shipped specs, one TOML file each."""
    return _folder("specs")


def suites_dir() -> Path:
    """The folder of the conformance suites, one sub-folder per part of the system."""
    return _folder("suites")


def in_wheel() -> bool:
    """Whether this is an installed wheel, whose suites are the package harness.suites."""
    return (_PACKAGE / "suites").is_dir()


def _folder(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
