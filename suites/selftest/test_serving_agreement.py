"""When two completions are the same: what rounding excuses, and what it does not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from harness.conformance import Violation, Void
from harness.conformance.checked import Malformed
from harness.conformance.serving import GREEDY, Agreement, arrivals, offered, parting, run
from harness.implementations.protocols import Unsupported
from harness.reference.engine import Completion, Request, Sampling, Served

REQUEST = Request((1, 2), 3, GREEDY, logprobs=True)
ANSWER = Completion((5, 6, 7), "length", (-0.5, -1.0, -2.0))


def same(found: Completion, *, exact: bool = True, request: Request = REQUEST) -> Agreement:
    """One comparison with ANSWER; raises Violation where they differ."""
    agreement = Agreement(exact)
    wanted = ANSWER if found.logprobs is not None else replace(ANSWER, logprobs=None)
    agreement.same(found, wanted, request, what="it", stage="isolation")
    return agreement


def test_equal_completions_agree() -> None:
    """A completion agrees with itself, and all of its tokens are counted."""
    assert same(ANSWER).tokens == 3


@pytest.mark.parametrize(
    "found",
    [
        replace(ANSWER, tokens=(5, 9, 7), logprobs=(-0.5, -1.2, -2.0)),
        replace(ANSWER, tokens=(5, 6), logprobs=(-0.5, -1.0)),
        replace(ANSWER, tokens=(5, 6, 7, 8), logprobs=(-0.5, -1.0, -2.0, -1.0)),
        replace(ANSWER, finish_reason="stop"),
        replace(ANSWER, logprobs=(-0.5, -1.001, -2.0)),
        replace(ANSWER, logprobs=(-0.5, float("nan"), -2.0)),
        replace(ANSWER, logprobs=(-0.5, -1.0)),
        replace(ANSWER, tokens=(), finish_reason="error", logprobs=(), error="why"),
        replace(ANSWER, tokens=(5, 9, 7), logprobs=None),
    ],
)
def test_differences_are_violations(found: Completion) -> None:
    """Other tokens, another length, end or log probability, and an error, are violations in float64."""
    with pytest.raises(Violation):
        same(found)


def test_log_probabilities_must_be_on_both_sides() -> None:
    """A completion without log probabilities differs from one with them."""
    with pytest.raises(Violation, match="has log probabilities other than alone"):
        Agreement(True).same(replace(ANSWER, logprobs=None), ANSWER, REQUEST, what="it", stage="isolation")


def test_ties_are_excused() -> None:
    """Greedy completions may part where their log probabilities show two tokens equally probable."""
    found = replace(ANSWER, tokens=(5, 9, 1), logprobs=(-0.5, -1.000001, -4.0))
    agreement = same(found)
    assert (agreement.tokens, agreement.parted) == (1, 1)
    drawn = replace(REQUEST, sampling=Sampling(seed=1))
    with pytest.raises(Violation):
        same(found, request=drawn)


def test_one_unexplained_difference_is_excused_in_low_precision() -> None:
    """Where neither precision nor log probabilities decide, one completion may part, and no second."""
    agreement, plain = Agreement(False), replace(ANSWER, logprobs=None)
    other = replace(plain, tokens=(5, 9, 7))
    agreement.same(other, plain, REQUEST, what="it", stage="isolation")
    with pytest.raises(Violation):
        agreement.same(other, plain, REQUEST, what="it", stage="isolation")


def test_nothing_compared_is_void() -> None:
    """Completions that part at their first tokens, excused, leave nothing compared."""
    agreement, plain = Agreement(False), replace(ANSWER, logprobs=None)
    agreement.same(replace(plain, tokens=(9,)), plain, REQUEST, what="it", stage="isolation")
    notes: dict[str, Any] = {}
    with pytest.raises(Void):
        agreement.noted(SimpleNamespace(note=notes.__setitem__))  # type: ignore[arg-type]
    assert notes["parted_by_rounding"] == 1


def test_sessions_that_fail_are_violations() -> None:
    """A session that raises, or answers too few, has lost requests; one that lacks something says so."""

    def raises(error: Exception) -> Any:
        def serve(_: Any) -> Served:
            raise error

        return SimpleNamespace(run=serve)

    with pytest.raises(Violation, match="1 requests were lost, as the engine raised KeyError"):
        run(raises(KeyError("x")), [REQUEST])
    with pytest.raises(Unsupported):
        run(raises(Unsupported("no seeds")), [REQUEST])
    with pytest.raises(Malformed):
        run(SimpleNamespace(run=lambda _: Served([])), [REQUEST])


def test_requests_ask_for_what_is_honoured() -> None:
    """Fields that an engine does not honour are left at their defaults."""
    model = SimpleNamespace(settings=frozenset(("temperature", "eos")), capabilities=frozenset(("serve",)))
    request = Request((1,), 2, Sampling(temperature=0.5, top_k=3, seed=1), eos=(4,), salt="s", logprobs=True)
    assert offered(model, request) == Request((1,), 2, Sampling(temperature=0.5), eos=(4,))


def test_arrivals_keep_the_order_of_requests() -> None:
    """Arrivals come in the given order, and stand in that of the requests."""
    engine = SimpleNamespace(capabilities=frozenset(("limits",)))
    assert [one.at for one in arrivals(engine, [REQUEST] * 3, order=(2, 0, 1), every=2)] == [2, 4, 0]
    assert parting((1, 2, 3), (1, 2)) == 2
