"""Verdicts on samples of a black box that may be stopped at any time: bets against its being right.

Letters: t draws so far, k outcomes, N(x) how often x was drawn, p a law, alpha the probability of a false
alarm that is allowed.

A bettor's wealth, one bet after another at fair odds if the hypothesis holds, is a martingale that starts
at 1: it ever reaches 1 / alpha with probability alpha at most (Ville 1939; see Ramdas, Gruenwald, Vovk and
Shafer 2023, Statistical Science 38(4), section 2). So one may look after every draw, and stop when wealth
has grown enough. An average of such wealths is one too, which is how bets of several sizes are mixed.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RUN_ALPHA = 1e-9
"""Probability that any verdict of a whole run is a false alarm."""

CONCENTRATIONS = np.array([30.0, 300.0, 3e3, 3e4])
"""How strongly a bettor believes in the hypothesis at first: in draws. Small ones win early against large
differences, large ones lose little while they wait for small differences."""

EPOCH = 1.1
"""Ratio of the numbers of draws between which a bound holds; near 1 each bound is sharp, but there are more
of them to share alpha: anything from 1.05 to 1.3 is within 5% of the best up to 10^6 draws."""

REPEAT_SHARES = np.array([0.01, 0.1, 0.5, 0.9])
"""Shares of repeated draws that are bet on."""


class Interval(NamedTuple):
    """Where a total variation lies."""

    low: float
    high: float


def share_of(cells: int, alpha: float = RUN_ALPHA) -> float:
    """The alpha of each of so many tests, so that all of them together have `alpha` (Bonferroni)."""
    if cells < 1:
        raise ValueError(f"alpha is shared among at least one test, not {cells}")
    return alpha / cells


def dirichlet_bets(expected: Floats, seen: Floats, draws: int) -> Floats:
    """[..., C] factors by which the wealths of `CONCENTRATIONS` change when x is drawn.

    expected [...] is p(x) > 0, seen [...] is N(x) before this draw, and draws is t. A bettor of
    concentration c expects x with probability (c p(x) + N(x)) / (c + t), the predictive law under a
    Dirichlet prior c p, and is paid that over p(x).
    """
    p, n, c = expected[..., None], seen[..., None], CONCENTRATIONS
    factors: Floats = (c * p + n) / ((c + draws) * p)
    return factors


def repeat_bets(expected: Floats, repeated: Floats) -> Floats:
    """[..., S] factors of the wealths of `REPEAT_SHARES` when a draw does or does not repeat an earlier one.

    expected [...] is p of the earlier one, repeated [...] 1 or 0. A bettor expects the law p with
    probability 1 - s, and a repetition with s.
    """
    s = REPEAT_SHARES
    factors: Floats = 1 - s + s * repeated[..., None] / expected[..., None]
    return factors


def mixed(log_wealths: Floats) -> float:
    """The average wealth, from logarithms; infinite where it is above 1e300."""
    top = float(log_wealths.max())
    if top > 690:
        return math.inf
    return float(np.exp(log_wealths - top).mean() * math.exp(top))


class Betting:
    """Are these independent draws from p? Wealth grows where they are not.

    p must be exact: a relative error e of its probabilities lets the wealth of a true sampler grow by up to
    (1 + e)^t. An outcome of probability 0 rejects at once, with no probability of a false alarm.
    """

    def __init__(self, law: Mapping[Hashable, float], *, alpha: float = RUN_ALPHA) -> None:
        self.law = {x: p for x, p in law.items() if p > 0}
        total = math.fsum(self.law.values())
        # float64 sums over the outcomes of an exact law
        if not abs(total - 1) <= 1e-6:
            raise ValueError(f"the law that is bet against has mass {total}, not 1")
        self.alpha = alpha
        self.counts: Counter[Hashable] = Counter()
        self.draws = 0
        self.impossible: Hashable | None = None
        """The first outcome of probability 0, if `rejected` because of it."""
        self.rejected = False
        """Stays once it is true."""
        self._log = np.zeros(len(CONCENTRATIONS))

    @property
    def e_value(self) -> float:
        """The wealth now: an e-value, whose mean is at most 1 if the draws are from p."""
        return math.inf if self.impossible is not None else mixed(self._log)

    def update(self, outcome: Hashable) -> bool:
        """Take one more draw; whether the hypothesis is rejected."""
        p = self.law.get(outcome, 0.0)
        if p == 0:
            if self.impossible is None:
                self.impossible = outcome
        else:
            seen = np.float64(self.counts[outcome])
            self._log += np.log(dirichlet_bets(np.asarray(p), np.asarray(seen), self.draws))
        self.counts[outcome] += 1
        self.draws += 1
        self.rejected = self.rejected or self.e_value >= 1 / self.alpha
        return self.rejected

    def tv(self) -> Interval:
        """Where the total variation of the sampler to p lies, except with probability alpha, however the
        number of draws was chosen (`radius`); all outcomes outside p count as one."""
        drawn, inside = max(self.draws, 1), sum(self.counts[x] for x in self.law)
        apart = sum(abs(self.counts[x] / drawn - p) for x, p in self.law.items())
        apart += (self.draws - inside) / drawn
        return around(apart / 2, radius(self.draws, len(self.law) + 1, self.alpha))


def radius(draws: int, outcomes: int, alpha: float) -> float:
    """How far, in total variation, the frequencies of t independent draws may lie from their law.

    At no t is it more than this, except with probability alpha. For a set A of outcomes and draws up to m,
    P(max over t <= m of t (frequency(A) - P(A)) >= y) <= exp(-2 y^2 / m) (Hoeffding 1963, theorem 1 and
    equation 2.17); of the k outcomes there are 2^k - 2 sets to be summed over; and the draws are cut at
    powers of `EPOCH`, m = EPOCH^j, of which each has the share 1 / ((j + 1)(j + 2)) of alpha.
    """
    if draws < 1:
        return 1.0
    epoch = math.ceil(math.log(draws, EPOCH))
    sets = outcomes * math.log(2) + math.log1p(-(2.0 ** (1 - min(outcomes, 1000))))
    needed = sets + math.log((epoch + 1) * (epoch + 2) / alpha)
    return min(1.0, math.sqrt(EPOCH**epoch * needed / 2) / draws)


def around(centre: float, distance: float) -> Interval:
    """The interval within [0, 1]; the triangle inequality makes it one for a total variation."""
    return Interval(max(0.0, centre - distance), min(1.0, centre + distance))


class TwoSamples:
    """Do two samplers have the same law, which nobody knows? Such as an engine with and without speculation.

    Draws come in pairs, one of each. After pairs before, the two laws are estimated as f and g, and the
    factor is f(x) g(y) / (h(x) h(y)) with h = (f + g) / 2: with d = (f - g) / (f + g) its mean is
    (1 + E d)(1 - E d) <= 1 if x and y have one law, whatever it is (Turner, Ly and Gruenwald 2024, Journal
    of Statistical Planning and Inference 230, arXiv 2106.02693, theorem 1). f and g are shrunk towards
    what both have in common, by each of `CONCENTRATIONS`.
    """

    def __init__(self, *, outcomes: int, alpha: float = RUN_ALPHA) -> None:
        self.outcomes = outcomes
        """How many there can be at most; only the interval of `tv` depends on it."""
        self.alpha = alpha
        self.left: Counter[Hashable] = Counter()
        self.right: Counter[Hashable] = Counter()
        self.pairs = 0
        self.rejected = False
        """Stays once it is true."""
        self._log = np.zeros(len(CONCENTRATIONS))

    @property
    def e_value(self) -> float:
        """The wealth now: an e-value, whose mean is at most 1 if the laws are the same."""
        return mixed(self._log)

    def update(self, left: Hashable, right: Hashable) -> bool:
        """Take one more draw of each; whether it is rejected that the laws are the same."""
        tilts = [
            tilt(np.asarray(float(self.left[x])), np.asarray(float(self.right[x])), self.pairs)
            for x in (left, right)
        ]
        self._log += np.log1p(tilts[0]) + np.log1p(-tilts[1])
        self.left[left] += 1
        self.right[right] += 1
        self.pairs += 1
        self.rejected = self.rejected or self.e_value >= 1 / self.alpha
        return self.rejected

    def tv(self) -> Interval:
        """Where the total variation between the two laws lies, except with probability alpha (`radius`,
        with half of alpha for each sampler)."""
        drawn = max(self.pairs, 1)
        apart = sum(abs(self.left[x] - self.right[x]) for x in self.left.keys() | self.right.keys())
        return around(apart / drawn / 2, 2 * radius(self.pairs, self.outcomes, self.alpha / 2))


def tilt(left: Floats, right: Floats, pairs: int) -> Floats:
    """[..., C]: (f(x) - g(x)) / (f(x) + g(x)) from the counts [...] of x in each sample of t draws.

    f(x) = (left + c common) / (t + c) with common = (left + right) / 2t, and g(x) likewise; 0 where x was
    never drawn.
    """
    both = (left + right)[..., None]
    pull = CONCENTRATIONS * both / max(pairs, 1)
    share = np.divide((left - right)[..., None], both + pull, out=np.zeros_like(both + pull), where=both > 0)
    result: Floats = share
    return result


class Repetition:
    """Are draws from p independent of those shortly before? Such as streams of one seed, given out twice.

    At each distance that is looked at, and for each of `REPEAT_SHARES`, one bettor bets that a draw repeats
    the one at that distance; under independence it does with probability p of that one.
    """

    def __init__(
        self,
        law: Mapping[Hashable, float],
        *,
        distances: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8),
        alpha: float = RUN_ALPHA,
    ) -> None:
        self.law = law
        self.distances = tuple(distances)
        self.alpha = alpha
        self.rejected = False
        """Stays once it is true."""
        self._past: deque[Any] = deque(maxlen=max(self.distances))
        self._log = np.zeros((len(self.distances), len(REPEAT_SHARES)))

    @property
    def e_value(self) -> float:
        """The wealth now: an e-value, whose mean is at most 1 if the draws are independent and from p."""
        return mixed(self._log)

    @property
    def distance(self) -> int:
        """The distance at which most was won."""
        return self.distances[int(self._log.max(axis=1).argmax())]

    def update(self, outcome: Hashable) -> bool:
        """Take one more draw; whether independence is rejected."""
        past = [*self._past]
        before = {
            row: past[-distance]
            for row, distance in enumerate(self.distances)
            if distance <= len(past) and self.law.get(past[-distance], 0.0) > 0
        }
        if before:
            expected = np.array([self.law[x] for x in before.values()])
            repeated = np.array([float(x == outcome) for x in before.values()])
            self._log[[*before]] += np.log(repeat_bets(expected, repeated))
        self._past.append(outcome)
        self.rejected = self.rejected or self.e_value >= 1 / self.alpha
        return self.rejected


class Adjacency:
    """Are draws of an unknown law independent? Of those that are not, neighbours repeat each other.

    Three draws a, b, c of which exactly two are equal are these in any order with the same probability if
    they are exchangeable, so the equal ones are neighbours with probability 2/3; for each s of
    `REPEAT_SHARES` a bettor is paid 1 + s / 2 if they are, and 1 - s if not. Draws that are all equal tell
    nothing: whether they may be is a question to their law.
    """

    def __init__(self, *, alpha: float = RUN_ALPHA) -> None:
        self.alpha = alpha
        self.rejected = False
        """Stays once it is true."""
        self._waiting: list[Hashable] = []
        self._log = np.zeros(len(REPEAT_SHARES))

    @property
    def e_value(self) -> float:
        """The wealth now: an e-value, whose mean is at most 1 if the draws are independent and of one law."""
        return mixed(self._log)

    def update(self, outcome: Hashable) -> bool:
        """Take one more draw; whether independence is rejected, which is decided at every third."""
        self._waiting.append(outcome)
        if len(self._waiting) == 3:
            a, b, c = self._waiting
            self._waiting = []
            if len({a, b, c}) == 2:
                self._log += np.log1p(-REPEAT_SHARES if a == c else REPEAT_SHARES / 2)
            self.rejected = self.rejected or self.e_value >= 1 / self.alpha
        return self.rejected
