"""Company: what a request is answered depends on no other request, and on no size of the engine.

Times are iterations of the engine, or shares of a second for a server.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.conformance import Case, conformance, require
from harness.conformance.passes import independent
from harness.conformance.serving import (
    GREEDY,
    ROUNDING,
    Agreement,
    alone,
    arrivals,
    batchings,
    engine,
    exact,
    greedy,
    offered,
    prompts,
    run,
    same_all,
    seeded,
    seeded_too,
    serve,
    speculations,
    startable,
)
from harness.implementations.protocols import Unsupported
from harness.reference.engine import Limits, Request, Speculation

ONE = Limits(sequences=1)


@conformance(
    "serving.company-changes-nothing",
    clause="serving.batching",
    needs=("serve",),
    kills=(
        "positions-are-those-of-the-longest",
        "padding-of-a-batch-is-attended",
        "rope-is-chosen-by-the-longest",
        "rows-are-taken-to-be-equally-long",
        "batches-are-summed-in-half-precision",
        "keys-of-batches-are-rounded",
        "neighbours-answers-are-swapped",
        "lengths-are-those-of-the-shortest",
    ),
    applies=independent,
    costly=True,
)
def test_company_changes_nothing(case: Case) -> None:
    """A greedy request gives the same tokens, finish reason and log probabilities alone and in company."""
    model = engine(case)
    # The last is long enough for another rope where that depends on length, and comes while others go on.
    requests = greedy(case, model, (3, 9, 17, 5, 12, 62), (9, 6, 8, 11, 5, 4))
    wanted, agreement = alone(model, requests), Agreement(exact(model))
    for what, order, every in (
        ("with five others", (0, 1, 5, 2, 3, 4), 0.0),
        ("in another order, two iterations apart", (3, 5, 1, 4, 0, 2), 2.0),
    ):
        found = serve(model, arrivals(model, requests, order=order, every=every)).completions
        same_all(agreement, found, wanted, requests, what=what, stage="isolation")
    agreement.noted(case)


@conformance(
    "serving.seeded-company-changes-nothing",
    clause="serving.seeds",
    needs=("serve",),
    kills=(
        "positions-are-those-of-the-longest",
        "seeds-are-forgotten",
        "seeds-depend-on-the-order",
        "generators-advance-on-a-copy",
        "seeds-depend-on-the-salt",
        "seeds-depend-on-log-probabilities",
    ),
    applies=independent,
    costly=True,
)
def test_seeded_company_changes_nothing(case: Case) -> None:
    """A request with a seed gives the same alone, in company, under a salt, and without log probabilities."""
    model = engine(case)
    requests = seeded(case, model, greedy(case, model))
    wanted, agreement = alone(model, requests), Agreement(exact(model))
    # Without seeds beside them, which draw from the engine's own generator, and without chance
    others = [replace(request, sampling=replace(request.sampling, seed=None)) for request in requests[:2]]
    others.append(replace(requests[2], sampling=GREEDY))
    # What has no part in a law: a salt, and whether log probabilities are asked for
    other = [
        replace(r, salt="tenant") if i % 2 else replace(r, logprobs=False) for i, r in enumerate(requests)
    ]
    other = [offered(model, request) for request in other]
    bare = [one if i % 2 else replace(one, logprobs=None) for i, one in enumerate(wanted)]
    for what, order, every, asked, answers in (
        ("with a seed, in company", (5, 0, 1, 6, 2, 3, 4, 7), 0.0, other, bare),
        ("with a seed, in company that comes and goes", (4, 5, 1, 7, 0, 6, 2, 3), 2.0, requests, wanted),
    ):
        found = serve(model, arrivals(model, [*asked, *others], order=order, every=every)).completions
        same_all(agreement, found[:5], answers, requests, what=what, stage="seed")
    agreement.noted(case)


@conformance(
    "serving.sizes-change-nothing",
    clause="serving.batching",
    needs=("serve", "limits"),
    kills=(
        "page-ends-are-off-by-one",
        "positions-are-those-of-the-longest",
        "padding-of-a-batch-is-attended",
        "batches-are-summed-in-half-precision",
    ),
    applies=independent,
    costly=True,
)
def test_sizes_change_nothing(case: Case) -> None:
    """Slots, page size and tokens per iteration change no answer, greedy or seeded."""
    model = engine(case)
    requests = greedy(case, model)
    requests += seeded_too(case, model, requests[:3])
    wanted, agreement = alone(model, requests, ONE), Agreement(exact(model))
    sizes = (
        Limits(1),
        Limits(2, page_size=1),
        Limits(3, page_size=5, chunk=16),
        Limits(8, page_size=32, pages=32),
    )
    for limits in startable(case, model, sizes):
        found = serve(model, arrivals(model, requests, every=0.5), limits).completions
        same_all(agreement, found, wanted, requests, what=f"in an engine of {limits}", stage="isolation")
    agreement.noted(case)


@conformance(
    "serving.chunks-change-nothing",
    clause="serving.chunked_prefill",
    needs=("serve", "limits"),
    kills=(
        "chunks-start-at-position-0",
        "chunks-overlap-by-one",
        "seeds-are-consumed-by-prompts",
        "seeds-fail-with-chunks",
    ),
    applies=independent,
    costly=True,
)
def test_chunks_change_nothing(case: Case) -> None:
    """A prompt in chunks of any size, some tokens at a time beside others that decode, gives the same."""
    model = engine(case)
    size = 4
    requests = greedy(case, model, (2, 3, 17, 16, 9), (12, 9, 3, 4, 5))
    requests += seeded_too(case, model, requests[2:4])
    wanted, agreement = alone(model, requests, ONE), Agreement(exact(model))
    for chunk in (1, 2, size - 1, size, size + 1, 2 * size + 1):
        # Decoding comes first: a budget of as many tokens as there are slots would leave none to prompts.
        limits = Limits(sequences=min(chunk, 4), page_size=size, chunk=chunk)
        found = serve(model, arrivals(model, requests, every=1.0), limits).completions
        what = f"in chunks of {chunk}"
        same_all(agreement, found[:5], wanted[:5], requests[:5], what=what, stage="pages")
        same_all(agreement, found[5:], wanted[5:], requests[5:], what=f"with a seed, {what}", stage="seed")
    agreement.noted(case)


@conformance(
    "serving.batching-changes-nothing",
    clause="serving.batching",
    needs=("serve", "limits"),
    kills=(
        "used-pages-are-not-overwritten",
        "static-batches-end-together",
    ),
    applies=independent,
    costly=True,
)
def test_batching_changes_nothing(case: Case) -> None:
    """Static and continuous batching give the same answers."""
    model = engine(case)
    requests = greedy(case, model, (3, 9, 17, 5, 12, 4, 7), (9, 2, 8, 11, 5, 1, 6))
    requests += seeded_too(case, model, requests[:2])
    wanted, agreement = alone(model, requests, ONE), Agreement(exact(model))
    kinds = batchings(model)
    if len(kinds) == 1:
        raise Unsupported(f"the engine has {kinds[0]} batching alone")
    for batching in kinds:
        limits = Limits(sequences=3, batching=batching)
        found = serve(model, arrivals(model, requests, every=1.0), limits).completions
        same_all(agreement, found, wanted, requests, what=f"under {batching} batching", stage="isolation")
    agreement.noted(case)


@conformance(
    "serving.equals-the-models-own-forward",
    clause="serving.batching",
    needs=("serve", "forward"),
    kills=(
        "used-pages-are-not-overwritten",
        "page-ends-are-off-by-one",
        "rope-is-chosen-by-the-longest",
        "cached-keys-keep-their-old-angles",
        "keys-of-batches-are-rounded",
        "positions-end-before-the-context",
    ),
    applies=independent,
    costly=True,
)
def test_equals_the_models_own_forward(case: Case) -> None:
    """Every token is the model's first choice after all before it, by one pass without a cache or a batch."""
    model = engine(case)
    longest = 64 if case.architecture is None else case.architecture.max_positions
    # Across the length at which rope is rescaled where it is, and the edges of windows and pages
    lengths = [min(n, longest - 12) for n in (3, 7, 8, 60, 64, 17)] + [longest - 10]
    rows = prompts(case, lengths)
    requests = [offered(model, Request(prompt, 10, GREEDY, logprobs=True)) for prompt in rows]
    bound, compared, worst = ROUNDING[exact(model)], 0, 0.0
    for answer, request in zip(
        serve(model, arrivals(model, requests, every=1.0)).completions, requests, strict=True
    ):
        what = f"the answer to {len(request.prompt)} tokens"
        require(
            answer.finish_reason in ("stop", "length"), f"{what} ends with {answer.error!r}", stage="fault"
        )
        require(len(answer.tokens) > 0, f"{what} is empty", stage="fault")
        whole = torch.tensor([[*request.prompt, *answer.tokens]])
        with torch.no_grad():
            laws = model.forward(whole)[0, len(request.prompt) - 1 : -1].double().log_softmax(-1)
        for i, (law, token) in enumerate(zip(laws, answer.tokens, strict=True)):
            behind = float(law.max() - law[token])
            require(
                behind <= bound,
                f"{what}: token {i} is {token}; {int(law.argmax())} is more probable by {behind:.3g} (log)",
                stage="pages",
            )
            if answer.logprobs is not None:
                error = abs(answer.logprobs[i] - float(law[token]))
                worst = max(worst, error)
                require(
                    error <= bound,
                    f"{what}: log probability of token {i} is {answer.logprobs[i]:.6g} in place of "
                    f"{float(law[token]):.6g}",
                    stage="pages",
                )
            compared += 1
    case.note("tokens_compared", compared)
    case.note("worst_logprob_difference", worst)


@conformance(
    "serving.the-context-may-be-filled",
    clause="serving.batching",
    needs=("serve", "limits"),
    kills=(
        "the-last-place-is-lost-in-company",
        "drafts-end-the-context-early",
        "page-numbers-have-seven-bits",
    ),
    applies=independent,
    costly=True,
)
def test_the_context_may_be_filled(case: Case) -> None:
    """Requests that fill the context to its last token, at once, in chunks or from a cache, are whole."""
    model = engine(case)
    positions = case.shape.max_positions
    lengths = (positions - 1, positions - 7, 5, positions - 2, positions - 6)
    requests = greedy(case, model, lengths, (9, 9, 12, 2, 6))
    wanted, agreement = alone(model, requests, Limits(1, 8, chunk=2 * positions)), Agreement(exact(model))
    size = Limits(4, 2, 4 * positions // 2, positions // 2)  # pages whose numbers need more than seven bits
    ways: list[Speculation | None] = [None]
    if "speculate" in model.capabilities:
        ways += speculations(case, model)
    for speculation in ways:
        session = model.start(size, speculation=speculation)
        for what, every in (("at once", 0.0), ("once more", 1.0)):
            found = run(session, arrivals(model, requests, every=every)).completions
            same_all(agreement, found, wanted, requests, what=f"in a full context, {what}", stage="pages")
            for answer, request in zip(found, requests, strict=True):
                have, most = len(answer.tokens), min(request.max_tokens, positions - len(request.prompt))
                require(
                    have >= most,  # more are for those who serve beyond the context to judge
                    f"after {len(request.prompt)} of {positions} tokens {have} were generated, not {most}",
                    stage="pages",
                )
        session.close()
    agreement.noted(case)
