"""How a decoder is put to the question: what it is asked, the law of its answers, and the verdict on it.

Letters: V vocabulary, g tokens proposed per round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from harness.conformance import laws
from harness.conformance.case import Case
from harness.conformance.pairs import Pair, designed
from harness.conformance.property import Violation, require
from harness.conformance.serving import GREEDY, REQUEST_SETTINGS, near_draft
from harness.evidence.enumeration import law
from harness.evidence.law import Law
from harness.implementations.protocols import Unsupported
from harness.reference.engine import Completion, Request, Sampling, Speculation
from harness.spec.architecture import Architecture

LOSSLESS = 1e-6
"""Total variation that rounding explains: a softmax in float32 errs by some 6e-8 of a probability, for each
of a few tokens. The smallest defect of the catalogue moves the law by more than a thousand times that."""


@dataclass(frozen=True)
class Trial:
    """A model under test that holds a designed target, with the designed draft beside it."""

    case: Case
    model: Any
    pair: Pair

    def request(self, max_tokens: int, sampling: Sampling | None = None, **more: Any) -> Request:
        """The pair's prompt, to be continued."""
        return Request(self.pair.prompt, max_tokens, sampling or Sampling(), **more)

    def wanted(self, request: Request) -> Law:
        """The law that the request's completion must have, from the reference in float64."""
        return laws.target_law(self.logits(request), request)

    def logits(self, request: Request) -> laws.Logits:
        """The target's, after every continuation."""
        forward = self.case.reference(self.pair.architecture, self.pair.target).forward
        return laws.tabulated(forward, request, self.pair.architecture.vocab_size)

    def drafted_logits(self, request: Request) -> laws.Logits:
        """The draft's, after every continuation."""
        forward = self.case.reference(self.pair.architecture, self.pair.draft).forward
        return laws.tabulated(forward, request, self.pair.architecture.vocab_size)

    def found(self, request: Request, speculation: Speculation | None = None) -> Law:
        """The law that it has."""
        return self.law_of(lambda: laws.outcome(generated(self.model, [request], speculation)[0]))

    def law_of(self, program: Callable[[], Any]) -> Law:
        """Every run of a program that draws, by enumeration."""
        return enumerated(self.model, program)

    def judge(
        self, what: str, request: Request, speculation: Speculation | None = None, *, stage: str = "law"
    ) -> None:
        """Raise Violation unless the completion has the target's law; the distance is noted either way."""
        lossless(self.case, what, self.found(request, speculation), self.wanted(request), stage=stage)


def enumerated(model: Any, program: Callable[[], Any]) -> Law:
    """The law of a program that asks the model: of one that can, each pass is computed once, and not once for
    every path on which it lies."""
    with torch.no_grad(), remembering(model):
        return law(program)


def remembering(model: Any) -> AbstractContextManager[None]:
    """Within it a model that can computes each pass once, for all laws that are enumerated."""
    found: AbstractContextManager[None] = getattr(model, "remembering", nullcontext)()
    return found


def trial(case: Case, vocab_size: int = 4, *, layers: int = 1) -> Trial:
    """A designed pair, loaded in float64 where the implementation has it."""
    pair = designed(case, vocab_size, layers=layers)
    model = precise(case, pair.architecture, pair.target)
    if "speculate" in model.capabilities and "draft_model" in model.methods:
        model.load_draft(pair.architecture, pair.draft)
    return Trial(case, model, pair)


def precise(
    case: Case, architecture: Architecture | None = None, weights: Mapping[str, Tensor] | None = None
) -> Any:
    """The model under test in float64, or in float32 where there is no other."""
    try:
        return case.model(architecture, weights, dtype=torch.float64)
    except Unsupported:
        return case.model(architecture, weights)


def lossless(case: Case, what: str, found: Law, wanted: Law, *, stage: str = "law") -> None:
    """Raise Violation unless both laws are the same; notes the total variation between them."""
    tv = found.tv(wanted)
    case.facts.setdefault("tv", {})[what] = tv
    case.facts["paths"] = case.facts.get("paths", 0) + found.paths
    if not tv <= LOSSLESS:
        worst = found.largest_difference(wanted)
        raise Violation(
            f"{what}: lossy: TV = {tv:.4g} over {len(wanted)} outcomes: {_shown(worst.outcome)} comes with "
            f"probability {worst.here:.6g} in place of {worst.there:.6g}",
            stage=stage,
            facts={
                "what": what,
                "index": _shown(worst.outcome),
                "observed": worst.here,
                "expected": worst.there,
                "difference": abs(worst.here - worst.there),
                "total_variation": tv,
                "tolerance": LOSSLESS,
                "compared": len(wanted),
            },
        )


REFUSED = "answered 400"
"""How an endpoint's adapter words it, such as for a temperature beyond the bound of its API."""


def generated(
    model: Any, requests: Sequence[Request], speculation: Speculation | None = None
) -> Sequence[Completion]:
    """The completions; raises Violation where one could not be served, Unsupported where a server declares
    (HTTP 400) that it does not take such a request."""
    answers: Sequence[Completion] = model.generate(list(requests), speculation=speculation)
    for i, answer in enumerate(answers):
        if "weights" not in model.capabilities and REFUSED in answer.error:
            raise Unsupported(f"request {i} of {len(answers)} is refused: {answer.error}")
        require(
            answer.finish_reason in ("stop", "length"),
            f"request {i} of {len(answers)} ended with {answer.finish_reason!r}: {answer.error or '?'}",
            stage="fault",
        )
    return answers


def settings_of(request: Request) -> set[str]:
    """The fields of Sampling and Request that are not at their default."""
    used = {f.name for f in fields(Sampling) if getattr(request.sampling, f.name) != f.default}
    defaults = {f.name: f.default for f in fields(Request) if f.name in REQUEST_SETTINGS}
    return used | {name for name, value in defaults.items() if getattr(request, name) != value}


def offered_only(case: Case, model: Any, requests: Mapping[str, Request]) -> dict[str, Request]:
    """Those that ask for nothing that the engine does not honour; the others are noted. Raises Unsupported
    where none is left."""
    missing = {name: settings_of(request) - set(model.settings) for name, request in requests.items()}
    left_out = sorted(name for name, lacking in missing.items() if lacking)
    if left_out:
        case.note("settings_not_offered", left_out)
    if len(left_out) == len(requests):
        lacking = sorted(set().union(*missing.values()))
        raise Unsupported(f"the engine does not honour {', '.join(lacking)}")
    return {name: request for name, request in requests.items() if not missing[name]}


def methods(case: Case, model: Any, *wanted: str) -> list[str]:
    """The methods of speculation among `wanted` that are offered; raises Unsupported where none is."""
    found = [name for name in wanted if name in model.methods]
    if not found:
        raise Unsupported(f"the engine speculates by none of {', '.join(wanted)}")
    if len(found) < len(wanted):
        case.note("methods_not_offered", sorted(set(wanted) - set(found)))
    return found


def ways(case: Case, model: Any, length: int = 3, *, near: float = 0.02) -> dict[str, Speculation]:
    """Every method of speculation that the engine offers at the twin's own size, by name; a draft is loaded
    that is often right, the more the less noise `near` is. Raises Unsupported where there is none."""
    found = {}
    if "prompt_lookup" in model.methods:
        found["prompt_lookup"] = Speculation("prompt_lookup", length, ngram=2)
    if "self_draft" in model.methods:
        found["self_draft"] = Speculation("self_draft", length)
    if "early_exit" in model.methods:
        found["early_exit"] = Speculation("early_exit", length)
    if case.architecture is not None:
        drafted = {"draft_model", "staged", "universal"} & set(model.methods)
        if drafted:
            model.load_draft(case.shape, near_draft(case, case.weights(), near))
        for name in sorted(drafted - {"universal"}):
            found[name] = Speculation(name, length)  # type: ignore[arg-type]
        if "universal" in drafted:
            found["universal"] = Speculation("universal", length, vocabulary=shuffled(case.vocab_size))
            if not taken(case, model, found["universal"]):
                del found["universal"]
    elif "draft_model" in model.methods and "weights" not in model.capabilities:
        found["draft_model"] = Speculation("draft_model", length)  # a server has its own
    if not found:
        raise Unsupported("the engine offers no speculation that needs no draft, and no draft can be loaded")
    return found


def taken(case: Case, model: Any, speculation: Speculation) -> bool:
    """Whether the engine takes just this speculation; where it does not, its reason is noted."""
    try:
        generated(model, [Request((0,), 1, GREEDY)], speculation)
    except Unsupported as error:
        case.note(f"{speculation.method}_not_taken", str(error))
        return False
    return True


def shuffled(vocab_size: int) -> tuple[int, ...]:
    """A draft's vocabulary of as many ids: rotated by one, a quarter of them lacking in the target."""
    lacking = vocab_size // 4
    return tuple(-1 if token < lacking else (token + 1) % vocab_size for token in range(vocab_size))


def sampled(requests: Iterable[Request], **changed: Any) -> list[Request]:
    """The requests with fields of their Sampling replaced."""
    return [replace(request, sampling=replace(request.sampling, **changed)) for request in requests]


def _shown(outcome: object) -> str:
    match outcome:
        case (tuple() as tokens, str() as reason):
            return f"{list(tokens)} ({reason})"
        case _:
            return str(outcome)
