"""Proposers and verification: whatever is proposed, by whom, what comes out has the target's own law.

Laws are computed by enumeration. Targets and drafts are tables that give every sequence logits of its own,
about half of a total variation apart; the reference model itself drafts where its caches are in question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.evidence.enumeration import law
from harness.evidence.law import Law, generations
from harness.reference import ReferenceModel, build
from harness.reference.engine import Grammar, Request, Sampling, Speculation
from harness.reference.engine.drafting import Reader, Translated
from harness.reference.engine.draws import Draws
from harness.reference.engine.proposal import Proposal, certain, until_end, useful
from harness.reference.engine.proposers import Drafter, PromptLookup, Staged, make
from harness.reference.engine.sampling import NoToken, Sampler
from harness.reference.engine.stopping import Ended, Stopper
from harness.reference.engine.verification import Verifier
from harness.theory import speculation as theory
from suites.selftest.controls import small

V, GAMMA, LENGTH = 3, 2, 4
"""Outputs of GAMMA + 2 tokens: a wrong token after accepted proposals, and a wrong context for the round
that follows, both show."""
EXACT = 1e-9
"""float64 throughout: what remains is the rounding of some hundred products (1e-14 measured)."""
PROMPT = (0, 1, 2, 0, 1)
"""The last two tokens stood there before, so that prompt lookup has something to propose."""


@dataclass
class Table:
    """A model that is a table: logits of any sequence, drawn from the seed and the sequence."""

    seed: int
    size: int = V

    def read(self, key: int, tokens: Sequence[int], last: int = 1) -> Tensor:
        """Logits [last, size]."""
        ends = range(len(tokens) - last + 1, len(tokens) + 1)
        return torch.stack([self.logits(tuple(tokens[:end])) for end in ends])

    @cache  # noqa: B019  # a handful of tables of a few hundred rows
    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        """Logits [size] after the tokens."""
        r = random.Random(str((self.seed, tokens)))
        return torch.tensor([r.gauss(0, 1.5) for _ in range(self.size)], dtype=torch.float64)

    def forget(self, key: int) -> None:
        """It has no memory."""

    def __hash__(self) -> int:
        return hash((self.seed, self.size))


class Remembering(Sampler):
    """The sampler, asked once for each law: an enumeration comes to each a hundred times."""

    def __init__(self) -> None:
        self.known: dict[Any, Tensor | NoToken] = {}

    def distribution(self, logits: Tensor, request: Request, generated: Sequence[int]) -> Tensor:
        """As the sampler does."""
        key = (tuple(logits.tolist()), tuple(generated), request)
        if key not in self.known:
            try:
                self.known[key] = super().distribution(logits, request, generated)
            except NoToken as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, NoToken):
            raise found
        return found


@dataclass
class One:
    """A sequence."""

    request: Request
    generated: list[int] = field(default_factory=list)
    index: int = 7


TARGET, DRAFT, FOREIGN = Table(1), Table(2), Table(3, size=5)
VOCABULARY = (2, -1, 0, 2, -1)
"""Of the foreign draft's five tokens two become token 2, two do not exist, and token 1 is missing."""
WAYS: dict[str, Callable[[Sampler], Any]] = {
    "draft_model": lambda sampler: Drafter(DRAFT, sampler, V),
    "self_draft": lambda sampler: Drafter(TARGET, sampler, V),
    "prompt_lookup": lambda _: PromptLookup(2, V),
    "universal": lambda sampler: Drafter(Translated(FOREIGN, VOCABULARY, V), sampler, V),
    "staged": lambda sampler: Staged(DRAFT, PromptLookup(2, V), sampler),
}
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "hot, top_k": {"temperature": 2.0, "top_k": 2},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.3},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    "logit_bias": {"logit_bias": ((1, 1.5), (2, -torch.inf))},
    "grammar": {"grammar": Grammar((((0, 1), (1, 0)), ((1, 2), (2, 2)), ((2, 0),)))},
    "everything": {
        "logit_bias": ((1, 0.5),),
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.2,
        "temperature": 0.8,
        "top_k": 2,
        "top_p": 0.95,
        "min_p": 0.1,
    },
    "greedy": {"temperature": 0.0},
}
ENDS: dict[str, dict[str, Any]] = {
    "eos": {"eos": (2,)},
    "eos, not at once": {"eos": (2,), "min_tokens": 2},
    "stop": {"stop": ((1, 2), (0, 0))},
    "one token": {"max_tokens": 1},
}
REQUESTS = {name: Request(PROMPT, LENGTH, Sampling(**fields)) for name, fields in ASKED.items()} | {
    name: replace(Request(PROMPT, LENGTH), **fields) for name, fields in ENDS.items()
}


@dataclass
class Decoded:
    """What a loop of rounds made of a request."""

    ended: Ended
    accepted: list[int]
    """Proposals that stood, round by round."""


def decode(request: Request, proposer: Any, sampler: Sampler, verifier: Verifier, target: Table) -> Decoded:
    """Rounds of speculative decoding until the request ends: the engine without anything around it."""
    sequence, draws, stopper, accepted = One(request), Draws(), Stopper(), []
    while (ended := stopper.end(request, sequence.generated)) is None:
        proposal = proposer.propose(sequence, GAMMA, draws)
        text = (*request.prompt, *sequence.generated, *proposal.tokens)
        logits = target.read(0, text, last=len(proposal.tokens) + 1)
        laws = verifier.targets(logits, request, sequence.generated, proposal.tokens, sampler)
        tokens, count = verifier.verify(proposal, laws, draws)
        sequence.generated += tokens
        accepted.append(count)
    proposer.forget(sequence)
    return Decoded(ended, accepted)


def speculated(request: Request, way: str, verifier: Verifier | None = None) -> Law:
    """The exact law of what speculative decoding gives."""
    sampler = Remembering()
    proposer = WAYS[way](sampler)
    return law(lambda: decode(request, proposer, sampler, verifier or Verifier(), TARGET).ended.tokens)


@cache
def target_law(request: Request) -> Law:
    """The law of plain decoding, by the chain rule over the oracle-checked sampler."""
    stopper = Stopper()

    def kept(tokens: tuple[int, ...]) -> tuple[int, ...]:
        ended = stopper.end(request, tokens)
        assert ended is not None
        return ended.tokens

    return generations(
        partial(following, TARGET, request),
        lambda tokens: stopper.end(request, tokens) is not None,
        kept,
    )


def following(table: Table, request: Request, tokens: tuple[int, ...]) -> list[float]:
    """The law of the token after the prompt and `tokens`."""
    logits = table.logits((*request.prompt, *tokens))
    law_: list[float] = Sampler().distribution(logits, request, tokens).tolist()
    return law_


CASES = [(asked, "draft_model") for asked in REQUESTS] + [
    (asked, way)
    for way in WAYS
    for asked in ("hot, top_k", "everything", "grammar", "eos", "greedy")
    if way != "draft_model"
]
"""One way under all settings; the others under those that leave few outcomes, which are quick."""


@pytest.mark.parametrize(("asked", "way"), CASES)
def test_speculation_changes_no_law(asked: str, way: str) -> None:
    """Under every setting and every way to propose, the output has exactly the target's law."""
    assert speculated(REQUESTS[asked], way).tv(target_law(REQUESTS[asked])) < EXACT


WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "residual is p": ("residual", lambda p, q: p),
    "residual is |p - q|": ("residual", lambda p, q: (p - q).abs() / (p - q).abs().sum()),
    "bonus from q": ("bonus", lambda proposal, targets: proposal.distributions[-1]),
    "accepts what is likely": ("accepts", lambda token, p, q, draws: bool(p[token] > 0.3)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_shows(name: str) -> None:
    """With one part of the verification replaced, the law is off by more than a hundredth."""
    part, wrong = WRONG[name]
    verifier = Verifier()
    kept = verifier.bonus
    if part == "bonus":
        verifier.bonus = lambda proposal, targets: (
            wrong(proposal, targets) if proposal.tokens else kept(proposal, targets)
        )
    else:
        setattr(verifier, part, wrong)
    request = REQUESTS["plain"]
    assert speculated(request, "draft_model", verifier).tv(target_law(request)) > 0.01


@pytest.mark.parametrize("way", ["draft_model", "universal", "staged"])
@pytest.mark.parametrize("asked", ["plain", "everything", "grammar", "eos"])
def test_proposals_have_the_law_that_is_reported(asked: str, way: str) -> None:
    """Proposed tokens are drawn from the distributions beside them, also where the draft is speculated."""
    request = REQUESTS[asked]
    proposer = WAYS[way](Remembering())
    laws: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def propose() -> tuple[int, ...]:
        proposal = proposer.propose(One(request), 3, Draws())
        assert proposal.distributions.shape == (len(proposal.tokens), V)
        for i, q in enumerate(proposal.distributions.tolist()):
            assert laws.setdefault(proposal.tokens[:i], tuple(q)) == tuple(q)
        return proposal.tokens

    found = law(propose)
    ended = lambda tokens: tokens not in laws  # noqa: E731
    assert found.tv(generations(lambda tokens: laws[tokens], ended)) < EXACT


def test_a_staged_draft_has_the_drafts_law() -> None:
    """What a draft speculated by prompt lookup proposes is what it proposes alone."""
    sampler, verified = Sampler(), []
    staged, alone = WAYS["staged"](sampler), WAYS["draft_model"](sampler)
    verify = staged.verifier.verify

    def count(proposal: Proposal, *rest: Any) -> Any:
        verified.append(len(proposal.tokens))
        return verify(proposal, *rest)

    staged.verifier.verify = count
    laws = [
        law(lambda by=by: by.propose(One(REQUESTS["plain"]), 3, Draws()).tokens) for by in (staged, alone)
    ]
    assert laws[0].tv(laws[1]) < EXACT
    assert sum(verified) > 0


def test_acceptance_is_the_closed_form() -> None:
    """How many proposals of a round stand, and how many tokens come of it, is what theory says."""
    request = replace(REQUESTS["plain"], max_tokens=GAMMA + 1)
    sampler = Remembering()
    proposer = WAYS["draft_model"](sampler)
    counts = law(lambda: decode(request, proposer, sampler, Verifier(), TARGET).accepted[0])
    p, q = (partial(following, table, request) for table in (TARGET, DRAFT))
    standing = theory.standing_probabilities(p, q, GAMMA)
    for i, expected in enumerate(standing, start=1):
        assert sum(counts[n] for n in range(i, GAMMA + 1)) == pytest.approx(expected, abs=EXACT)
    ratios = [now / before for now, before in zip(standing, [1.0, *standing], strict=False)]
    assert ratios[0] == pytest.approx(theory.acceptance_probability(p(()), q(())), abs=EXACT)
    tokens = theory.expected_tokens_by_position(ratios)
    assert 1 + counts.expect(float) == pytest.approx(tokens, abs=EXACT)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.99, 1.0])
def test_expected_tokens_are_the_geometric_sum(acceptance: float, length: int) -> None:
    """With one acceptance probability at all positions a round decides (1 - a^(g+1)) / (1 - a) tokens."""
    have = theory.expected_tokens(acceptance, length)
    if acceptance < 1:
        assert have == pytest.approx((1 - acceptance ** (length + 1)) / (1 - acceptance), rel=1e-12)
    else:
        assert have == length + 1
    laws = [1 - acceptance, acceptance]
    standing = theory.standing_probabilities(lambda _: laws, lambda _: [0.0, 1.0], length)
    assert 1 + sum(standing) == pytest.approx(have, rel=1e-12)


def test_acceptance_is_one_minus_total_variation() -> None:
    """sum min(p, q) and half of sum |p - q| add to 1."""
    p, q = following(TARGET, REQUESTS["plain"], ()), following(DRAFT, REQUESTS["plain"], ())
    apart = sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    assert 0.1 < apart == pytest.approx(1 - theory.acceptance_probability(p, q), abs=1e-12)


@pytest.mark.parametrize("asked", REQUESTS)
def test_a_draft_that_is_the_target_is_always_accepted(asked: str) -> None:
    """Self-drafted tokens stand up to the end of the request, whatever the sampling."""
    request, sampler = REQUESTS[asked], Remembering()
    for seed in range(20):
        sequence = One(request)
        draws = Draws(torch.Generator().manual_seed(seed))
        proposal = Drafter(TARGET, sampler, V).propose(sequence, GAMMA, draws)
        logits = TARGET.read(0, (*PROMPT, *proposal.tokens), last=len(proposal.tokens) + 1)
        laws = Verifier().targets(logits, request, (), proposal.tokens, sampler)
        tokens, accepted = Verifier().verify(proposal, laws, draws)
        assert accepted == len(proposal.tokens) == len(tokens) - 1


def test_the_round_ends_where_the_target_has_no_law() -> None:
    """Where grammar and bias rule out every token after accepted ones, those stand and nothing is added;
    the next round says why."""
    dead_end = Sampling(Grammar((((0, 1),), ((1, 2),), ((2, 0),))), logit_bias=((2, -torch.inf),))
    request, sampler = Request(PROMPT, 9, dead_end), Sampler()
    proposal = Drafter(DRAFT, sampler, V).propose(One(request), 4, Draws())
    assert proposal.tokens == (0, 1)  # the draft meets the same dead end
    laws = Verifier().targets(torch.zeros(3, V), request, (), proposal.tokens, sampler)
    assert Verifier().verify(proposal, laws, Draws()) == ((0, 1), 2)
    longer = certain((0, 1, 2, 0), V)
    laws = Verifier().targets(torch.zeros(5, V), request, (), longer.tokens, sampler)
    assert Verifier().verify(longer, laws, Draws()) == ((0, 1), 2)
    with pytest.raises(NoToken):
        Verifier().targets(torch.zeros(1, V), request, (0, 1), (), sampler)


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
    """Probabilities of tokens that become one add up, those without a counterpart are left out, and what
    the draft does not know is not shown to it."""
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
    """With the reference model as target and draft, greedy tokens are those of plain greedy decoding, and
    nothing is remembered afterwards."""
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


@pytest.mark.parametrize("method", ["draft_model", "early_exit", "staged"])
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
    request = Request(PROMPT, LENGTH, Sampling(temperature=1.5))
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
    """A draft whose logits are not numbers, or whose context is full, proposes no tokens."""
    broken = tiny(1, vocab_size=V)
    with torch.no_grad():
        broken.final_norm.weight.fill_(torch.nan)
    request = Request(PROMPT, 200)
    proposal = Drafter(Reader(broken, broken), Sampler(), V).propose(One(request), 3, Draws())
    assert proposal.tokens == ()
    assert proposal.distributions.shape == (0, V)
    model = tiny(1, vocab_size=V)
    limit = model.architecture.max_positions
    drafter = Drafter(Reader(model, model), Sampler(), V)
    near = One(Request((1,) * (limit - 1), 200))
    assert len(drafter.propose(near, 5, Draws()).tokens) == 2  # after limit - 1 tokens, and after limit
