"""Mutants in processes of their own: each runs one after another, and a process that dies is replaced."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from harness.results.gate import FAILED, OK, VOID
from harness.results.kills.hunting import Plan

GRACE_S = 60.0
"""Beyond the limit of a property, which its own process keeps: to start, to collect, to build."""
EVERY_S = 1.0
"""Between two looks at those that say nothing."""


@dataclass
class Worker:
    """A process, what it works on and when it was last heard of."""

    process: BaseProcess
    pipe: Connection
    mutant: str
    slug: str = ""
    heard: float = field(default_factory=time.monotonic)

    def give(self, mutant: str) -> None:
        """Begin another mutant."""
        self.mutant, self.slug, self.heard = mutant, "", time.monotonic()
        self.pipe.send(mutant)

    @property
    def where(self) -> str:
        """What it was doing."""
        return f"while it ran {self.slug}" if self.slug else "before its first property"

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run(names: Sequence[str], plan: Plan, folder: Path, jobs: int) -> Iterator[tuple[str, str]]:
    """Each mutant as its run ends, with a sentence that says why there is no result, or none where there is.

    When the iteration is given up the processes are ended; run files that have ended stay.
    """
    left = list(reversed(names))
    workers: list[Worker] = []
    try:
        while len(workers) < jobs and left:
            workers.append(_start(left.pop(), plan, folder))
        while workers:
            ready = wait([w.pipe for w in workers], timeout=EVERY_S)
            for worker in list(workers):
                mutant, ending = worker.mutant, _listen(worker, plan, heard=worker.pipe in ready)
                if ending is None:
                    continue
                if not worker.process.is_alive():
                    workers.remove(worker)
                    if left:
                        workers.append(_start(left.pop(), plan, folder))
                elif left:
                    worker.give(left.pop())
                else:
                    workers.remove(worker)
                    worker.end()
                yield mutant, ending
    finally:
        for worker in workers:
            worker.end()


def _start(mutant: str, plan: Plan, folder: Path) -> Worker:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(theirs, plan, folder), daemon=True)
    process.start()
    theirs.close()
    worker = Worker(process, ours, mutant)
    worker.give(mutant)
    return worker


def _listen(worker: Worker, plan: Plan, *, heard: bool) -> str | None:
    """How the mutant ended, or None while it runs. A worker that is of no more use is ended."""
    if not heard:
        if time.monotonic() - worker.heard < plan.timeout_s + GRACE_S:
            return None
        worker.end()
        return f"the process gave no sign for {plan.timeout_s + GRACE_S:.0f} s {worker.where}"
    try:
        told = worker.pipe.recv()
    except (EOFError, OSError):
        worker.end()
        return f"the process died {worker.where}"
    worker.heard = time.monotonic()
    if isinstance(told, str):
        worker.slug = told
        return None
    if told in (OK, FAILED, VOID):
        return ""
    return f"pytest ended with exit code {told} {worker.where}"


def _work(pipe: Connection, plan: Plan, folder: Path) -> None:
    """A process: mutants that come through the pipe, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of the group; the first process decides
    import torch

    from harness.results.kills import hunting

    torch.set_num_threads(1)
    hunting.enter(plan.also)
    hunting.order()  # imports the suites
    gc.freeze()  # pytest collects garbage after each run, and need not look through all of torch
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        log = hunting.run_file(folder, name).with_suffix(".log")
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        pipe.send(int(hunting.hunt(name, plan, folder, pipe.send)))
