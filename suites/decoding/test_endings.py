"""Where a completion ends, and what it says about that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.conformance import Case, conformance, require
from harness.conformance.decoding import generated, offered_only, precise, ways
from harness.conformance.passes import independent
from harness.conformance.property import Void
from harness.conformance.serving import GREEDY, ask_for, prompts
from harness.reference.engine import Completion, Request, Speculation

SO_MANY = 7
"""Tokens of the completion that is cut at every place: more than two rounds of two drafts that all stand."""


def expected(tokens: tuple[int, ...], request: Request) -> tuple[tuple[int, ...], str]:
    """How the greedy completion `tokens` ends under the request's eos, stop and max_tokens."""
    for count in range(1, len(tokens) + 1):
        so_far = tokens[:count]
        if so_far[-1] in request.eos:
            return so_far[:-1], "stop"
        ending = [len(stop) for stop in request.stop if so_far[-len(stop) :] == stop]
        if ending:
            return so_far[: count - max(ending)], "stop"
        if count == request.max_tokens:
            return so_far, "length"
    return tokens, "length"


def cuts(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> dict[str, Request]:
    """Requests that end the completion at each of its places."""
    made = {}
    for i, token in enumerate(tokens):
        made[f"max_tokens {i + 1}"] = Request(prompt, i + 1, GREEDY)
        made[f"eos at token {i}"] = Request(prompt, SO_MANY, GREEDY, eos=(token,))
        made[f"stop of 1 at token {i}"] = Request(prompt, SO_MANY, GREEDY, stop=((token,),))
        if i:
            made[f"stop of 2 at token {i}"] = Request(prompt, SO_MANY, GREEDY, stop=(tokens[i - 1 : i + 1],))
        if i == SO_MANY - 1:
            made[f"stop of 4 at token {i}"] = Request(prompt, SO_MANY, GREEDY, stop=(tokens[i - 3 : i + 1],))
    last, absent = tokens[-1], tuple(t for t in range(2 * len(tokens)) if t not in tokens)
    made["eos at the last token"] = Request(prompt, len(tokens), GREEDY, eos=(last,))
    made["two end tokens"] = Request(prompt, SO_MANY, GREEDY, eos=(absent[0], tokens[4]))
    made["a stop of which only the end comes"] = Request(prompt, SO_MANY, GREEDY, stop=((last, tokens[2]),))
    made["a stop that begins in the prompt"] = Request(
        prompt, SO_MANY, GREEDY, stop=((*prompt[-2:], tokens[0]),)
    )
    made["an end token that ends the prompt"] = Request(prompt, SO_MANY, GREEDY, eos=prompt[-1:])
    made["a stop before the end token"] = Request(
        prompt, SO_MANY, GREEDY, eos=tokens[5:6], stop=(tokens[1:3],)
    )
    made["an end token before the stop"] = Request(
        prompt, SO_MANY, GREEDY, eos=tokens[2:3], stop=(tokens[4:6],)
    )
    made["a stop that is all"] = Request(prompt, SO_MANY, GREEDY, stop=(tokens,))
    made["the second of two stops"] = Request(
        prompt, SO_MANY, GREEDY, stop=((*absent[:1], last), tokens[2:4])
    )
    made["a stop of which all but its beginning comes"] = Request(
        prompt, SO_MANY, GREEDY, stop=((absent[0], *tokens[:5]),)
    )
    made["many end tokens"] = Request(prompt, SO_MANY, GREEDY, eos=(*absent, tokens[4]))
    made["many stops"] = Request(
        prompt, SO_MANY, GREEDY, stop=(*((token, last) for token in absent), tokens[3:5])
    )
    made["a longer and a shorter stop"] = Request(
        prompt, SO_MANY, GREEDY, stop=(tokens[3:4], tokens[2:4], tokens[1:4])
    )
    return made


OFTEN = ("draft_model", "prompt_lookup")
"""Ways to speculate by which every end is looked for: most engines have them."""
FREE_TO_SERVERS = ("a longer and a shorter stop", "many stops")
"""Of stops that end at one token a server may cut any: vLLM goes by the order in which they are given. Some
take four of them at most."""


def judge(
    model: Any, requests: Mapping[str, Request], tokens: tuple[int, ...], speculation: Speculation | None
) -> None:
    """Each must end as the completion without an end says."""
    if "weights" not in model.capabilities:
        requests = {name: it for name, it in requests.items() if name not in FREE_TO_SERVERS}
    how = "without speculation" if speculation is None else f"by {speculation.method}"
    # Stop sequences come last: an engine that fails with them has shown the rest by then.
    for stops in (False, True):
        some = {name: request for name, request in requests.items() if bool(request.stop) is stops}
        answers = generated(model, list(some.values()), speculation) if some else ()
        for (name, request), answer in zip(some.items(), answers, strict=True):
            want = expected(tokens, request)
            require(
                (answer.tokens, answer.finish_reason) == want,
                f"{name}, {how}: {list(answer.tokens)} ({answer.finish_reason}) in place of {list(want[0])} "
                f"({want[1]})",
                stage="stop",
            )


def free(case: Case, model: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt and its greedy completion without an end."""
    prompt = prompts(case, (5,))[0]
    tokens: Completion = generated(model, [Request(prompt, SO_MANY, GREEDY)])[0]
    if len(tokens.tokens) < SO_MANY:
        raise Void("the completion ends by itself, though nothing was said to end it")
    return prompt, tokens.tokens


@conformance(
    "decoding.nothing-follows-the-end",
    clause="engine.Request.stop",
    needs=("generate",),
    kills=(
        "what-ends-it-stays",
        "length-comes-before-stop",
        "only-the-first-end-token-ends",
        "stop-sequences-match-by-their-last-token",
        "stop-sequences-may-begin-in-the-prompt",
        "one-token-too-many",
        "an-end-token-in-the-prompt-ends",
        "stop-sequences-must-lie-in-one-round",
        "end-tokens-are-three-at-most",
        "stop-sequences-are-four-at-most",
        "long-stop-sequences-match-by-their-end",
        "stop-sequences-are-off-beside-end-tokens",
    ),
    applies=independent,
    costly=True,
)
def test_ends(case: Case) -> None:
    """An end token, a stop sequence or the length ends the completion at its first place, and is named."""
    model = precise(case)
    ask_for(model, "temperature")
    prompt, tokens = free(case, model)
    judge(model, offered_only(case, model, cuts(prompt, tokens)), tokens, None)


@conformance(
    "decoding.ends-do-not-depend-on-speculation",
    clause="engine.Request.stop",
    needs=("generate", "speculate"),
    kills=(
        "ends-within-a-round-are-overlooked",
        "stop-sequences-must-lie-in-one-round",
        "stop-sequences-fail-with-drafts",
    ),
    applies=independent,
    costly=True,
)
def test_ends_within_rounds(case: Case) -> None:
    """Wherever in a round of drafts the end lies, the completion ends there."""
    model = precise(case)
    ask_for(model, "temperature")
    prompt, tokens = free(case, model)
    requests = offered_only(case, model, cuts(prompt, tokens))
    few = {name: request for name, request in requests.items() if name.startswith(("eos at", "stop of 2"))}
    for name, speculation in ways(case, model, 2).items():
        judge(model, requests if name in OFTEN else few, tokens, speculation)


@conformance(
    "decoding.no-end-before-min-tokens",
    clause="engine.Request.min_tokens",
    needs=("generate",),
    kills=("least-length-is-one-less", "least-length-overlooks-drafts", "least-length-counts-the-prompt"),
    applies=independent,
    costly=True,
)
def test_min_tokens(case: Case) -> None:
    """Before min_tokens no end token comes, and from then on it does; drafted or not."""
    model = precise(case)
    ask_for(model, "temperature", "min_tokens", "eos", "logit_bias")
    prompt = prompts(case, (5,))[0]
    end = prompt[0]
    hungry = GREEDY.__class__(temperature=0.0, logit_bias=((end, 1e3),))
    made = {n: Request(prompt, 8, hungry, eos=(end,), min_tokens=n) for n in range(6)}
    every: dict[str, Speculation | None] = {"without speculation": None}
    if "speculate" in model.capabilities:
        every |= ways(case, model, 2)
    for how, speculation in every.items():
        for n, answer in zip(made, generated(model, list(made.values()), speculation), strict=True):
            # What ends a completion is no part of it: its end token was drawn at the place after the last.
            ended = answer.finish_reason == "stop" or len(answer.tokens) == made[n].max_tokens
            misdrawn = ended and (*answer.tokens, end).index(end) != n
            require(
                (len(answer.tokens), answer.finish_reason) == (n, "stop"),
                f"{how}: with min_tokens {n} the end token came after {len(answer.tokens)} tokens "
                f"({answer.finish_reason})",
                stage="law" if misdrawn else "stop",
            )
