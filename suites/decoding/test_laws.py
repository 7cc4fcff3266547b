"""The exact law of whole completions: every random draw that an engine can make is made.

A law is over completions of g + 2 tokens where g are proposed per round: a round decides at most g + 1, so
the token that follows proposals which all stand, and the first of the next round, are among them.
"""

from __future__ import annotations

import torch

from harness.conformance import Case, conformance
from harness.conformance.case import replaced
from harness.conformance.decoding import Trial, methods, offered_only, remembering, trial
from harness.reference.engine import Grammar, Request, Sampling, Speculation

ONE = Speculation("draft_model", 1)
IN_TURN = Grammar((((0, 1), (1, 2), (2, 0)), ((1, 0), (3, 1)), ((0, 2), (2, 1), (3, 0))))
"""Three states over four tokens; what may come depends on what came."""
FREE_AT_LAST = Grammar((((0, 1), (3, 1)), ()))
"""One of two tokens, then any."""


def truncations(t: Trial) -> dict[str, Request]:
    """Settings that look at one token's logits."""
    return {
        "temperature 1.6, top_k 2": t.request(3, Sampling(temperature=1.6, top_k=2)),
        "temperature 0.6, top_p 0.8": t.request(3, Sampling(temperature=0.6, top_p=0.8)),
        "min_p 0.3": t.request(3, Sampling(min_p=0.3)),
    }


def histories(t: Trial) -> dict[str, Request]:
    """Settings that look at the tokens before."""
    return {
        "repetition_penalty 1.7": t.request(3, Sampling(repetition_penalty=1.7)),
        "presence 0.9, frequency 0.7": t.request(3, Sampling(presence_penalty=0.9, frequency_penalty=0.7)),
        "logit_bias": t.request(3, Sampling(logit_bias=((1, 1.2), (2, -1.5)), top_k=2)),
    }


def all_at_once(t: Trial) -> dict[str, Request]:
    """Settings together, whose order matters."""
    return {
        "bias, then penalties, then temperature": t.request(
            3,
            Sampling(
                logit_bias=((0, 1.5), (1, -1.0)),
                repetition_penalty=1.6,
                presence_penalty=0.5,
                frequency_penalty=0.4,
                temperature=0.6,
            ),
        ),
    }


def ends(t: Trial) -> dict[str, Request]:
    """Completions that end before their length. No stop sequence begins in the prompt: see test_endings."""
    last = t.pair.prompt[-1]
    first, *_, second = (token for token in range(t.pair.architecture.vocab_size) if token != last)
    return {
        "eos": t.request(3, eos=(2,)),
        "min_tokens": t.request(3, eos=(1, 2), min_tokens=1),
        "stop": t.request(3, stop=((first, last), (second, first), (second, second))),
        "a stop that begins anew": t.request(3, Sampling(temperature=5.0), stop=((second, first),)),
    }


def judge_all(t: Trial, requests: dict[str, Request], speculation: Speculation | None) -> None:
    """The law of every request whose settings the engine offers."""
    with remembering(t.model):
        for name, request in offered_only(t.case, t.model, requests).items():
            t.judge(name, request, speculation)


@conformance(
    "decoding.plain-sampling-has-the-target-law",
    clause="decoding.sampling",
    needs=("generate", "enumerable", "weights"),
    kills=(
        "temperature-comes-last",
        "top-p-drops-the-token-that-reaches-it",
        "top-k-keeps-one-more",
        "min-p-is-absolute",
        "repetition-rewards-the-unlikely",
        "repetition-forgets-the-prompt",
        "presence-counts",
        "frequency-counts-once",
        "biases-are-multiplied",
        "least-length-counts-the-prompt",
        "least-length-is-one-less",
        "temperature-is-ignored",
        "biases-come-after-penalties",
        "presence-comes-after-the-temperature",
        "repetition-comes-after-presence",
        "a-broken-match-is-not-begun-anew",
    ),
    costly=True,
)
def test_plain_sampling(case: Case) -> None:
    """Without speculation, completions have the law that logits and settings prescribe."""
    t = trial(case)
    judge_all(t, {"plain": t.request(3)} | truncations(t) | histories(t) | all_at_once(t) | ends(t), None)


@conformance(
    "decoding.grammar-is-followed",
    clause="decoding.sampling.grammar",
    needs=("generate", "enumerable", "weights"),
    kills=(
        "grammar-stands-still-over-drafts",
        "grammar-forbids-by-a-finite-number",
        "grammar-begins-anew-at-its-end",
    ),
    costly=True,
)
def test_grammar(case: Case) -> None:
    """Under a grammar, completions have the law of the allowed tokens, with speculation and without."""
    t = trial(case)
    requests = {"grammar": t.request(3, Sampling(grammar=IN_TURN))}
    limits = {
        "a bias on what is forbidden": t.request(2, Sampling(grammar=IN_TURN, logit_bias=((3, 100.0),))),
        "free at last": t.request(3, Sampling(grammar=FREE_AT_LAST)),
    }
    judge_all(t, requests | limits, None)
    if "draft_model" in getattr(t.model, "methods", ()):
        judge_all(t, {"grammar, drafted": requests["grammar"]}, ONE)


@conformance(
    "decoding.speculation-keeps-the-joint-law",
    clause="decoding.speculation",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=(
        "drafts-share-one-uniform",
        "blocks-are-accepted-jointly",
        "bonus-comes-from-the-draft",
        "bonus-is-greedy",
        "bonus-comes-a-row-too-early",
        "target-is-read-a-row-late",
        "one-rejected-draft-stands",
        "drafts-report-the-law-of-the-place-before",
    ),
    costly=True,
)
def test_joint_law(case: Case) -> None:
    """With two drafts per round, four tokens have the joint law of the target."""
    t = trial(case, 2)
    methods(case, t.model, "draft_model")
    t.judge("2 drafts, 2 tokens to choose from", t.request(4), Speculation("draft_model", 2))


@conformance(
    "decoding.speculation-keeps-the-law",
    clause="decoding.speculation",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=(
        "residual-is-a-softmax",
        "residual-is-the-target",
        "residual-has-no-sign",
        "residual-is-reversed",
        "residual-is-greedy",
        "residual-is-uniform",
        "residual-only-excludes-the-draft",
        "acceptance-is-reversed",
        "acceptance-ignores-the-draft",
        "every-draft-stands",
        "acceptance-is-typical",
        "acceptance-is-relaxed",
        "acceptance-has-a-bonus",
        "acceptance-is-greedy",
        "drafts-are-greedy",
        "speculation-never-samples",
        "bonus-is-greedy",
    ),
    costly=True,
)
def test_speculation(case: Case) -> None:
    """With one draft per round and four tokens to choose from, completions have the law of the target."""
    t = trial(case)
    methods(case, t.model, "draft_model")
    t.judge("1 draft", t.request(3), ONE)


@conformance(
    "decoding.speculation-keeps-truncated-laws",
    clause="decoding.speculation",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=("drafts-report-raw-laws", "drafts-have-no-temperature", "best-of-two-matches"),
    costly=True,
)
def test_truncated(case: Case) -> None:
    """Temperature, top_k, top_p and min_p mean the same with a draft model as without."""
    t = trial(case, 3)
    methods(case, t.model, "draft_model")
    judge_all(t, truncations(t), ONE)


@conformance(
    "decoding.speculation-keeps-penalised-laws",
    clause="decoding.speculation",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=("repetition-overlooks-drafts", "presence-overlooks-drafts"),
    costly=True,
)
def test_penalised(case: Case) -> None:
    """Penalties and biases mean the same with a draft model as without: they see the drafts too."""
    t = trial(case, 3)
    methods(case, t.model, "draft_model")
    judge_all(t, histories(t), ONE)


@conformance(
    "decoding.speculation-keeps-the-law-of-the-end",
    clause="decoding.speculation",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=("least-length-overlooks-drafts", "ends-within-a-round-are-overlooked"),
    costly=True,
)
def test_ends(case: Case) -> None:
    """Completions end by the same law with a draft model as without, wherever in a round the end lies."""
    t = trial(case, 3)
    methods(case, t.model, "draft_model")
    two = {"eos, 2 drafts": t.request(3, Sampling(top_k=2), eos=(2,))}
    judge_all(t, two, Speculation("draft_model", 2))
    judge_all(t, ends(t), ONE)


@conformance(
    "decoding.early-exit-keeps-the-law",
    clause="decoding.speculation.method",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=("drafts-are-greedy", "early-exits-draft-greedily", "residual-is-the-target"),
    costly=True,
)
def test_early_exit(case: Case) -> None:
    """With the first layers of the target as draft, completions have the law of the target."""
    t = trial(case, 3, layers=2)
    methods(case, t.model, "early_exit")
    t.judge("early exit", t.request(3), Speculation("early_exit", 1, layers=1))


@conformance(
    "decoding.self-draft-keeps-the-law",
    clause="decoding.speculation.method",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=("drafts-are-greedy", "drafts-report-the-law-of-the-place-before"),
    costly=True,
)
def test_self_draft(case: Case) -> None:
    """With the target as its own draft, completions have its law."""
    t = trial(case)
    methods(case, t.model, "self_draft")
    t.judge("self draft", t.request(3), Speculation("self_draft", 2))


@conformance(
    "decoding.prompt-lookup-keeps-the-law",
    clause="decoding.speculation.method",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=("residual-is-the-target", "every-draft-stands", "acceptance-is-relaxed"),
    costly=True,
)
def test_prompt_lookup(case: Case) -> None:
    """With what followed earlier in the text as draft, completions have the law of the target."""
    t = trial(case, 2)
    methods(case, t.model, "prompt_lookup")
    t.judge("prompt lookup", t.request(4), Speculation("prompt_lookup", 2, ngram=2))


@conformance(
    "decoding.universal-keeps-the-law",
    clause="decoding.speculation.method",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=("drafts-are-translated-after-their-law",),
    costly=True,
)
def test_universal(case: Case) -> None:
    """With a draft whose token ids differ, and that lacks one, completions have the law of the target."""
    t = trial(case)
    methods(case, t.model, "universal")
    # A fifth token that the target lacks too: some engines take vocabularies of one size for the same.
    wide = replaced(t.pair.architecture, {"vocab_size": 5})
    draft = dict(t.pair.draft)
    for name in {"embedding.weight", "unembedding.weight"} & draft.keys():
        draft[name] = torch.cat([draft[name], draft[name][:1]])
    t.model.load_draft(wide, draft)
    t.judge("universal", t.request(3), Speculation("universal", 1, vocabulary=(2, 0, -1, 3, -1)))


@conformance(
    "decoding.staged-keeps-the-law",
    clause="decoding.speculation.method",
    needs=("generate", "enumerable", "speculate", "weights"),
    kills=("every-draft-stands",),
    costly=True,
)
def test_staged(case: Case) -> None:
    """With a draft that is itself speculated, completions have the law of the target."""
    t = trial(case, 2)
    methods(case, t.model, "staged")
    t.judge("staged", t.request(3), Speculation("staged", 2, ngram=1))
