"""PaLM 540B on 64 TPU v4, after Pope et al. 2022 (arXiv 2211.05102): partitionings that no `Layout` has.

Letters: n chips, X the ways that divide d_model, Y Z = n / X those that divide d_ff and heads, T tokens of a
pass, D d_model, F d_ff, H heads of width h, b bytes/s of a chip's links. Activations take 2 bytes. X, Y and Z
are the axes of a torus of 4 x 4 x 4, each with a third of a chip's links.

  2D weight-stationary  each layer gathers and scatters inner activations over X, and the residual stream over
                        Y Z: T (3 F + 2 (H + 1) h) X / n and 2 T D / X elements with three matrices and a
                        parallel block (section 3.2.2 has 2 T (D / X + F / (Y Z)) for two matrices, at its
                        least 8 T D / sqrt(n) where F = 4 D)
  weight-gathered       each chip gathers the weights of every layer: P elements (section 3.2.3, over all n)

Heads are padded from 48 to 64 to divide over 64 chips (section 4), which costs FLOPs and bytes but no MFU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import sqrt

from harness.spec import load
from harness.spec.architecture import Architecture
from harness.spec.hardware import load_hardware
from harness.theory import flops, memory, parameters
from harness.theory.precision import PRECISIONS, stored_bytes
from harness.validation import published
from harness.validation.fit import fitted, held_out
from harness.validation.held import Row, Section
from harness.validation.shapes import CONTEXT

CHIPS, HEADS = 64, 64
AXES, AXIS = 3, 4
"""Of the torus, and chips along each."""
PARAMETERS = 540e9
"""As the paper's MFU counts them."""
COMPUTE, LAYER_SECONDS = (0.3, 1.5), (0.0, 5e-3)
ACTIVATION = 2
"""Bytes of an activation."""
PREFILLS, DECODES = (0, 2), (1, 3)
"""Rows of `published.POPE`."""


@cache
def padded() -> Architecture:
    """PaLM 540B with 64 heads."""
    palm = load("palm-540b").architecture
    return palm.model_copy(update={"attention": palm.attention.model_copy(update={"n_heads": HEADS})})


def stationary_elements(architecture: Architecture, tokens: float, split: int) -> tuple[float, float]:
    """Elements that a chip sends in a layer under 2D weight-stationary partitioning, d_model divided over
    `split`: inner activations over those axes, the residual stream over the others."""
    attention, ffn = architecture.attention, architecture.ffn
    assert ffn is not None
    heads = attention.n_heads * attention.head_dim
    into = (1 + ffn.gated) * ffn.d_ff + heads + 2 * attention.n_kv_heads * attention.head_dim
    out = ffn.d_ff + heads
    return tokens * (into + out) * split / CHIPS, 2 * tokens * architecture.d_model / split


def stationary_seconds(architecture: Architecture, tokens: float, axes: int) -> float:
    """A layer's time on the links where d_model lies over so many of the three axes of the torus, 1 or 2."""
    inner, outer = stationary_elements(architecture, tokens, AXIS**axes)
    each = load_hardware("tpu-v4").island_link.bandwidth / AXES
    return ACTIVATION * (inner / (axes * each) + outer / ((AXES - axes) * each))


def best_axes(architecture: Architecture) -> int:
    """The axes for d_model that take least time, of those that are a 2D partitioning."""
    return min(range(1, AXES), key=lambda axes: stationary_seconds(architecture, 1, axes))


def paper_elements(d_model: float, tokens: float, chips: int) -> float:
    """The paper's own least for two matrices and F = 4 D: 8 T D / sqrt(n) (section 3.2.2)."""
    return 8 * tokens * d_model / sqrt(chips)


@dataclass(frozen=True)
class Parts:
    """Seconds of one pass."""

    compute: float
    weights: float
    cache: float
    links: float
    layers: float

    @property
    def seconds(self) -> float:
        """Multiplying hides behind reading weights, or the reverse; the rest takes time of its own."""
        return max(self.compute, self.weights) + self.cache + self.links + self.layers

    def told(self) -> str:
        """In words."""
        names = ("compute", "weights", "cache", "links", "layers")
        return "ms: " + ", ".join(f"{name} {1e3 * getattr(self, name):,.1f}" for name in names)


def one_pass(
    batch: int, tokens: int, cached: float, weights: str, gathered: bool, compute: float, layer: float
) -> Parts:
    """A pass of `tokens` new tokens in each sequence, at a share of the peak and a time for each layer."""
    palm, chip = padded(), load_hardware("tpu-v4")
    work = flops.forward_total(palm, batch, tokens, cached=int(cached), attention="causal", logits="last")
    stored = stored_bytes(PRECISIONS[weights].matrices)
    size = parameters.total(palm) * stored
    if gathered:
        links = size / chip.island_link.bandwidth
    else:
        links = palm.n_layers * stationary_seconds(palm, batch * tokens, best_axes(palm))
    read = memory.kv_cache_bytes(palm, int(cached), batch, "bfloat16")
    return Parts(
        compute=work / (CHIPS * chip.peak_flops("bfloat16") * compute),
        weights=size / (CHIPS * chip.bandwidth.value),
        cache=read / (CHIPS * chip.bandwidth.value),
        links=links,
        layers=palm.n_layers * layer,
    )


def row_parts(row: int, compute: float, layer: float) -> Parts:
    """A column of table 2: its prefill, or one of its 64 decode steps in the middle."""
    one = published.POPE[row]
    gathered = one.layout.startswith("weight-gathered")
    cached = 0.0 if one.prompt else CONTEXT + published.POPE_STEPS / 2
    return one_pass(one.batch, one.prompt or 1, cached, one.weights, gathered, compute, layer)


def row_seconds(row: int, compute: float, layer: float) -> float:
    """The latency that table 2 gives of it."""
    steps = 1 if published.POPE[row].prompt else published.POPE_STEPS
    return steps * row_parts(row, compute, layer).seconds


def _tokens(row: int) -> int:
    one = published.POPE[row]
    return one.batch * (one.prompt or published.POPE_STEPS)


def utilisation(row: int, seconds: float) -> float:
    """MFU in per cent as the paper counts it: 2 N FLOP a token, no attention, no padding."""
    peak = load_hardware("tpu-v4").peak_flops("bfloat16")
    return 100 * 2 * PARAMETERS * _tokens(row) / (CHIPS * peak * seconds)


def palm() -> Section:
    """Table 2 and the abstract."""
    times = [one.seconds for one in published.POPE]
    # Each of a pair is predicted from its partner; the other pair's number is fitted to that pair alone.
    layer = fitted(lambda row, layer: row_seconds(row, 1.0, layer), times, DECODES, LAYER_SECONDS)
    prefills = [times[row] for row in PREFILLS]
    shares = held_out(
        lambda i, compute: row_seconds(PREFILLS[i], compute, layer), prefills, ((0,), (1,)), COMPUTE
    )
    share = fitted(lambda row, compute: row_seconds(row, compute, layer), times, PREFILLS, COMPUTE)
    decodes = [times[row] for row in DECODES]
    layers = held_out(
        lambda i, layer: row_seconds(DECODES[i], share, layer), decodes, ((0,), (1,)), LAYER_SECONDS
    )
    numbers = {
        PREFILLS[0]: (shares.parameters[0], layer),
        PREFILLS[1]: (shares.parameters[1], layer),
        DECODES[0]: (share, layers.parameters[0]),
        DECODES[1]: (share, layers.parameters[1]),
    }
    rows, found = [], {}
    for row, one in enumerate(published.POPE):
        found[row] = seconds = row_seconds(row, *numbers[row])
        why = (
            f"{row_parts(row, *numbers[row]).told()}; at data-sheet rates {row_seconds(row, 1.0, 0.0):.3g} s"
        )
        if row in DECODES:
            alone, other = (1e6 * layers.parameters[i] for i in (1 - DECODES.index(row), DECODES.index(row)))
            why += f"; alone a layer would take {alone:.0f} us beside what rates explain, and {other:.0f} at "
            why += "the other batch: it grows with the batch (norms, softmax), and one constant does not"
        rows += [
            Row(f"{one.name}, batch {one.batch}", one.seconds, seconds, "s", why),
            Row(f"{one.name}: MFU", one.percent, utilisation(row, seconds), "%", "as its latency"),
            Row(
                f"{one.name}: latency by the printed MFU",
                one.seconds,
                utilisation(row, 1.0) / one.percent,
                "s",
            ),
        ]
    rows += _abstract(found, numbers[DECODES[0]])
    return Section(
        "PaLM 540B on 64 TPU v4: latency and utilisation of inference",
        "Pope et al. 2022, arXiv 2211.05102, abstract, section 1 and table 2",
        "the paper's own formulas of partitioning, nothing overlapped, 64 padded heads, weights read at "
        f"1.2e12 bytes/s. Fitted: of the prefills one share of the peak ({shares.parameters[0]:.2f} from the "
        f"other one for low latency, {shares.parameters[1]:.2f} for high throughput), of the decodes one "
        f"time of a layer ({1e6 * layers.parameters[0]:.0f} us from the other one for low latency, "
        f"{1e6 * layers.parameters[1]:.0f} us for high throughput); never to the row that is predicted",
        tuple(rows),
    )


def _abstract(found: dict[int, float], numbers: tuple[float, float]) -> list[Row]:
    low, prefill, decode = DECODES[0], PREFILLS[1], DECODES[1]
    chat = one_pass(1, 64, 1920, "int8-weights", False, *numbers).seconds + found[low]
    # 1,984 tokens in and 64 out: the times of both per token, at the two high throughputs.
    rate = {row: found[row] / _tokens(row) for row in (prefill, decode)}
    whole = (CONTEXT - published.POPE_STEPS) * rate[prefill] + published.POPE_STEPS * rate[decode]
    peak = load_hardware("tpu-v4").peak_flops("bfloat16")
    offline = 100 * 2 * PARAMETERS * CONTEXT / (CHIPS * peak * whole)
    palm = load("palm-540b").architecture
    many = palm.attention.model_copy(update={"n_kv_heads": palm.attention.n_heads, "head_dim": 128})
    attentive = palm.model_copy(update={"attention": many})
    cache_bytes = memory.kv_cache_bytes(attentive, CONTEXT, published.POPE_CACHE_BATCH, "bfloat16")
    why = "rests on the low-latency decode, as its row"
    return [
        Row("a token at low latency, int8 weights", published.POPE_TOKEN, found[low] / 64, "s", why),
        Row("64 tokens after 64 new and 1,920 cached ones", published.POPE_CHAT, chat, "s", why),
        Row(
            "offline, 1,984 tokens in and 64 out: MFU",
            published.POPE_OFFLINE,
            offline,
            "%",
            "rests on both high throughputs, as their rows",
        ),
        Row("cache of multi-head attention, heads of 128", published.POPE_CACHE, cache_bytes, "bytes"),
    ]
