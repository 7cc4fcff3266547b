"""transformers' generation and continuous batching, as the adapter hands them over."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from harness.implementations import resolve
from harness.implementations.protocols import Unsupported
from harness.reference.engine import Arrival, Limits, Request, Sampling, Speculation

GREEDY = Sampling(temperature=0)
REQUESTS = (Request((1, 2, 3, 4, 5), 8, GREEDY), Request((7, 8, 9), 6, GREEDY))


@pytest.fixture(scope="module")
def model():
    """A tiny Mixtral of its own shape."""
    return resolve("transformers:mixtral").build(None, device="cpu", dtype=torch.float32, seed=0)


def test_capabilities_are_declared(model) -> None:
    """A decoder with a paged cache generates, speculates and serves; every setting is a field of ours."""
    assert {"generate", "enumerable", "speculate", "serve", "limits"} <= model.capabilities
    known = set(Sampling.__dataclass_fields__) | set(Request.__dataclass_fields__)
    assert model.settings <= known


def test_a_batch_is_cut_at_each_request(model) -> None:
    """In a left-padded batch each request gets the tokens that it gets alone, and as many as it asked for."""
    together = model.generate(REQUESTS)
    assert [len(c.tokens) for c in together] == [8, 6]
    assert [c.tokens for c in together] == [model.generate([r])[0].tokens for r in REQUESTS]


@pytest.mark.parametrize("method", ["self_draft", "early_exit", "prompt_lookup"])
def test_speculation_runs_and_changes_nothing(model, method) -> None:
    """Greedy tokens are those without a draft, and drafting is counted."""
    request = Request((1, 2, 3, 1, 2, 3, 1, 2), 8, GREEDY)
    (plain,), (drafted,) = (
        model.generate([request]),
        model.generate([request], speculation=Speculation(method)),
    )
    assert drafted.tokens == plain.tokens
    assert drafted.rounds > 0
    assert drafted.drafted > 0 or method == "prompt_lookup"
    assert drafted.accepted == drafted.drafted or method != "self_draft"


def test_eos_and_stop_are_no_part_of_a_completion(model) -> None:
    """A completion ends before its EOS token, and before a stop sequence."""
    tokens = model.generate(REQUESTS[:1])[0].tokens
    for ending in ({"eos": (tokens[4],)}, {"stop": (tokens[4:6],)}):
        (found,) = model.generate([Request((1, 2, 3, 4, 5), 8, GREEDY, **ending)])
        assert found.finish_reason == "stop"
        assert found.tokens == tokens[: tokens.index(tokens[4])]


def test_what_cannot_be_said_is_unsupported(model) -> None:
    """A penalty that transformers lacks is refused by name, and so are a seed and static batching."""
    for sampling in (Sampling(presence_penalty=1.0), Sampling(seed=1)):
        with pytest.raises(Unsupported, match=r"presence_penalty|seed"):
            model.generate([Request((1,), 1, sampling)])
    with pytest.raises(Unsupported, match="static"):
        model.start(Limits(batching="static"))
    with pytest.raises(Unsupported, match="speculate"):
        model.start(speculation=Speculation())


def test_serving_gives_the_solo_answers_and_a_timeline(model) -> None:
    """Continuous batching serves what generate answers; what it lost or was cancelled is said."""
    session = model.start(Limits(sequences=2, pages=32))
    try:
        arrivals = [Arrival(REQUESTS[0]), Arrival(REQUESTS[1], at=3), Arrival(REQUESTS[0], cancel_after=3)]
        with pytest.raises(Unsupported, match="min_p"):
            session.run([*arrivals, Arrival(Request((1,), 1, Sampling(temperature=0, min_p=0.1)))])
        served = session.run(arrivals)
    finally:
        session.close()
    solo = [c.tokens for c in model.generate(REQUESTS)]
    assert [c.tokens for c in served.completions[:2]] == solo
    assert served.completions[2].finish_reason == "cancelled"
    assert max(len(i.running) for i in served.timeline) >= 2
