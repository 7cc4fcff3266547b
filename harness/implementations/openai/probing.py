"""What a server takes, found by asking it.

Standard fields are believed until they are refused; extensions and prompts of token ids likewise. A field
that is accepted and has no effect is a property's to find.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from harness.implementations.openai.transport import Failure, Transport
from harness.implementations.openai.vocabulary import Bytes, Ids, Vocabulary
from harness.implementations.openai.wire import EXTENSIONS, LLAMA_CPP_NAMES, NAMES, STANDARD, Offer

TRIED: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 0.9,
    "seed": 1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {"0": 0.5},
    "logprobs": 1,
    "top_k": 2,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "min_tokens": 1,
    "salt": "a",
    "return_token_ids": True,
    "stop_token_ids": [0],
    "ignore_eos": True,
}
"""A harmless value for each field."""
REFUSALS = (400, 405, 413, 415, 422, 501)
"""Statuses that speak of what was asked: not of a key, a path, or a server that broke down over it."""
SERVER_FAULT = 500
WITHOUT_IDS = "add tokens=PATH, a JSON list of strings by token id, or tokens=text"
HELPERS = ("return_token_ids", "stop_token_ids", "ignore_eos")
UNKNOWN_TO_LLAMA_CPP = frozenset(("min_tokens", "salt", "return_token_ids", "stop_token_ids"))
"""Its server ignores fields that it does not know, so that asking finds nothing."""


class Unusable(Exception):
    """The endpoint cannot be put under test as it was addressed: one sentence."""


def probe(
    transport: Transport,
    *,
    model: str,
    vocabulary: Vocabulary | None,
    size: int,
    prompts: str,
    without: frozenset[str] = frozenset(),
) -> Offer:
    """Find out what the server offers, with a few requests of one token each.

    `model` "": the first that it lists. `vocabulary` None: token ids alone, `size` of them (0: as many as the
    server says). `prompts`: "tokens", "text", or "" for what works. `without`: settings that are not tried.
    Raises Unusable, or Failure.
    """
    listed = _listed(transport, needed=not model)
    model = model or str(listed["id"])
    llama_cpp = listed.get("owned_by") == "llamacpp"
    absent = UNKNOWN_TO_LLAMA_CPP if llama_cpp else frozenset()
    names = NAMES | LLAMA_CPP_NAMES if llama_cpp else NAMES
    asking = _Asking(transport, {"model": model, "max_tokens": 1}, names)

    id_prompts = prompts != "text" and (vocabulary is None or vocabulary.exact)
    if id_prompts:
        asking.base["prompt"] = [0, 1]
        why = asking.trouble()
        if why and (prompts == "tokens" or vocabulary is None):
            raise Unusable(f"a prompt of token ids is refused: {why}; {WITHOUT_IDS}")
        id_prompts = not why
    if not id_prompts:
        assert vocabulary is not None
        asking.base["prompt"] = vocabulary.text((65, 66) if isinstance(vocabulary, Bytes) else (0, 1))
        if why := asking.trouble():
            raise Unusable(f"the plainest completion is refused: {why}")

    helpers = frozenset(asking.taken(name for name in HELPERS if name not in absent)[0])
    if vocabulary is None:
        if "return_token_ids" not in helpers or not asking.gives_ids():
            raise Unusable(f"it gives no token ids; {WITHOUT_IDS}")
        vocabulary = Ids(size or _size(listed))
        if not vocabulary.size:
            raise Unusable("it does not say how large its vocabulary is: add vocab=N")
    asking.tried = TRIED | {"stop": ["a" if id_prompts else asking.base["prompt"]]}
    left = absent | without
    taken, refused = asking.taken(name for name in (*STANDARD, *EXTENSIONS) if name not in left)
    refused |= {name: f"without= leaves {name} out" for name in without}
    refused |= {name: f"llama.cpp's server has no field for {name}" for name in absent}
    settings, reasons = _settings(set(taken), refused, vocabulary, helpers)
    return Offer(model, vocabulary, settings, reasons, id_prompts, helpers, names)


def _settings(
    taken: set[str], refused: dict[str, str], vocabulary: Vocabulary, helpers: Iterable[str]
) -> tuple[frozenset[str], Mapping[str, str]]:
    """The settings that follow from the fields, and why the others are left out."""
    settings, reasons = set(taken), dict(refused)
    settings |= {"max_tokens"}
    if "stop_token_ids" in helpers or "stop" in taken:
        settings.add("eos")
    else:
        reasons["eos"] = reasons.get("stop", "the endpoint has no field for eos")
    if "stop_token_ids" not in helpers and "min_tokens" in settings:
        settings.remove("min_tokens")
        reasons["min_tokens"] = "min_tokens needs stop_token_ids, which the endpoint refuses"
    if isinstance(vocabulary, Ids):
        settings.discard("stop")
        reasons["stop"] = "stop needs the text of tokens; add tokens=PATH"
    if not vocabulary.exact:
        unknown = ("max_tokens", "stop", "eos", "min_tokens", "logit_bias", "logprobs")
        settings -= set(unknown)
        reasons |= {name: f"{name} counts tokens, and tokens=text knows none" for name in unknown}
    return frozenset(settings), reasons


class _Asking:
    """One request per question: is it refused?"""

    def __init__(self, transport: Transport, base: dict[str, Any], names: Mapping[str, str]) -> None:
        self.transport, self.base, self.names = transport, base, names
        self.tried = TRIED

    def trouble(self) -> str:
        """Why the server does not answer the base alone; "" where it does. Raises Failure: nothing proper."""
        try:
            self.transport.post("/completions", self.base)
        except Failure as failure:
            if failure.status not in REFUSALS and failure.status != SERVER_FAULT:
                raise
            return str(failure)
        return ""

    def gives_ids(self) -> bool:
        """Whether the token ids of an answer come with it."""
        answer = self.transport.post("/completions", self.base | {"return_token_ids": True})
        choices = answer.get("choices") if isinstance(answer, dict) else None
        first = choices[0] if isinstance(choices, list) and choices else None
        return isinstance(first, dict) and isinstance(first.get("token_ids"), list)

    def refusal(self, asked: Mapping[str, Any]) -> str:
        """Why the server does not take these fields; "" where it does, or breaks down over them."""
        try:
            self.transport.post("/completions", self.base | dict(asked))
        except Failure as failure:
            if failure.status is None:
                raise
            if failure.status in REFUSALS:
                return str(failure)
            if failure.status < SERVER_FAULT:
                raise
        return ""

    def taken(self, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
        """Which are taken, and the sentences that refuse the others: all at once, else one by one."""
        wanted = {name: {self.names.get(name, name): self.tried[name]} for name in names}
        together = {key: value for pair in wanted.values() for key, value in pair.items()}
        if not self.refusal(together):
            return list(wanted), {}
        answers = {name: self.refusal(pair) for name, pair in wanted.items()}
        return [name for name in wanted if not answers[name]], {
            name: f"the endpoint refuses {name}: {why}" for name, why in answers.items() if why
        }


def _listed(transport: Transport, *, needed: bool) -> dict[str, Any]:
    """The first model that the server lists; {} where it lists none and none is needed."""
    try:
        answer = transport.get("/models")
    except Failure as failure:
        if needed or failure.status is None:
            raise
        return {}
    models = answer.get("data") if isinstance(answer, dict) else None
    if isinstance(models, list) and models and isinstance(models[0], dict) and "id" in models[0]:
        return dict(models[0])
    if needed:
        raise Unusable("GET /models lists no model; add model=NAME")
    return {}


def _size(listed: Mapping[str, Any]) -> int:
    meta = listed.get("meta")
    found = meta.get("n_vocab") if isinstance(meta, dict) else None
    return found if type(found) is int else 0
