"""The work of `moe-harness bench serve`: a load on one engine, its tables, and the files asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.benchmark import picture as pictures
from harness.benchmark import serving, tables, workload
from harness.benchmark.metrics import Slo, samples
from harness.benchmark.setup import engine, slo
from harness.reference.engine import Limits, Sampling, Speculation
from harness.telemetry import machine
from harness.theory.describe import Table

VOID = 69
"""Exit code of a run that measured nothing."""


@dataclass(frozen=True)
class Load:
    """What is sent, and how fast."""

    dataset: str
    requests: int
    rate: float
    burstiness: float
    concurrency: int | None
    temperature: float
    seed: int

    def drawn(self, vocab_size: int) -> workload.Workload:
        """The requests and when they come; raises WorkloadError."""
        generator = np.random.default_rng(self.seed)
        asked = workload.dataset(
            self.dataset, self.requests, vocab_size, generator, Sampling(temperature=self.temperature)
        )
        at = workload.arrivals(self.requests, self.rate, generator, burstiness=self.burstiness)
        return workload.Workload(workload.seeded(asked, self.seed), at)

    def __str__(self) -> str:
        rate = "all at once" if np.isinf(self.rate) else f"{self.rate:g} per second"
        gaps = "" if self.burstiness == 1 or np.isinf(self.rate) else f", burstiness {self.burstiness:g}"
        bound = "" if self.concurrency is None else f", at most {self.concurrency} in flight"
        drawn = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        return f"{self.requests} requests of {self.dataset}, {rate}{gaps}{bound}, {drawn}, seed {self.seed}"


def serve(
    address: str,
    spec: str | None,
    load: Load,
    *,
    limits: Limits | None,
    speculation: Speculation | None,
    dtype: str,
    bounds: Sequence[str],
    output: Path | None,
    picture: Path | None,
    step: Callable[[str], None],
) -> tuple[int, list[Table], dict[str, Any]]:
    """Exit code, tables and facts of one run; `output` (Markdown) and `picture` (SVG) are written.

    Raises SpecError, AdapterError, Unsupported or WorkloadError for what cannot be used, OSError for a file.
    """
    from harness.results.files import ensure_writable

    asked = Slo(**slo(list(bounds)))
    for path in (output, picture):
        if path is not None:
            ensure_writable(path)
    served = engine(
        address,
        spec,
        dtype=getattr(torch, dtype),
        seed=load.seed,
        limits=limits,
        speculation=speculation,
    )
    workload = load.drawn(served.model.vocab_size)
    with served.session() as running:
        run = serving.run(
            running,
            workload,
            concurrency=load.concurrency,
            slo=asked,
            alone=served.session if served.here else None,
            step=step,
        )
    what = {
        "engine": address,
        "spec": spec,
        "limits": limits,
        "speculation": speculation,
        "dtype": dtype if served.here else None,
        "load": load,
        "slo": asked,
    }
    title = "; ".join(f"{name} {value}" for name, value in what.items() if value is not None)
    shown = tables.tables(run, title)
    if output is not None:
        write(output, "Serving benchmark", "moe-harness bench serve", shown)
    if picture is not None and not run.void:
        pictures.latencies(picture, samples(run.answers))
    facts = {name: asdict(value) if is_dataclass(value) else value for name, value in what.items()}
    return VOID if run.void else 0, shown, {"what": facts, **tables.as_json(run)}


def write(path: Path, title: str, made_by: str, shown: Sequence[Table]) -> None:
    """A Markdown file of the tables, with the machine that they were measured on. Raises OSError."""
    from harness.results.render import render

    facts = machine()
    where = f"{facts['cpu']}, {facts['system']}, torch {facts['torch']}"
    head = f"# {title}\n\nWritten by `{made_by}`: figures of one run, on {where}.\n"
    path.write_text("\n".join((head, *(render(table, "markdown") for table in shown))), encoding="utf-8")
