"""The wheel in an empty environment, outside of the checkout: what a stranger's own repository sees."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from harness.results.runfile import read

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in a checkout")

ADAPTER = """
from harness.implementations import resolve

def make():
    return resolve("reference")
"""


def call(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command with nothing of this checkout on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q")
    built = call(*pip, "-w", folder, ROOT, cwd=folder)
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("moe_harness-*.whl")
    return found


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel, and sees the dependencies installed here.

    They are seen through a path and not installed again, because torch alone takes minutes.
    """
    folder = tmp_path_factory.mktemp("env")
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps")
    installed = call(*pip, "--no-index", "--force-reinstall", "-q", wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return folder / "bin"


def test_the_wheel_ships_specs_and_suites_but_not_our_own_tests(wheel: Path) -> None:
    """Specs and suites are inside of the package, and nothing is beside it."""
    names = zipfile.ZipFile(wheel).namelist()
    assert "harness/specs/mixtral-8x7b.toml" in names
    assert "harness/suites/routing/test_routing.py" in names
    assert "harness/py.typed" in names
    assert not [name for name in names if "selftest" in name]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"harness", "moe_harness"}


def test_a_stranger_runs_the_suites_on_an_adapter(binaries: Path, tmp_path: Path) -> None:
    """`pytest --pyargs harness.suites --impl my_adapter:make` works with my_adapter.py alone."""
    (tmp_path / "my_adapter.py").write_text(ADAPTER)
    arguments = ("--impl", "my_adapter:make", "--spec", "mixtral-8x7b", "-k", "k_distinct")
    for command in (
        (binaries / "python", "-m", "pytest", "--pyargs", "harness.suites"),
        (binaries / "moe-harness", "check"),
    ):
        done = call(*command, *arguments, "--run-file", "run.jsonl", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        (record,) = read(tmp_path / "run.jsonl").records
        assert (record.slug, record.implementation) == ("routing.selects-k-distinct", "my_adapter:make")
        assert str(ROOT) not in done.stdout


def test_the_command_finds_its_specs_in_the_wheel(binaries: Path, tmp_path: Path) -> None:
    """`moe-harness describe` and `list` answer outside of the checkout."""
    described = call(binaries / "moe-harness", "describe", "mixtral-8x7b", "--json", cwd=tmp_path)
    assert '"total": 46702792704' in described.stdout
    listed = call(binaries / "moe-harness", "list", "specs", cwd=tmp_path)
    assert "gpt4-leak" in listed.stdout
