"""Proposers: what each proposes, and the caches of models that draft."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.evidence.enumeration import law
from harness.evidence.law import generations
from harness.reference import ReferenceModel, build
from harness.reference.engine import Request, Sampling, Speculation
from harness.reference.engine.drafting import Reader, Translated
from harness.reference.engine.draws import Draws
from harness.reference.engine.proposal import Proposal, certain, until_end, useful
from harness.reference.engine.proposers import Drafter, PromptLookup, make
from harness.reference.engine.sampling import Sampler
from harness.reference.engine.verification import Verifier
from suites.selftest.controls import small
from suites.selftest.engine_tables import (
    EXACT,
    GAMMA,
    LENGTH,
    PROMPT,
    VOCABULARY,
    WAYS,
    One,
    Remembering,
    Table,
    V,
    decode,
)


def test_nothing_useless_is_proposed() -> None:
    """A round gives one token more than it accepts: proposals end before max_tokens, and after eos."""
    counts = [useful(One(Request(PROMPT, 4), [0] * done), 3) for done in range(5)]
    assert counts == [3, 2, 1, 0, 0]
    assert until_end(Request(PROMPT, 9, eos=(2,)), (0, 2, 1)) == (0, 2)
    for way, make_one in WAYS.items():
        request = Request(PROMPT, 9, Sampling(logit_bias=((2, 50.0),)), eos=(2,))
        tokens = make_one(Sampler()).propose(One(request), 4, Draws()).tokens
        assert tokens[-1] == 2 not in tokens[:-1], way


LOOKUPS = {
    "the latest of two": (2, (1, 2, 3, 1, 2, 4, 5, 1, 2), 2, (4, 5)),
    "the longer n-gram first": (2, (1, 2, 3, 9, 2, 4, 1, 2), 1, (3,)),
    "then a shorter one": (3, (7, 2, 3, 9, 2), 5, (3, 9, 2)),
    "nothing new": (3, (1, 2, 3), 5, ()),
    "a run": (1, (5, 5), 3, (5,)),
    "one token": (2, (5,), 3, ()),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_prompt_lookup_finds_what_followed(name: str) -> None:
    """Proposed is what followed the latest earlier place of the longest n-gram at the end."""
    ngram, tokens, count, want = LOOKUPS[name]
    proposal = PromptLookup(ngram, 10).propose(One(Request(tokens, 20)), count, Draws())
    assert proposal.tokens == want
    assert proposal.distributions.argmax(-1).tolist() == list(want)
    assert proposal.distributions.sum() == len(want)


def test_a_foreign_draft_speaks_in_the_targets_tokens() -> None:
    """Tokens that become one add up, those without a counterpart are left out, unknown words not shown."""
    shown: list[Sequence[int]] = []

    class Spy(Table):
        def read(self, key: int, tokens: Sequence[int], last: int = 1) -> Tensor:
            shown.append(tokens)
            return torch.tensor([[0.1, 0.2, 0.3, 0.25, 0.15]], dtype=torch.float64).log()

    drafter = Drafter(Translated(Spy(0), VOCABULARY, V), Sampler(), V)
    q = drafter.propose(One(Request((1, 0, 2, 1), 9)), 1, Draws()).distributions[0]
    assert shown == [[2, 0]]
    assert q.tolist() == pytest.approx([0.3 / 0.65, 0, 0.35 / 0.65], abs=1e-12)


def tiny(seed: int, **overrides: Any) -> ReferenceModel:
    """A small reference model in float64."""
    architecture = small("mixtral-8x7b", n_experts=4, **overrides)
    return build(architecture, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_reader_forgets_rejected_tokens() -> None:
    """However a sequence grows, shrinks and changes, what is read of it is what one pass over it gives."""
    model, r = tiny(1, vocab_size=5), random.Random(2)
    reader = Reader(model, model)
    text: list[int] = [1]
    for _ in range(60):
        text = text[: r.randint(1, len(text))] + [r.randrange(5) for _ in range(r.randint(0, 3))]
        last = r.randint(1, len(text))
        with torch.no_grad():
            want = model(torch.tensor([text]))[0, -last:]
        # The same sums in another order, in float64.
        assert (reader.read(3, tuple(text), last) - want).abs().max() < 1e-9
    assert reader.memory[3].cache.length == len(text)
    reader.forget(3)
    assert not reader.memory


METHODS = {
    "draft_model": Speculation("draft_model", 3),
    "self_draft": Speculation("self_draft", 3),
    "early_exit": Speculation("early_exit", 3, layers=1),
    "prompt_lookup": Speculation("prompt_lookup", 3),
    "universal": Speculation("universal", 3, vocabulary=(4, -1, 2, 0, 1, 1)),
    "staged": Speculation("staged", 3),
}


@dataclass
class Whole:
    """The reference model as a table: one pass over the whole sequence, without any cache."""

    model: ReferenceModel

    def read(self, key: int, tokens: Sequence[int], last: int = 1) -> Tensor:
        """Logits [last, V]."""
        with torch.no_grad():
            return self.model(torch.tensor([list(tokens)]))[0, -last:]


@pytest.mark.parametrize("method", METHODS)
def test_greedy_is_greedy_with_real_models(method: str) -> None:
    """Tokens are those of plain greedy decoding, and nothing is remembered afterwards."""
    model, sampler, proposed = tiny(3, vocab_size=5), Sampler(), 0
    draft = tiny(4, vocab_size=6 if method == "universal" else 5, n_layers=1)
    proposer: Any = make(METHODS[method], model, draft, sampler)
    target: Any = Whole(model)
    for seed in range(8):
        r = random.Random(seed)
        prompt = tuple(r.randrange(5) for _ in range(r.randint(1, 6)))
        request = Request(prompt, r.randint(1, 12), Sampling(temperature=0.0, repetition_penalty=1.2))
        plain = decode(request, Nothing(), sampler, Verifier(), target)
        decoded = decode(request, proposer, sampler, Verifier(), target)
        assert decoded.ended == plain.ended
        proposed += sum(decoded.accepted)
        if method == "self_draft":
            assert len(decoded.accepted) == -(-request.max_tokens // (GAMMA + 1))
    assert proposed > 0
    assert not getattr(getattr(proposer, "reader", None), "memory", None)


class Nothing:
    """Proposes nothing: plain decoding."""

    def propose(self, *_: Any) -> Proposal:
        """No tokens."""
        return certain((), 5)

    def forget(self, _: One) -> None:
        """It remembers nothing."""


@pytest.mark.parametrize("method", ["early_exit", "staged"])
def test_real_models_keep_the_law(method: str) -> None:
    """With the reference model as target and draft, caches and all, the law is the target's."""
    model, draft, sampler = tiny(5, vocab_size=V), tiny(6, vocab_size=V, n_layers=1), Remembering()
    proposer = make(replace(METHODS[method], length=GAMMA), model, draft, sampler)
    whole: Any = Whole(model)
    known: dict[tuple[int, ...], Tensor] = {}

    class Known:
        def read(self, key: int, tokens: Sequence[int], last: int = 1) -> Tensor:
            ends = range(len(tokens) - last + 1, len(tokens) + 1)
            return torch.stack(
                [known.setdefault(tuple(tokens[:e]), whole.read(0, tokens[:e])[0]) for e in ends]
            )

    target: Any = Known()
    request = Request(PROMPT, LENGTH, Sampling(temperature=1.5, top_k=2))
    found = law(lambda: decode(request, proposer, sampler, Verifier(), target).ended.tokens)
    want = generations(
        lambda tokens: sampler.distribution(known[(*PROMPT, *tokens)], request, tokens),
        lambda tokens: len(tokens) == LENGTH,
    )
    assert found.tv(want) < EXACT


REFUSED = {
    "no draft": (Speculation("draft_model"), None, "needs a draft model"),
    "two vocabularies": (Speculation("draft_model"), 6, "needs one vocabulary"),
    "vocabulary too short": (Speculation("universal", vocabulary=(0,)), 6, "has 1 entries"),
    "vocabulary too far": (Speculation("universal", vocabulary=(0, 1, 2, 3, 4, 5)), 6, "leads to 5"),
    "no such layer": (Speculation("early_exit", layers=9), None, "layers is 9"),
    "no length": (Speculation("self_draft", 0), None, "length is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_speculated_is_refused(name: str) -> None:
    """A speculation that lacks something is refused in a sentence that says what."""
    speculation, size, why = REFUSED[name]
    draft = None if size is None else tiny(1, vocab_size=size)
    with pytest.raises(ValueError, match=why):
        make(speculation, tiny(1, vocab_size=5), draft, Sampler())


def test_a_draft_that_fails_proposes_nothing() -> None:
    """A draft without numbers, without a word that it knows, or without room proposes nothing."""
    broken = tiny(1, vocab_size=V)
    with torch.no_grad():
        broken.final_norm.weight.fill_(torch.nan)
    request = Request(PROMPT, 200)
    proposal = Drafter(Reader(broken, broken), Sampler(), V).propose(One(request), 3, Draws())
    assert proposal.tokens == ()
    assert proposal.distributions.shape == (0, V)
    stranger = Drafter(Translated(Reader(broken, broken), (-1, -1, 0), V), Sampler(), V)
    assert stranger.propose(One(Request((1, 2), 9)), 3, Draws()).tokens == ()
    model = tiny(1, vocab_size=V)
    limit = model.architecture.max_positions
    drafter = Drafter(Reader(model, model), Sampler(), V)
    near = One(Request((1,) * (limit - 1), 200))
    assert len(drafter.propose(near, 5, Draws()).tokens) == 2  # after limit - 1 tokens, and after limit
