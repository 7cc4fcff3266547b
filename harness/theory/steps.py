"""How long one training step takes: computation, idling and each kind of communication.

Letters: L n_layers, p stages, v chunks of layers on a stage, m microbatches, N tokens of a microbatch on one
context-parallel rank, t tensor ways; F, I, W the times of a stage for one microbatch: forward, gradient by
the input (with recomputation), gradient by the weights.

A step runs m microbatches through the busiest stage, idles as the schedule says, and then exchanges
gradients and updates the weights. Exposed communication of a layer is part of F and I, so that the pipeline
idles for it too. The layers are taken as equal (the mean over kinds of layer), experts as evenly loaded, and
what tensor ranks hold copies of as divided among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.spec.architecture import Architecture
from harness.spec.errors import SpecError
from harness.spec.hardware import Format, Hardware
from harness.theory import communication, flops, parameters, pipeline, sharding, training
from harness.theory.communication import Direction, total_seconds
from harness.theory.efficiency import IDEAL, Efficiency
from harness.theory.elementwise import moved_bytes
from harness.theory.layout import Layout, check
from harness.theory.training import FlopConvention

ADAM_BYTES = 28
"""Moved per parameter by an update: a 16-bit gradient, 32-bit weight, momentum and variance read; those
three and the 16-bit weight written (the states of Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1)."""


@dataclass(frozen=True)
class Overlap:
    """Share of each kind of communication that runs under computation; 0: all of it takes time of its own."""

    tensor: float = 0.0
    expert: float = 0.0
    context: float = 0.0
    pipeline: float = 0.0
    data: float = 0.0


EXPOSED = Overlap()
"""Nothing is hidden: the upper bound."""


@dataclass(frozen=True)
class TrainingStep:
    """Where the time of one step goes: seconds, each an array if the layout has arrays."""

    microbatches: Any
    tokens: Any
    """Of the whole microbatches that the batch holds."""
    devices: Any
    compute: Any
    """Forward and backward passes of the mean stage, without recomputation."""
    recompute: Any
    """FLOPs that the backward pass repeats."""
    elementwise: Any
    """All but matrix products, at the speed of memory, recomputation included."""
    overhead: Any
    """`Efficiency.layer_seconds` and `pass_seconds`."""
    tensor: Any
    expert: Any
    context: Any
    pipeline: Any
    imbalance: Any
    """What the busiest stage takes longer than the mean one."""
    bubble: Any
    data: Any
    optimizer: Any
    model_flops: float
    """Per token, under the convention that was asked for."""
    hardware_flops: float
    """The same with what the layout recomputes."""
    peak_flops: float
    """Of one device."""

    @property
    def seconds(self) -> Any:
        """Time of the step; infinite where a layout of an array cannot run it."""
        return sum(getattr(self, name) for name in PARTS)

    @property
    def tokens_per_second(self) -> Any:
        """Tokens of the batch over the time of the step."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> Any:
        """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B)."""
        return training.mfu(self.model_flops, self.tokens_per_second, self.devices, self.peak_flops)

    @property
    def hfu(self) -> Any:
        """Hardware FLOPs utilisation: recomputation counts as use."""
        return self.mfu * self.hardware_flops / self.model_flops


PARTS = (
    "compute",
    "recompute",
    "elementwise",
    "overhead",
    "tensor",
    "expert",
    "context",
    "pipeline",
    "imbalance",
    "bubble",
    "data",
    "optimizer",
)
"""Fields of TrainingStep that add up to its seconds."""


@dataclass(frozen=True)
class _Sent:
    """Exposed seconds of communication of the mean layer, and at the unembedding, for one microbatch."""

    tensor: Any
    expert: Any
    context: Any
    head: Any

    @property
    def layer(self) -> Any:
        return self.tensor + self.expert + self.context


def microbatches(layout: Layout, batch_tokens: Any, context: int) -> Any:
    """Whole microbatches of each data-parallel rank in a batch of tokens.

    Raises SpecError where a single layout has none; in arrays they are 0.
    """
    each = layout.microbatch * layout.data_parallel * context
    found = batch_tokens // each
    if np.ndim(found):
        return found
    if found < 1:
        wrong = f"a batch of {batch_tokens:,.0f} tokens is less than one microbatch of {layout.microbatch} x "
        wrong += f"{context:,} tokens on each of {layout.data_parallel} data-parallel ranks"
        raise SpecError(f"{wrong}; give at least {each:,} tokens, or fewer ranks")
    return int(found)


def training_step(
    architecture: Architecture,
    hardware: Hardware,
    layout: Layout,
    *,
    batch_tokens: Any,
    context: int,
    efficiency: Efficiency = IDEAL,
    multiplied: Format = "bfloat16",
    attention: flops.Pairs = "causal",
    convention: FlopConvention = "palm",
    overlap: Overlap = EXPOSED,
    flush: bool | None = None,
    relayed: bool = False,
    element: float = 2.0,
    weight_bytes: float = 2.0,
    gradient_bytes: float = 2.0,
) -> TrainingStep:
    """The time of one step of `batch_tokens` tokens in sequences of `context`.

    `attention`: which query-key pairs are multiplied ("causal": kernels that skip the masked ones).
    `convention`: of the MFU (`training.FLOP_CONVENTIONS`), over the peak of the format `multiplied`.
    `element`, `weight_bytes`, `gradient_bytes`: of what is sent. `flush`: see `pipeline.bubble`; `relayed`:
    see `communication.expert_traffic`.

    Backward is two products for each of forward's; those of attention's scores and values are all on the way
    to the input. With recomputation the backward pass repeats what `training.work_per_token` says, with full
    recomputation its communication too; flash attention multiplies queries with keys again in any case
    (Dao et al. 2022, arXiv 2205.14135, algorithm 4).

    Raises SpecError for one layout (of plain integers) that cannot be (`layout.check`, `pipeline.why_not`),
    a batch of less than a microbatch on each rank, and a format that the hardware does not multiply. In
    arrays such a schedule or batch takes infinite time; `layout.check` is the caller's there.
    """
    peak = hardware.peak_flops(multiplied)
    if not any(isinstance(value, np.ndarray) for value in vars(layout).values()):
        check(architecture, layout)
    m, p, layers = (
        microbatches(layout, batch_tokens, context),
        layout.pipeline_parallel,
        architecture.n_layers,
    )
    tokens = layout.microbatch * context / layout.context_parallel
    flop = tokens / (layout.tensor_parallel * peak * efficiency.compute)  # seconds of one FLOP per token

    # FLOPs of the mean layer for one token: all, on weights, recomputed; and of the unembedding.
    parts = {
        name: work / context
        for name, work in flops.forward_by_component(architecture, 1, context, attention=attention).items()
    }
    parts["experts"] /= efficiency.experts  # in FLOPs of other products that take as long
    head = parts["unembedding"]
    layer = (sum(parts.values()) - head) / layers
    core = (parts["attention.scores"] + parts["attention.values"]) / layers
    again = {"none": 0.0, "selective": core, "full": layer}[layout.recompute]
    if layout.flash:
        again = parts["attention.scores"] / layers + (again if layout.recompute == "full" else 0.0)

    forward, backward = (
        _sent(architecture, layout, hardware, tokens, way, element, efficiency, overlap, relayed)
        for way in communication.DIRECTIONS
    )
    moved = moved_bytes(architecture, layout, context, element)
    byte = tokens / (hardware.bandwidth.value * efficiency.memory)  # seconds of one byte per token
    repeated = {"none": 0.0, "selective": moved.scores, "full": moved.total}[layout.recompute]
    hops = communication.pipeline_traffic(architecture, layout, hardware, tokens, element=element)
    hop = total_seconds(hops, hardware, efficiency.network, efficiency.latency) * (1 - overlap.pipeline)
    repeats = 1 if layout.recompute == "full" else 0

    # Times of one layer, and of what is once on a stage, for one microbatch.
    input_grad = (layer + core + again) * flop + (2 * moved.total + repeated) * byte
    input_grad = input_grad + backward.layer + repeats * forward.layer
    times = (
        layer * flop + moved.total * byte + forward.layer + efficiency.layer_seconds,
        input_grad + (1 + repeats) * efficiency.layer_seconds,
        (layer - core) * flop,
    )
    ends = (head * flop + forward.head, head * flop + backward.head, head * flop)
    once = (hop + efficiency.pass_seconds, hop + efficiency.pass_seconds, 0.0)
    passes = [(layers * a + b) / p + c for a, b, c in zip(times, ends, once, strict=True)]
    idle = pipeline.bubble(layout.schedule, p, m, layout.virtual_stages, *passes, flush=flush)
    rounds = m * layers / p
    data, update = _after_backward(
        architecture, layout, hardware, m, efficiency, weight_bytes, gradient_bytes
    )
    # Flash attention has no scores to drop; what its kernels multiply again inside is not counted.
    repeated_work = "none" if layout.flash and layout.recompute == "selective" else layout.recompute
    work = training.work_per_token(architecture, context, recompute=repeated_work)
    model = training.flops_per_token(architecture, context, convention)
    return TrainingStep(
        microbatches=m,
        tokens=m * layout.microbatch * context * layout.data_parallel,
        devices=layout.devices,
        compute=3 * (rounds * layer + m * head / p) * flop,
        recompute=rounds * again * flop,
        elementwise=rounds * (3 * moved.total + repeated) * byte,
        overhead=rounds * (2 + repeats) * efficiency.layer_seconds + 2 * m * efficiency.pass_seconds,
        tensor=rounds * ((1 + repeats) * forward.tensor + backward.tensor)
        + m * (forward.head + backward.head) / p,
        expert=rounds * ((1 + repeats) * forward.expert + backward.expert),
        context=rounds * ((1 + repeats) * forward.context + backward.context),
        pipeline=2 * m * hop,
        imbalance=m * _imbalance(architecture, layout, sum(times), sum(ends)),
        bubble=_finite(idle, m) * sum(passes),
        data=data * (1 - overlap.data),
        optimizer=update,
        model_flops=model,
        hardware_flops=model * work.hardware / work.model,
        peak_flops=peak,
    )


def _finite(idle: Any, m: Any) -> Any:
    """Idle time in units of one microbatch; infinite without microbatches too."""
    if not isinstance(idle, np.ndarray):
        return idle * m
    return np.where(np.isinf(idle), np.inf, idle) * np.maximum(m, 1)


def _imbalance(architecture: Architecture, layout: Layout, layer: Any, head: Any) -> Any:
    """Seconds that the busiest stage takes longer than the mean one for a microbatch.

    Chunks have one layer more where the layers do not divide; which stages get those, and which one has the
    unembedding, is as `sharding.contents` spreads them.
    """
    layers, stages, chunks = architecture.n_layers, layout.pipeline_parallel, layout.virtual_stages
    each, left = layers // (stages * chunks), layers % (stages * chunks)
    fullest = (each * chunks - (-left // stages)) * layer
    end = 0 if layout.schedule == "zbv" else stages - 1
    last = sharding.contents(architecture, layout, end).layers * layer + head
    return np.maximum(fullest, last) - (layers * layer + head) / stages


def _sent(
    architecture: Architecture,
    layout: Layout,
    hardware: Hardware,
    tokens: Any,
    way: Direction,
    element: float,
    efficiency: Efficiency,
    overlap: Overlap,
    relayed: bool,
) -> _Sent:
    """Exposed communication of the mean layer and at the head, in one direction."""
    routed = parameters.n_moe_layers(architecture) / architecture.n_layers

    def seconds(traffic: tuple[communication.Traffic, ...]) -> Any:
        return total_seconds(traffic, hardware, efficiency.network, efficiency.latency)

    def tensor(moe: bool) -> Any:
        traffic = communication.tensor_traffic(
            architecture, layout, hardware, tokens, way, routed=moe, element=element
        )
        return seconds(traffic)

    mean: Any = 0.0
    if routed < 1:
        mean = mean + (1 - routed) * tensor(False)
    if routed > 0:
        mean = mean + routed * tensor(True)
    exchange = communication.expert_traffic(
        architecture, layout, hardware, tokens, relayed=relayed, element=element
    )
    ring = communication.context_traffic(architecture, layout, hardware, tokens, way, element=element)
    head = communication.head_traffic(architecture, layout, hardware, tokens, way, element=element)
    return _Sent(
        tensor=mean * (1 - overlap.tensor),
        expert=routed * seconds(exchange) * (1 - overlap.expert),
        context=seconds(ring) * (1 - overlap.context),
        head=seconds(head) * (1 - overlap.tensor),
    )


def _after_backward(
    architecture: Architecture,
    layout: Layout,
    hardware: Hardware,
    m: Any,
    efficiency: Efficiency,
    weight_bytes: float,
    gradient_bytes: float,
) -> tuple[Any, Any]:
    """Seconds of data parallelism in a step, and of the update, on a rank of the first stage."""
    layers = sharding.contents(architecture, layout, 0).layers
    dense, experts = sharding.split(sharding.rank_parameters(architecture, layout))
    traffic = communication.data_traffic(
        layout,
        hardware,
        dense,
        experts,
        m,
        layers=layers,
        weight_bytes=weight_bytes,
        gradient_bytes=gradient_bytes,
    )
    traffic += communication.replica_traffic(
        architecture, layout, hardware, layers, gradient_bytes=gradient_bytes
    )
    if layout.zero_stage:
        ways, expert_ways = sharding.shard_ways(layout)
        dense, experts = dense / ways, experts / expert_ways
    update = (dense + experts) * ADAM_BYTES / (hardware.bandwidth.value * efficiency.memory)
    return total_seconds(traffic, hardware, efficiency.network, efficiency.latency), update
