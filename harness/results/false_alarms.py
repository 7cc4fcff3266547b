"""False alarms: the fast profile on what is right by construction, once per seed, and what came of it.

A run is one session of pytest with one seed on one spec. What it found is one line of a file that grows, so
that a search that was interrupted goes on where it was.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

from harness.results.gate import FAILED, OK, VOID
from harness.results.report import Page
from harness.results.runfile import RunFileError
from harness.theory.describe import Table

COMMAND = "moe-harness false-alarms"
FILE = "false-alarms"
FOLDER = Path(".runs") / "false-alarms"
IMPLEMENTATIONS = ("reference", "independent")
SPECS = (
    "mixtral-8x7b",
    "deepseek-v3",
    "gpt-oss-20b",
    "olmoe-1b-7b",
    "dbrx",
    "qwen3-30b-a3b",
    "llama-3.1-8b",
    "gpt3-175b",
    "palm-540b",
)
"""One of each kind of router, attention and block that is shipped; a seed takes the next."""
QUICK = (
    "-q",
    "--tb=no",
    "--no-header",
    "--no-summary",
    "-p",
    "no:hypothesispytest",
    "-p",
    "no:unraisableexception",
)
"""The last: pytest would collect garbage five times at the end of each run."""


@dataclass(frozen=True)
class Ending:
    """A property that did not pass."""

    implementation: str
    slug: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class Trial:
    """One seed on one spec."""

    seed: int
    spec: str
    exit_code: int
    counts: dict[str, int]
    """How many properties ended in each outcome."""
    ran: tuple[str, ...]
    """Slugs of those that passed, once for each implementation."""
    wrong: tuple[Ending, ...]
    """Those that failed or were void."""
    comparable: dict[str, list[float]]
    """Slug -> the shares of tokens that could be compared."""
    used: dict[str, float]
    """Slug -> the largest share of a tolerance that was used."""
    seconds: float
    """Of processor time."""
    trouble: str = ""
    """Why there is no result, where there is none."""


def subject(seed: int, first: int) -> str:
    """The spec of a seed: they rotate."""
    return SPECS[(seed - first) % len(SPECS)]


def trial(seed: int, spec: str, implementations: Sequence[str]) -> Trial:
    """Run the fast profile; the suites are run by pytest, in this process."""
    from harness.results import suites
    from harness.results.runfile import read

    addresses = [word for name in implementations for word in ("--impl", f"{name}@{spec}")]
    said, began = io.StringIO(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.jsonl"
        options = ["--profile", "fast", "--no-null", "--seed", str(seed), "--run-file", str(file)]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = suites.run([*addresses, *options, *QUICK])
        seconds = time.process_time() - began
        try:
            run = read(file)
        except RunFileError:
            last = (said.getvalue().strip() or "nothing was said").splitlines()[-1]
            return Trial(seed, spec, code, {}, (), (), {}, {}, seconds, f"the run was cut off: {last}")
    comparable: dict[str, list[float]] = {}
    used: dict[str, float] = {}
    for record in run.records:
        for name, value in record.facts.items():
            if name == "comparable_share":
                comparable.setdefault(record.slug, []).append(value)
            elif name.endswith("share_of_tolerance"):
                used[record.slug] = max(used.get(record.slug, 0.0), value)
    wrong = tuple(
        Ending(r.implementation, r.slug, r.outcome, r.reason)
        for r in run.records
        if r.outcome in ("failed", "void")
    )
    passed = tuple(r.slug for r in run.records if r.passing)
    counts: dict[str, int] = {outcome: n for outcome, n in run.footer.counts.items() if n}
    canary = run.footer.canary
    alive = "" if canary is not None and canary.caught else "the canary was not caught"
    return Trial(seed, spec, code, counts, passed, wrong, comparable, used, seconds, alive)


def search(seeds: Sequence[int], first: int, implementations: Sequence[str], jobs: int) -> Iterator[Trial]:
    """A trial of each seed as it ends, those first that an earlier search of the same sources left behind.

    Raises RunFileError where a process died.
    """
    file = _kept(implementations, first)
    there = {one.seed: one for one in _read(file)}
    yield from (there[seed] for seed in seeds if seed in there)
    missing = [seed for seed in seeds if seed not in there]
    if not missing:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(min(jobs, len(missing)), get_context("spawn"), initializer=_begin)
    try:
        waiting = [pool.submit(trial, seed, subject(seed, first), implementations) for seed in missing]
        for done in as_completed(waiting):
            found = done.result()
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(asdict(found)) + "\n")
            yield found
    except BrokenProcessPool as error:
        raise RunFileError(f"{file}: a process that ran the suites died; start again to go on") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """A process of the pool: its libraries are loaded once, and no garbage is looked for in them."""
    import signal

    import torch

    from harness.conformance.catalogue import properties

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of the group; the first process decides

    torch.set_num_threads(1)
    list(properties())
    gc.freeze()


def _kept(implementations: Sequence[str], first: int) -> Path:
    """Where the trials are that the same sources made of the same implementations."""
    import hashlib

    from harness.results.kills.hunting import sources

    text = json.dumps([list(implementations), first % len(SPECS), SPECS, sources()])
    return FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"


def _read(file: Path) -> Iterator[Trial]:
    """The trials of a file; a line that was cut off is run again."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
            held = json.loads(line)
            held |= {"ran": tuple(held["ran"]), "wrong": tuple(Ending(**one) for one in held["wrong"])}
            yield Trial(**held)


@dataclass(frozen=True)
class Found:
    """What all trials found."""

    implementations: tuple[str, ...]
    trials: tuple[Trial, ...]

    @classmethod
    def of(cls, implementations: Sequence[str], trials: Iterable[Trial]) -> Found:
        """In the order of their seeds."""
        return cls(tuple(implementations), tuple(sorted(trials, key=lambda one: one.seed)))

    def count(self, *outcomes: str) -> int:
        """Properties x runs that ended so."""
        return sum(one.counts.get(outcome, 0) for one in self.trials for outcome in outcomes)

    @property
    def wrong(self) -> list[tuple[Trial, Ending]]:
        """Everything that failed or was void."""
        return [(one, ending) for one in self.trials for ending in one.wrong]

    @property
    def code(self) -> int:
        """1 if anything failed; 69 if anything was void, or a run has no result."""
        if self.count("failed"):
            return FAILED
        if self.count("void") or any(one.trouble for one in self.trials):
            return VOID
        return OK

    @property
    def incomparable(self) -> float:
        """Share of the tokens that were not compared, as the properties that say so have it."""
        shares = [s for one in self.trials for many in one.comparable.values() for s in many]
        return 1 - fmean(shares) if shares else 0.0

    def as_json(self) -> dict[str, Any]:
        """Ready for json.dumps: the page, and the time that it took."""
        seconds = [one.seconds for one in self.trials]
        return {
            "implementations": self.implementations,
            "seeds": [one.seed for one in self.trials],
            "runs": len(self.trials),
            "outcomes": {o: self.count(o) for o in ("passed", "failed", "void", "unsupported")},
            "incomparable_share": round(self.incomparable, 4),
            "processor_seconds": {"total": round(sum(seconds), 1), "median_run": round(median(seconds), 3)},
            "properties": [dict(zip(HEADERS, row, strict=True)) for row in self.rows()],
            "wrong": [{"seed": one.seed, "spec": one.spec, **asdict(ending)} for one, ending in self.wrong],
            "without_result": {one.seed: one.trouble for one in self.trials if one.trouble},
        }

    def rows(self) -> list[tuple[object, ...]]:
        """One for each property."""
        passed = Counter(slug for one in self.trials for slug in one.ran)
        wrong = Counter((ending.slug, ending.outcome) for _, ending in self.wrong)
        shares: dict[str, list[float]] = {}
        used: dict[str, float] = {}
        for one in self.trials:
            for slug, many in one.comparable.items():
                shares.setdefault(slug, []).extend(many)
            for slug, most in one.used.items():
                used[slug] = max(used.get(slug, 0.0), most)
        return [
            (
                slug,
                passed[slug],
                wrong[slug, "failed"],
                wrong[slug, "void"],
                f"{1 - fmean(shares[slug]):.4f}" if slug in shares else "",
                f"{used[slug]:.4f}" if slug in used else "",
            )
            for slug in sorted(passed.keys() | {slug for slug, _ in wrong})
        ]

    def page(self) -> Page:
        """The page of `results/`."""
        seeds = [one.seed for one in self.trials]
        first = (
            ("implementations", ", ".join(self.implementations)),
            ("runs, one seed each", len(seeds)),
            ("seeds", f"{min(seeds)} to {max(seeds)}" if seeds else ""),
            ("specs, in rotation", ", ".join(SPECS)),
            ("properties x runs that passed", self.count("passed")),
            ("that failed", self.count("failed")),
            ("that were void", self.count("void")),
            ("that an implementation does not offer", self.count("unsupported")),
            ("runs without a result", sum(bool(one.trouble) for one in self.trials)),
            ("share of tokens that were not comparable", f"{self.incomparable:.4f}"),
        )
        return Page(
            f"{FILE}.md",
            "False alarms of the fast profile",
            COMMAND,
            (
                Table("What ran, and what came of it", ("what", "value"), first),
                Table(
                    "What failed or was void",
                    ("seed", "spec", "implementation", "property", "why"),
                    self._why(),
                ),
                Table("By property", HEADERS, tuple(self.rows())),
            ),
        )

    def _why(self) -> tuple[tuple[object, ...], ...]:
        ended = [
            (one.seed, one.spec, e.implementation, e.slug, f"{e.outcome}: {e.reason}")
            for one, e in self.wrong
        ]
        return (*ended, *((one.seed, one.spec, "", "", one.trouble) for one in self.trials if one.trouble))


HEADERS = (
    "property",
    "passed",
    "failed",
    "void",
    "share of tokens not comparable",
    "largest share of its tolerance",
)
