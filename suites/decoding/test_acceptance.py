"""How many drafts stand: neither more nor fewer than the laws of draft and target say.

Letters: g tokens drafted per round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.conformance import Case, conformance, require
from harness.conformance.decoding import generated, lossless, methods, precise, taken, trial, ways
from harness.conformance.laws import Outcome, outcome, rounds_law, token_law
from harness.conformance.narrowing import narrowed
from harness.conformance.passes import independent
from harness.conformance.property import Violation, Void
from harness.conformance.serving import GREEDY, ask_for, honours, offered, prompts
from harness.evidence.law import Law
from harness.reference.engine import Completion, Grammar, Request, Sampling, Speculation
from harness.theory.speculation import standing_probabilities


@conformance(
    "decoding.rounds-have-the-exact-law",
    clause="engine.Completion.rounds",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=("drafts-keep-what-was-rejected", "drafts-forget-the-last-accepted-token", "rounds-count-tokens"),
    costly=True,
)
def test_rounds(case: Case) -> None:
    """Tokens and the number of rounds that they took have the joint law that draft and target determine."""
    t = trial(case, 2)
    methods(case, t.model, "draft_model")
    request, two = t.request(4), Speculation("draft_model", 2)

    def program() -> tuple[tuple[int, ...], int]:
        answer = generated(t.model, [request], two)[0]
        return answer.tokens, answer.rounds

    wanted = rounds_law(t.logits(request), t.drafted_logits(request), request, 2)
    lossless(case, "tokens and rounds", t.law_of(program), wanted, stage="acceptance")


@conformance(
    "decoding.acceptance-equals-the-closed-form",
    clause="engine.Completion.accepted",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=("acceptance-ignores-the-draft", "every-draft-stands"),
    costly=True,
)
def test_closed_form(case: Case) -> None:
    """All g drafts of a round stand with the probability that the closed form gives."""
    t = trial(case, 3)
    methods(case, t.model, "draft_model")
    request = t.request(3)
    two = Speculation("draft_model", 2)

    def program() -> tuple[Outcome, tuple[int, int]]:
        answer = generated(t.model, [request], two)[0]
        return outcome(answer), counted(answer)

    def tokens(aside: Case) -> None:
        lossless(aside, "tokens", found.of(lambda both: both[0]), t.wanted(request))

    found = t.law_of(program)
    laws = [
        lambda prefix, logits=logits: token_law(logits(prefix), request, prefix)
        for logits in (t.logits(request), t.drafted_logits(request))
    ]
    wanted = standing_probabilities(laws[0], laws[1], 2)[-1]
    case.note("probability_that_all_stand", wanted)
    standing = found.of(lambda both: both[1] == (1, 2))
    # Where the tokens keep their law, fewer or more drafts stand than the rule of acceptance has it.
    with narrowed(case, tokens, otherwise="acceptance"):
        lossless(case, "all of 2 drafts stand", standing, Law({True: wanted, False: 1 - wanted}), stage="")


def counted(answer: Completion) -> tuple[int, int]:
    """Rounds and accepted drafts."""
    return answer.rounds, answer.accepted


def permuted(case: Case, vocabulary: tuple[int, ...]) -> dict[str, Tensor]:
    """The target with the token ids of another vocabulary: row i is that of the target's vocabulary[i]."""
    weights = case.weights()
    for name in ("embedding.weight", "unembedding.weight"):
        if name in weights:
            weights[name] = weights[name][torch.tensor(vocabulary)]
    return weights


@conformance(
    "decoding.drafts-of-the-target-all-stand",
    clause="engine.Completion.accepted",
    needs=("generate", "speculate", "weights"),
    kills=(
        "translations-are-shifted",
        "drafts-forget-the-last-accepted-token",
        "speculation-is-silently-off",
        "early-exit-skips-the-final-norm",
        "translations-lack-the-last-entry",
    ),
    applies=independent,
    costly=True,
)
def test_all_stand(case: Case) -> None:
    """Where the draft is the target itself, in whatever guise, every draft stands, greedy or sampled."""
    model = precise(case)
    vocabulary = tuple((7 * token + 3) % case.vocab_size for token in range(case.vocab_size))
    same: dict[str, tuple[Speculation, dict[str, Tensor] | None]] = {
        "self_draft": (Speculation("self_draft", 2), None),
        "early_exit": (Speculation("early_exit", 2, layers=case.shape.n_layers), None),
        "draft_model": (Speculation("draft_model", 2), case.weights()),
        "universal": (Speculation("universal", 2, vocabulary=vocabulary), permuted(case, vocabulary)),
    }
    prompt = prompts(case, (5,))[0]
    requests = [Request(prompt, 9, GREEDY)]
    if honours(model, "seed"):
        requests += [
            Request(prompt, 9, Sampling(temperature=temperature, seed=3)) for temperature in (1.0, 2.5)
        ]
    if honours(model, "seed", "logit_bias"):
        # The first and the last entry of a vocabulary are drawn, and nothing else
        edges = ((vocabulary[0], 60.0), (vocabulary[-1], 60.0))
        requests += [
            Request(prompt, 9, Sampling(temperature=9.0, seed=seed, logit_bias=edges)) for seed in range(4, 8)
        ]
    for name in methods(case, model, *same):
        speculation, weights = same[name]
        if weights is not None:
            model.load_draft(case.shape, weights)
        if not taken(case, model, speculation):
            continue
        for answer in generated(model, requests, speculation):
            running(answer)
            # Nine tokens are three rounds of two drafts and one token more; some engines draft nothing with
            # the prompt, and some draft beyond the length.
            require(
                answer.rounds <= 4 and answer.drafted - answer.accepted <= 2,
                f"{name}: {answer.accepted} of {answer.drafted} drafts stand in {answer.rounds} rounds for "
                f"{len(answer.tokens)} tokens, though draft and target are one",
                stage="acceptance",
            )


def running(answer: Completion) -> None:
    """Raise Violation unless something was drafted; Void where the engine counts nothing."""
    if answer.rounds == answer.drafted == 0:
        raise Void("the engine does not count rounds and drafts: whether it speculated cannot be seen")
    require(answer.drafted > 0, "nothing was drafted, though speculation was asked for", stage="acceptance")


@conformance(
    "decoding.speculation-saves-passes",
    clause="engine.Speculation",
    needs=("generate", "speculate"),
    kills=("speculation-is-silently-off", "rounds-count-tokens"),
    applies=independent,
    costly=True,
)
def test_saves_passes(case: Case) -> None:
    """Where the next token is all but certain, drafts are made, stand, and save passes of the target."""
    model = precise(case)
    ask_for(model, "temperature", "logit_bias")
    token = prompts(case, (1,))[0][0]
    request = Request((token,) * 5, 12, Sampling(temperature=0.0, logit_bias=((token, 100.0),)))
    every = ways(case, model, 2)
    if case.architecture is not None:
        every.pop("universal", None)  # this draft has no such token at this place
    for name, speculation in every.items():
        answer = generated(model, [request], speculation)[0]
        running(answer)
        if not answer.rounds:
            raise Void("the engine does not count rounds, and its draft need not see the bias")
        require(
            answer.accepted > 0 and answer.rounds < len(answer.tokens),
            f"{name}: {len(answer.tokens)} tokens took {answer.rounds} passes, with {answer.accepted} of "
            f"{answer.drafted} drafts accepted",
            stage="acceptance",
        )
        case.note(f"tokens_per_pass_{name}", round(len(answer.tokens) / answer.rounds, 3))


LOOKED_UP = {
    "the longer n-gram decides": ("abcdebfgiab", "cdh", (2, 2, 1)),
    "the shorter serves where the longer is new": ("bfgib", "fgh", (2, 2, 1)),
    "what was generated is looked through too": ("a", "bcabca", (2, 2, 4)),
    "what is rejected counts as drafted": ("bfgib", "acdh", (2, 0, 4)),
}
"""Prompt, what a grammar makes follow it, and drafted, accepted and rounds where n-grams have two tokens or
one, and two tokens are drafted at most. Letters stand for tokens."""


@conformance(
    "decoding.prompt-lookup-finds-the-longest-n-gram",
    clause="engine.Speculation.ngram",
    needs=("generate", "speculate", "weights"),
    kills=("lookup-goes-by-the-last-token", "lookup-finds-itself", "drafted-ends-at-the-rejection"),
    applies=independent,
)
def test_lookup(case: Case) -> None:
    """Prompt lookup proposes what followed the longest n-gram at the end, in the prompt or after it."""
    model = precise(case)
    methods(case, model, "prompt_lookup")
    ask_for(model, "temperature", "grammar")
    ids = case.drawn(torch.randperm(case.vocab_size, generator=case.generator())[:9]).tolist()
    token = dict(zip("abcdefghi", ids, strict=True))
    for what, (prompt, text, wanted) in LOOKED_UP.items():
        states = tuple(((token[letter], i + 1),) for i, letter in enumerate(text))
        sampling = Sampling(temperature=0.0, grammar=Grammar((*states, ())))
        request = Request(tuple(token[letter] for letter in prompt), len(text), sampling)
        answer = generated(model, [request], Speculation("prompt_lookup", 2, ngram=2))[0]
        if answer.rounds == answer.drafted == 0:
            raise Void("the engine does not count rounds and drafts")
        found = answer.drafted, answer.accepted, answer.rounds
        require(
            found == wanted,
            f"{what}: {text} after {prompt} has drafted, accepted and rounds {found} in place of {wanted}",
            stage="counters" if found[1:] == wanted[1:] else "acceptance",
        )


def ending(case: Case, model: Any) -> list[Request]:
    """Requests that end by length, by end tokens and by stop sequences, at several places of a round."""
    prompt = prompts(case, (6,))[0]
    tokens = generated(model, [Request(prompt, 8, GREEDY)])[0].tokens
    made = [Request(prompt, length, GREEDY) for length in (1, 2, 4, 8)]
    if honours(model, "eos"):
        made += [Request(prompt, 8, GREEDY, eos=(token,)) for token in tokens[1:7]]
    if honours(model, "stop"):
        made += [Request(prompt, 8, GREEDY, stop=(tokens[i : i + 2],)) for i in range(5)]
    return [offered(model, request) for request in made]


@conformance(
    "decoding.counters-add-up-to-the-tokens",
    clause="engine.Completion",
    needs=("generate", "speculate"),
    kills=("drafts-after-the-end-count-as-accepted", "rounds-count-tokens"),
    applies=independent,
    costly=True,
)
def test_counters(case: Case) -> None:
    """Each round decides its accepted drafts and one token more, and nothing is counted beyond the end."""
    model = precise(case)
    ask_for(model, "temperature")
    requests = ending(case, model)
    for answer in generated(model, requests):
        require(
            answer.drafted == answer.accepted == 0,
            f"{answer.drafted} drafts are counted where no speculation was asked for",
            stage="counters",
        )
    for name, speculation in ways(case, model, 2).items():
        for request, answer in zip(requests, generated(model, requests, speculation), strict=True):
            consistent(name, request, answer, speculation.length)


def consistent(name: str, request: Request, answer: Completion, length: int) -> None:
    """Raise Violation unless drafted, accepted and rounds can be those of the completion."""
    if answer.rounds == answer.drafted == 0:
        raise Void("the engine does not count rounds and drafts")
    ended = 0
    if answer.finish_reason == "stop":
        ended = 1 if request.eos else len(request.stop[0])
    decided = len(answer.tokens) + ended
    # The last round decides one less where the end is itself a draft: what would have followed is not kept.
    fits = decided <= answer.accepted + answer.rounds <= decided + 1
    if not (fits and 0 <= answer.accepted <= answer.drafted <= length * answer.rounds):
        raise Violation(
            f"{name}: {decided} tokens were decided, the end included, by {answer.rounds} rounds and "
            f"{answer.accepted} accepted of {answer.drafted} drafts, at most {length} a round",
            stage="counters",
        )


@conformance(
    "decoding.drafts-beyond-their-use-are-harmless",
    clause="engine.Speculation.length",
    needs=("generate", "speculate"),
    kills=("rounds-without-drafts-fail", "drafted-counts-what-was-asked"),
    applies=independent,
    costly=True,
)
def test_long_windows(case: Case) -> None:
    """Drafts longer than the completion, and rounds without any, change neither tokens nor end."""
    model = precise(case)
    ask_for(model, "temperature")
    prompt = tuple(dict.fromkeys(prompts(case, (12,))[0]))
    requests = [Request(prompt, n, GREEDY) for n in (1, 2, 3, 5)]
    plain = generated(model, requests)
    lengths = [way for length in (1, 7) for way in ways(case, model, length).values()]
    for speculation in lengths:
        found = generated(model, requests, speculation)
        for request, one, other in zip(requests, found, plain, strict=True):
            require(
                (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason),
                f"{speculation.method} of {speculation.length} for {request.max_tokens} tokens: "
                f"{list(one.tokens)} ({one.finish_reason}) in place of {list(other.tokens)} "
                f"({other.finish_reason})",
                stage="greedy",
            )
        if speculation.method == "prompt_lookup":
            require(
                found[0].drafted == 0,
                f"{found[0].drafted} drafts are counted after a prompt in which no token stands twice",
                stage="counters",
            )
