"""The law of completions of an engine that can only be asked: by bets against its own probabilities.

Two tokens are allowed, by a bias, so that a completion of g + 2 tokens has 2^(g + 2) outcomes. The
probability of each is asked of the engine itself, without speculation: a token that is forced tells its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

from harness.conformance import Case, conformance
from harness.conformance.decoding import generated, precise, ways
from harness.conformance.passes import independent
from harness.conformance.property import Violation, Void, require
from harness.conformance.serving import ask_for, prompts
from harness.evidence.betting import RUN_ALPHA, Betting, Repetition, share_of
from harness.evidence.law import Law
from harness.reference.engine import Request, Sampling, Speculation

LENGTH = 4
"""Tokens of a completion: two drafts, the token after them, and the first of the next round."""
BATCH, BATCHES = 64, 20
"""Requests that are asked together, and how often at most: 1,280 draws reject a total variation of 0.1 about
every other time, and of 0.15 nearly always."""
DRAFTED = 1
"""Batches with speculation, where each request may be a call of its own, for an engine whose exact laws are
known anyway."""
TESTS = 32
"""Bets of one run at most, those of speculation against none included, which share its chance of a false
alarm: two for each way to decode."""
FORCE, HEAT = 100.0, 2.0
"""A bias that no logit outweighs, and a temperature that keeps both tokens possible."""


def forced(model: Any, texts: Sequence[tuple[tuple[int, ...], int]]) -> list[float]:
    """The log probability of each token after its text, under the model's own law."""
    requests = [
        Request(text, 1, Sampling(temperature=0.0, logit_bias=((token, FORCE),)), logprobs=True)
        for text, token in texts
    ]
    found = []
    for (_, token), answer in zip(texts, generated(model, requests), strict=True):
        forced_to_it = answer.tokens == (token,) and answer.logprobs is not None
        require(forced_to_it, f"a bias of {FORCE} on {token} gives {list(answer.tokens)}", stage="settings")
        assert answer.logprobs is not None
        found.append(answer.logprobs[0])
    return found


def closest(model: Any, prompt: tuple[int, ...]) -> tuple[int, int]:
    """Two tokens that are about equally probable after the prompt."""
    candidates = list(dict.fromkeys(prompt))
    told = sorted(zip(forced(model, [(prompt, token) for token in candidates]), candidates, strict=True))
    gaps = [(b[0] - a[0], a[1], b[1]) for a, b in pairwise(told)]
    return min(gaps)[1:]


def own_law(model: Any, prompt: tuple[int, ...], pair: tuple[int, int]) -> Law:
    """The law of completions of LENGTH tokens, each one of the pair."""
    contexts = [context for n in range(LENGTH) for context in product(pair, repeat=n)]
    told = forced(model, [((*prompt, *context), token) for context in contexts for token in pair])
    following = {}
    for i, context in enumerate(contexts):
        one, other = (log / HEAT for log in told[2 * i : 2 * i + 2])
        first = 1 / (1 + math.exp(other - one))
        following[context] = dict(zip(pair, (first, 1 - first), strict=True))
    law = {}
    for tokens in product(pair, repeat=LENGTH):
        law[tokens] = math.prod(following[tokens[:n]][tokens[n]] for n in range(LENGTH))
    return Law(law)


def bet(case: Case, model: Any, how: str, speculation: Speculation | None, request: Request, law: Law) -> int:
    """Draw until a bet is won or all draws are done; how many drafts were made."""
    alpha = share_of(TESTS, RUN_ALPHA)
    right, fresh = Betting(law, alpha=alpha), Repetition(law, alpha=alpha)
    drafted = 0
    known = speculation is not None and "enumerable" in model.capabilities
    for _ in range(DRAFTED if known else BATCHES):
        for answer in generated(model, [request] * BATCH, speculation):
            drafted += answer.drafted
            # One after the other: whoever may stop at any time may not look twice.
            if not (right.rejected or fresh.rejected):
                right.update(answer.tokens)
                fresh.update(answer.tokens)
        if right.rejected or fresh.rejected:
            break
    low, high = right.tv()
    case.facts.setdefault("tv_bounds", {})[how] = (round(low, 4), round(high, 4))
    case.facts.setdefault("draws", {})[how] = right.draws
    if right.rejected:
        raise Violation(
            f"{how}: lossy: TV is in [{low:.3g}, {high:.3g}] after {right.draws} draws "
            f"(e-value {right.e_value:.3g}, probability of a false alarm {alpha:.1g})",
            stage="law",
        )
    require(
        not fresh.rejected,
        f"{how}: draws repeat those {fresh.distance} before (e-value {fresh.e_value:.3g})",
        stage="seed",
    )
    return drafted


@conformance(
    "decoding.samples-have-the-engines-own-law",
    clause="engine.Sampling",
    needs=("generate",),
    kills=("every-draft-stands", "speculation-never-samples", "temperature-is-ignored"),
    applies=independent,
    costly=True,
)
def test_own_law(case: Case) -> None:
    """Sampled completions have the law of the engine's own log probabilities, drafted or not."""
    model = precise(case)
    ask_for(model, "temperature", "logit_bias", "logprobs")
    prompt = prompts(case, (9,))[0]
    pair = closest(model, prompt)
    law = own_law(model, prompt, pair)
    biases = tuple((token, FORCE) for token in pair)
    request = Request(prompt, LENGTH, Sampling(temperature=HEAT, logit_bias=biases))
    if max(law.values()) > 0.9:
        raise Void("one completion is all but certain: bets on it show nothing")
    bet(case, model, "without speculation", None, request, law)
    if "speculate" not in model.capabilities:
        return
    for name, speculation in ways(case, model, LENGTH - 2, near=0.4).items():
        if name in ("draft_model", "prompt_lookup"):
            drafted = bet(case, model, f"by {name}", speculation, request, law)
            case.note(f"drafted_by_{name}", drafted)
