"""Speculation against the law that the engine has without it: what every engine whose draws can be enumerated
can be asked, also one that has weights of its own."""

from __future__ import annotations

from harness.conformance import Case, conformance
from harness.conformance.decoding import enumerated, generated, lossless, precise, ways
from harness.conformance.laws import Outcome, outcome
from harness.conformance.passes import independent
from harness.conformance.property import Void
from harness.conformance.serving import prompts, settings
from harness.implementations.protocols import Unsupported
from harness.reference.engine import Request, Sampling, Speculation

DRAFTS, KNOWN = 2, 1
"""Of a window; of an engine with the reference's weights, whose laws are known for longer ones."""
AFTER = 2
"""Tokens of a completion beyond a window: the one after the drafts, and the first of the next round."""
FEW = ("early_exit", "draft_model")
SMALL = 4
"""Of a vocabulary: what can be enumerated without top_k."""


@conformance(
    "decoding.speculation-keeps-the-engines-own-law",
    clause="engine.Speculation",
    needs=("generate", "enumerable", "speculate"),
    kills=("acceptance-is-typical", "every-draft-stands", "bonus-comes-from-the-draft"),
    applies=independent,
    costly=True,
)
def test_own_speculation(case: Case) -> None:
    """Completions with speculation have, exactly, the law that the engine gives them without."""
    model = precise(case)
    known = settings(model)
    if "top_k" not in known and model.vocab_size > SMALL:
        raise Unsupported(f"without top_k the laws of {model.vocab_size} tokens are too many to enumerate")
    asked = {"temperature": 1.5, "top_k": 2}
    sampling = Sampling(**{name: value for name, value in asked.items() if name in known})  # type: ignore[arg-type]
    drafts = KNOWN if "weights" in model.capabilities else DRAFTS
    request = Request(prompts(case, (3,))[0] * 2, drafts + AFTER, sampling)
    drafted = 0

    def answer(speculation: Speculation | None) -> Outcome:
        nonlocal drafted
        (found,) = generated(model, [request], speculation)
        drafted += found.drafted
        return outcome(found)

    plain = enumerated(model, lambda: answer(None))
    offered = ways(case, model, drafts)
    if "weights" in model.capabilities:  # all its ways are held to the target's law, with designed weights
        offered = {name: way for name, way in offered.items() if name in FEW} or offered
    for name, speculation in offered.items():
        drafted = 0
        found = enumerated(model, lambda how=speculation: answer(how))
        lossless(case, name, found, plain)
        if not drafted:
            raise Void(f"{name}: nothing was drafted")
