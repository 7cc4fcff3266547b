"""The house itself: imports go down the layers, modules stay small, everything public is described."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "harness"

MAY_IMPORT: dict[str, set[str]] = {
    "spec": set(),
    "theory": {"spec"},
    "audit": {"spec", "theory"},
    "planning": {"spec", "theory"},
    "validation": {"spec", "theory", "planning"},
    "reference": {"spec"},
    "implementations": {"spec", "reference", "mutants"},
    "mutants": {"spec", "reference", "implementations"},
    "evidence": set(),
    "telemetry": set(),
    "conformance": {"spec", "reference", "implementations", "mutants", "evidence"},
    "results": {
        "spec",
        "evidence",
        "theory",
        "audit",
        "validation",
        "implementations",
        "mutants",
        "conformance",
        "telemetry",
    },
    "benchmark": {"spec", "theory", "reference", "implementations", "telemetry", "results"},
}
"""The layers of ARCHITECTURE.md; `plugin` and `cli` may import all of them."""

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in a checkout")


def modules() -> list[Path]:
    """Every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """The layers of `harness` that a module imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("harness.")}


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_go_down_the_layers(layer: str) -> None:
    """No module imports a layer above its own."""
    allowed = MAY_IMPORT[layer] | {layer, "_resources"}
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (PACKAGE / layer).rglob("*.py")
        for name in imported(ast.parse(path.read_text())) - allowed
    }
    assert not wrong


def test_modules_stay_small() -> None:
    """No module of the package or the suites has more than 400 lines."""
    paths = modules() + sorted((ROOT / "suites").rglob("*.py"))
    assert not [p.name for p in paths if len(p.read_text().splitlines()) > 400]


def defined(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a module and of its classes; what a function holds is its own affair."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from defined(node)


def test_public_functions_and_classes_are_described() -> None:
    """Every public function, method and class of the package has a docstring."""
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in modules()
        for node in defined(ast.parse(path.read_text()))
        if not node.name.startswith("_") and ast.get_docstring(node) is None and len(node.body) > 3
    ]
    assert not bare


def test_tests_read_as_statements() -> None:
    """Every test has a docstring whose first line is one sentence."""
    mute = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in sorted((ROOT / "suites").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not (ast.get_docstring(node) or "").split("\n")[0].endswith(".")
    ]
    assert not mute
