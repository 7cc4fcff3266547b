"""Salts: what was cached under one is found under no other, whatever it is called and however it came about.

A page holds `PAGE` tokens; a full page is shared, and the prompt's last token is always computed.
"""

from __future__ import annotations

from dataclasses import replace

from harness.conformance import Case, conformance, require
from harness.conformance.passes import independent
from harness.conformance.prefixes import APART, PAGE, SHARING, hits, one_by_one
from harness.conformance.serving import (
    GREEDY,
    Agreement,
    alone,
    arrivals,
    ask_for,
    engine,
    exact,
    offered,
    prompts,
    run,
    same_all,
    sized,
)
from harness.reference.engine import Limits, Request

LONG = "organisation/team/user/" * 12
"""What two salts have in common that differ at their end alone."""


@conformance(
    "serving.salts-isolate",
    clause="serving.prefix_sharing",
    needs=("serve",),
    kills=(
        "salt-is-no-part-of-the-key",
        "adapters-share-prefixes",
        "salts-are-cut-short",
        "salts-ignore-case-and-blanks",
        "without-a-salt-all-are-found",
        "salts-are-those-of-the-batch",
        "long-salts-are-cut",
    ),
    applies=independent,
    costly=True,
)
def test_salts_isolate(case: Case) -> None:
    """No request is served from a prefix that was cached under another salt, even of the same tokens."""
    model = engine(case)
    ask_for(model, "salt")
    (row,) = prompts(case, (4 * PAGE + 1,))
    salts = ("", "tenant", "tenant2", "adapter:one", "adapter:two", "Tenant", " ", LONG + "1", LONG + "2")
    requests = [offered(model, Request(row, 4, GREEDY, logprobs=True, salt=salt)) for salt in salts]
    wanted, agreement = alone(model, requests, sized(model, APART)), Agreement(exact(model))
    session = model.start(sized(model, SHARING), speculation=None)
    found = [one_by_one(session, [request, request]) for request in requests]
    session.close()
    hits(case, [again for _, again in found])
    for salt, (first, again) in zip(salts, found, strict=True):
        require(
            first.cached_tokens == 0,
            f"the first request of salt {salt!r} was given {first.cached_tokens} tokens of another salt",
            stage="prefix",
        )
        require(
            again.cached_tokens > 0, f"the second of salt {salt!r} found nothing of the first", stage="prefix"
        )
    same_all(agreement, [first for first, _ in found], wanted, requests, what="of a new salt", stage="prefix")
    same_all(
        agreement, [again for _, again in found], wanted, requests, what="of a known salt", stage="prefix"
    )
    # All at once, the one without a salt last: none finds what another has, neither now nor later
    together = [replace(request, prompt=request.prompt[::-1]) for request in reversed(requests)]
    session = model.start(sized(model, SHARING), speculation=None)
    at_once = run(session, arrivals(model, together)).completions
    later = one_by_one(session, together)
    session.close()
    for request, one, other in zip(together, at_once, later, strict=True):
        have = one.cached_tokens, other.cached_tokens > 0
        require(
            have == (0, True),
            f"salt {request.salt!r}, beside others: {have[0]} tokens were cached at first, "
            f"{other.cached_tokens} when it was asked again",
            stage="prefix",
        )
    agreement.noted(case)


@conformance(
    "serving.salts-hold-for-answers-and-chunks",
    clause="serving.prefix_sharing",
    needs=("serve", "limits"),
    kills=("salts-are-lost-after-the-prompt", "salts-are-lost-after-the-first-chunk"),
    applies=independent,
)
def test_answers_and_chunks(case: Case) -> None:
    """Of a text whose beginning two salts share, neither finds what chunks and answers of the other added."""
    model = engine(case)
    ask_for(model, "salt")
    (row,) = prompts(case, (4 * PAGE + 1,))
    for known in (row[: PAGE + 2], row):
        session = model.start(Limits(2, PAGE, chunk=PAGE + 1), speculation=None)
        mine, other = (
            offered(model, Request(text, count, GREEDY, salt=salt))
            for text, count, salt in ((known, 1, ""), (row, 12, "tenant"))
        )
        _, answer = one_by_one(session, [mine, other])
        again = replace(mine, prompt=row + answer.tokens)
        found = one_by_one(session, [again, again])
        session.close()
        hits(case, found)
        require(
            found[0].cached_tokens <= len(known),
            f"{found[0].cached_tokens} tokens were found where {len(known)} are known to the salt",
            stage="prefix",
        )


@conformance(
    "serving.salts-are-no-tokens",
    clause="serving.prefix_sharing",
    needs=("serve", "limits"),
    kills=("salts-run-into-tokens",),
    applies=independent,
)
def test_no_tokens(case: Case) -> None:
    """A salt and a prompt that read as another prompt, character by character, are not taken for it."""
    model = engine(case)
    ask_for(model, "salt")
    (row,) = prompts(case, (2 * PAGE + 1,))
    row = (2, *row[1:])
    spelled = tuple(range(33, 33 + PAGE))
    for salt, beginning, alike in (
        ("".join(map(chr, spelled)), (*spelled, 0), spelled + row),
        ("1", (0,), (12, *row[1:])),  # as 1 before 2 is read as 12
    ):
        texts = (("", beginning), (salt, row), ("", alike))
        requests = [offered(model, Request(text, 1, GREEDY, salt=one)) for one, text in texts]
        session = model.start(SHARING, speculation=None)
        found = one_by_one(session, [*requests, requests[-1]])
        session.close()
        hits(case, found)
        have, own = found[2].cached_tokens, len(beginning) // PAGE * PAGE
        require(have <= own, f"{have} tokens of salt {salt!r} were found without a salt", stage="prefix")
