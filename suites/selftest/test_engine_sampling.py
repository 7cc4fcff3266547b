"""Sampling, draws and stopping of the engine, against an oracle in plain Python and worked cases."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from harness.evidence.enumeration import law
from harness.reference.engine import Grammar, Request, Sampling
from harness.reference.engine.draws import Draws
from harness.reference.engine.sampling import NoToken, Sampler, log_probabilities
from harness.reference.engine.sequence import sampling_problem
from harness.reference.engine.stopping import Ended, Stopper

CLOSE = 1e-13
"""Two softmaxes of a dozen float64 numbers, summed in different orders."""
NEVER = -math.inf
ALTERNATE = Grammar((((0, 1), (2, 1)), ((1, 0),)))
"""0 or 2, then 1, and again."""


def probabilities(z: Sequence[float]) -> list[float]:
    """softmax."""
    e = [math.exp(x - max(z)) for x in z]
    return [x / math.fsum(e) for x in e]


def oracle(logits: Sequence[float], request: Request, generated: Sequence[int]) -> list[float]:
    """The law that `Sampling` describes, by lists and sets of tokens."""
    s, z, ids = request.sampling, list(logits), range(len(logits))
    possible = {x for x in ids if z[x] > NEVER}
    if len(generated) < request.min_tokens:
        possible -= set(request.eos)
    if s.grammar is not None:
        state = 0
        for token in generated:
            state = dict(s.grammar.states[state]).get(token, state)
        possible &= {token for token, _ in s.grammar.states[state]} or set(ids)
    for token, bias in s.logit_bias:
        z[token] += bias
    for token in {*request.prompt, *generated}:
        z[token] = z[token] / s.repetition_penalty if z[token] > 0 else z[token] * s.repetition_penalty
    for token in ids:
        times = list(generated).count(token)
        z[token] -= s.presence_penalty * (times > 0) + s.frequency_penalty * times
    ranked = sorted(possible, key=lambda x: (-z[x], x))
    if s.temperature == 0:
        return [float(x == ranked[0]) for x in ids]
    if s.top_k > 0:
        kept = ranked[: s.top_k]
        ranked = [x for x in ranked if z[x] >= z[kept[-1]]]
    p = probabilities([z[x] / s.temperature for x in ranked])
    nucleus = next((n for n in range(1, len(p)) if math.fsum(p[:n]) >= s.top_p - 1e-12), len(p))
    kept = {x: y for x, y in zip(ranked[:nucleus], p, strict=False) if y >= s.min_p * p[0] - 1e-12}
    return [kept.get(x, 0.0) / math.fsum(kept.values()) for x in ids]


def drawn_case(seed: int) -> tuple[list[float], Request, list[int]]:
    """Logits with ties and impossible tokens, and a request with some of the fields set."""
    r = random.Random(seed)
    size = r.randint(3, 9)
    logits = [r.choice((r.gauss(0, 2), round(r.gauss(0, 2)), 1.0)) for _ in range(size)]
    if r.random() < 0.3:
        logits[r.randrange(3, size) if size > 3 else 2] = NEVER
    some = lambda value, default: value if r.random() < 0.4 else default  # noqa: E731
    sampling = Sampling(
        grammar=some(ALTERNATE, None),
        logit_bias=some(((0, r.gauss(0, 1)), (size - 1, r.gauss(0, 1))), ()),
        repetition_penalty=some(r.choice((0.7, 1.4)), 1.0),
        presence_penalty=some(r.gauss(0, 1), 0.0),
        frequency_penalty=some(r.gauss(0, 1), 0.0),
        temperature=some(r.choice((0.0, 0.6, 1.7)), 1.0),
        top_k=some(r.randint(-1, size + 1), 0),
        top_p=some(r.choice((0.0, 0.5, 0.7, 0.9)), 1.0),
        min_p=some(r.choice((0.1, 0.6)), 0.0),
    )
    generated = [2, 1, 0, 1][: r.randint(0, 4)]
    prompt = tuple(r.randrange(size) for _ in range(3))
    eos = (1,) if sampling.grammar is None else ()
    return logits, Request(prompt, 9, sampling, eos=eos, min_tokens=r.randint(0, 4)), generated


def test_every_combination_is_what_the_fields_say() -> None:
    """On 600 drawn combinations of all fields the law is the oracle's."""
    undecided = 0
    for seed in range(600):
        logits, request, generated = drawn_case(seed)
        have = Sampler().distribution(torch.tensor(logits), request, generated)
        want = torch.tensor(oracle(torch.tensor(logits).tolist(), request, generated), dtype=torch.float64)
        assert (have - want).abs().max() < CLOSE, (seed, request, generated, have, want)
        undecided += int((have > 0).sum() > 1)
    assert undecided > 200  # many of the laws leave something to chance


def law_of(logits: Sequence[float], generated: Sequence[int] = (), **fields: object) -> list[float]:
    """The law after the prompt (0,) with these fields of Sampling, rounded to 12 digits."""
    request = Request((0,), 9, replace(Sampling(), **fields))
    return [
        round(p, 12)
        for p in Sampler()
        .distribution(torch.tensor(logits, dtype=torch.float64), request, generated)
        .tolist()
    ]


def logs(*p: float) -> list[float]:
    """Logits of these probabilities, off by a constant as logits are."""
    return [math.log(x) + 3 if x else NEVER for x in p]


ORDERS = {
    "bias before repetition": (
        {"logit_bias": ((0, 3.0),), "repetition_penalty": 2.0},
        probabilities([(-1 + 3) / 2, 0.0]),
    ),
    "repetition before presence": (
        {"repetition_penalty": 2.0, "presence_penalty": 0.5},
        probabilities([-1 * 2 - 0.5, 0.0]),
    ),
    "penalties before temperature": (
        {"presence_penalty": 0.5, "frequency_penalty": 0.25, "temperature": 0.5},
        probabilities([(-1 - 0.5 - 2 * 0.25) / 0.5, 0.0]),
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_fields_apply_in_their_order(name: str) -> None:
    """Worked cases in which another order would give another law: logits (-1, 0), token 0 generated twice."""
    fields, want = ORDERS[name]
    assert law_of([-1.0, 0.0], [0, 0], **fields) == pytest.approx(want, abs=1e-12)


def test_filters_apply_in_their_order() -> None:
    """top_p sums what temperature and top_k leave, and min_p sees what top_p leaves."""
    p = logs(0.4, 0.3, 0.2, 0.1)
    # squared: 16, 9, 4, 1 of 30; the first reaches 0.53
    assert law_of(p, temperature=0.5, top_p=0.52) == [1, 0, 0, 0]
    # of the first two, the first holds 4/7
    assert law_of(p, top_k=2, top_p=0.55) == [1, 0, 0, 0]
    assert law_of(p, top_k=2, top_p=0.58) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=1e-12)
    assert law_of(p, top_p=0.85, min_p=0.6) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=1e-12)


BOUNDARIES = {
    "ties at the k-th all stay": ([1.0, 2.0, 1.0, 0.0], {"top_k": 2}, [0, 1, 2]),
    "k below 1 is all": ([1.0, 2.0, 1.0, 0.0], {"top_k": -1}, [0, 1, 2, 3]),
    "k above V is all": ([1.0, 2.0, 1.0, 0.0], {"top_k": 9}, [0, 1, 2, 3]),
    "among equals top_p takes smaller ids": ([0.0] * 5, {"top_p": 0.5}, [0, 1, 2]),
    "a sum that is exactly top_p suffices": (logs(0.25, 0.5, 0.125, 0.125), {"top_p": 0.75}, [0, 1]),
    "so does one that rounds below it": ([0.0] * 10, {"top_p": 0.8}, list(range(8))),
    "and one that rounds above it": ([0.0] * 10, {"top_p": 0.3}, [0, 1, 2]),
    "top_p 0 keeps the most probable": ([0.0, 1.0, 1.0], {"top_p": 0.0}, [1]),
    "exactly min_p times the largest stays": (logs(0.6, 0.3, 0.1), {"min_p": 0.5}, [0, 1]),
    "min_p 1 keeps the largest, ties too": ([1.0, 1.0, 0.0], {"min_p": 1.0}, [0, 1]),
    "impossible tokens stay impossible": ([0.0, NEVER, 0.0], {"top_k": 3, "logit_bias": ((1, 9.0),)}, [0, 2]),
    "a bias may forbid": ([0.0, 0.0, 0.0], {"logit_bias": ((1, NEVER),)}, [0, 2]),
    "greedy takes the smallest of equals": ([0.0, 2.0, 2.0], {"temperature": 0.0}, [1]),
    "greedy is so under any filter": (
        [0.0, 2.0, 1.0],
        {"temperature": 0.0, "top_k": 2, "top_p": 0.9},
        [1],
    ),
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_boundaries_fall_on_the_stated_side(name: str) -> None:
    """At ties and at sums that meet a threshold exactly, those tokens remain which the field's words keep."""
    logits, fields, want = BOUNDARIES[name]
    assert [token for token, p in enumerate(law_of(logits, **fields)) if p > 0] == want


@pytest.mark.parametrize("temperature", [1e-5, 1e-300])
def test_a_low_temperature_does_not_overflow(temperature: float) -> None:
    """Near temperature 0 the law is finite, all on the largest logit, and equals share it."""
    assert law_of([5000.0, 4999.0, NEVER], temperature=temperature) == [1, 0, 0]
    assert law_of([-7e4, -7e4, -8e4], temperature=temperature) == [0.5, 0.5, 0]


def test_a_grammar_is_followed() -> None:
    """Only what the automaton allows may come; a state without pairs allows all, and remains."""
    grammar = Grammar((((0, 1),), ((1, 1), (2, 2)), ()))
    allowed = {(): [0], (0,): [1, 2], (0, 1): [1, 2], (0, 1, 2): [0, 1, 2, 3], (0, 2, 0, 3): [0, 1, 2, 3]}
    for generated, want in allowed.items():
        have = law_of([0.0] * 4, generated, grammar=grammar)
        assert [token for token, p in enumerate(have) if p > 0] == want


BROKEN = {
    "no states": (Grammar(()), "no states"),
    "a foreign token": (Grammar((((9, 0),),)), "token 9 is not in the vocabulary"),
    "a foreign state": (Grammar((((1, 1),),)), "leads to 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_grammar_is_refused(name: str) -> None:
    """An automaton that leads out of its states or of the vocabulary is named as the problem."""
    grammar, why = BROKEN[name]
    assert why in sampling_problem(Request((0,), 9, Sampling(grammar)), 4)
    assert not sampling_problem(Request((0,), 9, Sampling(ALTERNATE)), 4)


def test_eos_waits_for_min_tokens() -> None:
    """The tokens of eos have probability 0 before min_tokens, and their own from then on."""
    request = Request((0,), 9, eos=(1, 2), min_tokens=2)
    support = [
        (Sampler().distribution(torch.zeros(4), request, [3] * n) > 0).nonzero().flatten().tolist()
        for n in range(4)
    ]
    assert support == [[0, 3], [0, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


HOPELESS = {
    "grammar and bias": ([0.0] * 3, Request((0,), 9, Sampling(ALTERNATE, logit_bias=((1, NEVER),))), [0]),
    "after a forbidden token": ([0.0] * 3, Request((0,), 9, Sampling(ALTERNATE)), [1]),
    "eos alone before min_tokens": ([0.0], Request((0,), 9, eos=(0,), min_tokens=1), []),
    "NaN": ([0.0, math.nan], Request((0,), 9), []),
    "an overflow": ([0.0, 0.0], Request((0,), 9, Sampling(logit_bias=((0, 1e308),) * 2)), []),
    "infinite": ([0.0, math.inf], Request((0,), 9), []),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_where_no_token_is_possible_it_says_so(name: str) -> None:
    """A law that does not exist is an error in a sentence, never a token."""
    logits, request, generated = HOPELESS[name]
    with pytest.raises(NoToken, match=r"no token is possible|NaN or \+inf|too large"):
        Sampler().distribution(torch.tensor(logits), request, generated)


def test_logprobs_are_of_the_raw_logits() -> None:
    """A token's log probability is that of the softmax of the logits, row by row."""
    logits = torch.tensor([logs(0.5, 0.25, 0.25), logs(0.1, 0.9, 0)], dtype=torch.float64)
    assert log_probabilities(logits, [2, 1]) == pytest.approx((math.log(0.25), math.log(0.9)), abs=1e-12)


def test_a_certain_outcome_draws_nothing() -> None:
    """Choosing among one token leaves the generator as it was; any other choice has exactly its law."""
    draws = Draws(torch.Generator().manual_seed(3))
    before = draws.generator.get_state()
    assert draws.choose(torch.tensor([0.0, 1.0, 0.0])) == 1
    assert torch.equal(draws.generator.get_state(), before)
    p = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64)
    found = law(lambda: (draws.choose(p), bool(draws.uniform() < 0.3)))
    assert found.probabilities == pytest.approx(
        {(x, low): float(p[x]) * (0.3 if low else 0.7) for x in (0, 2, 3) for low in (True, False)}
    )


def test_the_generator_alone_decides() -> None:
    """The same seed gives the same draws whatever else is drawn; another seed gives others."""

    def some(seed: int) -> list[float]:
        draws, p = Draws(torch.Generator().manual_seed(seed)), torch.full((7,), 1 / 7)
        out = []
        for _ in range(10):
            out += [draws.choose(p), float(draws.uniform())]
            torch.rand(1)
        return out

    assert some(4) == some(4) != some(5)


ENDINGS = {
    "goes on": ({}, (5, 6), None),
    "eos": ({"eos": (3,)}, (5, 3), Ended((5,), "stop", 2)),
    "eos inside a window": ({"eos": (3,)}, (5, 3, 6, 3), Ended((5,), "stop", 2)),
    "eos at once": ({"eos": (3,)}, (3,), Ended((), "stop", 1)),
    "length": ({"max_tokens": 2}, (5, 6), Ended((5, 6), "length", 2)),
    "length inside a window": ({"max_tokens": 2}, (5, 6, 7), Ended((5, 6), "length", 2)),
    "no tokens asked for": ({"max_tokens": 0}, (), Ended((), "length", 0)),
    "eos as the last token": ({"max_tokens": 2, "eos": (3,)}, (5, 3), Ended((5,), "stop", 2)),
    "eos after the last token": ({"max_tokens": 2, "eos": (3,)}, (5, 6, 3), Ended((5, 6), "length", 2)),
    "stop sequence": ({"stop": ((6, 7),)}, (5, 6, 7, 8), Ended((5,), "stop", 3)),
    "stop sequence cut by the length": (
        {"stop": ((6, 7),), "max_tokens": 2},
        (5, 6),
        Ended((5, 6), "length", 2),
    ),
    "stop sequence started twice": ({"stop": ((6, 6, 7),)}, (6, 6, 6, 7), Ended((6,), "stop", 4)),
    "the longer of two": ({"stop": ((7,), (6, 7))}, (5, 6, 7), Ended((5,), "stop", 3)),
    "the earlier of two": ({"stop": ((6, 7, 8), (7,))}, (5, 6, 7, 8), Ended((5, 6), "stop", 3)),
    "not across the prompt": ({"stop": ((0, 6),)}, (6, 5), None),
    "min_tokens holds no stop back": (
        {"stop": ((5,),), "min_tokens": 3},
        (5,),
        Ended((), "stop", 1),
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_completion_ends_where_it_should(name: str) -> None:
    """The first end in the scanned tokens counts, and it is the same however they came in."""
    fields, generated, want = ENDINGS[name]
    request = replace(Request((0,), 9), **fields)
    assert Stopper().end(request, generated) == want
    for cuts in itertools.product((0, 1), repeat=len(generated)):
        found, seen = Stopper().end(request, ()), 0
        for end, cut in enumerate((*cuts[1:], 1), start=1) if generated else ():
            if cut and found is None:
                found, seen = Stopper().end(request, generated[:end], since=seen), end
        assert found == want
