"""Families under the suites in processes of their own: one that hangs or dies takes no other with it.

A server process imports the libraries once and forks a process per family, so that none pays for them again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from harness.results import suites
from harness.results.gate import FAILED, OK, VOID
from harness.results.header import LIBRARIES, installed

FOLDER = Path(".runs") / "survey"
PARTS = ("parameters", "compute", "routing", "attention", "training")
"""Parts of the suites that concern one model's passes, in eval and in training mode. What is generated is
left out: decoding and serving are the library's, not a family's, and take longer than all of these."""
EVERY_S = 1.0
"""Between two looks at the clock."""


@dataclass(frozen=True)
class Plan:
    """What every family is put through."""

    seed: int = 1
    limit_s: float = 180.0
    """Seconds that a family may take; a property may take half of them."""
    parts: tuple[str, ...] = PARTS

    def folder(self) -> Path:
        """Where the results are: under the digest of all that decides them."""
        from harness.results.kills.hunting import sources

        libraries = [platform.python_version(), *(installed(name) for name in LIBRARIES)]
        text = json.dumps([asdict(self), libraries, sources()])
        return FOLDER / hashlib.sha256(text.encode()).hexdigest()[:16]


def run_file(folder: Path, family: str) -> Path:
    """Where the run of a family is."""
    return folder / f"{family}.jsonl"


def facts_file(folder: Path, family: str) -> Path:
    """Where the facts about a family are."""
    return folder / f"{family}.json"


def run(
    addresses: Mapping[str, str], plan: Plan, folder: Path, jobs: int, preload: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """Each family as it ends, with a sentence that says why there is no result, or none where there is.

    addresses: name of a family -> address of the implementation. preload: modules that are imported once for
    all. When the iteration is given up, what runs is ended; the files of what has ended stay.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "pytest", "harness.conformance", "harness.mutants", *preload])
    left = list(addresses.items())[::-1]
    running: dict[str, tuple[BaseProcess, float]] = {}
    try:
        while left or running:
            while left and len(running) < jobs:
                name, address = left.pop()
                process: BaseProcess = server.Process(
                    target=_work, args=(name, address, plan, folder), daemon=False
                )
                process.start()
                running[name] = process, time.monotonic()
            wait([process.sentinel for process, _ in running.values()], timeout=EVERY_S)
            for family, (child, began) in list(running.items()):
                ending = _ending(child, time.monotonic() - began, plan, facts_file(folder, family))
                if ending is not None:
                    _end(child)
                    del running[family]
                    yield family, ending
    finally:
        for child, _ in running.values():
            _end(child)


def _ending(process: BaseProcess, seconds: float, plan: Plan, facts: Path) -> str | None:
    """How a family ended; None while it runs."""
    code = process.exitcode
    if code is None:
        return f"it did not end within {plan.limit_s:g} s" if seconds > plan.limit_s else None
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return "" if code == 0 and facts.exists() else f"its process ended with exit code {code}; see its log"


def _end(process: BaseProcess) -> None:
    """End a process and all that it started."""
    if process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it is over, or was not yet the first of a group
            process.kill()
    process.join()


def _work(name: str, address: str, plan: Plan, folder: Path) -> None:
    """One family, in a process that is forked for it: its run file, then its facts."""
    os.setsid()
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    began, used = time.monotonic(), time.process_time()
    arguments = [
        *("--impl", address, "--seed", str(plan.seed), "--no-null"),
        *("--run-file", str(run_file(folder, name)), "--timeout-property", str(plan.limit_s / 2)),
        *("-q", "--no-header", "--tb=short", "-p", "no:hypothesispytest", "-p", "no:randomly"),
    ]
    code = suites.run(arguments, [part for part in plan.parts if suites.exists(part)])
    if code not in (OK, FAILED, VOID):
        sys.exit(code)
    seconds = {"seconds": time.monotonic() - began, "processor_seconds": time.process_time() - used}
    rounded = {key: round(value, 2) for key, value in seconds.items()}
    facts = rounded | _described(address, plan.seed)
    facts_file(folder, name).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _described(address: str, seed: int) -> dict[str, Any]:
    """What the model under test is, as far as it says so; why there is none."""
    import torch

    from harness.implementations import resolve
    from harness.implementations.protocols import Unsupported

    try:
        model: Any = resolve(address).build(None, device="cpu", dtype=torch.float32, seed=seed)
    except Unsupported as error:
        return {"unsupported": str(error)}
    except Exception as error:  # noqa: BLE001  # the run file has it as the outcome of each property
        return {"crashed": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {
        "class": type(getattr(model, "module", model)).__name__,
        "parameters": sum(tensor.numel() for tensor in model.parameters().values()),
        "routers": [site.router for site in getattr(model, "sites", ())],
        "capabilities": sorted(model.capabilities),
        "missing": dict(getattr(model, "missing", {})),
    }
