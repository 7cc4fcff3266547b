"""Greedy decoding: whatever is drafted, and whoever stands beside it, the same tokens come."""

from __future__ import annotations

import torch

from harness.conformance import Case, conformance, require
from harness.conformance.decoding import generated, precise, ways
from harness.conformance.passes import independent
from harness.conformance.serving import GREEDY, Agreement, exact, greedy, same_all
from harness.reference.engine import Request, Speculation

LENGTHS = (3, 7, 8, 9, 15, 4, 33, 61)
"""Of prompts: at, below and above the window of the twins and multiples of a page, and so near the length for
which rope was trained that the completion crosses it."""
ENDS = (14, 10, 6, 12, 1, 9, 2, 8)


@conformance(
    "decoding.greedy-speculation-changes-nothing",
    clause="engine.Speculation",
    needs=("generate", "speculate"),
    kills=(
        "keys-of-a-rejected-draft-stay",
        "positions-advance-by-one-a-round",
        "one-rejected-draft-stands",
        "a-rejection-empties-the-cache",
    ),
    applies=independent,
    costly=True,
)
def test_speculation(case: Case) -> None:
    """With greedy decoding every method of speculation gives the tokens that come without."""
    model = precise(case)
    requests, agreement = greedy(case, model, LENGTHS, ENDS), Agreement(exact(model))
    plain = generated(model, requests)
    for name, speculation in ways(case, model).items():
        found = generated(model, requests, speculation)
        same_all(agreement, found, plain, requests, what=f"by {name}", stage="greedy", but="without")
    agreement.noted(case)


@conformance(
    "decoding.ties-go-to-the-smallest-token",
    clause="engine.Sampling.temperature",
    needs=("generate", "weights"),
    kills=("ties-go-to-the-last",),
    applies=independent,
)
def test_ties(case: Case) -> None:
    """Where all logits are equal the smallest token id comes, drafted or not."""
    weights = case.weights()
    name = "embedding.weight" if case.shape.tie_embeddings else "unembedding.weight"
    weights[name] = torch.zeros_like(weights[name])
    model = precise(case, case.architecture, weights)
    request = Request(tuple(case.tokens(1, 5)[0].tolist()), 6, GREEDY)
    found = {"plain": generated(model, [request])[0]}
    if "draft_model" in getattr(model, "methods", ()):
        model.load_draft(case.shape, case.weights())
        found["draft_model"] = generated(model, [request], Speculation("draft_model", 2))[0]
    for how, answer in found.items():
        require(
            answer.tokens == (0,) * 6,
            f"{how}: {list(answer.tokens)} in place of six times token 0, though all logits are equal",
            stage="greedy",
        )


HAIR = 3e-5
"""Lead of the best logit over the others, relative: hundreds of roundings of float32, less than one of half
precision."""


@conformance(
    "decoding.the-best-token-wins-by-a-hair",
    clause="engine.Sampling.temperature",
    needs=("generate", "weights"),
    kills=("greedy-compares-in-half-precision",),
    applies=independent,
)
def test_hair(case: Case) -> None:
    """Where one logit is the largest by three parts in 100,000, its token comes, drafted or not."""
    weights = case.weights()
    name = "embedding.weight" if case.shape.tie_embeddings else "unembedding.weight"
    rows = weights[name][:1].expand_as(weights[name]).clone()
    rows[5] *= 1 + HAIR  # the best one where logits are positive
    rows[9] *= 1 - HAIR  # and where they are negative
    weights[name] = rows.float().double()
    model = precise(case, case.architecture, weights)
    request = Request(tuple(case.tokens(1, 5)[0].tolist()), 6, GREEDY)
    found = {"plain": generated(model, [request])[0]}
    if "draft_model" in getattr(model, "methods", ()):
        model.load_draft(case.shape, weights)
        found["draft_model"] = generated(model, [request], Speculation("draft_model", 2))[0]
    for how, answer in found.items():
        require(
            set(answer.tokens) <= {5, 9},
            f"{how}: {list(answer.tokens)}, though the logit of token 5 or 9 is the largest",
            stage="greedy",
        )


@conformance(
    "decoding.a-batch-decodes-as-each-alone",
    clause="engine.Request",
    needs=("generate",),
    kills=(
        "rows-are-taken-to-be-equally-long",
        "batches-are-summed-in-half-precision",
        "keys-of-batches-are-rounded",
        "positions-are-those-of-the-longest",
        "padding-of-a-batch-is-attended",
    ),
    applies=independent,
    costly=True,
)
def test_batch(case: Case) -> None:
    """Prompts of uneven lengths decoded as one batch give what each gives alone, log probabilities too."""
    model = precise(case)
    requests, agreement = greedy(case, model), Agreement(exact(model))
    alone = [generated(model, [request])[0] for request in requests]
    for order in ((0, 1, 2, 3, 4), (3, 1, 4, 0, 2)):
        turned = [requests[i] for i in order]
        found = generated(model, turned)
        same_all(agreement, found, [alone[i] for i in order], turned, what="in a batch", stage="isolation")
    agreement.noted(case)


OFTEN = ("draft_model", "prompt_lookup", "staged")
"""Ways to speculate that draft for a batch in ways of their own; an engine with its own weights tries all."""


@conformance(
    "decoding.uneven-acceptance-changes-nothing",
    clause="engine.Speculation",
    needs=("generate", "speculate"),
    kills=("drafts-shrink-in-company", "rows-are-taken-to-be-equally-long"),
    applies=independent,
    costly=True,
)
def test_uneven_acceptance(case: Case) -> None:
    """In a batch in which some drafts stand and others do not, each request gives what it gives alone."""
    model = precise(case)
    requests, agreement = greedy(case, model), Agreement(exact(model))
    uneven = False
    for name, speculation in ways(case, model).items():
        if exact(model) and name not in OFTEN:
            continue
        alone = [generated(model, [request], speculation)[0] for request in requests]
        found = generated(model, requests, speculation)
        same_all(agreement, found, alone, requests, what=f"by {name} in a batch", stage="isolation")
        uneven = uneven or len({answer.accepted for answer in found}) > 1
        if exact(model):
            counts = [[(a.drafted, a.accepted, a.rounds) for a in answers] for answers in (found, alone)]
            require(
                counts[0] == counts[1],
                f"by {name}: drafted, accepted and rounds are {counts[0]} in a batch and {counts[1]} alone",
                stage="acceptance",
            )
    case.note("acceptance_was_uneven", uneven)
    agreement.noted(case)


@conformance(
    "decoding.long-completions-are-those-of-one-pass",
    clause="engine.Request",
    needs=("generate", "forward", "weights"),
    kills=("keys-of-a-rejected-draft-stay",),
    applies=independent,
    costly=True,
)
def test_long(case: Case) -> None:
    """Every token of a completion that fills the context is the best of one pass over all before it."""
    model = precise(case)
    context = case.shape.max_positions
    prompts = case.tokens(2, 5).tolist()
    requests = [Request(tuple(prompt), context - len(prompt), GREEDY) for prompt in prompts]
    found = {"plain": generated(model, requests)}
    if "prompt_lookup" in getattr(model, "methods", ()):
        found["prompt_lookup"] = generated(model, requests, Speculation("prompt_lookup", 3))
    for how, answers in found.items():
        for request, answer in zip(requests, answers, strict=True):
            text = [*request.prompt, *answer.tokens]
            require(
                len(text) == context and answer.finish_reason == "length",
                f"{how}: {len(text)} tokens ended by {answer.finish_reason!r}; the context has {context}",
                stage="stop",
            )
            with torch.no_grad():
                logits = model.forward(torch.tensor([text[:-1]]))[0, len(request.prompt) - 1 :].double()
            chosen = logits.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
            # Half of the digits of float32, relative to the largest logit: a wrong token misses by far more.
            worse = logits.max(-1).values - chosen > 3e-4 * logits.abs().max()
            require(
                not bool(worse.any()),
                f"{how}: {int(worse.sum())} of {len(worse)} tokens are not the best of one pass",
                stage="greedy",
            )
