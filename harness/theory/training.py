"""What a training run costs, in FLOPs, device time and money, and through which tokens it goes.

Plain arithmetic on floats (or arrays of them); FLOPs stay exact integers while their arguments are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any, Literal

import numpy as np

from harness.spec.architecture import Architecture
from harness.theory import parameters
from harness.theory.flops import Pairs, forward_by_component, forward_per_token
from harness.theory.layout import Recompute

FlopConvention = Literal["6n", "6n-matmul", "palm", "forward-x3"]

FLOP_CONVENTIONS: Mapping[FlopConvention, str] = {
    "6n": "6 FLOP per active parameter (Kaplan et al. 2020), both embeddings counted, no attention term",
    "6n-matmul": "6 FLOP per active matrix parameter, unembedding counted, no attention term",
    "palm": "6 N + 12 L H h S: attention over the full S x S square, no recomputation (PaLM, appendix B)",
    "forward-x3": "three forward passes, full attention: backward is two products for each of forward's",
}

SECONDS_PER_DAY = 86_400
HOURS_PER_DAY = 24


def flops_per_token(architecture: Architecture, context: int, convention: FlopConvention = "6n") -> int:
    """Training FLOPs of one token in a sequence of `context` tokens, under a key of FLOP_CONVENTIONS.

    Raises ValueError on another name.
    """
    attention = architecture.attention
    if convention == "6n":
        return 6 * parameters.active(architecture)
    if convention == "6n-matmul":
        return 6 * parameters.active(architecture, "matmul")
    if convention == "palm":
        square = 12 * architecture.n_layers * attention.n_heads * attention.head_dim * context
        return 6 * parameters.active(architecture) + square
    if convention == "forward-x3":
        return 3 * forward_per_token(architecture, context)
    raise ValueError(f"no FLOP convention {convention!r}; there are {', '.join(FLOP_CONVENTIONS)}")


def mfu(flops_per_token: float, tokens_per_second: float, devices: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: the model's FLOP/s over the devices' peak FLOP/s (PaLM, appendix B)."""
    return flops_per_token * tokens_per_second / (devices * peak_flops)


@dataclass(frozen=True)
class Work:
    """FLOPs of one token in training, as the hardware runs them."""

    forward: float
    backward: float
    recomputed: float
    """What the backward pass repeats of the forward pass, because it was not kept."""

    @property
    def model(self) -> float:
        """What the model needs, however it is run: numerator of the MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """What is multiplied, recomputation included: numerator of the HFU."""
        return self.model + self.recomputed


def work_per_token(
    architecture: Architecture, context: int, *, recompute: Recompute = "none", attention: Pairs = "full"
) -> Work:
    """FLOPs of one token, on average over a sequence of `context` tokens.

    Backward is two products for each of forward's. Recomputed are, with "selective", attention's two
    products of queries with keys and of weights with values (Korthikanti et al. 2022, arXiv 2205.05198,
    section 5); with "full", every layer but not the unembedding (Narayanan et al. 2021, arXiv 2104.04473,
    eq. 3). `attention` is the convention of `harness.theory.flops`: "full" squares or "causal" pairs.
    """
    parts = forward_by_component(architecture, 1, context, attention=attention)
    forward = sum(parts.values()) / context
    again = {
        "none": 0,
        "selective": parts["attention.scores"] + parts["attention.values"],
        "full": sum(parts.values()) - parts["unembedding"],
    }
    return Work(forward, 2 * forward, again[recompute] / context)


def hfu(mfu: float, work: Work) -> float:
    """Hardware FLOPs utilisation of a run of that MFU: recomputation counts as use (PaLM, appendix B).

    MFU and `work` have to follow the same convention on attention.
    """
    return mfu * work.hardware / work.model


def days(flops: float, devices: float, peak_flops: float, mfu: float) -> float:
    """Days that `devices` of `peak_flops` FLOP/s each need for `flops` at that utilisation."""
    return flops / (devices * peak_flops * mfu * SECONDS_PER_DAY)


def implied_mfu(flops: float, devices: float, peak_flops: float, days: float) -> float:
    """The utilisation at which `devices` finish `flops` in so many days."""
    return flops / (devices * peak_flops * days * SECONDS_PER_DAY)


def run_mfu(
    architecture: Architecture,
    *,
    context: int,
    tokens: float,
    devices: float,
    peak_flops: float,
    days: float,
    convention: FlopConvention = "6n",
) -> float:
    """The utilisation that a run of so many tokens in so many days had, under a key of FLOP_CONVENTIONS."""
    return implied_mfu(tokens * flops_per_token(architecture, context, convention), devices, peak_flops, days)


def device_hours(devices: float, days: float) -> float:
    """Hours of devices that are occupied for so many days, busy or not."""
    return devices * days * HOURS_PER_DAY


def cost(devices: float, days: float, price_per_device_hour: float) -> float:
    """Rent of the devices, in the currency of the price."""
    return device_hours(devices, days) * price_per_device_hour


@dataclass(frozen=True)
class Ramp:
    """A batch that grows from `start` to `end` tokens while `tokens` go by.

    stages None: it grows linearly with the tokens seen (GPT-3, arXiv 2005.14165, appendix B). Otherwise in
    so many equal increments, that is stages + 1 sizes of which each but the last holds for an equal share
    of the tokens (Megatron-LM's --rampup-batch-size).
    """

    start: float
    end: float
    tokens: float
    stages: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.start <= self.end:
            raise ValueError(f"a ramp goes from 0 < start to end >= start, not {self.start} to {self.end}")
        if self.stages is not None and self.stages < 1:
            raise ValueError(f"a ramp has at least 1 stage, not {self.stages}; None grows continuously")

    @property
    def steps(self) -> float:
        """Optimizer steps of the ramp: the integral of 1 / batch over its tokens X.

        Linear: X ln(end / start) / (end - start). Staged: the sum over sizes of (X / stages) / size.
        """
        if self.start == self.end:
            return self.tokens / self.end
        if self.stages is None:
            return self.tokens * log(self.end / self.start) / (self.end - self.start)
        rise = (self.end - self.start) / self.stages
        sizes = (self.start + i * rise for i in range(self.stages))
        return sum(self.tokens / self.stages / size for size in sizes)

    def share(self, run_tokens: float) -> float:
        """Share of the run's tokens that pass before the batch is full."""
        return self.tokens / run_tokens

    def run_steps(self, run_tokens: float) -> float:
        """Optimizer steps of the whole run: the ramp, then the full batch. Raises ValueError if the run ends
        within the ramp."""
        if run_tokens < self.tokens:
            raise ValueError(f"a run of {run_tokens:g} tokens ends within a ramp of {self.tokens:g}")
        return self.steps + (run_tokens - self.tokens) / self.end


def tokens_in(days: float, run_tokens: float, run_days: float) -> float:
    """Tokens that go by in so many days of a run, at its mean rate.

    For a ramp an upper bound: small batches fill pipelines worse, so that fewer tokens pass.
    """
    return run_tokens * days / run_days


def unique_tokens(seen: Mapping[str, float], epochs: Mapping[str, float]) -> dict[str, float]:
    """Distinct tokens of each part of a mix, of which `seen` went by in so many epochs: seen / epochs."""
    return {part: tokens / epochs[part] for part, tokens in seen.items()}


def unique_range(seen: float, epochs: Mapping[str, float]) -> tuple[float, float]:
    """Least and most distinct tokens behind `seen` when the shares of the parts are not known."""
    return seen / max(epochs.values()), seen / min(epochs.values())


def share_of_part(seen: float, unique: float, epochs: Mapping[str, float], part: str) -> float:
    """Share of the tokens seen that belongs to one part of a mix of two, from the distinct tokens of both.

    Solves unique = seen (w / epochs[part] + (1 - w) / epochs[other]) for w; outside 0 .. 1 no mix gives it.
    Raises ValueError unless there are two parts of different epochs, one of them `part`.
    """
    others = [name for name in epochs if name != part]
    if len(others) != 1 or part not in epochs or epochs[part] == epochs[others[0]]:
        raise ValueError(f"want two parts of different epochs, one of them {part!r}, not {dict(epochs)}")
    mine, other = 1 / epochs[part], 1 / epochs[others[0]]
    return (unique / seen - other) / (mine - other)


def effective_tokens(unique: Any, epochs: Any, decay: float = 15.4) -> Any:
    """Fresh tokens that are worth as much as `epochs` passes over `unique` ones.

    U + U R* (1 - exp(-(epochs - 1) / R*)): Muennighoff et al. 2023, arXiv 2305.16264, section 3.1, with
    R* = 15.4 fitted there on up to 9e9 parameters and 9e11 tokens.
    """
    return unique * (1 - decay * np.expm1(-(epochs - 1) / decay))
