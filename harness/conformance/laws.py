"""What a request must be answered with: the law of its completions, from logits and its own settings.

Letters: V vocabulary. Written in plain Python, a token at a time, and shares no line with any engine: it is
what they are held to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import product

import torch

from harness.evidence.law import Law, generations
from harness.reference.engine import Completion, Grammar, Request

Outcome = tuple[tuple[int, ...], str]
"""Tokens and finish_reason of a completion."""
Logits = Callable[[tuple[int, ...]], Sequence[float]]
"""From the tokens generated so far to the V logits of the next."""


def outcome(completion: Completion) -> Outcome:
    """What a law is over."""
    return completion.tokens, completion.finish_reason


def target_law(logits: Logits, request: Request) -> Law:
    """The law of the completion: each token is drawn from `token_law`, until one of them ends it."""
    return generations(
        lambda generated: token_law(logits(generated), request, generated),
        lambda generated: end(generated, request) is not None,
        lambda generated: end(generated, request),
    )


def end(generated: tuple[int, ...], request: Request) -> Outcome | None:
    """The outcome, if the last of these tokens ends the completion: by eos, else by a stop sequence (the
    longest), else by length."""
    if generated and generated[-1] in request.eos:
        return generated[:-1], "stop"
    for sequence in sorted(request.stop, key=len, reverse=True):
        if generated[-len(sequence) :] == sequence:
            return generated[: -len(sequence)], "stop"
    return (generated, "length") if len(generated) >= request.max_tokens else None


def token_law(logits: Sequence[float], request: Request, generated: tuple[int, ...]) -> list[float]:
    """The V probabilities of the next token: the fields of Sampling in their order, normalised once."""
    sampling = request.sampling
    scores = list(map(float, logits))
    allowed = set(range(len(scores)))
    if sampling.grammar is not None:
        allowed &= _grammatical(sampling.grammar, generated, len(scores))
    if len(generated) < request.min_tokens:
        allowed -= set(request.eos)
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    for token in {*request.prompt, *generated}:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(generated):
        scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * generated.count(token)
    allowed = {token for token in allowed if scores[token] > -math.inf}
    if sampling.temperature == 0:
        best = max(sorted(allowed), key=lambda token: scores[token])
        return [float(token == best) for token in range(len(scores))]
    kept = _kept(scores, allowed, request)
    highest = max(scores[token] for token in kept)
    weights = {token: math.exp((scores[token] - highest) / sampling.temperature) for token in kept}
    total = math.fsum(weights.values())
    return [weights.get(token, 0.0) / total for token in range(len(scores))]


def _grammatical(grammar: Grammar, generated: Sequence[int], vocab_size: int) -> set[int]:
    state = 0
    for token in generated:
        state = dict(grammar.states[state]).get(token, state)
    return set(dict(grammar.states[state])) or set(range(vocab_size))


def _kept(scores: Sequence[float], allowed: set[int], request: Request) -> set[int]:
    """Tokens that top_k, then top_p, then min_p leave; probabilities are those under the temperature."""
    sampling = request.sampling
    ranked = sorted(allowed, key=lambda token: (-scores[token], token))
    if 0 < sampling.top_k < len(ranked):
        least = scores[ranked[sampling.top_k - 1]]
        ranked = [token for token in ranked if scores[token] >= least]
    highest = scores[ranked[0]]
    weights = [math.exp((scores[token] - highest) / sampling.temperature) for token in ranked]
    total = math.fsum(weights)
    if sampling.top_p < 1:
        count = 1
        while math.fsum(weights[:count]) < sampling.top_p * total:
            count += 1
        ranked, weights = ranked[:count], weights[:count]
    return {token for token, weight in zip(ranked, weights, strict=True) if weight >= sampling.min_p}


def rounds_law(target: Logits, draft: Logits, request: Request, length: int) -> Law:
    """The law of (tokens, rounds) of a request without ends, where a draft proposes `length` tokens a round.

    A token x is drafted and stands with probability min(p(x), q(x)); z comes in the place of a rejected one
    with probability max(p(z) - q(z), 0) (arXiv 2211.17192, appendix A.1). How many are drafted where fewer
    than `length` can serve makes no difference.
    """
    sums: dict[Hashable, float] = {}

    def go_on(generated: tuple[int, ...], left: int, rounds: int, mass: float) -> None:
        if mass == 0:
            return
        if len(generated) == request.max_tokens:
            sums[generated, rounds] = sums.get((generated, rounds), 0.0) + mass
            return
        p = token_law(target(generated), request, generated)
        if not left:
            for token, probability in enumerate(p):
                go_on((*generated, token), length, rounds + 1, mass * probability)
            return
        q = token_law(draft(generated), request, generated)
        for token, (wanted, drafted) in enumerate(zip(p, q, strict=True)):
            # A draft that fills the completion ends its round as one that is rejected does.
            last = len(generated) + 1 == request.max_tokens
            go_on((*generated, token), left - 1, rounds + last, mass * min(wanted, drafted))
            go_on((*generated, token), length, rounds + 1, mass * max(wanted - drafted, 0.0))

    go_on((), length, 0, 1.0)
    return Law(sums)


def tabulated(forward: Callable[..., torch.Tensor], request: Request, vocab_size: int) -> Logits:
    """The logits that `forward` ([B, S] -> [B, S, V]) gives after the prompt and every continuation of fewer
    than max_tokens tokens: one pass per length."""
    table: dict[tuple[int, ...], list[float]] = {}
    for length in range(request.max_tokens):
        continuations = list(product(range(vocab_size), repeat=length))
        rows = torch.tensor([[*request.prompt, *tokens] for tokens in continuations])
        with torch.no_grad():
            last = forward(rows)[:, -1].double()
        table |= dict(zip(continuations, last.tolist(), strict=True))
    return table.__getitem__


def asked(forward: Callable[..., torch.Tensor], prompt: tuple[int, ...]) -> Logits:
    """As `tabulated`, for continuations of any length, each in a pass of its own, once it is asked for."""
    table: dict[tuple[int, ...], list[float]] = {}

    def logits(tokens: tuple[int, ...]) -> list[float]:
        if tokens not in table:
            with torch.no_grad():
                table[tokens] = forward(torch.tensor([[*prompt, *tokens]]))[0, -1].double().tolist()
        return table[tokens]

    return logits
