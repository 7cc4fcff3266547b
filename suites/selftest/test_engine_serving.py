"""Serving changes nothing: a request has the tokens that it has alone, whatever happens around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.implementations.protocols import Unsupported
from harness.implementations.reference import Reference
from harness.reference.engine import Arrival, Engine, Limits, Request, Sampling, Speculation
from suites.selftest.controls import changed, relative, small
from suites.selftest.engines import GREEDY, engine, mixed, prompt, run, served, tokens

CLOSE = 1e-9
"""float64, as against the oracle: batches and pages only change the order of sums."""
NAMES = ("mixtral-8x7b", "deepseek-v3", "gpt-oss-20b", "gpt3-175b")
"""Grouped, latent and windowed attention, and learned positions."""
ROOMY = Limits()
SIZES = {
    "roomy": ROOMY,
    "tiny pool": Limits(sequences=4, page_size=2, pages=16, chunk=8),
    "one slot": Limits(sequences=1, page_size=3, pages=12),
    "small chunk": Limits(sequences=5, page_size=4, pages=64, chunk=4),
    "pages of one token": Limits(sequences=3, page_size=1, pages=34, chunk=16),
    "static": Limits(sequences=3, page_size=4, pages=64, batching="static"),
    "nothing shared": replace(ROOMY, prefix_sharing=False),
}
METHODS = (None, "draft_model", "self_draft", "early_exit", "prompt_lookup", "staged")


def speculation(method: Any) -> Speculation | None:
    """Of 3 tokens, which the smallest chunk above just holds."""
    return None if method is None else Speculation(method, length=3)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_the_model(name: str) -> None:
    """A batch decoded greedily has the arg max of the full pass at every step, and its log probability."""
    requests = [replace(request, sampling=GREEDY) for request in mixed(name)]
    for request, have in zip(requests, served(name).generate(requests), strict=True):
        text = [*request.prompt, *have.tokens]
        with torch.no_grad():
            laws = served(name).forward(torch.tensor([text])).log_softmax(-1)[0, len(request.prompt) - 1 : -1]
        assert tuple(laws.argmax(-1).tolist()) == have.tokens
        assert have.logprobs == pytest.approx(laws.max(-1).values.tolist(), abs=CLOSE)
        assert (have.finish_reason, have.rounds) == ("length", request.max_tokens)


@pytest.mark.parametrize(
    ("size", "method"),
    [(size, method) for size in SIZES for method in METHODS if size == "tiny pool" or method in METHODS[:2]],
)
def test_no_company_changes_tokens(size: str, method: str | None) -> None:
    """Greedy or seeded, in a full engine of any size, twice: always the completion that it has alone."""
    alone = [served().generate([request], speculation=speculation(method))[0] for request in mixed()]
    busy = engine(SIZES[size], speculation(method))
    for _ in range(2):
        together = run(busy, mixed()).completions
        assert tokens(together) == tokens(alone)
        for one, other in zip(alone, together, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=CLOSE)
            assert (one.finish_reason, one.drafted, one.accepted, one.rounds) == (
                *(other.finish_reason, other.drafted, other.accepted, other.rounds),
            )
    assert size != "tiny pool" or any(completion.preemptions for completion in together)
    assert size != "roomy" or any(completion.cached_tokens for completion in together)


@pytest.mark.parametrize("name", NAMES[1:])
def test_no_company_changes_tokens_of_other_kinds(name: str) -> None:
    """The same with latent attention, windows and learned positions, under speculation in a tiny pool."""
    method = speculation("draft_model")
    alone = [served(name).generate([request], speculation=method)[0] for request in mixed(name)]
    assert tokens(run(engine(SIZES["tiny pool"], method, name), mixed(name)).completions) == tokens(alone)
    assert sum(completion.accepted for completion in alone) > 0


def held(one: Engine, pages: list[int], length: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer of the first `length` tokens in these pages."""
    return [(layer.keys, layer.values) for layer in one.pool.gather([pages], [length]).layers]


def fresh(one: Engine, text: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """The same from a pass over the tokens alone."""
    with torch.no_grad():
        _, cache = one.model.extend(torch.tensor([text]), None)
    return [(layer.keys, layer.values) for layer in cache.layers]


def same(have: list[tuple[Tensor, Tensor]], want: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether all keys and all values agree."""
    return all(max(relative(a, b), relative(c, d)) < CLOSE for (a, c), (b, d) in zip(have, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_pages_hold_what_a_fresh_pass_computes(name: str) -> None:
    """After every step pages hold the keys and values of their sequences' own tokens.

    Rejected drafts leave nothing, and a shared page holds those of the tokens under its key.
    """
    busy = engine(SIZES["tiny pool"], speculation("draft_model"), name)
    for request in mixed(name):
        busy.add(request)
    while busy.scheduler.busy:
        busy.step()
        for sequence in busy.scheduler.running:
            assert sequence.computed < sequence.length
            just_served = sequence.served_at == busy.scheduler.steps
            assert not just_served or len(sequence.pages) == busy.pool.needed(sequence.length - 1)
            text = tuple(sequence.tokens[: sequence.computed])
            assert not text or same(held(busy, sequence.pages, len(text)), fresh(busy, text))
        for (salt, text), page in busy.pool.shared.items():
            chain = [busy.pool.shared.get((salt, text[:end])) for end in range(2, len(text), 2)]
            last = [(keys[:, -2:], values[:, -2:]) for keys, values in fresh(busy, text)]
            assert same(held(busy, [page], 2), last)
            assert page not in chain


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"prompt": ()}, "the prompt is empty"),
    "foreign token": ({"prompt": (1, 10**6)}, "prompt: token 1000000 is not in the vocabulary"),
    "negative token": ({"prompt": (-1,)}, "prompt: token -1 is not in the vocabulary"),
    "foreign eos": ({"eos": (-1,)}, "eos: token -1 is not in the vocabulary"),
    "no tokens": ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    "empty stop": ({"stop": ((),)}, "an empty sequence would end every completion"),
    "no room": ({"prompt": (1,) * 128}, "a context of 128 leaves at most 127"),
    "too long": ({"max_tokens": 120}, "need 122 slots; all pages have 64"),
    "temperature": ({"sampling": Sampling(temperature=-1.0)}, "temperature is -1.0; it must be 0 or more"),
    "not a number": ({"sampling": Sampling(temperature=float("nan"))}, "temperature is nan"),
    "top_p": ({"sampling": Sampling(top_p=1.5)}, "top_p is 1.5; it must be from 0 to 1"),
    "min_p": ({"sampling": Sampling(min_p=-0.1)}, "min_p is -0.1; it must be from 0 to 1"),
    "penalty": ({"sampling": Sampling(repetition_penalty=0.0)}, "repetition_penalty is 0.0; it must be more"),
    "endless penalty": ({"sampling": Sampling(presence_penalty=float("inf"))}, "a finite number"),
    "bias of nothing": ({"sampling": Sampling(logit_bias=((10**6, 1.0),))}, "logit_bias: token 1000000"),
    "endless bias": ({"sampling": Sampling(logit_bias=((1, float("inf")),))}, "logit_bias of token 1 is inf"),
    "seed": ({"sampling": Sampling(seed=-1)}, "seed is -1; it must be from 0"),
    "all forbidden": (
        {
            "sampling": Sampling(
                logit_bias=tuple((i, -float("inf")) for i in range(small("mixtral-8x7b").vocab_size))
            )
        },
        "no token is possible",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_request_ends_alone(bad: str) -> None:
    """It says what is wrong, at once, and its neighbours have the tokens that they have without it."""
    fields, why = BAD[bad]
    limits = Limits(sequences=3, page_size=4, pages=16)
    wrong = replace(Request(prompt(3), 5, GREEDY), **fields)
    neighbours = [Request(prompt(n, n), 4, GREEDY) for n in (4, 7, 2)]
    arrivals = [Arrival(neighbours[0]), Arrival(wrong), *map(Arrival, neighbours[1:])]
    answer = engine(limits).run(arrivals).completions
    error = answer[1]
    assert (error.tokens, error.finish_reason) == ((), "error")
    assert why in error.error
    assert tokens([answer[0], *answer[2:]]) == tokens(served().generate(neighbours))


def test_a_fault_while_decoding_ends_one_request() -> None:
    """Where sampling or proposing fails for one request, it ends with the reason, and others go on."""
    for part, method in (("sampler", "distribution"), ("proposer", "propose")):
        busy = engine(ROOMY, speculation("prompt_lookup"))
        whole, wrong = getattr(getattr(busy, part), method), mixed()[1]

        def broken(*given: Any, whole: Any = whole, wrong: Request = wrong) -> Any:
            if any(getattr(value, "request", value) == wrong for value in given):
                raise RuntimeError("out of order")
            return whole(*given)

        setattr(getattr(busy, part), method, broken)
        answer = run(busy, mixed()).completions
        assert (answer[1].finish_reason, answer[1].error) == ("error", "out of order")
        alone = served().generate(mixed(), speculation=speculation("prompt_lookup"))
        assert tokens(answer[2:]) == tokens(alone[2:])


def test_an_engine_survives_a_failed_pass() -> None:
    """An exception in the model ends the run, and the next run is the same as on a fresh engine."""
    busy = engine(ROOMY, speculation("draft_model"))
    forward, passes = busy.forward, iter(range(100))

    def failing(*given: Any) -> Any:
        if next(passes) == 3:
            raise MemoryError
        return forward(*given)

    busy.forward = failing  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        run(busy, mixed())
    assert busy.pool.used == 0
    want = run(engine(ROOMY, speculation("draft_model")), mixed()).completions
    assert tokens(run(busy, mixed()).completions) == tokens(want)


@pytest.mark.parametrize("cancel_after", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("method", [None, "self_draft"])
def test_a_cancelled_request_keeps_what_its_client_saw(cancel_after: int, method: str | None) -> None:
    """Exactly so many tokens, speculation or not; an end by itself at that token counts first."""
    request = Request(prompt(5), 5, GREEDY)
    busy = engine(ROOMY, speculation(method))
    answer = busy.run([Arrival(request, cancel_after=cancel_after), Arrival(request)]).completions
    assert answer[0].tokens == answer[1].tokens[:cancel_after]
    assert answer[0].finish_reason == ("length" if cancel_after >= 5 else "cancelled")
    assert busy.pool.used == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_of_exact_fit_is_enough(method: str | None) -> None:
    """prompt + max_tokens - 1 slots serve a request; one page less is refused, and nobody waits for ever."""
    requests = [Request(prompt(6, i), 7, Sampling(seed=i)) for i in range(3)]
    exact = Limits(sequences=3, page_size=3, pages=4)
    answer = run(engine(exact, speculation(method)), requests, every=0).completions
    assert tokens(answer) == tokens(
        [served().generate([r], speculation=speculation(method))[0] for r in requests]
    )
    small_one = Request(prompt(2), 2, GREEDY)
    less = run(engine(replace(exact, pages=3), speculation(method)), [*requests, small_one]).completions
    assert [completion.finish_reason for completion in less] == ["error"] * 3 + ["length"]
    assert "need 12 slots; all pages have 9" in less[0].error


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [125, 126, 127])
def test_a_full_context_ends_a_completion(length: int, method: str | None) -> None:
    """Prompt and completion fill max_positions together, and the reason is length."""
    request = Request(prompt(length), 50, GREEDY)
    (completion,) = served().generate([request], speculation=speculation(method))
    assert small("mixtral-8x7b").max_positions == 128
    assert (len(completion.tokens), completion.finish_reason) == (128 - length, "length")


def test_capacity_is_refused() -> None:
    """Where tokens of a pass compete for capacity nothing is served, in a sentence."""
    architecture = changed(small("mixtral-8x7b"), moe={"router": {"capacity_factor": 1.5}})
    model = Reference().build(architecture, device="cpu", dtype=torch.float64, seed=1)
    with pytest.raises(Unsupported, match="capacity_factor: the tokens of a pass compete"):
        model.start()


@pytest.mark.parametrize("field", ["sequences", "page_size", "pages", "chunk"])
def test_a_size_of_nothing_is_refused(field: str) -> None:
    """Every size of an engine is at least 1."""
    with pytest.raises(Unsupported, match=rf"limits.{field} is 0; it must be at least 1"):
        served().start(replace(ROOMY, **{field: 0}))
