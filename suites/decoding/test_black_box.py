"""The law of an engine whose draws cannot be seen: speculation on and off are bet against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.conformance import Case, conformance, require
from harness.conformance.decoding import generated, ways
from harness.conformance.passes import independent
from harness.conformance.property import Void
from harness.conformance.serving import ask_for, prompts
from harness.evidence.betting import TwoSamples, share_of
from harness.reference.engine import Request, Sampling, Speculation

LENGTH, DRAFTS = 5, 3
"""Tokens of a completion and of a window: a bonus token, and one that is drawn in the next round."""
BATCH, PAIRS, FEWER = 32, 512, 160
"""Completions asked for at once; pairs of them at most, and at most of an engine whose laws are computed
elsewhere. Laws 0.3 apart are told after about 100."""
TESTS = 32
"""Bets of one run at most, those against an engine's own law included, which share its chance of a false
alarm: one for each way to speculate."""
COMMON = 3
"""Tokens that are told apart at each place; the others are one."""


def classes(completions: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """The most common tokens of each place."""
    places = zip(*(tokens for tokens in completions if len(tokens) == LENGTH), strict=True)
    return [[token for token, _ in Counter(place).most_common(COMMON)] for place in places]


def outcome(tokens: tuple[int, ...], common: list[list[int]]) -> tuple[int, ...]:
    """Which of the common tokens stands at each place after the first, which no draft decides."""
    return tuple(known.index(t) if t in known else COMMON for t, known in zip(tokens, common, strict=False))[
        1:
    ]


def apart(bets: TwoSamples) -> str:
    """How far apart two samples are, and what that certifies."""
    sampled = bets.left.keys() | bets.right.keys()
    seen = sum(abs(bets.left[one] - bets.right[one]) for one in sampled) / 2 / bets.pairs
    found = bets.tv()
    return (
        f"the samples are {seen:.2f} apart in total variation, chance included; of the laws they certify "
        f"{found.low:.2f} to {found.high:.2f}"
    )


@conformance(
    "decoding.sampled-speculation-keeps-the-law",
    clause="engine.Speculation",
    needs=("generate", "speculate"),
    kills=("every-draft-stands",),
    applies=independent,
    costly=True,
)
def test_black_box_law(case: Case) -> None:
    """Sampled completions with speculation have the law of those without: an e-process at alpha = 1e-9."""
    model = case.model()
    ask_for(model, "temperature")
    prompt = prompts(case, (4,))[0] * 3
    requests = [Request(prompt, LENGTH, Sampling(temperature=0.7))] * BATCH

    drafted = 0

    def drawn(speculation: Speculation | None) -> list[tuple[int, ...]]:
        nonlocal drafted
        answers = generated(model, requests, speculation)
        drafted += sum(answer.drafted for answer in answers)
        return [answer.tokens for answer in answers]

    offered, pairs = ways(case, model, DRAFTS), PAIRS
    if "enumerable" in model.capabilities:  # here the bets only show that they work
        offered, pairs = dict([*offered.items()][:1]), FEWER
    common = classes([tokens for _ in range(4) for tokens in drawn(None)])
    for name, speculation in offered.items():
        bets = TwoSamples(outcomes=(COMMON + 1) ** (LENGTH - 1), alpha=share_of(TESTS))
        drafted = 0
        for _ in range(pairs // BATCH):
            for plain, other in zip(drawn(None), drawn(speculation), strict=True):
                rejected = bets.update(outcome(plain, common), outcome(other, common))
                require(
                    not rejected,
                    f"{name}: after {bets.pairs} pairs of completions their laws are sure to differ (alpha "
                    f"{bets.alpha:.2g}): {apart(bets)}",
                    stage="law",
                )
        case.note(f"total variation, {name}", apart(bets))
        if not drafted:
            raise Void(f"{name}: nothing was drafted, or the engine does not say so; {apart(bets)}")
