"""Stub properties in a folder of their own, for tests of how runs are run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import cli

ROOT = Path(__file__).resolve().parents[2]
ODD = "suites.selftest.odd_implementations:"
QUICK = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--no-null")
"""Without the plugin of Hypothesis, which takes seconds to import and nothing here uses, and without the null
implementation, which the stubs cannot tell from another."""
CONFTEST = """
import pytest
from harness.conformance import canary

pytest_plugins = ["harness.plugin"]

def pytest_configure(config):
    patch = pytest.MonkeyPatch()
    patch.setattr(canary, "run", lambda seed: {canary})
    config.add_cleanup(patch.undo)
"""
STUBS = '''
import torch
from harness.conformance import Void, Violation, conformance, require

@conformance("stub.finite", clause="c", needs=("forward",))
def test_finite(case):
    """Logits are finite."""
    logits = case.model().forward(case.tokens(2, 3))
    require(bool(torch.isfinite(logits).all()), "logit of token 0 is nan", stage="combine", token=0)

@conformance("stub.shape", clause="c", needs=("forward",))
def test_shape(case):
    """Logits have the shape of the tokens."""
    tokens = case.tokens(2, 3)
    shape = tuple(case.model().forward(tokens).shape[:2])
    case.note("shape", shape)
    assert shape == (2, 3), f"logits are {shape}, not (2, 3)"

@conformance("stub.cached", clause="c", needs=("cache",), level="SHOULD")
def test_cached(case):
    """There is a cache."""
    case.model().extend(case.tokens(2, 3), None)

@conformance("stub.elsewhere", clause="c", needs=(), applies=lambda architecture: False)
def test_elsewhere(case):
    """Applies to nothing."""
'''
VOID = '''
@conformance("stub.void", clause="c", needs=())
def test_void(case):
    """Cannot be measured."""
    raise Void("no margin is wide enough")
'''


def write(folder: Path, *, stubs: str = STUBS, canary: str = '(True, "caught")') -> None:
    """Put the stubs, and a conftest whose canary ends as told, into a folder."""
    (folder / "conftest.py").write_text(CONFTEST.format(canary=canary))
    (folder / "test_stub.py").write_text(stubs)


def environment() -> dict[str, str]:
    """In which a process finds the harness of this checkout, and writes its lines whole."""
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on a folder, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *QUICK, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def command(*arguments: str) -> int:
    """The exit code of the command, in this process."""
    with pytest.raises(SystemExit) as ending:
        cli.main(arguments)
    return int(ending.value.code or 0)


def moe_harness(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from harness.cli import main; main()", *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
