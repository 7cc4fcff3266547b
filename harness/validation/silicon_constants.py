"""The constants between data sheets and measured serving times: their meaning, ranges and fitted values.

The values stand in `silicon.json`, which `python -m harness.validation.silicon` writes; nothing is typed in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from harness.spec import SpecError
from harness.spec.errors import did_you_mean
from harness.theory.efficiency import Efficiency

FILE = Path(__file__).with_name("silicon.json")
ENGINES = ("trtllm", "vllm", "sglang")
ALL_ENGINES = "mean"
"""Of the three, for a plan that names none."""


@dataclass(frozen=True)
class Constants:
    """What is fitted: to TPOT down to `sequence_seconds`, the rest to TTFT. Shares, seconds, numbers."""

    compute: float
    experts: float
    memory: float
    cache: float
    network: float
    latency: float
    kernel_trtllm: float
    kernel_vllm: float
    kernel_sglang: float
    launch_seconds: float
    sequence_seconds: float
    request_seconds: float = 0.0
    passes: float = 0.0
    burst_trtllm: float = 0.0
    burst_vllm: float = 0.0
    burst_sglang: float = 0.0


@dataclass(frozen=True)
class Range:
    """What a constant may be, and where a fit starts."""

    low: float
    start: float
    high: float
    meaning: str


RANGES: Mapping[str, Range] = {
    "compute": Range(
        0.3, 0.7, 0.95, "share of peak FLOP/s of dense matrix products; 0.5 to 0.8 for large ones"
    ),
    "experts": Range(0.05, 0.3, 1.0, "of it, what grouped products of routed experts reach"),
    "memory": Range(0.5, 0.85, 0.95, "share of the memory's bytes/s; streaming copies reach 0.9 to 0.95"),
    "cache": Range(0.3, 0.8, 1.0, "of it, what reading keys and values reaches"),
    "network": Range(0.1, 0.5, 0.95, "share of a link's bytes/s in collectives; large ones reach 0.8"),
    "latency": Range(
        0.1, 1.0, 3.0, "of a link's latency in specs/hardware.toml, what a collective waits for"
    ),
    "kernel_trtllm": Range(1e-6, 3e-6, 2e-5, "seconds of a dependent kernel in a captured graph: 2 to 5 us"),
    "kernel_vllm": Range(1e-6, 4e-6, 2e-5, "the same"),
    "kernel_sglang": Range(1e-6, 4e-6, 2e-5, "the same"),
    "launch_seconds": Range(1e-7, 5e-6, 5e-5, "more for a kernel that the host launches: 5 to 10 us"),
    "sequence_seconds": Range(1e-7, 1e-5, 1e-4, "host work for a sampled token: 5 to 50 us in Python"),
    "request_seconds": Range(1e-3, 0.02, 1.0, "to take a request in: HTTP, tokenising, scheduling"),
    "passes": Range(
        0.5, 2.0, 40.0, "passes until a first token is seen: the one under way, streaming intervals"
    ),
    "burst_trtllm": Range(
        1e-3, 0.05, 1.0, "prompts before one's own, as a share of those running; 0.05 if only at first"
    ),
    "burst_vllm": Range(1e-3, 0.05, 1.0, "the same"),
    "burst_sglang": Range(1e-3, 0.05, 1.0, "the same"),
}
"""By name of the constant. `high` of a share of a data sheet is below 1: none is reached."""


def read(file: Path = FILE) -> Constants:
    """The fitted constants. Raises SpecError where the file is not what the fit writes."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))["constants"]
        return Constants(**{one.name: float(values[one.name]) for one in fields(Constants)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        right = "write it with: python -m harness.validation.silicon"
        raise SpecError(f"{file} does not hold the fitted constants ({error}); {right}") from None


def write(constants: Constants, about: Mapping[str, object], file: Path = FILE) -> None:
    """Constants to four digits, with what they were fitted to."""
    values = {name: float(f"{value:.4g}") for name, value in asdict(constants).items()}
    file.write_text(json.dumps({**about, "constants": values}, indent=2) + "\n", encoding="utf-8")


def measured(engine: str = ALL_ENGINES) -> Efficiency:
    """Efficiencies as fitted to measured serving rows, of one engine or of their mean. Raises SpecError."""
    return efficiency(read(), engine)


def efficiency(constants: Constants, engine: str = ALL_ENGINES) -> Efficiency:
    """What `harness.theory.roofline` takes, of one engine or of their mean. Raises SpecError."""
    if engine not in (*ENGINES, ALL_ENGINES):
        raise SpecError(f'no engine "{engine}"; {did_you_mean(engine, (*ENGINES, ALL_ENGINES))}')
    chosen = ENGINES if engine == ALL_ENGINES else (engine,)
    kernel = sum(getattr(constants, f"kernel_{one}") for one in chosen) / len(chosen)
    return Efficiency(
        compute=constants.compute,
        experts=constants.experts,
        memory=constants.memory,
        cache=constants.cache,
        network=constants.network,
        latency=constants.latency,
        kernel_seconds=kernel,
        launch_seconds=constants.launch_seconds,
        sequence_seconds=constants.sequence_seconds,
    )
