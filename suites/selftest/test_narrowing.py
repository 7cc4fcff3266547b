"""A counterexample in whole logits is of the stage that a smaller check names, and of none where none can."""

from __future__ import annotations

import pytest
import torch

from harness.conformance import Case, Violation, Void, require
from harness.conformance.narrowing import Call, Check, narrowed, parted
from harness.implementations.reference import Reference
from harness.mutants import CATALOGUE
from harness.mutants.defect import MutantImplementation
from harness.spec import load, twin


def case(mutant: str = "") -> Case:
    """A case of Mixtral's twin, on the reference or on a mutant."""
    implementation = MutantImplementation(CATALOGUE[mutant]) if mutant else Reference()
    full = load("mixtral-8x7b").architecture
    return Case(implementation, "part.statement", 1, "mixtral-8x7b", full, twin(full))


def stage_of(*checks: Check, otherwise: str = "rest", named: str = "", of: Case | None = None) -> str:
    """The stage of a Violation that is narrowed by these checks."""
    with pytest.raises(Violation) as caught, narrowed(of or case(), *checks, otherwise=otherwise):
        raise Violation("whole logits differ", stage=named)
    return caught.value.stage


def fails(stage: str) -> Check:
    """A check that does not hold."""
    return lambda _: require(False, "less differs too", stage=stage)


def holds(_: Case) -> None:
    """A check that holds."""


def cannot_be_made(_: Case) -> None:
    """A check with nothing to compare."""
    raise Void("nothing is comparable")


def test_the_first_check_that_fails_names_the_stage() -> None:
    """The stage is that of the first check that fails, and what they all leave out where none does."""
    assert stage_of(holds, fails("mask"), fails("combine")) == "mask"
    assert stage_of(holds, holds) == "rest"
    assert stage_of(fails("")) == ""


def test_what_cannot_be_checked_names_nothing() -> None:
    """A check that cannot be made rules nothing out."""
    assert stage_of(cannot_be_made, fails("mask")) == ""


def test_a_stage_that_is_known_stays() -> None:
    """A Violation that names its stage is not narrowed."""
    assert stage_of(fails("mask"), named="score") == "score"


def test_checks_draw_and_note_nothing_of_the_case() -> None:
    """Neither the digest nor the facts of a case show that it was narrowed."""
    one = case()
    one.tokens(2, 3)
    before = one.digest

    def draws(aside: Case) -> None:
        aside.tokens(5, 5)
        aside.note("comparable_share", 0.5)

    stage_of(draws, of=one)
    assert (one.digest, one.facts) == (before, {})


@pytest.mark.parametrize(
    ("mutant", "stage"),
    [
        ("", "rest"),
        ("softmax-over-tokens", "score"),
        ("selects-by-the-token-before", "select"),
        ("single-token-not-normalised", "weigh"),
        ("combines-over-the-batch", "combine"),
    ],
)
def test_tokens_part_at_the_stage_that_is_broken(mutant: str, stage: str) -> None:
    """Of a token alone and in company, the first stage that differs is the one that the mutant breaks."""
    one = case(mutant)
    model, tokens = one.model(), one.tokens(7, 1)
    pair = Call(tokens, torch.tensor([3])), Call(tokens[3:4], torch.tensor([0]))
    assert stage_of(parted(one, model, [pair]), of=one) == stage
