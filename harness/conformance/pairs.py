"""Designed pairs of target and draft: small enough to enumerate, and far enough apart to show a defect.

Letters: V vocabulary. At default weights a draft and its target nearly agree, or disagree on everything, and
most wrong acceptance rules hide. Here half of the probability of a draft lies where the target's does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from harness.conformance.case import Case, replaced, seeded
from harness.conformance.property import Void
from harness.reference import ReferenceModel, build, weights
from harness.spec.architecture import Architecture

SPREAD = 1.5
"""Standard deviation of the logits of one token: every token stays possible, none as good as certain."""
APART = (0.4, 0.6)
"""Total variation between the laws of target and draft, on average over contexts."""
CONTEXTS = 3
"""Tokens generated before a context at most, less one, over which the laws are compared."""
TRIES = 200


@dataclass(frozen=True)
class Pair:
    """A target and a draft of one architecture."""

    architecture: Architecture
    target: Mapping[str, Tensor]
    draft: Mapping[str, Tensor]
    """Weights by canonical name."""
    prompt: tuple[int, ...]
    tv: float
    """Total variation between their laws, on average over all contexts after the prompt."""


def designed(case: Case, vocab_size: int = 4, *, layers: int = 1) -> Pair:
    """The pair of this case's kind of architecture; its weights are entered into the digest, its distance is
    noted. Raises Void where the search found none."""
    tiny = small(case, vocab_size, layers)
    pair = _designed(tiny, case.seed)
    if pair is None:
        low, high = APART
        raise Void(f"none of {TRIES} drafts is between TV {low} and {high} from the target")
    for part in (pair.target, pair.draft):
        for name in sorted(part):
            case.drawn(part[name])
    case.note("tv_of_draft", round(pair.tv, 4))
    return pair


def small(case: Case, vocab_size: int, layers: int = 1) -> Architecture:
    """The twin with `layers` layers and a vocabulary that can be enumerated."""
    kind = case.one_layer()
    return replaced(kind, {"vocab_size": vocab_size, "n_layers": layers})


@lru_cache(maxsize=32)
def _designed(architecture: Architecture, seed: int) -> Pair | None:
    generator = seeded(seed, "pair", architecture.model_dump_json())
    one, other = torch.randperm(architecture.vocab_size, generator=generator)[:2].tolist()
    prompt = one, other, one  # its end stood there before, and some tokens of most vocabularies did not
    model = build(architecture, dtype=torch.float64)
    target, p = _spread(model, prompt, generator)
    for _ in range(TRIES):
        draft, q = _spread(model, prompt, generator)
        apart = (p - q).abs().sum(-1) / 2
        tv = float(apart.mean())
        # Nowhere close: a defect that shows in one context only must show.
        if APART[0] <= tv <= APART[1] and float(apart.min()) >= APART[0] / 4:
            return Pair(architecture, target, draft, prompt, tv)
    return None


def _spread(
    model: ReferenceModel, prompt: tuple[int, ...], generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Weights whose logits spread by SPREAD, and their laws [contexts, V] after the prompt and every
    continuation of fewer than CONTEXTS tokens."""
    drawn = weights.draw(model.architecture, generator)
    model.load_weights(drawn)
    found = []
    for length in range(CONTEXTS):
        after = product(range(model.architecture.vocab_size), repeat=length)
        with torch.no_grad():
            rows = torch.tensor([[*prompt, *tokens] for tokens in after])
            found.append(model.forward(rows)[:, -1])
    logits = torch.cat(found)
    factor = SPREAD / float(logits.std(-1, correction=0).mean())
    for name in drawn:
        if name.startswith("final_norm."):  # logits are linear in it
            drawn[name] = drawn[name] * factor
    return {name: value.float().double() for name, value in drawn.items()}, (factor * logits).softmax(-1)
