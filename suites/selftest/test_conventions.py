"""The convention finder: it names what a mutant does, names nothing else, and never changes a verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.conformance import Case, Violation, subjects
from harness.conformance.catalogue import properties
from harness.conformance.conventions import Seen, explained, unexplained
from harness.conformance.conventions.combining import COMBINE
from harness.conformance.conventions.dropping import DROP
from harness.conformance.conventions.losses import BALANCE, Z
from harness.conformance.conventions.models import MUTANTS
from harness.conformance.conventions.scoring import PROJECT, SCORE
from harness.conformance.conventions.search import Convention, Finding, Fit, search
from harness.conformance.conventions.selecting import SELECT
from harness.conformance.conventions.weighing import WEIGH
from harness.mutants import CATALOGUE
from harness.mutants.defect import Mutant, MutantImplementation

PROPERTIES = {prop.slug: (prop, function) for prop, function in properties()}
STAGES: dict[str, tuple[Convention[Any], ...]] = {
    "routing.projects-the-input": PROJECT,
    "routing.scores-the-logits": SCORE,
    "routing.selects-the-best": SELECT,
    "routing.weighs-the-selected": WEIGH,
    "routing.combines-the-experts": COMBINE,
    "routing.balance-loss-follows-its-convention": BALANCE,
    "routing.z-loss-follows-its-formula": Z,
    "routing.capacity-keeps-the-right-tokens": DROP,
}
ALSO = {
    "always-normalised": "normalised-after-scaling",  # the mutant divides last
    "softmax-of-the-selected": "always-normalised",  # of softmax scores the same function
    "capacity-rounded-down": "capacity-rounded-down + drops-by-position",  # it knows no other policy
}
"""What a mutant is told where its own name is not the simplest."""
WHOLE = (
    ("attention.rope-turns-as-specified", "rope-layout-swapped"),
    ("attention.rope-turns-as-specified", "rope-theta-default"),
    ("attention.rope-turns-as-specified", "rope-scaling-ignored"),
    ("attention.window-ends-where-it-should", "window-one-more"),
    ("attention.window-ends-where-it-should", "window-one-less"),
    ("attention.window-ends-where-it-should", "window-ignored"),
    ("attention.full-layers-see-everything", "window-everywhere"),
    ("attention.heads-share-keys-in-groups", "kv-heads-tiled"),
    ("attention.one-layer-equals-reference", "scale-default"),
    ("attention.one-layer-equals-reference", "sinks-dropped"),
    ("attention.one-layer-equals-reference", "qk-norm-dropped"),
    ("attention.one-layer-equals-reference", "padding-is-attended"),
    ("routing.near-ties-need-the-router-dtype", "selection-in-bfloat16"),
    ("routing.bfloat16-model-scores-in-float32", "scores-in-model-dtype"),
    ("routing.balance-loss-trains-the-router", "balance-detached"),
    ("routing.z-loss-trains-the-router", "z-on-probabilities"),
    ("compute.logits-equal-reference", "unweighted-sum"),
    ("compute.logits-equal-reference", "gate-and-up-swapped"),
    ("compute.logits-equal-reference", "final-norm-dropped"),
    ("compute.logits-equal-reference", "router-in-bfloat16"),
    ("compute.logits-equal-reference", "selects-the-worst"),
    ("compute.faint-input-equals-reference", "norm-eps-default"),
    ("compute.variants-equal-reference", "scaling-only-if-normalised"),
    ("compute.variants-equal-reference", "transposed-if-square"),
)


def broken(slug: str, mutant: Mutant, seed: int = 0) -> Violation:
    """How a mutant breaks a property."""
    (subject,) = subjects.resolve(["reference"], [mutant.spec])
    subject = replace(subject, implementation=MutantImplementation(mutant))
    prop, function = PROPERTIES[slug]
    with pytest.raises(Violation) as caught:
        function(subjects.case(subject, prop, seed))
    return caught.value


def both(first: str, second: str) -> Mutant:
    """A mutant with the defects of two, on the spec of the first."""
    one, two = CATALOGUE[first], CATALOGUE[second]

    def patch(built: Any) -> None:
        one.patch(built)
        two.patch(built)

    return replace(one, name=f"{first}+{second}", patch=patch)


def known(slug: str) -> list[tuple[str, str]]:
    """The mutants that a property must kill and that are conventions of its stage."""
    names = {convention.name for convention in STAGES[slug]}
    return [(slug, name) for name in PROPERTIES[slug][0].kills if name in names]


@pytest.mark.parametrize(("slug", "name"), [*(pair for slug in STAGES for pair in known(slug)), *WHOLE])
def test_a_convention_is_named(slug: str, name: str) -> None:
    """A property that a convention breaks says which one it is, in its message and its facts."""
    violation = broken(slug, CATALOGUE[name])
    found = violation.facts["implements"]
    assert ALSO.get(name, name) in found
    assert "; this implements " in str(violation)
    # Scores that were rounded, or logits that were: what shows is which of two near experts won.
    assert len(found) == 1 or name == "selection-in-bfloat16"


@pytest.mark.parametrize(
    ("slug", "first", "second", "spec"),
    [
        ("routing.weighs-the-selected", "never-normalised", "scaling-twice", "deepseek-v3"),
        ("routing.weighs-the-selected", "scaling-twice", "correction-bias-in-weights", "deepseek-v3"),
        ("routing.selects-the-best", "correction-bias-ignored", "group-score-max", "deepseek-v3"),
        ("routing.combines-the-experts", "gate-and-up-swapped", "unweighted-sum", "mixtral-8x7b"),
        (
            "routing.balance-loss-follows-its-convention",
            "balance-counts-padding",
            "balance-divides-by-k-twice",
            "mixtral-8x7b",
        ),
        ("attention.one-layer-equals-reference", "rope-layout-swapped", "kv-heads-tiled", "mixtral-8x7b"),
    ],
)
def test_a_pair_of_conventions_is_named(slug: str, first: str, second: str, spec: str) -> None:
    """Two conventions of one stage together are found as a pair."""
    violation = broken(slug, replace(both(first, second), spec=spec))
    assert any(set(names.split(" + ")) == {first, second} for names in violation.facts["implements"])


def test_the_spec_is_quoted_where_a_convention_shows() -> None:
    """Of a pair, each convention is set against the spec that it is needed for, not against the twin's."""
    pair = replace(both("expert-bias-dropped", "clamp-constant"), spec="gpt-oss-20b")
    message = str(broken("routing.combines-the-experts", pair))
    assert message.startswith("twin, ")
    assert message.endswith("where the spec says bias = true and the spec says clamp = 5.0")


@pytest.mark.parametrize(
    ("slug", "name"),
    [
        ("routing.projects-the-input", "z-on-noised-logits"),
        ("routing.selects-the-best", "canary"),
        ("routing.combines-the-experts", "weights-of-another-slot"),
        ("routing.balance-loss-follows-its-convention", "balance-over-the-wrong-axis"),
        ("compute.logits-equal-reference", "experts-in-string-order"),
    ],
)
def test_what_is_no_convention_is_said_to_be_none(slug: str, name: str) -> None:
    """Of a defect that no convention explains the message says so, and no variant is named."""
    violation = broken(slug, CATALOGUE[name])
    assert violation.facts["implements"] == []
    assert str(violation).endswith("; no known convention explains it")


@pytest.mark.parametrize("slug", sorted(STAGES))
def test_nothing_is_named_on_the_reference(slug: str) -> None:
    """On the reference each property with a finder passes, and notes no convention."""
    spec = "olmoe-1b-7b" if ".z-loss" in slug else "mixtral-8x7b"
    (subject,) = subjects.resolve(["reference"], [spec])
    prop, function = PROPERTIES[slug]
    case = subjects.case(subject, prop, 0)
    function(case)
    assert not {"implements", "convention_finder"} & set(case.facts)


def test_mutants_that_are_conventions_exist() -> None:
    """Every convention of whole models is a mutant, named once."""
    names = [row.name for row in MUTANTS]
    assert len(set(names)) == len(names)
    assert not set(names) - set(CATALOGUE)


def plus(name: str, by: float, axis: str = "") -> Convention[float]:
    """A convention that adds to a number."""
    return Convention(name, axis or name, f"{name} is added", lambda _: "adds nothing", lambda x: x + by)


def near(actual: float) -> Callable[[Callable[[float], float], float], Fit]:
    """The fit of a number that was seen, within 0.1."""
    return lambda change, seen: Fit(abs(change(seen) - actual - seen) < 0.1, abs(change(seen) - seen) > 0.1)


def names(found: tuple[tuple[Convention[float], ...], ...]) -> list[str]:
    """Of each variant, its conventions' names."""
    return ["+".join(part.name for part in variant) for variant in found]


def test_the_simplest_variant_is_named() -> None:
    """A pair is named only where no single convention agrees, and never two of one axis."""
    some = [plus("one", 1), plus("two", 2), plus("three", 3, "two")]
    assert names(search(some, [0.0, 5.0], near(3))) == ["three"]
    assert names(search(some, [0.0], near(4))) == ["one+three"]
    assert names(search(some, [0.0], near(5))) == []


def test_variants_that_agree_alike_are_all_named() -> None:
    """Variants that the input does not tell apart are all named, and the message says so."""
    found = search([plus("one", 1), plus("other", 1.01)], [0.0], near(1))
    assert names(found) == ["one", "other"]
    assert "does not tell apart: one is added; or other is added" in Finding(found).sentence


def test_what_does_not_differ_from_the_spec_is_not_named() -> None:
    """A convention that gives what the spec gives explains nothing."""
    assert search([plus("nothing", 0.01)], [0.0], near(0.0)) == ()


def failing(find: Callable[[list[int]], Finding | None]) -> Violation:
    """A comparison that fails under a finder."""
    seen = Seen[int]()
    seen.add(1)
    violation = Violation("it is 1 in place of 2", stage="weigh", facts={"index": 0})
    with pytest.raises(Violation), explained(seen, find):
        raise violation
    return violation


def test_a_finder_that_crashes_changes_nothing() -> None:
    """The message, stage and facts are as they were, and a fact says that the finder failed."""

    def crash(_: list[int]) -> Finding:
        raise RuntimeError("no such field")

    violation = failing(crash)
    assert (str(violation), violation.stage) == ("it is 1 in place of 2", "weigh")
    assert violation.facts == {"index": 0, "convention_finder": "failed: RuntimeError: no such field"}


def test_a_finder_may_be_silent() -> None:
    """A finder that has nothing to say, and one that is not wanted, leave the Violation alone."""
    assert failing(lambda _: None).facts == {"index": 0}
    with unexplained():
        assert failing(lambda _: pytest.fail("it was called")).facts == {"index": 0}


def test_nothing_is_searched_while_a_property_passes() -> None:
    """Where nothing fails the finder is not called."""
    seen = Seen([1, 2])
    with explained(seen, lambda _: pytest.fail("it was called")):
        assert list(seen) == [1, 2]


def test_what_the_source_refuses_is_not_explained() -> None:
    """A Violation that is raised before anything can be compared is left alone."""

    def source() -> Any:
        yield 1
        raise Violation("it has shape (2,) in place of (3,)")

    seen = Seen(source())
    with pytest.raises(Violation, match=r"\(3,\)$"), explained(seen, lambda _: pytest.fail("it was called")):
        list(seen)


def test_an_own_shape_is_not_explained() -> None:
    """Where the reference's logits are not known there is nothing to compare conventions with."""
    from harness.conformance.comparison import Margin
    from harness.conformance.conventions.models import Pass, find_model

    (subject,) = subjects.resolve(["reference"], ["mixtral-8x7b"])
    case: Case = subjects.case(subject, PROPERTIES["attention.is-causal"][0], 0)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    bound = Margin(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert find_model(case)([Pass(case.shape, {}, tokens, torch.zeros(1, 2, 7), bound)]) is None
