"""What is sent, and when: prompts of a dataset, and seeded arrivals.

Letters: N requests, V vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.reference.engine import Request, Sampling

LONGEST_S = 1e6
"""Seconds of a load: eleven days, after which a rate is taken for a mistake."""
FORMS = "fixed:PROMPT:OUTPUT, uniform:LOW-HIGH:LOW-HIGH, skewed:PROMPT:MEAN, or a file of JSON lines"
_FIXED = re.compile(r"fixed:(\d+):(\d+)")
_UNIFORM = re.compile(r"uniform:(\d+)-(\d+):(\d+)-(\d+)")
_SKEWED = re.compile(r"skewed:(\d+):(\d+)")


class WorkloadError(ValueError):
    """A dataset or a rate that cannot be used: one sentence saying what, where, and what would do."""


@dataclass(frozen=True)
class Workload:
    """N requests, and the second at which each is sent."""

    requests: tuple[Request, ...]
    at: tuple[float, ...]
    """Seconds after the start, ascending; all 0 at an infinite rate."""


def arrivals(
    count: int, rate: float, generator: np.random.Generator, *, burstiness: float = 1.0
) -> tuple[float, ...]:
    """Seconds after the start at which N requests come, the first at 0.

    Gaps are gamma distributed with shape `burstiness` and mean 1 / rate: a Poisson process at 1, more bursty
    below it, more regular above it (the definition of vLLM's `bench serve`). rate inf: all at once.
    Raises WorkloadError.
    """
    if not rate > 0:
        raise WorkloadError(f"the rate is {rate:g}; give requests per second above 0, or inf for all at once")
    if not 0 < burstiness < math.inf:
        raise WorkloadError(f"the burstiness is {burstiness:g}; give the shape of a gamma law, above 0")
    if math.isinf(rate):
        return (0.0,) * count
    gaps = generator.gamma(burstiness, 1 / max(rate * burstiness, 1e-300), size=max(count - 1, 0))
    at = (0.0, *np.cumsum(gaps).tolist())[:count]
    if at[-1] > LONGEST_S:
        raise WorkloadError(f"at {rate:g} requests per second the last comes after {at[-1]:.3g} seconds")
    return at


def dataset(
    text: str, count: int, vocab_size: int, generator: np.random.Generator, sampling: Sampling
) -> tuple[Request, ...]:
    """N requests. Lengths are in tokens, prompts are uniform over the vocabulary.

    fixed: all alike. uniform: both lengths uniform, ends included. skewed: outputs geometric with that mean,
    so that most are short and a few are very long. A file has one request a line, {"prompt": [token ids],
    "max_tokens": number}, and is repeated until there are N. Raises WorkloadError.
    """
    if (found := _FIXED.fullmatch(text)) is not None:
        prompt, output = map(int, found.groups())
        lengths = [(prompt, output)] * count
    elif (found := _UNIFORM.fullmatch(text)) is not None:
        low, high, short, long = map(int, found.groups())
        if low > high or short > long:
            raise WorkloadError(f"dataset {text!r}: a range runs from the smaller to the larger number")
        prompts = generator.integers(low, high + 1, size=count)
        outputs = generator.integers(short, long + 1, size=count)
        lengths = list(zip(prompts.tolist(), outputs.tolist(), strict=True))
    elif (found := _SKEWED.fullmatch(text)) is not None:
        prompt, mean = map(int, found.groups())
        if mean < 1:
            raise WorkloadError(f"dataset {text!r}: the mean output is 1 token or more")
        lengths = [(prompt, int(one)) for one in generator.geometric(1 / mean, size=count)]
    elif Path(text).suffix == ".jsonl" or Path(text).exists():
        return _from_file(Path(text), count, vocab_size, sampling)
    else:
        raise WorkloadError(f"there is no dataset {text!r}; say {FORMS}")
    if min(min(pair) for pair in lengths) < 1:
        raise WorkloadError(f"dataset {text!r}: a prompt and an output have 1 token or more")
    return tuple(
        Request(tuple(generator.integers(vocab_size, size=prompt).tolist()), output, sampling)
        for prompt, output in lengths
    )


def seeded(requests: tuple[Request, ...], seed: int) -> tuple[Request, ...]:
    """The requests with a seed each, where they are sampled: the same again when each is asked alone."""
    return tuple(
        one
        if one.sampling.temperature == 0
        else replace(one, sampling=replace(one.sampling, seed=seed + number))
        for number, one in enumerate(requests)
    )


def _from_file(path: Path, count: int, vocab_size: int, sampling: Sampling) -> tuple[Request, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: cannot be read: {error}") from error
    read = [
        _request(line, f"{path}:{number}", vocab_size, sampling)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not read:
        raise WorkloadError(f"{path}: it has no line; each is one request as JSON")
    return tuple(read[number % len(read)] for number in range(count))


def _request(line: str, where: str, vocab_size: int, sampling: Sampling) -> Request:
    wanted = '{"prompt": [token ids], "max_tokens": number}'
    try:
        given: Any = json.loads(line)
    except ValueError as error:
        raise WorkloadError(f"{where}: no JSON ({error}); a line is {wanted}") from error
    if not isinstance(given, dict) or set(given) != {"prompt", "max_tokens"}:
        raise WorkloadError(f"{where}: a line is {wanted}, and nothing else")
    prompt, output = given["prompt"], given["max_tokens"]
    ids = isinstance(prompt, list) and all(type(one) is int and 0 <= one < vocab_size for one in prompt)
    if not ids or not prompt:
        raise WorkloadError(f"{where}: prompt is a list of token ids from 0 to {vocab_size - 1}, not empty")
    if type(output) is not int or output < 1:
        raise WorkloadError(f"{where}: max_tokens is {output!r}; give a whole number, 1 or more")
    return Request(tuple(prompt), output, sampling)
