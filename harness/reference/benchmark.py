"""How fast one MoE layer is, beside plain matmuls of the same FLOPs and beside transformers, in one run.

Letters: T tokens, D d_model, F d_ff, E experts, K top-k. A layer is router, K gated experts of each token,
and combine: 6 T K D F FLOPs in its experts. The floor is two plain matmuls of that many FLOPs, [T K, D] by
[D, 2 F] and [T K, F] by [F, D], with no router, activation or movement of rows.

Candidates take turns within every round, so that what disturbs the machine disturbs all of them. Time is
CPU time of the process on one thread: it is not inflated by other processes, as wall clock is. The lower
quartile is what ratios are taken of. The answers are checked on the same build, in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from types import MappingProxyType
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from harness.reference.experts import Moe
from harness.reference.oracle.arithmetic import Weights
from harness.reference.oracle.moe import mixture
from harness.reference.weights import draw_one
from harness.spec import architecture as spec

CHECKED = 16
"""Tokens that are compared with the oracle."""
TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType({torch.float32: 1e-5, torch.bfloat16: 2e-2})
"""Of |output - oracle| / |oracle|: rounding, 2^-24 or 2^-8, of each of three layers' results and, averaged
out, inside them; with a decade of room in float32 and a factor of 5 in bfloat16."""
FLOOR = "two plain matmuls"
REFERENCE = "reference"

COLUMNS = ("dtype", "tokens", "layer", "ratio to the floor", "ms CPU", "median", "GFLOP/s", "error")

Layer = Callable[[Tensor], Tensor]
"""[T, D] -> [T, D]."""


@dataclass(frozen=True)
class Shape:
    """The layer that is measured: Mixtral's routing at a quarter of its width."""

    d_model: int = 1024
    d_ff: int = 3584
    n_experts: int = 8
    top_k: int = 2

    @property
    def moe(self) -> spec.Moe:
        """As a spec says it."""
        expert = spec.FeedForward(d_ff=self.d_ff)
        return spec.Moe(n_experts=self.n_experts, top_k=self.top_k, expert=expert)


@dataclass(frozen=True)
class Row:
    """One candidate at one size."""

    dtype: str
    tokens: int
    candidate: str
    seconds: float
    """Lower quartile of CPU time per call."""
    seconds_median: float
    ratio: float
    """The floor's lower quartile over this one's: 1 is as fast as the matmuls alone."""
    gflops: float
    """1e9 FLOP per second of CPU time, matmuls of the experts alone."""
    error: float | None
    """|output - oracle| / |oracle| over the checked tokens; None for the floor, which is no layer."""


def layer(
    shape: Shape = Shape(),
    *,
    tokens: Sequence[int] = (512, 4096),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    rounds: int = 7,
    seed: int = 0,
    progress: Callable[[str], object] = lambda _: None,
) -> list[Row]:
    """Time every candidate at every size, `rounds` times in turn after one warm-up.

    progress: called after each turn of all candidates, with what they are measured at.
    Raises ArithmeticError if the reference layer's answers are wrong: its speed would mean nothing.
    Without transformers its candidates are absent.
    """
    rows: list[Row] = []
    with one_thread(), torch.inference_mode():
        for dtype in dtypes:
            generator = torch.Generator().manual_seed(seed)
            moe = _layer(shape, dtype, generator)
            candidates: dict[str, Layer] = {REFERENCE: _reference(moe)} | _transformers(shape, moe)
            for count in tokens:
                name = str(dtype).removeprefix("torch.")
                x = torch.randn(count, shape.d_model, generator=generator, dtype=torch.float64).to(dtype)
                errors = _errors(candidates, shape, moe, x)
                if errors[REFERENCE] > TOLERANCE[dtype]:
                    raise ArithmeticError(
                        f"the reference layer is off by {errors[REFERENCE]:.1e} in {name}; "
                        f"at most {TOLERANCE[dtype]:.0e} is rounding"
                    )
                floor = _floor(shape, count, dtype, generator)
                times = _times(
                    candidates | {FLOOR: floor}, x, rounds, partial(progress, f"{name}, {count} tokens")
                )
                flops = 6 * count * shape.top_k * shape.d_model * shape.d_ff
                rows += _rows(name, count, flops, times, errors)
    return rows


def cells(row: Row) -> tuple[object, ...]:
    """The row as printed, in the order of COLUMNS."""
    error = "" if row.error is None else f"{row.error:.1e}"
    times = (f"{1e3 * row.seconds:.1f}", f"{1e3 * row.seconds_median:.1f}")
    return row.dtype, row.tokens, row.candidate, f"{row.ratio:.2f}", *times, f"{row.gflops:.0f}", error


def document(rows: Sequence[Row], machine: str, shape: Shape = Shape()) -> str:
    """The Markdown of `results/benchmark_layer.md`; `machine` says in words what it ran on."""
    table = tabulate(map(cells, rows), headers=COLUMNS, tablefmt="github", disable_numparse=True)
    return f"""# Speed of one MoE layer

d_model {shape.d_model}, d_ff {shape.d_ff}, {shape.n_experts} experts, top-{shape.top_k}, router and combine
included, forward, one thread. {machine}

{table}

Ratio: CPU time of two plain matmuls of the experts' FLOPs, into memory that is there already, over that of
the layer; 1 is as fast as the matmuls alone. Times are the lower quartile and the median per call, of
candidates that took turns in one run. Error: |output - oracle| / |oracle| over the first {CHECKED} tokens,
with the same weights. Written by `moe-harness bench layer`; the figures are those of one run on one machine.
"""


def write(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Write `document` to `path`."""
    path.write_text(document(rows, machine), encoding="utf-8")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: threads that wait for each other would be counted as CPU time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _layer(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Moe:
    """A layer with weights of standard deviation D^-1/2, which keep activations near 1."""
    moe = Moe(shape.moe, shape.d_model, options={"device": torch.device("cpu"), "dtype": dtype})
    for name, tensor in moe.state_dict().items():
        tensor.copy_(draw_one(name, tuple(tensor.shape), generator, shape.d_model**-0.5))
    return moe.eval()


def _reference(moe: Moe) -> Layer:
    def run(x: Tensor) -> Tensor:
        output: Tensor = moe(x, torch.ones(len(x), dtype=torch.bool)).output
        return output

    return run


def _floor(shape: Shape, tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Layer:
    """Both matmuls, on operands and into memory that are there already; its argument is not looked at."""
    rows, d, f = tokens * shape.top_k, shape.d_model, shape.d_ff
    sizes = ((rows, d), (d, 2 * f), (rows, f), (f, d))
    x, up, hidden, down = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    wide, narrow = torch.empty(rows, 2 * f, dtype=dtype), torch.empty(rows, d, dtype=dtype)

    def run(_: Tensor) -> Tensor:
        torch.mm(x, up, out=wide)
        return torch.mm(hidden, down, out=narrow)

    return run


def _transformers(shape: Shape, moe: Moe) -> dict[str, Layer]:
    """Mixtral's sparse block of transformers with the same weights, in two experts backends."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return {}
    assert moe.experts.gate is not None
    gate_up = torch.cat([moe.experts.gate, moe.experts.up], dim=1)
    layers: dict[str, Layer] = {}
    for backend in ("eager", "grouped_mm"):
        config: Any = MixtralConfig(
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_local_experts=shape.n_experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = backend  # noqa: SLF001, transformers' own switch has no public name
        with torch.device("meta"):
            block: Any = MixtralSparseMoeBlock(config)
        state = {"gate.weight": moe.router.weight, "experts.gate_up_proj": gate_up}
        block.load_state_dict(state | {"experts.down_proj": moe.experts.down}, assign=True)
        layers[f"transformers, {backend}"] = _batch_of_one(block.eval())
    return layers


def _batch_of_one(block: Callable[[Tensor], Tensor]) -> Layer:
    return lambda x: block(x[None])[0]


def _errors(candidates: Mapping[str, Layer], shape: Shape, moe: Moe, x: Tensor) -> dict[str, float]:
    weights = Weights({f"layers.0.moe.{name}": tensor for name, tensor in moe.state_dict().items()})
    checked = min(CHECKED, len(x))
    tokens = {(0, t): x[t].double().numpy() for t in range(checked)}
    want = mixture(shape.moe, 0, weights, tokens, (1, checked))[1].output
    return {
        name: float((run(x)[:checked].double() - want).norm() / want.norm())
        for name, run in candidates.items()
    }


def _times(
    candidates: Mapping[str, Layer], x: Tensor, rounds: int, progress: Callable[[], object]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            start = time.process_time()
            run(x)
            if turn:  # the first one warms up
                times[name].append(time.process_time() - start)
        progress()
    return times


def _rows(
    dtype: str, tokens: int, flops: int, times: Mapping[str, list[float]], errors: Mapping[str, float]
) -> list[Row]:
    quartile = {name: quantiles(taken, n=4)[0] for name, taken in times.items()}
    return [
        Row(
            dtype=dtype,
            tokens=tokens,
            candidate=name,
            seconds=quartile[name],
            seconds_median=median(taken),
            ratio=quartile[FLOOR] / quartile[name],
            gflops=flops / quartile[name] / 1e9,
            error=errors.get(name),
        )
        for name, taken in times.items()
    ]
