"""An OpenAI-compatible endpoint under test: what goes out, what comes back, and what never does."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("httpx2")

from harness.implementations import AdapterError, Unsupported, resolve
from harness.implementations.openai import OpenAIModel
from harness.implementations.openai.vocabulary import Bytes, Table
from harness.reference.engine import Arrival, Completion, Engine, Limits, Request, Sampling, Speculation
from suites.selftest.fake_endpoint import EXTENSIONS, Endpoint, tiny_model
from suites.selftest.stubs import moe_harness

GREEDY = Sampling(temperature=0.0)
PROMPT = (3, 14, 15, 9, 2, 6)
REQUESTS = {
    "greedy": Request(PROMPT, 9, GREEDY),
    "seeded": Request(PROMPT, 9, Sampling(seed=5)),
    "cut": Request(PROMPT, 9, Sampling(seed=5, temperature=0.7, top_k=9, top_p=0.9, min_p=0.02)),
    "penalised": Request(
        PROMPT,
        9,
        Sampling(seed=5, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3),
    ),
    "biased": Request(PROMPT, 9, replace(GREEDY, logit_bias=((7, 50.0),))),
    "logprobs": Request(PROMPT, 9, GREEDY, logprobs=True),
    "salted": Request(PROMPT, 9, GREEDY, salt="tenant"),
}
"""Every field that goes out, once."""


def model(endpoint: Endpoint, folder: Path, *options: str) -> OpenAIModel:
    """What is under test at an endpoint."""
    implementation = resolve(endpoint.address(*options, tokens=folder / "tokens.json"))
    built = implementation.build(None, device="cpu", dtype=torch.float32, seed=1)
    assert isinstance(built, OpenAIModel)
    return built


@cache
def expected(request: Request) -> Completion:
    """What the engine behind the endpoint answers alone, in this process."""
    limits = Limits(sequences=4, page_size=4, pages=64, chunk=16)
    return Engine(tiny_model(), limits).run([Arrival(request)]).completions[0]


@pytest.mark.parametrize("prompts", ["tokens", "text"])
@pytest.mark.parametrize("name", REQUESTS)
def test_every_setting_arrives(name: str, prompts: str, tmp_path: Path) -> None:
    """Each setting has over HTTP, whole and streamed, the effect that it has in the engine itself."""
    request = REQUESTS[name]
    with Endpoint() as endpoint:
        served = model(endpoint, tmp_path, f"prompts={prompts}")
        want = expected(request)
        for got in (served.generate([request])[0], served.start().run([Arrival(request)]).completions[0]):
            assert (got.tokens, got.finish_reason, got.error) == (want.tokens, "length", "")
            assert not request.logprobs or got.logprobs == pytest.approx(want.logprobs)


@pytest.mark.parametrize("extensions", [EXTENSIONS, frozenset()], ids=["extended", "plain"])
def test_the_end_is_no_part_of_the_answer(extensions: frozenset[str], tmp_path: Path) -> None:
    """A token of eos and a sequence of stop end the completion and are not in it, with ids or without."""
    greedy = expected(REQUESTS["greedy"]).tokens
    for ending in ({"eos": (greedy[4],)}, {"stop": (greedy[3:5],)}):
        request = replace(REQUESTS["greedy"], **ending)
        with Endpoint(extensions=extensions) as endpoint:
            served = model(endpoint, tmp_path)
            want = expected(request)
            assert want.finish_reason == "stop"
            for got in (served.generate([request])[0], served.start().stream(request).completion):
                assert (got.tokens, got.finish_reason) == (want.tokens, "stop")


def test_what_is_refused_is_left_out_with_the_reason(tmp_path: Path) -> None:
    """An extension that the server refuses is no setting, and asking for it says why."""
    with Endpoint(extensions=EXTENSIONS - {"min_p", "cache_salt"}, id_prompts=False) as endpoint:
        served = model(endpoint, tmp_path)
        assert served.settings >= {"temperature", "top_k", "stop", "min_tokens", "eos"}
        assert not served.settings & {"min_p", "salt", "grammar"}
        assert not served.server.offer.id_prompts
        with pytest.raises(Unsupported, match=r"refuses min_p: .* answered 400"):
            served.generate([Request(PROMPT, 2, Sampling(min_p=0.1))])
        with pytest.raises(Unsupported, match="refuses salt"):
            served.start().run([Arrival(Request(PROMPT, 2, salt="a"))])


def test_a_field_that_is_ignored_is_still_declared(tmp_path: Path) -> None:
    """A field that is accepted without effect stays a setting: to find that out is a property's work."""
    with Endpoint(ignored=frozenset(("top_k",))) as endpoint:
        assert "top_k" in model(endpoint, tmp_path).settings


def test_together_is_as_alone(tmp_path: Path) -> None:
    """Requests at once, some of them cancelled, are answered as the engine answers each alone."""
    requests = [Request((*PROMPT, index), 6, Sampling(seed=index)) for index in range(12)]
    with Endpoint() as endpoint:
        session = model(endpoint, tmp_path).start()
        arrivals = [
            Arrival(request, at=0.01 * index, cancel_after=2 if index % 3 == 1 else None)
            for index, request in enumerate(requests)
        ]
        for arrival, got in zip(arrivals, session.run(arrivals).completions, strict=True):
            want = expected(arrival.request).tokens
            if arrival.cancel_after is None:
                assert (got.tokens, got.finish_reason) == (want, "length")
            else:
                assert (got.tokens, got.finish_reason) == (want[:2], "cancelled")


def test_a_closed_stream_reaches_the_server(tmp_path: Path) -> None:
    """A client that goes away frees its slot: the server sees the connection close."""
    with Endpoint() as endpoint:
        session = model(endpoint, tmp_path).start()
        long = Request(PROMPT, 90, GREEDY)
        assert session.run([Arrival(long, cancel_after=1)]).completions[0].finish_reason == "cancelled"
        assert session.run([Arrival(long, cancel_after=0)]).completions[0].tokens == ()
        session.run([Arrival(REQUESTS["greedy"])])
        with endpoint.changed:
            assert endpoint.changed.wait_for(lambda: endpoint.cancelled == 2, timeout=10)


def test_streams_tell_when_tokens_came(tmp_path: Path) -> None:
    """Chunks are in order between sending and end, and their tokens add up to the completion's."""
    with Endpoint() as endpoint:
        streamed = model(endpoint, tmp_path).start().stream(REQUESTS["greedy"])
    times = [at for at, _ in streamed.chunks]
    assert len(times) > 1
    assert [streamed.sent_at, *times, streamed.ended_at] == sorted(
        [streamed.sent_at, *times, streamed.ended_at]
    )
    assert sum(tokens for _, tokens in streamed.chunks) == len(streamed.completion.tokens) == 9


def test_plain_is_where_requests_without_speculation_go(tmp_path: Path) -> None:
    """With plain=URL the first server gets the speculated requests, the second the others."""
    with Endpoint() as speculating, Endpoint() as plain:
        served = model(speculating, tmp_path, f"plain={plain.url}", "method=prompt_lookup")
        assert served.capabilities == {"generate", "serve", "speculate"}
        assert served.methods == {"prompt_lookup"}
        before = dict(speculating.seen), dict(plain.seen)
        served.generate([REQUESTS["greedy"]])
        assert (dict(speculating.seen), plain.seen["/v1/completions"]) == (
            before[0],
            before[1]["/v1/completions"] + 1,
        )
        served.generate([REQUESTS["greedy"]], speculation=Speculation("prompt_lookup"))
        assert speculating.seen["/v1/completions"] == before[0]["/v1/completions"] + 1
        with pytest.raises(Unsupported, match="speculates by prompt_lookup"):
            served.generate([REQUESTS["greedy"]], speculation=Speculation("staged"))
        with pytest.raises(Unsupported, match="without plain=URL"):
            model(plain, tmp_path).start(speculation=Speculation())


def test_the_budget_is_an_outcome(tmp_path: Path) -> None:
    """More requests than allowed are not sent; the outcome says which option to raise."""
    with Endpoint() as endpoint:
        served = model(endpoint, tmp_path, "requests=9")
        left = served.server.transport.budget.left
        assert 0 < left < 9
        served.generate([REQUESTS["greedy"]] * left)
        with pytest.raises(Unsupported, match="budget of 9 requests is spent; give a larger requests=N"):
            served.start().run([Arrival(REQUESTS["greedy"])])
        assert sum(endpoint.seen.values()) == 9


@pytest.mark.parametrize("wait", ["0", "60", "soon"])
def test_a_busy_server_is_asked_again(wait: str, tmp_path: Path) -> None:
    """503 is tried again, no sooner than Retry-After, and not at all where that is beyond the timeout."""
    with Endpoint() as endpoint:
        served = model(endpoint, tmp_path, "timeout=5")
        endpoint.refusals, endpoint.retry_after = 2, wait
        got = served.generate([REQUESTS["greedy"]])[0]
        assert (got.finish_reason == "error") == (wait == "60")
        assert "answered 503: " in got.error if wait == "60" else endpoint.refusals == 0
        endpoint.refusals, endpoint.retry_after = 99, "0"
        assert "answered 503: " in served.generate([REQUESTS["greedy"]])[0].error
        assert endpoint.refusals >= 95


@pytest.mark.parametrize("variable", ["MOE_HARNESS_API_KEY", "OPENAI_API_KEY"])
def test_the_key_is_sent_and_never_shown(variable, tmp_path, monkeypatch, caplog, capfd) -> None:
    """The key goes into the header of requests, and into no message, repr, log or output, even if echoed."""
    key = "sk-unmistakable-0123456789"
    monkeypatch.setenv(variable, key)
    caplog.set_level(logging.DEBUG)
    with Endpoint(faults={7: "401", 8: "500"}) as endpoint:
        served = model(endpoint, tmp_path)
        assert endpoint.headers["authorization"] == f"Bearer {key}"
        errors = [served.generate([Request(PROMPT, 2, Sampling(seed=seed))])[0].error for seed in (7, 8)] + [
            served.start().stream(Request(PROMPT, 2, Sampling(seed=7))).completion.error
        ]
        shown = [*errors, repr(served), repr(served.server.transport), str(vars(served.server.transport))]
    assert ["your key is ***" in error for error in errors] == [True] * 3, errors
    assert key not in "".join(shown) + caplog.text + "".join(capfd.readouterr())


def test_a_url_is_shown_without_credentials(tmp_path: Path) -> None:
    """User and password of a URL become a header, and stand neither in the name nor in an error."""
    with Endpoint() as endpoint:
        address = endpoint.address(tokens=tmp_path / "t.json").replace("http://", "http://user:hunter2@")
        implementation = resolve(address)
        assert endpoint.headers["authorization"].startswith("Basic ")
        assert implementation.name == f"openai:{endpoint.url}"
        assert "hunter2" not in repr(implementation)
    with pytest.raises(AdapterError, match="nothing answers at") as caught:
        resolve(address)
    assert "hunter2" not in str(caught.value)


WRONG = {
    "": "it is no URL of a server",
    "127.0.0.1:8000": "it is no URL",
    "http://127.0.0.1:1/v1?key=x": "goes on after its path",
    "http://127.0.0.1:1/v1,modle=x": "no option 'modle=x', did you mean 'model'",
    "http://127.0.0.1:1/v1,model": "no option 'model'",
    "http://127.0.0.1:1/v1,timeout=never": "timeout cannot be 'never'",
    "http://127.0.0.1:1/v1,requests=0": "requests cannot be '0'",
    "http://127.0.0.1:1/v1,prompts=words": "prompts cannot be 'words'; it is tokens or text",
    "http://127.0.0.1:1/v1,method=luck": "method cannot be 'luck'",
    "http://127.0.0.1:1/v1,tokens=/no/such/file": "tokens=/no/such/file cannot be read",
    "http://127.0.0.1:1/v1": "nothing answers at http://127.0.0.1:1/v1: ConnectError",
}


@pytest.mark.parametrize("rest", WRONG)
def test_a_wrong_address_is_one_sentence(rest: str) -> None:
    """Every way to address an endpoint wrongly is an AdapterError of one line."""
    with pytest.raises(AdapterError, match=WRONG[rest]) as caught:
        resolve(f"openai:{rest}")
    assert "\n" not in str(caught.value)


def test_nobody_there_ends_with_78() -> None:
    """Where nothing answers the command ends with 78 and one sentence."""
    ended = moe_harness("check", "--impl", "openai:http://127.0.0.1:1/v1", "-k", "nothing")
    assert ended.returncode == 78
    assert "nothing answers at http://127.0.0.1:1/v1" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_table_is_one_to_one(tmp_path: Path) -> None:
    """Text and ids of a table say the same; a table that is not one to one is refused."""
    table = Table(("<s>", "a", "b"))
    assert (table.text((1, 2)), table.tokens("ba")) == ("ab", (2, 1))
    for text in ("a<", "\ufffd"):
        with pytest.raises(ValueError, match="no token of the table"):
            table.tokens(text)
    with pytest.raises(ValueError, match="token 3 is not in the vocabulary of 3"):
        table.text((3,))
    for strings in (["a", "a"], ["ab"], [1], {}, []):
        (tmp_path / "t.json").write_text(json.dumps(strings))
        with pytest.raises(ValueError, match=r"t\.json"):
            Table.load(tmp_path / "t.json")


def test_without_a_table_text_is_compared_as_bytes(tmp_path: Path) -> None:
    """tokens=text declares no setting that counts tokens, and gives the bytes of the answer."""
    with Endpoint(extensions=frozenset()) as endpoint:
        implementation = resolve(f"openai:{endpoint.url},tokens=text")
        served = implementation.build(None, device="cpu", dtype=torch.float32, seed=1)
        assert not served.settings & {"max_tokens", "stop", "eos", "logprobs"}
        text = Bytes().tokens("$%&")
        got = served.generate([Request(text, 4, GREEDY)])[0]
        assert got.finish_reason == "length"
        assert bytes(got.tokens).decode()
        with pytest.raises(AdapterError, match="gives no token ids; add tokens=PATH"):
            resolve(f"openai:{endpoint.url}")


def test_ids_alone_will_do(tmp_path: Path) -> None:
    """A server that takes and gives token ids needs no table, only the size of its vocabulary."""
    with Endpoint() as endpoint:
        served = resolve(f"openai:{endpoint.url},vocab=80").build(
            None, device="cpu", dtype=torch.float32, seed=1
        )
        assert served.vocab_size == 80
        assert "stop" not in served.settings
        assert served.generate([REQUESTS["greedy"]])[0].tokens == expected(REQUESTS["greedy"]).tokens
