"""What a simulated server is sent: lengths of prompts and outputs, and when each request comes.

Letters: N requests.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.spec.errors import SpecError

LONGEST_S = 1e9
"""Seconds of a load: 32 years, after which a rate is taken for a mistake."""
LONGEST = 10**7
"""Tokens of one prompt or output, above which a length is taken for a mistake."""
MOST_VARIATION = 100
"""Of a lognormal law: half of its lengths are then below a hundredth of the mean."""
FORMS = "a number, a list as 5,8,4 (repeated), uniform:LOW-HIGH or lognormal:MEAN:CV"
_LIST = re.compile(r"\d+(,\d+)*")
_UNIFORM = re.compile(r"uniform:(\d+)-(\d+)")
_LOGNORMAL = re.compile(r"lognormal:(\d+\.?\d*|\.\d+):(\d+\.?\d*|\.\d+)")


@dataclass(frozen=True, eq=False)
class Workload:
    """N requests, in the order in which they are sent."""

    prompts: NDArray[np.int64]
    """[N] tokens."""
    outputs: NDArray[np.int64]
    """[N] tokens, 1 or more."""
    at: NDArray[np.float64] | None
    """[N] seconds at which they come, ascending; None: each user sends the next when the last is answered."""
    users: int = 0
    """Of a closed loop: requests in flight at most."""

    def __len__(self) -> int:
        return len(self.prompts)


def workload(
    count: int,
    prompt: str,
    output: str,
    *,
    rate: float | None = None,
    burstiness: float = 1.0,
    concurrency: int | None = None,
    seed: int = 0,
) -> Workload:
    """N requests, either at `rate` per second (open loop) or from `concurrency` users (closed loop).

    Prompts, outputs and gaps are drawn from streams of their own, so that another rate meets the same
    requests. Raises SpecError, also where neither or both of the two are given.
    """
    if count < 1:
        raise SpecError(f"{count} requests say nothing; give 1 or more")
    if rate is None and concurrency is None:
        raise SpecError("neither a rate nor a concurrency is given; give one, as --rate 4")
    if rate is not None and concurrency is not None:
        wrong = f"a rate of {rate:g} and a concurrency of {concurrency}"
        raise SpecError(f"{wrong} are both given; give one of them")
    if rate is None and burstiness != 1:
        raise SpecError(
            f"a burstiness of {burstiness:g} shapes the gaps of a rate; give one, or no burstiness"
        )
    if concurrency is not None and concurrency < 1:
        raise SpecError(f"{concurrency} users send nothing; give a concurrency of 1 or more")
    streams = [np.random.default_rng(one) for one in np.random.SeedSequence(seed).spawn(3)]
    prompts = lengths("prompt", prompt, count, streams[0])
    outputs = lengths("output", output, count, streams[1])
    if rate is None:
        return Workload(prompts, outputs, None, min(concurrency or 1, count))
    return Workload(prompts, outputs, arrivals(count, rate, streams[2], burstiness=burstiness))


def pace(rate: float | None, concurrency: int | None) -> str:
    """How requests come, in words."""
    if rate is None:
        return f"from {concurrency} users"
    return "all at once" if math.isinf(rate) else f"at {rate:g} a second"


def lengths(name: str, text: str, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """N lengths in tokens, each 1 or more; `text` is one of FORMS, `name` what a mistake is told by.

    uniform: ends included. lognormal: by its mean and its coefficient of variation (standard deviation over
    mean), so that log-lengths have variance ln(1 + cv^2); rounded to the nearest, at least 1.
    Raises SpecError.
    """
    if _LIST.fullmatch(text):
        listed = np.array([min(int(word), LONGEST + 1) for word in text.split(",")])
        found = np.resize(listed, count)
    elif (range_ := _UNIFORM.fullmatch(text)) is not None:
        low, high = (min(int(word), LONGEST + 1) for word in range_.groups())
        if low > high:
            raise SpecError(f"{name} {text!r}: {low} to {high} is no range; give the smaller number first")
        found = generator.integers(low, high + 1, size=count)
    elif (law := _LOGNORMAL.fullmatch(text)) is not None:
        mean, variation = map(float, law.groups())
        if not 1 <= mean <= LONGEST:
            raise SpecError(f"{name} {text!r}: a mean of {mean:g} tokens; give 1 to {LONGEST:,}")
        if variation > MOST_VARIATION:
            wrong = f"a standard deviation of {variation:g} means"
            raise SpecError(f"{name} {text!r}: {wrong}; give at most {MOST_VARIATION}")
        variance = math.log1p(variation**2)
        drawn = generator.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), size=count)
        found = np.maximum(np.rint(np.minimum(drawn, LONGEST + 1)), 1)
    else:
        raise SpecError(f"{name} {text!r} is no length; give {FORMS}")
    if found.min() < 1:
        raise SpecError(f"{name} {text!r}: a length of {found.min()} tokens; give 1 or more")
    if found.max() > LONGEST:
        raise SpecError(f"{name} {text!r}: a length of more than {LONGEST:,} tokens; give fewer")
    return found.astype(np.int64)


def arrivals(
    count: int, rate: float, generator: np.random.Generator, *, burstiness: float = 1.0
) -> NDArray[np.float64]:
    """Seconds [N] at which N requests come, the first at 0.

    Gaps are gamma distributed with shape `burstiness` and mean 1 / rate: a Poisson process at 1, more bursty
    below it, more regular above it (the definition of vLLM's `bench serve`, as in `moe-harness bench serve`).
    rate inf: all at once. Raises SpecError.
    """
    if not rate > 0:
        raise SpecError(
            f"a rate of {rate:g} never sends; give requests per second above 0, or inf for all at once"
        )
    if not 0 < burstiness < math.inf:
        raise SpecError(f"a burstiness of {burstiness:g}; give the shape of a gamma law, above 0")
    if math.isinf(rate):
        return np.zeros(count)
    gaps = generator.gamma(burstiness, 1 / burstiness, size=count - 1) / rate
    at = np.concatenate([[0.0], np.cumsum(gaps)])
    if not at[-1] <= LONGEST_S:
        raise SpecError(
            f"at {rate:g} requests per second the last comes after {at[-1]:.3g} seconds; give more"
        )
    return at
