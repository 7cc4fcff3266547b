"""What one pass of inference takes on devices: a roofline by class of matrices, on one rank.

Letters: T tokens of a pass, W attention window; t, d, c the ways of tensor, data and context parallelism.

A rank's time for a class is the larger of its FLOP over FLOP/s and its bytes over bytes/s (Williams, Waterman
and Patterson 2009), and classes follow one another: a layer's experts cannot start before its attention has
ended, so that reading the weights of one never hides behind multiplying with the other. The classes are

  matrices   attention projections, dense and shared feed-forward, routers: each weight read once a pass,
             2 FLOP for each token that meets it (Pope et al. 2022, arXiv 2211.05102, section 2); divided and
             copied over t as `sharding` says, tokens over d and c
  experts    of the busiest expert-parallel rank: the distinct experts that the batch touches are read
             (`routing.busiest_rank`), its assignments multiplied; they see the tokens of all ranks that share
             them, and no fewer than those of the busiest
  attention  keys and values read and written once, 2 FLOP for each element of a query-key pair; heads over
             t, sequences over d, cached tokens over c. Latent attention keeps one latent for all heads,
             copied over t; decoding multiplies latents, a prefill expands them (arXiv 2405.04434, section
             2.1.2)
  logits     the unembedding over t, for the tokens that reach it
  links      `harness.theory.links`
  overhead   what `Efficiency` states per kernel, layer and pass, and per sequence of a data-parallel rank

Left out: norms, activations, softmax, sampling, the look-up of embeddings. Every number of a `Layout`, and
with uniform routing every dimension of the architecture, may be an array: so are the times then. All seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from harness.spec.architecture import Architecture
from harness.spec.hardware import Hardware
from harness.theory import parameters, routing, sharding
from harness.theory.efficiency import IDEAL, Efficiency
from harness.theory.flops import n_window_layers
from harness.theory.kernels import kernels
from harness.theory.layout import Layout
from harness.theory.links import Links, links
from harness.theory.memory import cached_width
from harness.theory.passes import Pass
from harness.theory.precision import Precision, stored_bytes

Bound = Literal["compute", "weights", "cache", "communication", "overhead"]
BOUNDS: tuple[Bound, ...] = ("compute", "weights", "cache", "communication", "overhead")
Class = tuple[Any, Any]
"""Seconds of a class of matrices if compute alone, and if memory alone bounds it."""
Classes = tuple[Class, Class, Class, Class]
"""Matrices, experts, attention, logits."""
READS: tuple[Bound, ...] = ("weights", "weights", "cache", "weights")
"""What the memory traffic of each class is."""


@dataclass(frozen=True)
class Step:
    """Seconds of one pass through all stages, each class of matrices charged to what bounds it."""

    compute: Any
    weights: Any
    cache: Any
    communication: Any
    overhead: Any
    work: Any
    """What the FLOP of one rank would take at the data sheet's FLOP/s; no part of `seconds`."""

    @property
    def seconds(self) -> Any:
        """The pass's time."""
        return self.compute + self.weights + self.cache + self.communication + self.overhead

    @property
    def bound(self) -> Bound:
        """Where most of the time goes; for one layout."""
        return max(BOUNDS, key=lambda name: float(getattr(self, name)))

    @property
    def utilisation(self) -> Any:
        """Share of the peak FLOP/s in use, work that ranks do twice included."""
        return self.work / self.seconds


@dataclass(frozen=True)
class Pricer:
    """Prices passes of one model on one layout; made by `pricer`. Seconds on one rank, all layers of it."""

    architecture: Architecture
    hardware: Hardware
    layout: Layout
    precision: Precision
    efficiency: Efficiency
    skew: float

    matrices_read: Any
    matrices_token: Any
    """Compute for each token of the pass, all data-parallel ranks' tokens counted."""
    touched: Callable[[Any], routing.Touched] | None
    """What tokens do to a layer's experts; None without any."""
    held: Any
    """Experts of a layer on one rank."""
    expert_read: Any
    """For each distinct expert."""
    expert_assignment: Any
    """Compute for each assignment of a token to an expert."""
    copies: Any
    """Groups of ranks that hold all experts, and share the pass's tokens."""
    takers: Any
    """Of them, or of the ranks that have tokens of their own where those are more."""
    largest: Any
    """Of as many standard normals as there are expert-parallel ranks."""
    cache_full: Any
    """Reading or writing one token's entry on all full layers."""
    cache_window: Any
    pair_full: Any
    """Compute of one query-key pair: all heads of the rank, all full layers."""
    pair_window: Any
    pair_absorbed: Any
    """What a pair costs more where latents are multiplied."""
    expansion: Any
    """Compute of one cached token's keys and values out of its latents."""
    logits_read: Any
    logits_token: Any
    links: Links
    overhead: Any
    overhead_prompts: Any
    """More where the pass holds prompts."""
    overhead_sequence: Any
    """For each token that reaches the unembedding, all data-parallel ranks' counted."""
    arrays: bool
    """Whether any of these is an array."""

    def step(self, one: Pass) -> Step:
        """The time of a pass, and what bounds it."""
        charged: dict[str, Any] = dict.fromkeys(BOUNDS, 0.0)
        classes = self.classes(one)
        for reads, (computing, reading) in zip(READS, classes, strict=True):
            computed = 1 * (computing >= reading)
            charged["compute"] = charged["compute"] + computed * computing
            charged[reads] = charged[reads] + (1 - computed) * reading
        charged["communication"] = self.links.seconds(one.tokens, self._larger_smaller(one)[1])
        charged["overhead"] = self.overhead_of(one)
        (matrices, _), (experts, _), (attention, _), (logits, _) = classes
        work = self.efficiency.compute * (matrices + experts * self.efficiency.experts + attention + logits)
        return Step(**charged, work=work)

    def of(self, one: Pass) -> Any:
        """`step(one).seconds`, without what bounds it."""
        larger, smaller = self._larger_smaller(one)
        (a, b), (c, d), (e, f), (g, h) = self.classes(one)
        rooflines = larger(a, b) + larger(c, d) + larger(e, f) + larger(g, h)
        return rooflines + self.links.seconds(one.tokens, smaller) + self.overhead_of(one)

    def seconds(self, tokens: Any, sequences: Any, cached: Any, pairs: Any) -> Any:
        """`step(...).seconds` from four counts of a `Pass`, in microseconds of Python.

        Windows are taken at the mean: each sequence reads at most W - 1 cached tokens, each token meets at
        most W. Latents are taken as multiplied once for every cached token (decoding) and expanded for all
        other pairs (prefill). Where that is too rough, or data-parallel ranks have prompts beside decoding,
        `of` takes the whole `Pass`.
        """
        window = self.architecture.attention.window
        near, met = cached, pairs
        if window is not None:
            near = sharding.least(cached, sequences * (window - 1))
            met = sharding.least(pairs, tokens * window)
        whole = Pass(tokens, sequences, cached, pairs, near, met, sharding.least(pairs, cached))
        return self.of(whole.spread(sequences, self.layout.data_parallel))

    def slowest_stage(self, one: Pass) -> Any:
        """Seconds of the pipeline stage that takes longest: with most layers, or with the logits.

        Layers are taken as equal. The logits' stage is among those with fewest layers. A hand-over overlaps
        with the next microbatch and is left out.
        """
        stages, layers = self.layout.pipeline_parallel, self.architecture.n_layers
        larger, smaller = self._larger_smaller(one)
        matrices, experts, attention, logits = self.classes(one)
        blocks = larger(*matrices) + larger(*experts) + larger(*attention)
        layer = (blocks + self.links.inside(one.tokens, smaller) + self.overhead_of(one)) / layers
        return larger(-(-layers // stages) * layer, layers // stages * layer + larger(*logits))

    def overhead_of(self, one: Pass) -> Any:
        """What no rate explains."""
        prompts = one.tokens > one.sequences
        return self.overhead + prompts * self.overhead_prompts + one.sequences * self.overhead_sequence

    def _larger_smaller(self, one: Pass) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Elementwise maximum and minimum, for numbers the much quicker ones of Python."""
        counted = one.tokens + one.sequences + one.cached + one.pairs
        return (np.maximum, np.minimum) if self.arrays or isinstance(counted, np.ndarray) else (max, min)

    def classes(self, one: Pass) -> Classes:
        """Matrices, experts, attention and logits, each (if compute alone, if memory alone bounds it)."""
        tokens = one.tokens
        experts: Class = (0.0, 0.0)
        if self.touched is not None:
            experts = self._experts(sharding.most(one.routed / self.copies, tokens / self.takers))
        pairs = one.pairs * self.pair_full + one.window_pairs * self.pair_window
        return (
            (tokens * self.matrices_token, self.matrices_read),
            experts,
            (
                pairs + one.absorbed * self.pair_absorbed + one.expanded * self.expansion,
                (one.cached + tokens) * self.cache_full + (one.window_cached + tokens) * self.cache_window,
            ),
            (one.sequences * self.logits_token, self.logits_read),
        )

    def _experts(self, tokens: Any) -> Class:
        """Of the busiest rank."""
        assert self.touched is not None
        assert self.architecture.moe is not None
        moe = self.architecture.moe
        distinct, load = routing.busiest(
            self.touched(tokens), moe.n_experts, moe.top_k, tokens, self.held, self.largest
        )
        return load * self.expert_assignment, distinct * self.expert_read


def pricer(
    architecture: Architecture,
    hardware: Hardware,
    layout: Layout,
    precision: Precision,
    efficiency: Efficiency = IDEAL,
    skew: float = 0.0,
) -> Pricer:
    """What passes of `architecture` cost on `hardware`; experts' popularity falls as i^-skew.

    Raises SpecError where the hardware does not multiply the precision's formats.
    """
    bandwidth = hardware.bandwidth.value * efficiency.memory
    peak, experts_peak, activations_peak = (
        hardware.peak_flops(form) * efficiency.compute
        for form in (precision.multiplied, precision.experts_multiplied, precision.activations)
    )
    shares = layout.data_parallel * layout.context_parallel
    windowed = n_window_layers(architecture)
    full = architecture.n_layers - windowed
    rank = sharding.rank_parameters(architecture, replace(layout, pipeline_parallel=1, virtual_stages=1))
    routers = rank["router.weight"] + rank["shared.gate"]
    matrices = rank["attention.projections"] + rank["ffn.weights"] + rank["shared.weights"]
    read = matrices * stored_bytes(precision.matrices) + routers * stored_bytes(precision.embeddings)
    table = sharding.vocabulary_rows(architecture, layout) * architecture.d_model

    touched, held, expert, copies, ranks = None, 0, 0, 1, 1
    moe = architecture.moe
    if moe is not None:
        ranks, copies = layout.expert_parallel, layout.expert_copies * layout.context_parallel
        held = sharding.up(moe.n_experts, ranks)
        expert = rank["experts.weights"] / held
        touched = _touched(moe.n_experts, moe.top_k, skew)
    width, pair, absorbed = _attention(architecture, layout)
    entry = width * stored_bytes(precision.cache) / (shares * bandwidth * efficiency.cache)
    expansion = 2 * architecture.n_layers * parameters.latent_expansion(architecture.attention)
    numbers = {
        "matrices_read": read / bandwidth,
        "matrices_token": 2 * (matrices + routers) / (shares * peak),
        "held": held,
        "expert_read": expert * stored_bytes(precision.experts) / bandwidth,
        "expert_assignment": 2 * expert / (experts_peak * efficiency.experts),
        "copies": copies,
        "takers": sharding.most(copies, shares),
        "largest": routing.expected_maximum_normal(ranks),
        "cache_full": full * entry,
        "cache_window": windowed * entry,
        "pair_full": full * pair / (shares * activations_peak),
        "pair_window": windowed * pair / (shares * activations_peak),
        "pair_absorbed": full * absorbed / (shares * activations_peak),
        "expansion": expansion / (layout.tensor_parallel * shares * peak),
        "logits_read": table * stored_bytes(precision.embeddings) / bandwidth,
        "logits_token": 2 * table / (shares * activations_peak),
        "overhead": architecture.n_layers * efficiency.layer_seconds
        + kernels(architecture, precision) * efficiency.kernel_seconds
        + efficiency.pass_seconds,
        "overhead_prompts": kernels(architecture, precision) * efficiency.launch_seconds,
        "overhead_sequence": efficiency.sequence_seconds / shares,
    }
    joined = links(architecture, hardware, layout, precision, efficiency)
    return Pricer(
        architecture,
        hardware,
        layout,
        precision,
        efficiency,
        skew,
        **numbers,
        touched=touched,
        links=joined,
        arrays=joined.arrays or any(isinstance(one, np.ndarray) for one in numbers.values()),
    )


def _touched(n_experts: Any, top_k: Any, skew: float) -> Callable[[Any], routing.Touched]:
    if skew:
        return routing.touched_table(n_experts, top_k, skew)
    return routing.uniform(n_experts, top_k)


def _attention(architecture: Architecture, layout: Layout) -> tuple[Any, Any, Any]:
    """Of one rank and layer: elements that a token caches, FLOP of a pair, and what a pair costs more where
    latents are multiplied."""
    attention = architecture.attention
    heads, mla = sharding.up(attention.n_heads, layout.tensor_parallel), attention.mla
    if mla is None:
        groups = sharding.up(attention.n_kv_heads, sharding.group_ways(architecture, layout))
        return 2 * attention.head_dim * groups, 4 * heads * attention.head_dim, 0
    pair = 2 * heads * (attention.head_dim + mla.v_head_dim)
    latent = 2 * heads * (mla.kv_lora_rank + mla.qk_rope_head_dim + mla.kv_lora_rank)
    return cached_width(architecture), pair, latent - pair
