"""The hooks of the process that controls a run: it gathers the records, judges them and shows the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from harness.conformance.subjects import Subject
    from harness.results.gate import Verdict
    from harness.results.record import Canary, Null, Record
    from harness.results.runfile import RunWriter

PLAN = "harness_plan"
"""Under pytest-xdist, the key of a worker's output: test id -> record of a property that has not run."""
OVERHEAD = "harness_overhead"
"""As above: what sampling the machine cost the worker, or None."""
PHASES = ("setup", "call", "teardown")
EXPLICIT = ("impl", "spec", "run_file", "baseline", "write_baseline", "reproduce")


def asked_for(config: pytest.Config) -> bool:
    """Whether the options say that properties are to be run: a run without any is then no success."""
    return any(config.getoption(name) for name in EXPLICIT)


class Controller:
    """A pytest plugin; idle in a run without properties."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._writer: RunWriter | None = None
        self._records: list[Record] = []
        self._canary: Canary | None = None
        self._null: Null | Literal["off"] | None = "off" if config.getoption("no_null") else None
        self._dead: list[str] = []
        self._plan: dict[str, str] = {}
        self.overheads: list[dict[str, float]] = []
        """What telemetry cost, one entry for each process that sampled."""
        self._failed = 0
        self._asked = asked_for(config)
        self._verdict: Verdict | None = None

    def begin(self, subjects: Sequence[Subject]) -> None:
        """Properties are to be run on `subjects`. Raises RunFileError if the run file cannot be written."""
        from harness.results.header import header
        from harness.results.runfile import RunWriter

        option = self._config.getoption
        if option("run_file") is not None:
            self._writer = RunWriter(
                option("run_file"),
                header(
                    seed=option("seed"),
                    implementations=list(dict.fromkeys(s.address for s in subjects)),
                    specs={s.spec: s.digest for s in subjects},
                    options={
                        "baseline": str(option("baseline") or ""),
                        "keyword": option("keyword"),
                        "null": not option("no_null"),
                        "telemetry": option("telemetry"),
                        "timeout_property_s": option("timeout_property"),
                        "processes": getattr(self._config.option, "numprocesses", None),
                    },
                ),
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write each record down as it arrives."""
        from harness.results import reports

        record, canary = reports.record_of(report), reports.canary_of(report)
        null = reports.null_of(report)
        if record is not None:
            self._add(record)
        elif canary is not None:
            self._canary = canary
        elif null is not None:
            self._null = null
        elif report.when not in PHASES:  # how pytest-xdist reports a worker that died
            self._dead.append(report.nodeid)
        else:
            return
        self._asked = True
        self._failed += report.failed

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a worker of pytest-xdist had planned, and what it spent on telemetry."""
        output = getattr(node, "workeroutput", {})
        self._plan |= output.get(PLAN, {})
        if output.get(OVERHEAD):
            self.overheads.append(output[OVERHEAD])

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """End the run file if the run ended of its own accord, and decide the exit code."""
        from harness.results import reports

        for test in self._dead:
            if test in self._plan:
                self._add(reports.died(self._plan[test]))
        stopped = bool(session.shouldstop or session.shouldfail)
        whole = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not stopped
        if whole and self._asked and not self._config.option.collectonly:
            self._verdict = self._judge(others_failed=session.testsfailed > self._failed)
            session.exitstatus = self._verdict.code
        if self._writer is not None:
            self._writer.close()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show the outcome of each property, and what decided the exit code."""
        if not self._records:
            return
        from harness.results import tables
        from harness.results.render import render, room

        terminalreporter.section("conformance")
        width = room(is_terminal=bool(terminalreporter.isatty))
        if not terminalreporter.config.getoption("no_summary"):
            terminalreporter.write_line(render(tables.matrix(self._records), width=width))
            terminalreporter.write_line("")
        terminalreporter.write_line(tables.counts(self._records))
        for sentence in tables.left_out(self._records):
            terminalreporter.write_line(sentence)
        for sentence in tables.overhead(self._records, self._null):
            terminalreporter.write_line(sentence)
        each = tables.overhead_by_property(self._null) if terminalreporter.verbosity > 0 else None
        if each is not None:
            terminalreporter.write_line(render(each, width=width))
        for cost in self.overheads:
            share = f"{cost['sampling_s']:.3f} s, {cost['share_of_wall']:.2%} of the run"
            terminalreporter.write_line(f"telemetry: {cost['samples']:.0f} samples took {share}")
        for sentence in self._scripts():
            terminalreporter.write_line(sentence)
        if self._verdict is None:
            terminalreporter.write_line("The run did not end of its own accord: this is not a result.")
        else:
            terminalreporter.write_line(f"{self._verdict.headline} (exit code {self._verdict.code})")

    def _scripts(self) -> list[str]:
        """Where the scripts of the failures are; their index is written."""
        from harness.results import reproduce

        folder = self._config.getoption("reproduce")
        return [] if folder is None else [reproduce.indexed(folder, self._records)]

    def _add(self, record: Record) -> None:
        self._records.append(record)
        if self._writer is not None:
            self._writer.record(record)

    def _judge(self, *, others_failed: bool) -> Verdict:
        from harness.results import baseline
        from harness.results.gate import CONFIG, FAILED, OK, Verdict, judge

        if self._writer is not None:
            self._writer.finish(self._records, self._canary, self._null)
        verdict = judge(self._records, self._canary, self._null)
        path = self._config.getoption("write_baseline")
        if path is not None and verdict.code in (OK, FAILED):
            try:
                added, removed = baseline.write(path, self._records)
            except baseline.BaselineError as error:
                return Verdict(CONFIG, str(error))
            verdict = Verdict(OK, f"wrote {path}: {added} added, {removed} removed")
        if others_failed and verdict.code == OK:
            return Verdict(FAILED, f"{verdict.headline}, but tests that are no properties failed")
        return verdict
