"""A model on devices as a simulated server needs it: what an iteration takes, and the room for caches.

Letters: p pipeline stages, d data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import add, sub

from harness.planning.scheduling import Cache, Policy
from harness.planning.settings import rates
from harness.planning.workload import Workload
from harness.spec.architecture import Architecture
from harness.spec.errors import SpecError
from harness.spec.hardware import Hardware
from harness.theory import states
from harness.theory.efficiency import IDEAL, Efficiency
from harness.theory.fitting import refuse
from harness.theory.inference import Pass, Pricer, pricer
from harness.theory.layout import Layout, check
from harness.theory.precision import Precision
from harness.theory.sharding import contents, telling_stages

REMEMBERED = 100_000
"""Sizes of a pass whose time without attention is kept."""

Counts = tuple[float, float, float, float]
"""Tokens and sequences; seconds of attention if multiplying, and if reading alone bounds it."""
Microbatch = tuple[float, float, float, float, float]
"""The same, with the tokens that are routed as the second: those of all ranks, not d times the busiest's."""


class Priced:
    """Step times of `harness.theory.inference`, quick for passes of a size that was priced before.

    All of a pass but attention, logits and overheads of sequences depends on how many tokens it has, and is
    priced once for each number. In a pipeline the batch runs as up to p microbatches, a prompt in one of
    them, and an iteration takes until each has come round, the period of `inference.mixed_times`.
    Data-parallel ranks share requests, not tokens (`Pass.spread`), and run in step: an iteration takes what
    the busiest of them does.
    """

    def __init__(self, priced: Pricer, verified: int = 1) -> None:
        """`verified`: tokens that each request decodes in one pass, g + 1 where g are drafted."""
        self.priced, self.verified = priced, verified
        self.stages, self.ranks = int(priced.layout.pipeline_parallel), int(priced.layout.data_parallel)
        layers = priced.architecture.n_layers
        self.layers, self.fewest, self.most = layers, layers // self.stages, -(-layers // self.stages)
        self.rests: dict[tuple[float, float], tuple[float, float]] = {}

    @property
    def window(self) -> int | None:
        """Tokens that a window layer sees, where there is one."""
        return self.priced.architecture.attention.window

    def seconds(
        self,
        tokens: float,
        sequences: float,
        cached: float,
        pairs: float,
        window_cached: float = 0,
        window_pairs: float = 0,
        absorbed: float = 0,
        expanded: float = 0,
        prompts: float = 0,
    ) -> float:
        """`Pricer.of` of the Pass of these counts, or the period of its microbatches.

        `prompts` of the sequences are read, the others decode.
        """
        one, ranks = self.priced, self.ranks
        multiplied = (
            pairs * one.pair_full
            + window_pairs * one.pair_window
            + absorbed * one.pair_absorbed
            + expanded * one.expansion
        )
        read = cached * one.cache_full + window_cached * one.cache_window
        if self.stages == ranks == 1:
            return self._microbatch(tokens, tokens, sequences, multiplied, read)[0]
        batch = (sequences - prompts) / self.verified
        microbatches = min(self.stages, max(1.0, (batch + prompts) / ranks))
        whole = decoding = tokens, sequences, multiplied, read
        if prompts:
            decoding = self._decoding(batch, cached - expanded, window_cached, absorbed, expanded)
        plain = self._divided(decoding, batch, microbatches)
        latency, slowest = self._microbatch(*plain)
        if not prompts:
            return max(latency, microbatches * slowest)
        holding = min(max(prompts / ranks, 1.0), microbatches)
        reading = self._divided(map(sub, whole, decoding), prompts, holding)
        latency, fuller = self._microbatch(*map(add, plain, reading))
        return max(latency, holding * fuller + (microbatches - holding) * slowest)

    def _decoding(
        self, batch: float, cached: float, window_cached: float, absorbed: float, expanded: float
    ) -> Counts:
        """Of a pass in which prompts are read, what is decoded.

        Only the first of its prompts can have tokens in its cache.
        """
        one, verified, window = self.priced, self.verified, self.window
        near = near_pairs = 0.0
        if window is not None:
            near = window_cached - min(expanded, window - 1)
            # Exact for contexts beyond the window and for those within it, and without drafts.
            near_pairs = min(
                verified * near + batch * verified * (verified + 1) / 2, batch * verified * window
            )
        multiplied = absorbed * (one.pair_full + one.pair_absorbed) + near_pairs * one.pair_window
        read = cached * one.cache_full + near * one.cache_window
        return batch * verified, batch * verified, multiplied, read

    def _divided(self, counts: Iterable[float], requests: float, parts: float) -> Microbatch:
        """Of counts that so many requests have, one of m parts on the busiest rank (`Pass.spread`)."""
        tokens, sequences, multiplied, read = counts
        share = max(1.0, self.ranks / max(1.0, requests)) / parts
        return tokens * share, tokens / parts, sequences * share, multiplied * share, read * share

    def _microbatch(
        self, tokens: float, routed: float, sequences: float, multiplied: float, read: float
    ) -> tuple[float, float]:
        """Seconds of one in all stages and in the slowest, as `Pricer.of` and `Pricer.slowest_stage`.

        `multiplied`, `read`: seconds of its attention, if either alone bounds it, but for what it writes.
        """
        one = self.priced
        found = self.rests.get((tokens, routed))
        rest, handing = self._rest(tokens, routed) if found is None else found
        logits = max(sequences * one.logits_token, one.logits_read)
        overhead = sequences * one.overhead_sequence + (tokens > sequences) * one.overhead_prompts
        written = tokens * (one.cache_full + one.cache_window)
        latency: float = rest + max(multiplied, read + written) + overhead + logits
        if self.stages == 1:
            return latency, latency
        layer = (latency - handing - logits) / self.layers
        return latency, max(self.most * layer, self.fewest * layer + logits)

    def _rest(self, tokens: float, routed: float) -> tuple[float, float]:
        """Seconds of a microbatch but for attention, logits and sequences; of them of hand-overs."""
        one = self.priced
        if len(self.rests) >= REMEMBERED:
            self.rests.clear()
        nothing = one.logits_read + one.overhead_prompts + tokens * (one.cache_full + one.cache_window)
        whole = one.of(Pass(tokens, 0, 0, 0, padding=tokens - routed))
        fixed, slope = one.links.handovers
        found = self.rests[tokens, routed] = (float(whole - nothing), float(fixed + tokens * slope))
        return found


@dataclass(frozen=True)
class Deployment:
    """A model on devices."""

    architecture: Architecture
    hardware: Hardware
    layout: Layout
    precision: Precision
    efficiency: Efficiency = IDEAL
    skew: float = 0.0
    """Popularity of experts falls as i^-skew."""
    reserve: float = 0.1
    """Share of memory for what theory does not count: the runtime, buffers, fragments."""

    def words(self) -> str:
        """The devices, and how the model lies on them."""
        one = self.layout
        ways = (one.tensor_parallel, one.pipeline_parallel, one.data_parallel, one.expert_parallel)
        named = ", ".join(f"{name} {n}" for name, n in zip(("TP", "PP", "DP", "EP"), ways, strict=True))
        step = ", DP ranks in step" if one.data_parallel > 1 else ""
        return f"{one.devices:,} {self.hardware.name} ({named}{step}) at {rates(self.efficiency)}"

    def steps(self, policy: Policy) -> Priced:
        """What iterations take. Raises SpecError for a layout that nothing can run, or a missing format."""
        check(self.architecture, self.layout)
        priced = pricer(
            self.architecture, self.hardware, self.layout, self.precision, self.efficiency, self.skew
        )
        return Priced(priced, 1 + policy.draft_length)

    def cache(self, load: Workload, policy: Policy) -> Cache:
        """Room beside weights and the largest pass, on the stage where it is scarcest for its layers.

        All data-parallel ranks' together: requests are taken to be spread over them evenly.
        Raises SpecError where a request is longer than the model's positions, or fits into no memory.
        """
        longest = int((load.prompts + load.outputs).max())
        if longest > (positions := self.architecture.max_positions):
            raise SpecError(
                f"a request of {longest:,} tokens, and the model has {positions:,} positions; give fewer"
            )
        shares = int(self.layout.data_parallel)
        slots = -(-policy.slots // shares)
        tokens = policy.chunk or slots * int(load.prompts.max())
        found: list[tuple[float, int, float]] = []
        for stage in telling_stages(self.architecture, self.layout):
            need = states.serving_memory(
                self.architecture,
                self.layout,
                self.precision,
                batch=1,
                context=longest,
                stage=stage,
                tokens=tokens,
            )
            refuse(need, self.hardware, 1 - self.reserve)
            room = (1 - self.reserve) * self.hardware.memory.value - (need.total - need.cache)
            found.append((room / need.cache, stage, room))
        _, stage, room = min(found)
        window = self.architecture.attention.window
        if window is None:
            return Cache(shares * room, self._held(stage, 1))
        per_token = self._held(stage, window + 1) - self._held(stage, window)
        return Cache(shares * room, per_token, self._held(stage, 1) - per_token, window)

    def _held(self, stage: int, tokens: int) -> float:
        """Bytes of cache of one sequence on one rank."""
        held = contents(self.architecture, self.layout, stage)
        return float(states.sequence_cache(self.architecture, self.layout, self.precision, held, tokens))


def divided(
    gpus: int,
    *,
    tensor_parallel: int | None = None,
    pipeline_parallel: int = 1,
    data_parallel: int = 1,
    expert_parallel: int = 1,
) -> Layout:
    """A layout of `gpus` devices; unless it is given, tensor parallelism takes what the others leave.

    Raises SpecError where the ways do not multiply to `gpus`.
    """
    left = max(1, gpus // (pipeline_parallel * data_parallel))
    tensor = left if tensor_parallel is None else tensor_parallel
    layout = Layout(tensor, pipeline_parallel, data_parallel, expert_parallel)
    if layout.devices != gpus:
        raise SpecError(
            f"{tensor} tensor x {pipeline_parallel} pipeline x {data_parallel} data-parallel ways take "
            f"{layout.devices} GPUs, and there are {gpus}; give ways whose product is {gpus}"
        )
    return layout
