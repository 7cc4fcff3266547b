"""A survey as a page and as JSON: family x property, and what lies behind each cell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from harness.results.record import OUTCOMES, Record
from harness.results.report import Page
from harness.results.survey.reading import Survey, Surveyed
from harness.theory.describe import Table

SIGNS = {"passed": ".", "failed": "F", "expected": "x", "unsupported": "-", "stale": "S", "void": "v"}
LEGEND = (
    ". passed, x fails for a reason that is known, F fails, - unsupported, v could not be measured, "
    "S passes though a failure was expected, blank: does not apply"
)
FINDINGS = re.compile(r"results/findings\.md, ([a-z0-9-]+(?:, [a-z0-9-]+)*)")
HEADLESS = "text model alone, under a fixed random head"


def page(survey: Survey) -> Page:
    """The page."""
    number = {slug: i for i, slug in enumerate(survey.slugs, start=1)}
    tables = (
        summary(survey),
        Table(
            "Properties, by the numbers of the table below",
            ("number", "property", *OUTCOMES),
            tuple((i, slug, *_counts(survey, slug)) for slug, i in number.items()),
        ),
        Table(
            f"Family x property: {LEGEND}",
            ("family", *(str(i) for i in number.values()), "processor seconds"),
            tuple(
                (one.family, *_signs(one, survey.slugs), one.facts.get("processor_seconds", ""))
                for one in survey.families
                if not one.why
            ),
        ),
        Table(
            "What failed, or could not be measured",
            ("family", "property", "outcome", "reason"),
            tuple(
                (one.family, record.slug, record.outcome, _linked(record.reason))
                for one in survey.families
                for record in one.records
                if record.outcome not in ("passed", "unsupported")
            ),
        ),
        Table(
            "Capabilities that families lack, other than to take the reference's weights",
            ("capability", "why", "families"),
            tuple(_missing(survey)),
        ),
        Table(
            "Families: what ran, and what its config was given beside the recipe",
            ("family", "class", "runs as", "parameters", "routers", "config beside the recipe"),
            tuple(_described(one) for one in survey.families),
        ),
        Table(
            "Not run",
            ("family", "why"),
            (
                *((one.family, one.why) for one in survey.of("not run")),
                *((name, f"is a model around {inner}") for name, inner in survey.around.items()),
                *((name, f"cannot be imported: {why}") for name, why in survey.broken.items()),
            ),
        ),
    )
    name = survey.library.partition(" ")[0]
    command = f"moe-harness survey {name}"
    return Page(f"survey-{name}.md", f"Every MoE family of {survey.library}", command, tables)


def summary(survey: Survey) -> Table:
    """How many families there are, and how they ended."""
    found, clean, failing, rest = (
        len(names)
        for names in (survey.families, survey.of("clean"), survey.of("failing"), survey.of("not run"))
    )
    outcomes = Counter(record.outcome for record in survey.records)
    return Table(
        f"Families of {survey.library}, tiny, with random weights, in their own shape",
        ("found", "run", "clean", "failing", "not run", *(f"{name} outcomes" for name in OUTCOMES)),
        ((found, clean + failing, clean, failing, rest, *(outcomes[name] for name in OUTCOMES)),),
    )


def as_json(survey: Survey) -> dict[str, Any]:
    """Everything on the page, with the records whole."""
    verdict = survey.verdict
    return {
        "library": survey.library,
        "exit_code": verdict.code,
        "headline": verdict.headline,
        "families": {
            one.family: {
                "status": one.status,
                "why": one.why,
                "class": one.model,
                "shape": one.shape,
                "overrides": dict(one.overrides),
                **one.facts,
                "properties": {record.slug: _record(record) for record in one.records},
            }
            for one in survey.families
        },
        "around": dict(survey.around),
        "broken": dict(survey.broken),
    }


def _record(record: Record) -> dict[str, Any]:
    facts: dict[str, Any] = {"outcome": record.outcome, "seconds": round(record.duration_s, 3)}
    if record.reason:
        facts["reason"] = record.reason
    if record.stage:
        facts["stage"] = record.stage
    if slugs := FINDINGS.search(record.reason):
        facts["findings"] = slugs[1].split(", ")
    return facts


def _counts(survey: Survey, slug: str) -> tuple[int, ...]:
    counts = Counter(record.outcome for record in survey.records if record.slug == slug)
    return tuple(counts[outcome] for outcome in OUTCOMES)


def _signs(one: Surveyed, slugs: tuple[str, ...]) -> tuple[str, ...]:
    signs = {record.slug: SIGNS[record.outcome] for record in one.records}
    return tuple(signs.get(slug, "") for slug in slugs)


def _linked(reason: str) -> str:
    """The reason, with the findings that it names as links."""
    found = FINDINGS.search(reason)
    if found is None:
        return reason
    links = ", ".join(f"[{slug}](findings.md#{slug})" for slug in found[1].split(", "))
    return reason[: found.start()] + links + reason[found.end() :]


def _missing(survey: Survey) -> Iterator[tuple[str, str, str]]:
    lacking: dict[tuple[str, str], list[str]] = {}
    for one in survey.families:
        for capability, why in one.facts.get("missing", {}).items():
            if capability != "weights":
                lacking.setdefault((capability, why), []).append(one.family)
    for (capability, why), names in sorted(lacking.items()):
        yield capability, why, ", ".join(names)


def _described(one: Surveyed) -> tuple[object, ...]:
    facts = one.facts
    routers = facts.get("routers", [])
    where = re.sub(r"\b\d+\b", "*", routers[0]) if routers else ""
    given = ", ".join(f"{name} = {value}" for name, value in one.overrides.items())
    shape = {"headless": HEADLESS, "encoder-decoder": "decoder of an encoder-decoder"}.get(
        one.shape, one.shape
    )
    count = f"{len(routers)} at {where}" if routers else ""
    return one.family, one.model, shape, facts.get("parameters", ""), count, given
