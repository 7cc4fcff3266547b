"""One mutant under the suites: which properties run, in what order, and when the search for a kill ends."""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import pytest

import harness
from harness._resources import in_wheel, specs_dir, suites_dir
from harness.conformance.catalogue import OF_THE_HARNESS, properties
from harness.conformance.conventions.search import unexplained
from harness.conformance.property import Property
from harness.implementations.registry import AdapterError, describe
from harness.mutants import CATALOGUE, Mutant
from harness.results import reports, suites
from harness.results.header import LIBRARIES, installed
from harness.results.kills.stages import sparing

FOLDER = Path(".runs") / "mutants"
ELSEWHERE = ("audit", "benchmark", "cli", "planning", "results", "telemetry", "validation")
"""Layers that decide no outcome of a property: a change there leaves what was measured as it is."""


@dataclass(frozen=True)
class Plan:
    """What every mutant is put through."""

    seed: int = 1
    timeout_s: float = 60.0
    """Seconds that one property may take."""
    selected: tuple[str, ...] = ()
    """Slugs of the only properties that run; empty: all."""
    full: bool = False
    """Every property of the mutant's side, also after the first kill."""
    also: tuple[str, ...] = ()
    """Modules that enter mutants of their own in the catalogue."""

    def folder(self) -> Path:
        """Where the run files of this plan are: one per mutant, under the digest of all that decides them."""
        libraries = [platform.python_version(), *(installed(name) for name in LIBRARIES)]
        own = [Path(sys.modules[name].__file__ or "").read_text(encoding="utf-8") for name in self.also]
        text = json.dumps([asdict(self), libraries, own, sources()])
        return FOLDER / hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def sources() -> str:
    """sha256 of every file that decides how a property ends: of the harness, the suites and the specs."""
    package, digest = Path(harness.__file__).parent, hashlib.sha256()
    left_out = [*(package / layer for layer in ELSEWHERE), suites_dir() / OF_THE_HARNESS]
    folders = [package] if in_wheel() else [package, suites_dir(), specs_dir()]
    for folder in folders:
        for path in sorted((*folder.rglob("*.py"), *folder.rglob("*.toml"))):
            if not any(path.is_relative_to(other) for other in left_out):
                digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def enter(modules: Iterable[str]) -> None:
    """Import modules whose mutants are to join the catalogue. Raises AdapterError where one cannot be."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    for name in modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise AdapterError(f"--also {name}: cannot be imported, {describe(error)}") from error


def on_side(prop: Property, mutant: Mutant) -> bool:
    """Whether a property is of the side of the system, model or engine, that the mutant patches."""
    return (prop.slug.partition(".")[0] in suites.ENGINES) == (mutant.side == "engine")


@lru_cache(maxsize=1)
def order() -> dict[str, int]:
    """The rank of each property by its slug: next comes the one that claims most mutants which none before it
    claims (test prioritisation by additional coverage, Rothermel et al. 2001)."""
    left = {prop.slug: frozenset(prop.kills) for prop, _ in properties()}
    everything = frozenset().union(*left.values())
    ranks: dict[str, int] = {}
    rest = everything
    while left:
        best = min(left, key=lambda slug: (-len(left[slug] & rest), slug))
        if not left[best] & rest and rest != everything:
            rest = everything
            continue
        ranks[best] = len(ranks)
        rest -= left.pop(best)
    return ranks


class Hunt:
    """A pytest plugin: of one mutant's properties, those worth their time, the most telling first.

    Until the first counterexample all of its side run; then those that claim it or must spare it.
    """

    def __init__(self, mutant: Mutant, plan: Plan, tell: Callable[[str], None]) -> None:
        self._mutant, self._plan, self._tell = mutant, plan, tell
        self._sparing = sparing(mutant.stage) if mutant.side == "model" else ()
        self._found = False

    def wanted(self, prop: Property) -> bool:
        """Whether the property is to run, as things stand."""
        if self._plan.selected and prop.slug not in self._plan.selected:
            return False
        if self._mutant.name in prop.kills or prop.slug in self._sparing:
            return True
        return on_side(prop, self._mutant) and (self._plan.full or not self._found)

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Generator[None]:
        """Put the most telling properties first, after the canary."""
        yield
        ranks = order()

        def rank(item: pytest.Item) -> int:
            prop = _property(item)
            return -1 if prop is None else ranks[prop.slug]

        items.sort(key=rank)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run what is worth its time, and pass over the rest, which leaves no record.

        Each item is torn down to the last: what comes next depends on how it ends.
        """
        if session.testsfailed:  # while collecting: pytest's own loop says so
            return None
        for item in session.items:
            prop = _property(item)
            if prop is not None and not self.wanted(prop):
                continue
            if prop is not None:
                self._tell(prop.slug)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if session.shouldfail or session.shouldstop:
                raise session.Interrupted(session.shouldfail or session.shouldstop)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The first counterexample ends the search."""
        record = reports.record_of(report)
        if record is not None and record.outcome == "failed" and not record.crashed:
            self._found = True


def hunt(name: str, plan: Plan, folder: Path, tell: Callable[[str], None] = lambda _: None) -> int:
    """Run one mutant into its run file; pytest's exit code. `tell` hears each property before it runs."""
    mutant = CATALOGUE[name]
    arguments = [
        *("--impl", f"mutant:{name}@{mutant.spec}", "--seed", str(plan.seed)),
        *("--run-file", str(run_file(folder, name)), "--timeout-property", str(plan.timeout_s)),
        *("--no-null", "--shrink-seconds", "0", "-p", "no:hypothesispytest"),
        *("-q", "--tb=no", "--no-header", "--no-summary"),
    ]
    with unexplained():
        return suites.run(arguments, plugins=[Hunt(mutant, plan, tell)])


def run_file(folder: Path, name: str) -> Path:
    """Where the run of a mutant is."""
    return folder / f"{name}.jsonl"


def share(names: Sequence[str], part: tuple[int, int]) -> tuple[str, ...]:
    """Part K of N of the names: every Nth in their order."""
    k, n = part
    return tuple(sorted(names)[k - 1 :: n])


def _property(item: pytest.Item) -> Property | None:
    mark = item.get_closest_marker("conformance")
    found: Property | None = mark.args[0] if mark is not None else None
    return found
