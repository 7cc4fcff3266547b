"""Laws of the loss: what parameters, tokens and experts buy, as fitted by those who published them.

Letters: N parameters, D training tokens, E experts of a layer of which one is chosen (where k of equal size
are chosen, E / k has the same ratio of all to active parameters), L loss in nats per token on the corpus and
with the tokenizer of the paper: losses of two laws cannot be compared, signs of differences can. Which
parameters N counts is stated with each law (`counts`). Coefficients are those that the papers print, and
hardly any run that they are asked about lies where they were fitted: `beyond` says so. N, D and E may be
numpy arrays that broadcast, but for `beyond` and the searches for a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

TOKENS_PER_PARAMETER = 20
"""The rule of thumb of Hoffmann et al. 2022 (arXiv 2203.15556, table 3, approach 1): D = 20 N."""


@dataclass(frozen=True)
class Fitted:
    """Least and largest values among the runs that a law was fitted to."""

    parameters: tuple[float, float]
    tokens: tuple[float, float]
    experts: tuple[float, float] = (1, 1)


def beyond(fitted: Fitted, *, parameters: float, tokens: float, experts: float = 1) -> tuple[str, ...]:
    """In which respects a law extrapolates, and how far; empty inside its range."""
    said = []
    for name, value in (("parameters", parameters), ("tokens", tokens), ("experts", experts)):
        low, high = getattr(fitted, name)
        if value > high:
            said.append(f"{value:.3g} {name} are {value / high:.2g} times the {high:.3g} it was fitted to")
        elif value < low:
            said.append(f"{value:.3g} {name} are fewer than the {low:.3g} it was fitted to")
    return tuple(said)


@dataclass(frozen=True)
class ParametricLaw:
    """L = c + a / N^alpha + b / D^beta (Hoffmann et al. 2022, arXiv 2203.15556, eq. 2: approach 3)."""

    name: str
    source: str
    counts: str
    irreducible: float
    a: Any
    alpha: Any
    b: Any
    beta: Any
    fitted: Fitted

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Loss of N parameters after D tokens."""
        return self.irreducible + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def optimum(self, flops: Any) -> tuple[Any, Any]:
        """N and D of least loss for C = 6 N D FLOPs (Hoffmann et al. 2022, eq. 4).

        N = G (C/6)^(beta / (alpha + beta)), D = (C/6) / N, G = (alpha a / (beta b))^(1 / (alpha + beta)).
        """
        exponent = 1 / (self.alpha + self.beta)
        balance = (self.alpha * self.a / (self.beta * self.b)) ** exponent
        parameters = balance * (flops / 6) ** (self.beta * exponent)
        return parameters, flops / 6 / parameters

    def optimal_tokens(self, parameters: Any) -> Any:
        """D at which N is the best size for 6 N D FLOPs: alpha a / N^alpha = beta b / D^beta."""
        return (self.beta * self.b * parameters**self.alpha / (self.alpha * self.a)) ** (1 / self.beta)

    def optimal_parameters(self, tokens: Any) -> Any:
        """N for which D tokens are the best number: the inverse of `optimal_tokens`."""
        return (self.alpha * self.a * tokens**self.beta / (self.beta * self.b)) ** (1 / self.alpha)


_CHINCHILLA_RUNS = Fitted((70e6, 16e9), (5e9, 500e9))
HOFFMANN_PRINTED = ParametricLaw(
    "hoffmann-printed",
    "Hoffmann et al. 2022, arXiv 2203.15556, eq. 10: exponents rounded to two decimals",
    "all parameters of a dense model",
    *(1.69, 406.4, 0.34, 410.7, 0.28),
    _CHINCHILLA_RUNS,
)
HOFFMANN = ParametricLaw(
    "hoffmann",
    "Hoffmann et al. 2022, arXiv 2203.15556, exponents as in its TeX source (Besiroglu et al. 2024, table 1)",
    "all parameters of a dense model",
    *(1.6934, 406.4, 0.3392, 410.7, 0.2849),
    _CHINCHILLA_RUNS,
)
BESIROGLU = ParametricLaw(
    "besiroglu",
    "Besiroglu et al. 2024, arXiv 2404.10102: the same runs fitted again, after rounding and an early stop",
    "all parameters of a dense model",
    *(1.8172, 482.01, 0.3478, 2085.43, 0.3658),
    _CHINCHILLA_RUNS,
)
TOKEN_LAWS: Mapping[str, ParametricLaw] = {law.name: law for law in (HOFFMANN, HOFFMANN_PRINTED, BESIROGLU)}


@dataclass(frozen=True)
class KaplanLaw:
    """L = [(Nc / N)^(alpha / beta) + Dc / D]^beta, stopped early (Kaplan et al. 2020, arXiv 2001.08361,
    eq. 1.5 and table 2). N leaves out embeddings."""

    critical_parameters: float = 6.4e13
    alpha: float = 0.076
    critical_tokens: float = 1.8e13
    beta: float = 0.103
    fitted: Fitted = Fitted((768, 1.5e9), (22e6, 23e9))

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Loss of N parameters on D distinct tokens, trained until the test loss no longer falls."""
        size = (self.critical_parameters / parameters) ** (self.alpha / self.beta)
        return (size + self.critical_tokens / tokens) ** self.beta

    def tokens_against_overfitting(self, parameters: Any, excess: float = 0.02) -> Any:
        """D at which too little data raises the loss by the share `excess` (section 4.2, eq. 4.4)."""
        size = (self.critical_parameters / parameters) ** (self.alpha / self.beta)
        return self.critical_tokens / (size * ((1 + excess) ** (1 / self.beta) - 1))


KAPLAN = KaplanLaw()


class ExpertLaw(Protocol):
    """A law in which the number of experts counts, at the same work per token."""

    @property
    def name(self) -> str:
        """How tables call it."""

    @property
    def source(self) -> str:
        """Paper and table."""

    @property
    def counts(self) -> str:
        """Which parameters N counts."""

    @property
    def fitted(self) -> Fitted:
        """Where it was fitted."""

    def loss(self, parameters: Any, tokens: Any, experts: Any) -> Any:
        """Loss of N parameters and E experts after D tokens."""


def saturated(experts: Any, start: float, end: float) -> Any:
    """E with its ends bent: 1 / [1 / (E - 1 + 1 / (1/start - 1/end)) + 1 / end], from `start` at E = 1 to
    `end` (Clark et al. 2022, arXiv 2202.01169, eq. 4)."""
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / end)) + 1 / end)


@dataclass(frozen=True)
class RoutedLaw:
    """log L = a log N + b log Ê + c log N log Ê + d, decimal logarithms, Ê = `saturated` E.

    Clark et al. 2022, arXiv 2202.01169, eq. 1 and table 3. N is the dense model that one expert makes;
    every run saw 130e9 tokens, so that D does not enter.
    """

    name: str
    a: float
    b: float
    d: float
    start: float
    end: float
    cutoff: float
    """N at which experts no longer matter and beyond which more of them raise the loss, as section 5 says."""
    source: str = "Clark et al. 2022, arXiv 2202.01169, table 3"
    counts: str = "the dense model that the one chosen expert makes"
    fitted: Fitted = Fitted((15e6, 1.3e9), (130e9, 130e9), (1, 512))

    @property
    def c(self) -> float:
        """-b / log N at the cutoff. Table 3 prints three decimals of it, one or two digits, which by
        themselves would move the cutoff by up to 3 times."""
        return -self.b / float(np.log10(self.cutoff))

    def loss(self, parameters: Any, tokens: Any, experts: Any) -> Any:  # noqa: ARG002  # as ExpertLaw
        """Loss after the 130e9 tokens of the paper; `tokens` is not used."""
        size, bent = np.log10(parameters), np.log10(saturated(experts, self.start, self.end))
        return 10 ** (self.a * size + self.b * bent + self.c * size * bent + self.d)

    def effective_parameters(self, parameters: Any, experts: Any) -> Any:
        """Size of the dense model (E = 1) of the same loss, by solving eq. 1 for N."""
        size, bent = np.log10(parameters), np.log10(saturated(experts, self.start, self.end))
        dense = np.log10(saturated(1, self.start, self.end))
        reached = self.a * size + self.b * (bent - dense) + self.c * size * bent
        return 10 ** (reached / (self.a + self.c * dense))


@dataclass(frozen=True)
class JointLaw:
    """L = a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c, Ê = `saturated` E.

    Ludziejewski et al. 2025, arXiv 2502.05172, eq. 6 and table 3; experts as large as the dense feed-forward
    network, one chosen. N is active parameters, both embeddings included.
    """

    name: str = "joint"
    a: float = 35.91
    alpha: float = -0.1889
    delta: float = -0.2285
    gamma: float = 0.0098
    b: float = 35.98
    beta: float = -0.1775
    omega: float = 0.5529
    zeta: float = -0.0259
    start: float = 2.0732
    end: float = 290.4521
    irreducible: float = 1.3637
    source: str = "Ludziejewski et al. 2025, arXiv 2502.05172, table 3"
    counts: str = "active parameters, both embeddings included"
    fitted: Fitted = Fitted((79e6, 2.7e9), (0.5e9, 80e9), (1, 32))

    def at(self, experts: Any) -> ParametricLaw:
        """The law in N and D that it is for a given number of experts (table 4)."""
        bent = np.log(saturated(experts, self.start, self.end))
        return ParametricLaw(
            f"{self.name} at {experts} experts",
            self.source,
            self.counts,
            self.irreducible,
            self.a * np.exp(self.delta * bent),
            -(self.alpha + self.gamma * bent),
            self.b * np.exp(self.omega * bent),
            -(self.beta + self.zeta * bent),
            self.fitted,
        )

    def loss(self, parameters: Any, tokens: Any, experts: Any) -> Any:
        """Loss of N active parameters and E experts after D tokens."""
        return self.at(experts).loss(parameters, tokens)


@dataclass(frozen=True)
class GranularLaw:
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta at 64 times as many expert as active parameters.

    Krajewski et al. 2024, arXiv 2402.07871, eq. 9 and table 1: G experts of 1/G of the dense width are
    chosen from 64 G. N counts all parameters without embeddings. It says nothing of other expansions than 64.
    """

    irreducible: float = 0.47
    a: float = 18.1
    alpha: float = 0.115
    b: float = 30.8
    beta: float = 0.147
    g: float = 2.1
    gamma: float = 0.58
    fitted: Fitted = Fitted((129e6, 3.7e9), (16e9, 130e9), (64, 64))

    def loss(self, parameters: Any, tokens: Any, granularity: Any = 1) -> Any:
        """Loss of N total parameters after D tokens with G chosen experts."""
        size = (self.g / granularity**self.gamma + self.a) / parameters**self.alpha
        return self.irreducible + size + self.b / tokens**self.beta


KRAJEWSKI = GranularLaw()
S_BASE = RoutedLaw("s-base", -0.082, -0.108, 1.104, 1.847, 314.478, 937e9)
RL_R = RoutedLaw("rl-r", -0.083, -0.126, 1.111, 1.880, 469.982, 85e9)
HASH = RoutedLaw("hash", -0.087, -0.136, 1.157, 4.175, 477.741, 83e9)
JOINT = JointLaw()
EXPERT_LAWS: Mapping[str, ExpertLaw] = {law.name: law for law in (S_BASE, RL_R, HASH, JOINT)}


def gain(law: ExpertLaw, parameters: Any, tokens: Any, fewer: Any, more: Any) -> Any:
    """By what share `more` experts lower the loss at the same N and D; negative where they raise it."""
    return 1 - law.loss(parameters, tokens, more) / law.loss(parameters, tokens, fewer)


def turning_parameters(
    law: ExpertLaw, tokens: float, fewer: float, more: float, *, between: tuple[float, float] = (1e6, 1e18)
) -> tuple[float, ...]:
    """Every N at which `gain` changes its sign; empty if it does not between these sizes."""
    return _turns(lambda parameters: float(gain(law, parameters, tokens, fewer, more)), between)


def turning_tokens(
    law: ExpertLaw,
    parameters: float,
    fewer: float,
    more: float,
    *,
    between: tuple[float, float] = (1e6, 1e18),
) -> tuple[float, ...]:
    """Every D at which `gain` changes its sign; empty where D does not matter."""
    return _turns(lambda tokens: float(gain(law, parameters, tokens, fewer, more)), between)


def _turns(value: Callable[[float], float], between: tuple[float, float]) -> tuple[float, ...]:
    """Where `value` changes its sign, by bisection between 400 points evenly spaced in the logarithm: the
    laws are sums of few powers, which have no two turns within a factor of 1.1."""
    grid = np.geomspace(*between, 400)
    found = []
    for left, right in pairwise(map(float, grid)):
        low, high = left, right
        rising = value(low) <= 0
        if rising == (value(high) <= 0):
            continue
        while high - low > 1e-12 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if (value(middle) <= 0) == rising else (low, middle)
        found.append((low + high) / 2)
    return tuple(found)
