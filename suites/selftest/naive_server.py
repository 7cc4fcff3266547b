"""A simulated server written out: one iteration at a time, every request asked in each; the tests' oracle.

It shares with `harness.planning.server` only what its caller hands it, and counts passes by
`harness.theory.passes`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from harness.planning.scheduling import Cache, Policy
from harness.planning.workload import Workload
from harness.theory.passes import NOTHING, Pass, decode, prefill


def serve_naively(
    sent: Workload,
    seconds: Callable[..., float],
    policy: Policy,
    cache: Cache,
    window: int | None,
    *,
    seed: int,
) -> dict[str, Any]:
    """The fields of a `Record` of these names, as lists and numbers."""
    model: Any = SimpleNamespace(attention=SimpleNamespace(window=window))
    generator = np.random.default_rng(seed)
    count, verified = len(sent), 1 + policy.draft_length
    found: dict[str, Any] = {name: [0.0] * count for name in ("sent", "admitted", "first", "ended")}
    found |= {"rounds": [0] * count, "iterations": 0, "running": 0, "busy": 0.0}
    if sent.at is not None:
        found["sent"] = sent.at.tolist()
    coming, waiting, running = list(range(count)), [], []
    filled, known, plans = [0] * count, [0] * count, [[] for _ in range(count)]
    now = 0.0

    def come(number: int) -> None:
        coming.remove(number)
        waiting.append(number)
        if sent.at is None:
            found["sent"][number] = now

    for number in range(sent.users):
        come(number)
    while coming or waiting or running:
        if sent.at is not None:
            for number in [one for one in coming if sent.at[one] <= now]:
                come(number)
        admitting = policy.batching == "continuous" or not running
        while admitting and waiting and len(running) < policy.slots:
            lengths = [int(sent.prompts[one] + sent.outputs[one]) for one in (*running, waiting[0])]
            if sum(map(cache.held, lengths)) > cache.room:
                break
            running.append(waiting.pop(0))
            found["admitted"][running[-1]] = now
        if not running:
            now = float(sent.at[coming[0]])
            continue
        decoding = [one for one in running if known[one]]
        whole, plain = NOTHING, NOTHING
        for one in decoding:
            context = int(sent.prompts[one]) + known[one] - 1
            whole += decode(model, 1, context, verified)
            plain += decode(model, 1, context)
        left = 10**9 if policy.chunk is None else policy.chunk - verified * len(decoding)
        for one in [each for each in running if not known[each]]:
            new = min(int(sent.prompts[one]) - filled[one], left)
            if new:
                whole += prefill(model, 1, new, filled[one])
            left, filled[one] = left - new, filled[one] + new
        took = price(whole, seconds, window)
        drafting = policy.draft_length * policy.draft_cost
        if decoding and drafting:
            took += drafting * price(plain, seconds, window)
        now, found["busy"] = now + took, found["busy"] + took
        found["iterations"] += 1
        found["running"] += len(running)
        for one in decoding:
            known[one] += plans[one][found["rounds"][one]] if plans[one] else 1
            found["rounds"][one] += 1
        for one in [each for each in running if not known[each] and filled[each] == sent.prompts[each]]:
            known[one], found["first"][one] = 1, now
            if policy.draft_length and sent.outputs[one] > 1:
                plans[one] = stands(int(sent.outputs[one]) - 1, policy, generator)
        for one in [each for each in running if known[each] >= sent.outputs[each]]:
            running.remove(one)
            found["ended"][one] = now
            if sent.at is None and coming:
                come(coming[0])
    return found


def stands(rounds: int, policy: Policy, generator: np.random.Generator) -> list[int]:
    """Tokens that each of so many rounds decides: failures are drawn as the server draws them."""
    if policy.acceptance == 1:
        return [1 + policy.draft_length] * rounds
    drawn = generator.geometric(1 - policy.acceptance, size=rounds).tolist()
    return [min(int(one), 1 + policy.draft_length) for one in drawn]


def price(one: Pass, seconds: Callable[..., float], window: int | None) -> float:
    """Seconds of a pass; where there is no window its layers are not asked for."""
    near = (one.window_cached, one.window_pairs) if window is not None else (0, 0)
    return seconds(one.tokens, one.sequences, one.cached, one.pairs, *near, one.absorbed, one.expanded)
