"""The documents beside one another, the counts of verdicts, and an explanation of every claim."""

from __future__ import annotations

import json

import pytest

from harness.audit import audit, explain
from harness.audit.explain import lines
from harness.audit.sources import OUTCOMES, documents
from harness.audit.units import UNITS
from harness.audit.wording import decided
from harness.spec import load, names
from suites.selftest.arithmetic import as_printed, is_sum, worked_out
from suites.selftest.small_specs import claim, spec

AUDITS = {name: audit(load(name)) for name in names()}
LEAK = AUDITS["gpt4-leak"]


def table(audited, start):
    """The table of an audit whose title starts so."""
    return next(one for one in audited.tables() if one.title.startswith(start))


@pytest.mark.parametrize("name", names())
def test_every_claim_is_explained(name):
    """For every claim of every shipped spec: what is printed, the verdict, its reason or its derivation."""
    found = AUDITS[name]
    for one in found.spec.claims:
        text = "\n".join(lines(found._judged, one.id))
        assert text.startswith(f"{one.id}: ")
        for verdict in (v for v in found.verdicts if v.claim.id == one.id):
            assert f"{verdict.figure} (" in text or not verdict.figure.readings
            assert f": {verdict.outcome}" in text
            if not verdict.findings:
                assert verdict.reason in text
                continue
            for finding in verdict.findings:
                assert f"{finding.holding:,} of {finding.admitted:,} completions" in text
                assert all(f" {line}" in text for line in finding.test.quantity.formula.splitlines())
            if verdict.outcome == "undetermined":
                assert decided(verdict.decisive) in text


def test_an_explanation_names_each_number_of_the_formula():
    """Every name that the formula has a number for stands in a line of its own, with its unit and origin."""
    text = explain(LEAK.spec, "training-cost-a100")
    for step in ("gpus = 25,000 GPUs ([training] tries", "days = ", "gpu_hour_usd = 1 USD/h ("):
        assert f"\n    {step}" in text
    assert "as printed, that is 6.25e7 to 6.35e7 USD" in text
    assert "cannot hold together: training-cost-a100, " in text
    assert "(1 USD; ours)" in text


@pytest.mark.parametrize(
    ("printed", "meant"),
    [
        ("<30", "less than 30 GPUs"),
        ("<=30", "at most 30 GPUs"),
        (">10", "more than 10 GPUs"),
        (">=10", "at least 10 GPUs"),
        ("~20", "15 to 25 GPUs"),
        ("10-20", "10 to 20 GPUs"),
    ],
)
def test_a_figure_is_explained_as_what_it_stands_for(tmp_path, printed, meant):
    """Bounds with or without their end, roundings and ranges, in the unit that is printed."""
    document = spec(tmp_path, claim("gpus", "training.gpus", (printed, "GPUs", "A")))
    assert f"as printed, that is {meant}\n" in explain(document, "gpus")


@pytest.mark.parametrize("name", names())
def test_counts_add_up(name):
    """Over verdicts and silence each document has as many claims as there are; every figure is counted."""
    found = AUDITS[name]
    counted = found.as_dict()["claims"]
    claims = sum(one.kind == "claim" for one in found.spec.claims)
    for column in ("claims by best figure", "claims by worst figure", *documents(found.spec)):
        assert sum(counted[column].values()) == claims
    ours = counted.get("assumptions", dict.fromkeys(OUTCOMES, 0))
    for outcome, count in found.counts.items():
        assert counted["figures"][outcome] + ours[outcome] == count
        for column in ("figures", "claims by worst figure"):
            best = counted["claims by best figure"][outcome]
            assert outcome != "contradicts" or counted[column][outcome] >= best
    assert sum(found.counts.values()) == len(found.verdicts)
    assert tuple(found.counts) == OUTCOMES


def test_a_claim_counts_as_its_best_and_as_its_worst_figure(tmp_path):
    """Of two figures, one open and one out of reach, the claim is open at best, and contradicts at worst."""
    figures = [("10", "GPUs", "A"), ("40", "GPUs", "B"), ("many", "GPUs", "B")]
    silent = claim("layers", "architecture.n_layers", ("4", "layers", "B"))
    counted = audit(spec(tmp_path, claim("gpus", "training.gpus", *figures), silent)).as_dict()["claims"]
    shown = {name: (one["undetermined"], one["contradicts"]) for name, one in counted.items()}
    assert shown["figures"] == (2, 1)
    assert counted["figures"]["not quantitative"] == 1
    assert shown["claims by best figure"] == (2, 0)
    assert shown["claims by worst figure"] == (1, 1)
    assert (shown["A"], counted["A"]["silent"]) == ((1, 0), 1)
    assert (shown["B"], counted["B"]["silent"]) == ((1, 1), 0)


@pytest.mark.parametrize("name", names())
def test_every_sum_of_an_explanation_comes_out(name):
    """What stands between two signs of equality is the number after it, to every digit that is printed."""
    found, sums = AUDITS[name], 0
    for one in found.spec.claims:
        for line in lines(found._judged, one.id):
            parts = line.strip().split(" = ")
            for place, part in enumerate(parts[1:-1], 1):
                if not is_sum(part, of_names=False):
                    continue
                value = worked_out(part, {})
                for said in parts[place + 1 :]:
                    number, _, unit = said.partition(" ")
                    factor = UNITS[unit].factor if unit in UNITS else 1
                    assert as_printed(value / factor, number), line
                sums += 1
    formulas = [finding.test.quantity.formula for v in found.verdicts for finding in v.findings]
    assert sums == sum(is_sum(line, of_names=True) for one in formulas for line in expressions(one))


def expressions(formula):
    """The right sides of a formula's lines."""
    return [line.rpartition(" = ")[2] for line in formula.splitlines()]


def test_a_rounding_is_told_apart_from_the_numbers():
    """A constant that is a figure counts as printed, and what its rounding does stands beside it."""
    text = explain(LEAK.spec, "vision-io")
    assert "io_ratio = vision_bytes / text_bytes = 600 / 4 = 150\n" in text
    assert "with vision_bytes 550 to 650 and text_bytes 3.5 to 4.5: 122.2 to 185.7 x" in text


def test_one_row_for_each_claim_on_which_documents_differ():
    """A column for each document, with what it prints of the claim, and what theory admits of it."""
    shown = table(LEAK, "Where the sources differ")
    assert shown.headers == ("claim", "A", "B", "C", "D", "theory admits")
    rows = {row[0]: row[1:] for row in shown.rows}
    assert len(rows) == len(shown.rows)
    assert rows["serving-cost-a100"] == (
        "0.0049 US cents",
        "0.0049 US cents",
        "0.0049 USD",
        "0.0049 $ cents",
        "open: 0.0049 USD",
    )
    assert rows["optimizer-sharding"] == ("1", "-", "1-3", "1-3", "open: 1; open: 1-3")
    assert rows["forward-flops"][-1] == "none; 560 as GFLOP"
    assert rows["refinedweb-tokens"][:2] == ("-", "-")
    assert not {"total-parameters", "layers", "serving-gpus"} & set(rows)


@pytest.mark.parametrize(
    ("figures", "admits"),
    [
        ([("10", "GPUs", "A"), ("15", "GPUs", "B")], "open: 10 GPUs"),
        ([("40", "GPUs", "A"), ("30", "GPUs", "B")], "none"),
        ([("<30", "GPUs", "A"), ("10", "GPUs", "B")], "<30 GPUs; open: 10 GPUs"),
        ([("10", "GPUs", "A"), ("many", "GPUs", "B")], "open: 10 GPUs"),
        ([("few", "GPUs", "A"), ("many", "GPUs", "B")], "not quantitative"),
        ([("10", "GPUs", "A"), ("~10", "GPUs", "B")], None),
    ],
)
def test_which_reading_theory_admits(tmp_path, figures, admits):
    """All that are consistent, then what is open, or none; one figure in other signs is no difference."""
    found = audit(spec(tmp_path, claim("gpus", "training.gpus", *figures))).disagreements
    assert [one.admits for one in found] == ([] if admits is None else [admits])


def test_the_sources_are_data_too():
    """JSON has the columns, what theory admits, and every decider with the values at which it turns."""
    data = json.loads(json.dumps(LEAK.as_dict(), allow_nan=False))
    (row,) = (one for one in data["disagreements"] if one["claim"] == "optimizer-sharding")
    assert row["documents"] == {"A": "1", "B": "-", "C": "1-3", "D": "1-3"}
    assert row["admits"] == "open: 1; open: 1-3"
    deciders = [f["decider"] for v in data["verdicts"] for f in v["findings"] if f["decider"]]
    assert deciders
    assert all(one["turns"] for one in deciders if one["alone"])
