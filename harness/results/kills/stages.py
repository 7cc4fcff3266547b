"""What names a stage: the stage of a mutant, and those under which a counterexample may name it."""

from __future__ import annotations

STAGED = {
    "routing.projects-the-input": "proj",
    "routing.scores-the-logits": "score",
    "routing.selects-the-best": "select",
    "routing.weighs-the-selected": "weigh",
    "routing.combines-the-experts": "combine",
}
"""In the order of the stages: each judges its own, on the implementation's input to it."""


def shown_as(stage: str, side: str) -> frozenset[str]:
    """What a defect of a stage may show as.

    Those who see only the answers of an engine see a wrong rule of acceptance as a wrong law, a wrong
    rollback in greedy tokens too, and a law that leaves no token as a fault.
    """
    if side == "model":
        return frozenset((stage,))
    return frozenset((stage, "law")) | {
        "rollback": frozenset(("greedy",)),
        "law": frozenset(("fault",)),
    }.get(stage, frozenset())


def sparing(stage: str) -> tuple[str, ...]:
    """Properties of the stages before a defect: they must pass, or name the stage of the defect."""
    stages = list(STAGED.values())
    before = stages[: stages.index(stage)] if stage in stages else []
    return tuple(slug for slug, own in STAGED.items() if own in before)
