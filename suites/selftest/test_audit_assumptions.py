"""Assumptions of a spec: what a file may say of them, what turns on them, and `--assume` in their place."""

from __future__ import annotations

import json

import pytest

from harness.audit import assume, audit, explain, solve
from harness.cli import main
from harness.spec import SpecError, load
from suites.selftest.small_specs import BASE, claim, only
from suites.selftest.small_specs import spec as small

RATE = """
[assumptions.rate]
value = 2
values = [1, 2, 3]
unit = "USD/h"
sources = ["B"]
why = "what a GPU-hour is said to cost"
"""
RENT = 'given = { gpus = 10, days = 1, gpu_hour_usd = "assumptions.rate" }'
"""10 x 24 h at the rate: 240, 480 or 720 USD."""


def spec(tmp_path, *claims, assumptions=RATE):
    """The small model with an assumption and these claims."""
    return small(tmp_path, *claims, base=BASE + assumptions)


def rent(printed):
    """A claim on what ten GPUs cost in a day."""
    return claim("rent", "training.rent", (printed, "USD", "A"), extra=RENT)


def outcomes(audited):
    """Outcome of each figure, by claim."""
    found = {}
    for verdict in audited.verdicts:
        found.setdefault(verdict.claim.id, []).append(verdict.outcome)
    return found


def test_an_assumption_is_read_with_its_value_among_the_values(tmp_path):
    """What is tried is listed once, in order and with the assumed value, which alone needs no list."""
    one = spec(tmp_path).assumptions["rate"]
    assert (one.value, one.values, one.unit, one.sources) == (2, (1, 2, 3), "USD/h", ("B",))
    assert one.why
    alone = spec(tmp_path, assumptions='[assumptions.rate]\nvalue = 5\nwhy = "w"\n').assumptions["rate"]
    assert alone.values == (5,)
    added = RATE.replace("values = [1, 2, 3]", "values = [3, 1]")
    assert spec(tmp_path, assumptions=added).assumptions["rate"].values == (1, 2, 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value = 2", "value = true", r"rate\.value: got true; it should be a valid number"),
        ("value = 2", 'value = "2"', r'rate\.value: got "2"'),
        ("value = 2\n", "", r"rate\.value: is missing"),
        ("value = 2", "value = nan", r"rate\.value: is not a finite number"),
        ("[1, 2, 3]", '[1, "x"]', r'rate\.values\[1\]: got "x"'),
        ("[1, 2, 3]", "3", r"rate\.values: got 3; it should be a valid list"),
        ("values =", "valeus =", r'rate\.valeus: unknown key; did you mean "values"\?'),
        ('why = "what a GPU-hour is said to cost"\n', "", r"rate\.why: is missing"),
        ('["B"]', '["Z"]', r'rate\.sources: cites "Z"'),
        ("assumptions.rate", 'assumptions."Hourly Rate"', "it should be lower-case letters"),
        ("[assumptions.rate]", "[assumption.rate]", 'unknown key; did you mean "assumptions"'),
    ],
)
def test_a_wrong_assumption_is_an_error_with_its_place(tmp_path, old, new, message):
    """File, line, field, what is wrong, and what would be right."""
    assert old in RATE
    with pytest.raises(SpecError, match=rf"small\.toml:\d+: assumption.*{message}"):
        spec(tmp_path, assumptions=RATE.replace(old, new))


@pytest.mark.parametrize(
    ("printed", "outcome", "why"),
    [
        ("<1000", "consistent", "with rate 1, 2, 3"),
        ("240", "undetermined", "rate decides: holds at 1, fails from 2; fails at what is assumed"),
        ("400-800", "undetermined", "rate decides: fails at 1, holds from 2; holds at what is assumed"),
        ("480", "undetermined", "rate decides: holds at 2, fails at 1, 3; holds at what is assumed"),
        ("900", "contradicts", "out of reach of every completion, whether rate 1, 2, 3"),
    ],
)
def test_an_assumption_decides_and_the_audit_says_where_it_turns(tmp_path, printed, outcome, why):
    """The verdict is over every value that is tried, and names those at which it would turn."""
    found = audit(spec(tmp_path, rent(printed)))
    assert only(found).outcome == outcome
    assert found._why(only(found)) == why


@pytest.mark.parametrize(
    ("rate", "outcome"), [("1", "consistent"), ("2.5", "contradicts"), ("1,3", "undetermined")]
)
def test_an_assumption_may_be_changed(tmp_path, rate, outcome):
    """`--assume` puts other values in the place of all that the file tries."""
    document = spec(tmp_path, rent("240"))
    assert only(audit(assume(document, [f"rate={rate}"]))).outcome == outcome
    assert only(audit(document)).outcome == "undetermined"


def test_what_was_assumed_is_shown(tmp_path):
    """Tables, data, explanation and solution say that they are not of the file as it is."""
    document = assume(spec(tmp_path, rent("240")), ["rate=4", "gpus=30"])
    found = audit(document)
    changed = found.tables()[0]
    assert changed.title == "Not what the file says: changed by --assume"
    assert changed.rows == (
        ("assumptions.rate", "4", "1, 2, 3", ""),
        ("training.gpus", "30", "10, 20", ""),
    )
    assert solve(document).tables()[0].rows == changed.rows
    data = json.loads(json.dumps(found.as_dict()))
    assert data["assumed"] == {"assumptions.rate": [4.0], "training.gpus": [30]}
    assert data["assumptions"][0]["values"] == [4.0]
    assert "assumed on the command line: training.gpus = 30" in explain(document, "rent")
    table = next(table for table in found.tables() if table.title.startswith("Assumptions"))
    assert table.rows[0][:4] == ("rate", "4", "4", "USD/h")
    assert "changed by --assume" in table.rows[0][4]


def test_an_axis_that_an_assumption_states_is_restated_with_it():
    """gpu_hour_usd=1.10 pins the axis and makes ours say 1.1, so that 63e6 USD can be the cost of the run."""
    leak = load("gpt4-leak")
    changed = audit(assume(leak, ["gpu_hour_usd=1.10"]))
    assert changed.spec.pins[0].restates == ("a100-hour-price",)
    price = next(v for v in changed.verdicts if v.claim.id == "a100-hour-price")
    assert (str(price.figure), price.figure.sources, price.outcome) == (
        "1.1 USD",
        ("--assume",),
        "consistent",
    )
    assert outcomes(audit(leak))["training-cost-a100"][0] == "contradicts"
    assert outcomes(changed)["training-cost-a100"][0] == "undetermined"


def test_a_leaf_may_be_assumed():
    """A width leaves the completions that have it; a source's claim on another value then contradicts."""
    leak = load("gpt4-leak")
    narrow = audit(assume(leak, ["architecture.d_model=10752"]))
    assert 0 < narrow.blocks["architecture"] < audit(leak).blocks["architecture"]
    layers = audit(assume(leak, ["n_layers=96"]))
    assert outcomes(layers)["layers"] == ["contradicts"]
    several = assume(leak, ["d_model=10752,14848"])
    assert set(solve(several).distinct["d_model"]) <= {10752, 14848}


def test_a_convention_of_ours_may_be_restated(tmp_path):
    """The quantity of a claim of the kind assumption is a name too: what it states becomes the value."""
    ours = 'kind = "assumption"\ngiven = { exact = true }'
    ratio = claim("ratio", "architecture.query_ratio", ("2", "x", "A"), extra=ours)
    document = assume(spec(tmp_path, ratio), ["query_ratio=0.5"])
    assert document.claims[0].readings[0].value == "0.5"
    assert document.pins[0].before == ("2",)
    assert only(audit(spec(tmp_path, ratio))).outcome == "contradicts"
    assert only(audit(document)).outcome == "undetermined"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["rate"], "--assume rate: it is no assumption; give NAME=VALUE"),
        (["rate="], "it is no assumption"),
        (["=3"], "it is no assumption"),
        (["rate=1,,2"], "is no value of assumptions.rate; give a number"),
        (["rate=fast"], "fast is no value of assumptions.rate; give a number"),
        (["rate=inf"], "inf is no value"),
        (["rate=true"], "is no value of assumptions.rate"),
        (["gpus=-1"], "-1 is no value of training.gpus; give a number of at least 0"),
        (["rats=1"], 'small assumes nothing that is called rats; did you mean "rate"?'),
        (["training.gpu=1"], 'did you mean "training.gpus"?'),
        (["context=1"], "context may be training.context or serving.context; give the name in full"),
        (["rate=1", "rate=2"], "assumptions.rate is assumed twice; give all its values in one: rate=1,2"),
        (["n_heads=0"], "got 0 among the values"),
        (["n_heads=3.5"], "got 3.5 among the values"),
        (["n_heads=4", "n_kv_heads=3"], "no completion is left that makes a model"),
    ],
)
def test_what_cannot_be_assumed_is_one_sentence(tmp_path, texts, message):
    """A name that is none, a name of two things, and a value that cannot be are refused by what was typed."""
    with pytest.raises(SpecError) as raised:
        assume(spec(tmp_path), texts)
    assert str(raised.value).startswith("--assume ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_command_line_assumes(capsys):
    """`audit` and `solve` take it, more than once; what is wrong with it is one sentence and code 78."""
    for arguments in (["audit", "--assume", "gpus=24000,25000"], ["solve", "--limit", "1"]):
        with pytest.raises(SystemExit) as done:
            main([arguments[0], "gpt4-leak", *arguments[1:], "--assume", "d_model=10752"])
        assert done.value.code == 0
        assert "changed by --assume" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["audit", "gpt4-leak", "--assume", "gpu_hour=1"])
    assert done.value.code == 78
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert 'did you mean "gpu_hour_usd"?' in shown.err


def test_a_constant_names_an_axis_that_the_spec_has(tmp_path):
    """A claim that takes a constant from an assumption which is not there is refused with the nearest one."""
    wrong = claim("rent", "training.rent", ("1", "USD", "A"), extra=RENT.replace(".rate", ".rats"))
    with pytest.raises(SpecError, match=r'rent\.given\.gpu_hour_usd: .*did you mean "assumptions\.rate"\?'):
        audit(spec(tmp_path, wrong))
    growth = claim(
        "growth", "parameters.growth", (">1", "x", "A"), extra='given = { baseline = "assumptions.rate" }'
    )
    with pytest.raises(SpecError, match="depends on the architecture alone"):
        audit(spec(tmp_path, growth))


def test_an_explanation_says_where_an_assumed_number_is_from(tmp_path):
    """Name, value, unit, what is tried, why and who says so stand beside the formula in numbers."""
    text = explain(spec(tmp_path, rent("480")), "rent")
    assert "rate = 2 USD/h (assumed; tried: 1, 2, 3; what a GPU-hour is said to cost; B)" in text
    assert "rent = gpus * days * 24 * rate = 10 * 1 * 24 * 2 = 480 USD" in text
    assert "turns between 1 and 2, between 2 and 3" in text
