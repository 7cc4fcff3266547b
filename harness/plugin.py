"""The pytest plugin: hooks only.

A test function marked by `harness.conformance.conformance` becomes one test per implementation and spec,
and each of these one record. Tests without the mark are left as they are.

Records travel from where a test ran to the controlling process on the test's report, so that a plain run
and one under pytest-xdist share every line below. Nothing here imports torch before a property is collected.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness._resources import suites_dir
from harness.results.controller import OVERHEAD, PLAN, Controller, asked_for
from harness.results.failures import SHRINK_S, Reporter

if TYPE_CHECKING:
    from harness.conformance.case import Case
    from harness.conformance.property import Property
    from harness.conformance.subjects import Subject
    from harness.results.baseline import Baseline
    from harness.telemetry import Sampler

DEFAULT_SEED = 1
DEFAULT_TIMEOUT_S = 120.0
NULL_TIMEOUT_S = 60.0
"""Of all properties together on the null implementation, of which none should wait for anything."""
CONTROLLER = "moe-harness-controller"


@dataclass
class State:
    """What the hooks of one process share."""

    subjects: tuple[Subject, ...] | None = None
    """None until they are needed: a run without properties never imports torch for them."""
    declared: dict[str, frozenset[str] | BaseException] = field(default_factory=dict)
    """By subject: the capabilities of its model, or why that could not be built."""
    baseline: Baseline = field(default_factory=dict)
    plan: dict[str, str] = field(default_factory=dict)
    """By test id, the record of a property that has not run, as JSON text."""
    reporter: Reporter = field(default_factory=Reporter)
    sampler: Sampler | None = None
    resources: ExitStack = field(default_factory=ExitStack)


STATE = pytest.StashKey[State]()
CASE = pytest.StashKey["Case"]()
SPAN = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options; `moe-harness check` hands the same ones to pytest."""
    add = parser.getgroup("moe-harness", "conformance of language models").addoption
    add(
        "--impl",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="under test: reference, mutant:NAME, transformers:NAME, openai:URL or package.module:factory; "
        "ADDRESS@SPEC on that spec alone (repeatable; default: reference)",
    )
    add(
        "--spec",
        action="append",
        default=[],
        metavar="SPEC",
        help="name of a shipped spec, or a path (repeatable; default: the implementation's own shape, or "
        "specs that cover the kinds of router and attention)",
    )
    add("--seed", type=int, default=DEFAULT_SEED, help="of every input (default: %(default)s)")
    add("--run-file", type=Path, metavar="PATH", help="write the run there, JSON Lines")
    add("--baseline", type=Path, metavar="PATH", help="known failures; new and stale ones fail the run")
    add("--write-baseline", type=Path, metavar="PATH", help="bring this baseline up to date with the run")
    add(
        "--profile",
        choices=("full", "fast"),
        default="full",
        help="fast: without the properties that take long (default: %(default)s)",
    )
    add("--no-null", action="store_true", help="do not run the properties on the null implementation too")
    add("--telemetry", action="store_true", help="sample power, clocks, memory and host time per property")
    add(
        "--shrink-seconds",
        type=_seconds_or_none,
        default=SHRINK_S,
        metavar="SECONDS",
        help="for a smaller counterexample of a failure, five times as many in all; 0: none is sought "
        "(default: %(default)s)",
    )
    add("--reproduce", type=Path, metavar="DIR", help="write a script there for each failure, and an index")
    add(
        "--timeout-property",
        type=_seconds,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="a property that takes longer has failed (default: %(default)s)",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"it is {text!r}; give a number of seconds above 0")
    return value


def _seconds_or_none(text: str) -> float:
    return 0.0 if text == "0" else _seconds(text)


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark, which an installed wheel has no configuration file for."""
    config.addinivalue_line("markers", "conformance(property): a property of the implementation under test.")
    option = config.getoption
    config.stash[STATE] = State(reporter=Reporter(option("shrink_seconds"), option("reproduce")))
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Controller(config), CONTROLLER)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse what cannot be used before anything runs, and start what observes the run."""
    config = session.config
    state = config.stash[STATE]
    if asked_for(config):
        _prepare(config, state)
    if config.getoption("telemetry") and not config.pluginmanager.hasplugin("dsession"):  # workers do it
        from harness.telemetry import Sampler

        state.sampler = state.resources.enter_context(Sampler())


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is under test, when that was asked for."""
    subjects = config.stash[STATE].subjects or ()
    listed = ", ".join(subject.id for subject in subjects)
    return [f"under test: {listed}; seed {config.getoption('seed')}"] if listed else []


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where an implementation or a spec is named, the harness's own tests are not what was asked for."""
    if not (config.getoption("impl") or config.getoption("spec")):
        return None
    return True if collection_path.resolve() == suites_dir() / "selftest" else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per subject to which the property applies."""
    prop = _property(metafunc.definition)
    if prop is None:
        return
    state = metafunc.config.stash[STATE]
    _prepare(metafunc.config, state)
    wanted = metafunc.config.getoption("profile") == "full" or not prop.costly
    subjects = [s for s in state.subjects or () if wanted and prop.applies(s.architecture)]
    # pytest makes a skipped test of an empty set; None is dropped in pytest_collection_modifyitems
    metafunc.parametrize("case", subjects or [None], ids=[s.id for s in subjects] or ["-"], indirect=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Drop what does not apply, give each property its time limit, put the canary first and null last."""
    items[:] = [item for item in items if _property(item) is None or _subject(item) is not None]
    properties = [item for item in items if _property(item) is not None]
    if properties:
        canary = CanaryItem.from_parent(session, name="canary", nodeid="canary")
        items.insert(0, canary)
        limit = session.config.getoption("timeout_property")
        for item in (canary, *properties):
            item.add_marker(pytest.mark.timeout(limit, method="signal"))
        if not session.config.getoption("no_null"):
            items.append(NullItem.over(session, properties))
        session.config.stash[STATE].plan = {item.nodeid: _planned(item) for item in properties}


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """What a property sees: seeded inputs, and the model under test."""
    from harness.conformance import subjects

    prop, subject = _property(request.node), _subject(request.node)
    if prop is None or subject is None:
        pytest.fail("the fixture `case` is for functions marked by harness.conformance.conformance")
    made = subjects.case(subject, prop, request.config.getoption("seed"))
    made.fast = request.config.getoption("profile") == "fast"
    request.node.stash[CASE] = made
    subjects.need(subject, prop, made.seed, request.config.stash[STATE].declared)
    return made


class CanaryItem(pytest.Item):
    """The property and the implementation of `harness.conformance.canary`, as a test of this run."""

    caught = False
    reason = "it did not finish"

    def runtest(self) -> None:
        """Run the canary; how it did is told by the report."""
        from harness.conformance import canary

        self.caught, self.reason = canary.run(self.config.getoption("seed"))

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where pytest says that the test is."""
        return Path(__file__), None, "canary"


class NullItem(pytest.Item):
    """The properties of this run on the null implementation, as one test of it."""

    properties: Sequence[pytest.Item] = ()
    measured: tuple[list[Any], list[str]] = ([], [])

    @classmethod
    def over(cls, session: pytest.Session, properties: Sequence[pytest.Item]) -> NullItem:
        """The test that runs each of `properties` once, and has a time limit of its own."""
        item: NullItem = cls.from_parent(session, name="null", nodeid="null")
        item.properties = properties
        item.add_marker(pytest.mark.timeout(NULL_TIMEOUT_S, method="signal"))
        return item

    def runtest(self) -> None:
        """Run them; how it did is told by the report."""
        from harness.conformance import overhead

        wanted = [(_property(item), getattr(item, "obj", None), _subject(item)) for item in self.properties]
        self.measured = overhead.measure(wanted, self.config.getoption("seed"))  # type: ignore[arg-type]

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where pytest says that the test is."""
        return Path(__file__), None, "null"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fix what a property's model draws from torch's global generator, and sample the machine meanwhile."""
    if _property(item) is None:
        return (yield)
    from harness.conformance.case import global_draws

    sampler = item.config.stash[STATE].sampler
    with global_draws(item.config.getoption("seed")):
        if sampler is None:
            return (yield)
        with sampler.span(item.name) as span:
            item.stash[SPAN] = span
            return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the ending of a property into its record."""
    report = yield
    ended = call.when == "call" or (call.when == "setup" and call.excinfo is not None)
    if not ended:
        return report
    from harness.results import reports

    if isinstance(item, CanaryItem):
        reports.attach_canary(report, caught=item.caught, reason=item.reason)
        return report
    if isinstance(item, NullItem):
        if call.excinfo is None:
            reports.attach_null(report, *item.measured)
        return report
    prop, subject = _property(item), _subject(item)
    if prop is not None and subject is not None:
        state, span = item.config.stash[STATE], item.stash.get(SPAN, None)
        record = reports.ended(
            reports.planned(prop, subject, item.config.getoption("seed")),
            call.excinfo.value if call.excinfo else None,
            state.baseline,
            case=item.stash.get(CASE, None),
            duration_s=call.duration,
            telemetry=span.summary if span else {},
        )
        record = state.reporter.explained(
            record,
            call.excinfo.value if call.excinfo else None,
            prop=prop,
            subject=subject,
            case=item.stash.get(CASE, None),
            function=item.obj,  # type: ignore[attr-defined]
        )
        short = item.config.getoption("tbstyle") == "auto"
        reports.attach(report, record, state.baseline, short=short)
        item.user_properties += reports.properties(record)  # a JUnit file takes them from the test
    return report


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Call each outcome by its own name: only what passed is counted as passed."""
    if not any(hasattr(report, f"harness_{carried}") for carried in ("record", "canary", "null")):
        return None
    from harness.results import reports

    return reports.status(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop what observes the run; tell the controlling process what that cost, and what was planned."""
    state = session.config.stash[STATE]
    overhead = state.sampler.overhead() if state.sampler is not None else None
    state.resources.close()
    output = getattr(session.config, "workeroutput", None)
    controller = session.config.pluginmanager.get_plugin(CONTROLLER)
    if output is not None:
        output |= {PLAN: state.plan, OVERHEAD: overhead}
    elif overhead is not None and isinstance(controller, Controller):
        controller.overheads.append(overhead)


def _prepare(config: pytest.Config, state: State) -> None:
    """Look up what the options name. Ends the session with exit code 78 where one cannot be used."""
    if state.subjects is not None:
        return
    from harness.conformance import subjects
    from harness.implementations.registry import AdapterError
    from harness.results import baseline, reproduce
    from harness.results.gate import CONFIG
    from harness.results.runfile import RunFileError
    from harness.spec import SpecError

    option = config.getoption
    try:
        state.subjects = subjects.resolve(option("impl"), option("spec"))
        if option("baseline") is not None:
            state.baseline = baseline.load(option("baseline"))
        if option("write_baseline") is not None:
            baseline.ensure_writable(option("write_baseline"))
        if option("reproduce") is not None:
            reproduce.ensure_writable(option("reproduce"))
        controller = config.pluginmanager.get_plugin(CONTROLLER)
        if isinstance(controller, Controller):
            controller.begin(state.subjects)
    except (
        SpecError,
        AdapterError,
        baseline.BaselineError,
        RunFileError,
        reproduce.FolderError,
    ) as error:
        pytest.exit(str(error), returncode=CONFIG)


def _property(node: pytest.Item) -> Property | None:
    mark = node.get_closest_marker("conformance")
    return mark.args[0] if mark is not None else None


def _planned(item: pytest.Item) -> str:
    from harness.results import reports

    prop, subject = _property(item), _subject(item)
    assert prop is not None
    assert subject is not None
    return reports.planned(prop, subject, item.config.getoption("seed")).model_dump_json()


def _subject(item: pytest.Item) -> Subject | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("case") if callspec is not None else None
