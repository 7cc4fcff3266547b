"""How an engine is asked and judged: requests, arrivals, and when two completions are the same.

Letters: V vocabulary. Times are iterations for an engine with "limits", and shares of a second for a server.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.checked import Malformed
from harness.conformance.passes import independent
from harness.conformance.property import Violation, Void, require
from harness.implementations.protocols import Unsupported
from harness.implementations.registry import describe
from harness.reference.engine import (
    Arrival,
    Batching,
    Completion,
    Iteration,
    Limits,
    Request,
    Sampling,
    Served,
    Speculation,
)
from harness.spec.architecture import Architecture

GREEDY = Sampling(temperature=0.0)
MOMENT_S = 0.05
"""What an iteration is worth where time is in seconds: long enough for some tokens of a small model."""
ROUNDING = {True: 1e-5, False: 5e-3}
"""How far log probabilities may differ by rounding; True: built in float64. An engine that is built so may
still compute rotary angles, norms or softmax in float32: some tens of roundings of 6e-8. An endpoint is taken
to have float32, logits near 20, and half of the digits of these right, as in `comparison.margin`."""


def windowed(architecture: Architecture | None) -> bool:
    """Applies where some layer attends to a window."""
    return (
        independent(architecture) and architecture is not None and architecture.attention.window is not None
    )


def engine(case: Case, weights: Mapping[str, Tensor] | None = None) -> Any:
    """The model under test in float64, or as it is where it keeps its own weights. Its `settings` are those
    of its sessions, which may honour fewer than `generate`."""
    model = case.model(weights=weights, dtype=torch.float64)
    model.settings = getattr(model, "serve_settings", settings(model))
    return model


def exact(model: Any) -> bool:
    """Whether the model is one that was built in float64 with known weights."""
    return "weights" in model.capabilities


def settings(model: Any) -> frozenset[str]:
    """The fields of Sampling and Request that are honoured."""
    found: frozenset[str] = getattr(model, "settings", frozenset())
    return found


def honours(model: Any, *names: str) -> bool:
    """Whether these fields of Sampling and Request are honoured."""
    return settings(model).issuperset(names)


def ask_for(model: Any, *names: str) -> None:
    """Raise Unsupported unless these fields of Sampling and Request are honoured."""
    missing = sorted(set(names) - settings(model))
    if missing:
        raise Unsupported(f"the engine does not honour {', '.join(missing)}")


def offered(model: Any, request: Request) -> Request:
    """The request with every field that the engine does not honour at its default."""
    known = settings(model)
    drop = {f.name: f.default for f in fields(Sampling) if f.name not in known}
    bare = {f.name: f.default for f in fields(Request) if f.name in REQUEST_SETTINGS and f.name not in known}
    return replace(request, sampling=replace(request.sampling, **drop), **bare)  # type: ignore[arg-type]


REQUEST_SETTINGS = ("eos", "stop", "min_tokens", "logprobs", "salt")
"""Fields of Request that an engine may not honour."""


def batchings(model: Any) -> tuple[Batching, ...]:
    """The ways of batching that the engine has."""
    try:
        model.start(Limits(batching="static"), speculation=None).close()
    except Unsupported:
        return ("continuous",)
    return ("continuous", "static")


def seeded_too(case: Case, model: Any, requests: Sequence[Request]) -> list[Request]:
    """As `seeded`, for what is also asked without chance: none where seeds are not honoured."""
    return seeded(case, model, requests) if honours(model, "seed", "temperature") else []


def startable(case: Case, model: Any, sizes: Sequence[Limits]) -> list[Limits]:
    """The sizes that the engine takes; the others are noted. Raises Unsupported where it takes none."""
    taken, why = [], {}
    for limits in sizes:
        try:
            model.start(limits, speculation=None).close()
        except Unsupported as error:
            why[str(limits)] = str(error)
        else:
            taken.append(limits)
    if why:
        case.note("sizes_not_taken", why)
    if not taken:
        raise Unsupported(f"the engine takes none of {len(sizes)} sizes: {next(iter(why.values()))}")
    return taken


def sized(model: Any, limits: Limits) -> Limits | None:
    """Limits for an engine that takes them; None for one that has its own."""
    return limits if "limits" in model.capabilities else None


def prompts(case: Case, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """One prompt of random tokens for each length."""
    drawn = case.tokens(len(lengths), max(lengths)).tolist()
    return [tuple(row[:length]) for row, length in zip(drawn, lengths, strict=True)]


def greedy(
    case: Case,
    model: Any,
    lengths: Sequence[int] = (3, 9, 17, 5, 12),
    max_tokens: Sequence[int] = (9, 6, 8, 11, 5),
) -> list[Request]:
    """Requests of uneven lengths, without chance, with log probabilities where they are offered."""
    pairs = zip(prompts(case, lengths), max_tokens, strict=True)
    return [offered(model, Request(prompt, n, GREEDY, logprobs=True)) for prompt, n in pairs]


def narrow(case: Case, model: Any, requests: Sequence[Request]) -> list[Request]:
    """The requests, every other one held to four tokens, so that its answer repeats itself and is guessed."""
    few = tuple((token, 30.0) for token in dict.fromkeys(prompts(case, (12,))[0]))[:4]
    made = (replace(r, sampling=replace(r.sampling, logit_bias=few)) for r in requests)
    return [
        offered(model, one) if i % 2 else r for i, (r, one) in enumerate(zip(requests, made, strict=True))
    ]


def seeded(case: Case, model: Any, requests: Sequence[Request], temperature: float = 1.3) -> list[Request]:
    """The same requests, each drawn with its own seed. Raises Unsupported where no seed is honoured."""
    ask_for(model, "seed", "temperature")
    first = int(torch.randint(1, 1 << 20, (), generator=case.generator()))
    law = (Sampling(temperature=temperature, seed=first + i) for i in range(len(requests)))
    return [replace(request, sampling=sampling) for request, sampling in zip(requests, law, strict=True)]


def arrivals(
    model: Any, requests: Iterable[Request], *, every: float = 0.0, order: Sequence[int] | None = None
) -> list[Arrival]:
    """The requests in their order; the `order[i]`-th comes `i * every` iterations after the first."""
    listed = list(requests)
    turn = {index: place for place, index in enumerate(order or range(len(listed)))}
    unit = every if "limits" in model.capabilities else every * MOMENT_S
    return [Arrival(request, turn[i] * unit) for i, request in enumerate(listed)]


def run(session: Any, wanted: Sequence[Arrival | Request], *, stage: str = "fault") -> Served:
    """Serve them in a session, with the type and number of what comes back checked.

    Raises Violation in `stage` where the session fails as a whole: what a request causes is its own error.
    """
    given = [one if isinstance(one, Arrival) else Arrival(one) for one in wanted]
    try:
        served = session.run(given)
    except (Unsupported, Violation):
        raise
    except Exception as error:
        what = f"{len(given)} requests were lost, as the engine raised {describe(error)}"
        raise Violation(what, stage=stage) from error
    answers = getattr(served, "completions", None)
    right = isinstance(answers, Sequence) and len(answers) == len(given)
    right = right and all(isinstance(answer, Completion) for answer in answers)  # type: ignore[union-attr]
    if not right:
        raise Malformed(f"{len(given)} arrivals were not answered by as many completions")
    found: Served = served
    return found


def serve(
    model: Any,
    wanted: Sequence[Arrival | Request],
    limits: Limits | None = None,
    speculation: Speculation | None = None,
    *,
    stage: str = "fault",
) -> Served:
    """What a fresh engine makes of them."""
    session = model.start(limits, speculation=speculation)
    try:
        return run(session, wanted, stage=stage)
    finally:
        session.close()


def alone(
    model: Any,
    requests: Iterable[Request],
    limits: Limits | None = None,
    speculation: Speculation | None = None,
) -> list[Completion]:
    """What each request gives in a fresh engine of its own. Raises Violation where one cannot be served."""
    answers = [serve(model, [request], limits, speculation).completions[0] for request in requests]
    for answer in answers:
        require(
            answer.finish_reason in ("stop", "length"),
            f"a request alone ended with {answer.finish_reason!r}: {answer.error or 'no reason'}",
            stage="fault",
        )
    return answers


@dataclass
class Agreement:
    """Completions compared one by one; what rounding may explain is counted, and is no violation.

    Two greedy completions may part where the engine's two best tokens are as good as equal. Each is then as
    probable as the other, so their log probabilities tell, without asking for those of all V tokens.
    """

    exact: bool
    """The engine computes in float64: only log probabilities within rounding excuse a difference."""
    tokens: int = 0
    """Compared so far."""
    parted: int = 0
    """Completions that rounding may have parted."""
    unexplained: int = 0
    """Those among them where nothing shows how near the two tokens were."""
    worst: float = 0.0
    """The largest difference of two log probabilities."""

    def same(
        self, found: Completion, wanted: Completion, request: Request, *, what: str, stage: str, but: str = ""
    ) -> None:
        """Raise Violation unless both are the same completion of the request."""
        than = f"than {but}" if but else "than alone"
        if found.finish_reason == "error":
            raise Violation(f"{what} could not be served: {found.error or 'no reason'}", stage=stage)
        at = parting(found.tokens, wanted.tokens)
        self.logprobs(found, wanted, at, what=what, stage=stage, than=than)
        if at == len(found.tokens) == len(wanted.tokens):
            ends = found.finish_reason, wanted.finish_reason
            require(
                ends[0] == ends[1], f"{what} ends with {ends[0]!r} other {than} ({ends[1]!r})", stage=stage
            )
        elif not self.excused(found, wanted, at, request):
            have, want = list(found.tokens[: at + 1]), list(wanted.tokens[: at + 1])
            message = f"{what} differs at token {at}: {have} other {than} ({want})"
            facts = {"what": what, "index": [at], "observed": have, "expected": want}
            raise Violation(message, stage=stage, facts=facts)
        self.tokens += at

    def logprobs(
        self, found: Completion, wanted: Completion, upto: int, *, what: str, stage: str, than: str
    ) -> None:
        """Raise Violation unless log probabilities of the common tokens differ by rounding at most."""
        one, other = found.logprobs, wanted.logprobs
        require((one is None) == (other is None), f"{what} has log probabilities other {than}", stage=stage)
        if one is None or other is None:
            return
        require(
            len(one) == len(found.tokens),
            f"{what} has {len(one)} log probabilities for {len(found.tokens)} tokens",
            stage=stage,
        )
        for i, (have, want) in enumerate(zip(one[:upto], other[:upto], strict=True)):
            near = abs(have - want)
            self.worst = max(self.worst, near if math.isfinite(near) else 0.0)
            require(
                near <= ROUNDING[self.exact],
                f"{what}: log probability of token {i} is {have:.6g} other {than} ({want:.6g})",
                stage=stage,
                what=what,
                index=[i],
                observed=have,
                expected=want,
                difference=near,
                tolerance=ROUNDING[self.exact],
            )

    def excused(self, found: Completion, wanted: Completion, at: int, request: Request) -> bool:
        """Whether rounding may explain that two completions part at token `at`."""
        plain = replace(request.sampling, seed=None) == GREEDY
        shown = found.logprobs is not None and wanted.logprobs is not None
        if plain and shown and at < min(len(found.tokens), len(wanted.tokens)):
            assert found.logprobs is not None
            assert wanted.logprobs is not None
            self.parted += 1
            return abs(found.logprobs[at] - wanted.logprobs[at]) <= ROUNDING[self.exact]
        if self.exact or (plain and shown):
            return False
        self.parted, self.unexplained = self.parted + 1, self.unexplained + 1
        # One in a hundred tokens has a rival within 1e-3 of its probability, and float32 errs by less than
        # a tenth of that: one completion of some may part by chance, hardly ever a second.
        return self.unexplained <= 1

    def noted(self, case: Case) -> None:
        """Report what was compared; Void if nothing was."""
        case.note("tokens_compared", self.tokens)
        case.note("worst_logprob_difference", self.worst)
        if self.parted:
            case.note("parted_by_rounding", self.parted)
        if not self.tokens:
            raise Void("no two completions had a token in common that could be compared")


def parting(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place where two sequences differ; the shorter's length where one begins the other."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def same_all(
    agreement: Agreement,
    found: Sequence[Completion],
    wanted: Sequence[Completion],
    requests: Sequence[Request],
    *,
    what: str,
    stage: str,
    but: str = "",
) -> None:
    """Raise Violation unless each of `found` is the same as its counterpart."""
    for i, (one, other, request) in enumerate(zip(found, wanted, requests, strict=True)):
        agreement.same(one, other, request, what=f"request {i} {what}", stage=stage, but=but)


def near_draft(case: Case, weights: Mapping[str, Tensor], by: float = 0.02) -> dict[str, Tensor]:
    """Weights of a draft that agrees with a target of `weights` on about half of the tokens."""
    generator = case.generator()
    made = {}
    for name in sorted(weights):
        value = weights[name]
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        made[name] = value + by * value.double().square().mean().sqrt() * noise
    return made


def speculations(case: Case, model: Any, length: int = 3) -> list[Speculation]:
    """The ways to speculate that the engine offers, a draft loaded where it takes one."""
    methods: frozenset[str] = getattr(model, "methods", frozenset())
    found: list[Speculation] = []
    if "draft_model" in methods and case.architecture is not None:
        model.load_draft(case.shape, near_draft(case, case.weights()))
        found.append(Speculation("draft_model", length))
    elif "draft_model" in methods and "weights" not in model.capabilities:
        found.append(Speculation("draft_model", length))  # a server has its own
    if "prompt_lookup" in methods:
        found.append(Speculation("prompt_lookup", length, ngram=2))
    if not found:
        raise Unsupported("the engine speculates neither with a draft model nor by prompt lookup")
    return found


def counted(answers: Iterable[Completion], what: str) -> int:
    """The sum of a count over completions, for instance of "preemptions"."""
    return sum(int(getattr(answer, what)) for answer in answers)


def timeline(served: Served) -> Sequence[Iteration]:
    """Iterations as they happened; Unsupported where the engine does not show them."""
    if not served.timeline:
        raise Unsupported("the engine shows no timeline")
    return served.timeline
