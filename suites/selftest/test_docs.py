"""Every command and every recipe that the documents show is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+://)([^)#]*)(#([^)]*))?\)")
MADE_BY_MAKE = ("make report", "make test", "git clone", "pip install")
"""Run on a fresh clone, or by this very run: not again inside of it."""

LIMIT_S = 300
"""No command that a document shows takes longer, on two busy cores."""

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in a checkout")


@dataclass
class Section:
    """What one headed section shows: files to write, and commands with the exit code they end in."""

    title: str
    files: dict[str, str] = field(default_factory=dict)
    commands: list[tuple[str, int]] = field(default_factory=list)


def sections(document: str) -> list[Section]:
    """The sections of a document that show a command.

    "```python NAME.py" is a file; each "$ command" line of a "```console" block is a command, and
    "# exit N" at its end says that it ends in N.
    """
    found = []
    for part in re.split(r"^(?=#+ )", (ROOT / document).read_text(), flags=re.MULTILINE):
        section = Section(part.split("\n")[0].lstrip("# "))
        for language, name, body in FENCE.findall(part):
            if language == "console":
                for line in re.findall(r"^\$ (.+)$", body, re.MULTILINE):
                    command, _, code = line.partition("# exit ")
                    if not command.startswith(MADE_BY_MAKE):
                        section.commands.append((command.strip(), int(code or 0)))
            elif name.strip():
                section.files[name.strip()] = body
        if section.commands:
            found.append(section)
    return found


CASES = [
    pytest.param(document, section, id=f"{document}-{section.title}".replace(" ", "-"))
    for document in ("README.md", "CONTRIBUTING.md")
    if (ROOT / document).exists()
    for section in sections(document)
]


@pytest.mark.parametrize(("document", "section"), CASES)
def test_what_a_document_shows_works(document: str, section: Section, tmp_path: Path) -> None:
    """Each section's files and commands, in a directory of their own, end as the document says."""
    for name in ("specs", "suites", "results"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, body in section.files.items():
        (tmp_path / name).write_text(body)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path)}
    for command, code in section.commands:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
        assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_no_document_shows_a_make_target_that_does_not_exist() -> None:
    """Every `make TARGET` of the documents is a target of the Makefile."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {
        target
        for document in ROOT.glob("*.md")
        for target in re.findall(r"^\$ make (\w+)", document.read_text(), re.MULTILINE)
    }
    assert shown <= targets


@pytest.mark.parametrize("document", sorted(path.name for path in ROOT.glob("*.md")))
def test_every_link_leads_somewhere(document: str) -> None:
    """What a document links to in the repository is there, and so is the heading that it names."""
    for target, _, heading in LINK.findall((ROOT / document).read_text()):
        where = ROOT / (target or document)
        assert where.exists(), f"{document} links to {target}"
        titles = re.findall(r"^#+ (.+)$", where.read_text(), re.MULTILINE) if heading else []
        slugs = {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}
        assert not heading or heading in slugs, f"{document} links to {target}#{heading}"


def cells(line: str) -> tuple[str, ...]:
    """The cells of one row of a Markdown table."""
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def test_the_readmes_table_is_real_output() -> None:
    """Every row of the README's table is a row of the committed audit."""
    audit = {cells(line) for line in (ROOT / "results/audit-gpt4-leak.md").read_text().splitlines()}
    rows = [cells(line) for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    shown = [row for row in rows if not set("".join(row)) <= set("-:")]
    assert len(shown) > 5
    assert set(shown) <= audit
