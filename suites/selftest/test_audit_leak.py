"""What the audit finds in the leaked statements on GPT-4, and that it finds it by computing."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from harness.audit import audit, explain, solve
from harness.audit.assume import assume
from harness.audit.blocks import Values
from harness.audit.derivation import names
from harness.audit.quantities import argument
from harness.audit.wording import completion
from harness.spec import SpecError, load
from harness.theory import flops, parameters
from suites.selftest.arithmetic import worked_out

LEAK = load("gpt4-leak")
AUDIT = audit(LEAK)
BLOCKS = {block.name: block for block in AUDIT._judged.case.blocks}


def outcomes(audit_, claim):
    """Outcome of each figure of a claim."""
    return {str(v.figure): v.outcome for v in audit_.verdicts if v.claim.id == claim}


def finding(audit_, claim, block="architecture"):
    """What a block says about the first figure of a claim."""
    verdict = next(v for v in audit_.verdicts if v.claim.id == claim)
    return next(f for f in verdict.findings if f.block == block)


def edited(tmp_path, *changes):
    """The leak with pieces of its text replaced, each of which occurs once."""
    text = LEAK.path.read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    path = tmp_path / "edited.toml"
    path.write_text(text, encoding="utf-8")
    return load(path)


def conflicts(audit_):
    """The smallest conflicts as sets of claims."""
    return {frozenset(member.claim.id for member in conflict.members) for conflict in audit_.conflicts}


def test_no_claim_is_dropped():
    """Each claim of the spec has a verdict on every figure, and those without findings say why."""
    assert [c.id for c in LEAK.claims] == list(dict.fromkeys(v.claim.id for v in AUDIT.verdicts))
    assert all(bool(v.findings) == (v.outcome != "not quantitative") for v in AUDIT.verdicts)
    assert all(v.reason for v in AUDIT.verdicts if v.outcome == "not quantitative")
    for claim in LEAK.claims:
        figures = [v.figure for v in AUDIT.verdicts if v.claim.id == claim.id]
        assert sum(len(figure.readings) for figure in figures) == len(claim.readings)


def test_the_search_is_wide_and_has_the_telling_widths():
    """At least 1e5 completions of the architecture; d_model 10752 and 14848, d_ff 2.1, 4 and 8 x d_model."""
    block = BLOCKS["architecture"]
    assert block.completions >= 100_000
    axes = {axis.name: axis for axis in block.axes}
    assert {10752, 14848} <= set(axes["architecture.d_model"].values)
    assert {2.09375, 4.0, 8.0} <= set(axes["architecture.moe.expert.d_ff"].values)


@pytest.mark.parametrize("claim", ["forward-flops", "dense-forward-flops"])
def test_tera_is_a_slip_for_giga(claim):
    """Both FLOP figures contradict as printed, in every unit printed, and are admitted as GFLOP."""
    verdicts = [v for v in AUDIT.verdicts if v.claim.id == claim]
    assert {v.figure.readings[0].unit for v in verdicts} == {"TFLOP", "TFLOP/s"}
    for verdict in verdicts:
        assert verdict.outcome == "contradicts"
        assert verdict.slips == ("as GFLOP",)


def test_multi_query_attention_does_not_sit_with_the_sizes():
    """55e9 of attention, 111e9 per expert, d_ff = 4 d_model, q width = d_model: not one key/value head."""
    expected = {"shared-attention-parameters", "expert-parameters", "d-ff-four-times", "query-width"}
    assert expected | {"attention-variant"} in conflicts(AUDIT)
    assert outcomes(AUDIT, "attention-variant") == {"1 heads": "contradicts"}


@pytest.mark.parametrize(
    "others",
    [{"total-parameters", "serving-parallelism"}, {"weights-per-gpu-serving", "serving-tensor-parallel"}],
)
def test_parameters_per_node_do_not_sit_with_the_layout(others):
    """130e9 per node conflicts with 1.8e12 over 16 nodes, and with under 30 GB on each of 8 GPUs."""
    assert {"parameters-per-node"} | others in conflicts(AUDIT)
    assert outcomes(AUDIT, "parameters-per-node") == {"~130e9 parameters": "contradicts"}


@pytest.mark.parametrize("claim", ["serving-cost-a100", "serving-cost-h100"])
def test_cents_lie_below_the_floor_and_dollars_do_not(claim):
    """Of the sources' units, theory admits dollars alone, at one utilisation, and says so of the cents."""
    for verdict in (v for v in AUDIT.verdicts if v.claim.id == claim):
        dollars = verdict.figure.readings[0].unit == "USD"
        assert verdict.outcome == ("undetermined" if dollars else "contradicts")
        assert verdict.slips == (() if dollars else ("as USD",))
        floor = verdict.findings[0].low
        assert (floor < verdict.figure.interval.low) == dollars
    assert claim in {one.claim for one in AUDIT.disagreements}


def test_the_training_bill_does_not_add_up():
    """63e6 USD, 25,000 GPUs, 90 to 100 days and 1 USD an hour conflict; a source's wider range does not."""
    assert {"training-cost-a100", "training-gpus", "training-days", "a100-hour-price"} in conflicts(AUDIT)
    assert outcomes(AUDIT, "training-cost-a100") == {
        "~63e6 USD": "contradicts",
        "32e6-63e6 USD": "consistent",
    }


def test_the_memory_of_40_gb_needs_more_sharding_than_stage_1():
    """Under TP x PP alone ZeRO stage 1 leaves no room on 40 GB and stage 2 does, or experts on more ranks.

    30 GB of weights with gradients fill it; experts that lie on several data-parallel ranks would make room.
    """
    alone = audit(assume(LEAK, ["expert_ranks=1"]))
    assert outcomes(alone, "optimizer-sharding") == {"1": "contradicts", "1-3": "consistent"}
    divided = audit(assume(LEAK, ["expert_ranks=2"]))
    assert "contradicts" not in outcomes(divided, "optimizer-sharding").values()
    assert set(outcomes(AUDIT, "optimizer-sharding").values()) == {"undetermined"}


@pytest.mark.parametrize(
    "claim",
    [
        "total-parameters",
        "growth-over-gpt3",
        "experts",
        "routed-experts",
        "active-parameters",
        "training-days",
    ],
)
def test_the_sizes_that_hang_together_are_consistent(claim):
    """Totals, experts and the length of the run follow from the other statements."""
    assert set(outcomes(AUDIT, claim).values()) == {"consistent"}


def test_array_theory_is_exact_theory():
    """At random completions, the patterns of the search are those of exact integers in the closed forms."""
    block, draw = BLOCKS["architecture"], random.Random(1)
    by_id = {test.claim.id: i for i, test in enumerate(block.tests)}
    exact = {
        "total-parameters": parameters.total,
        "expert-parameters": parameters.one_expert,
        "shared-attention-parameters": lambda a: parameters.part(a, "attention"),
        "active-parameters": parameters.active,
        "forward-flops": lambda a: flops.forward_per_token(a, 0),
        "dense-forward-flops": lambda a: 2 * parameters.total(a),
        "attention-variant": lambda a: a.attention.n_kv_heads,
        "layers": lambda a: a.n_layers,
        "query-width": lambda a: a.attention.n_heads * a.attention.head_dim / a.d_model,
    }
    seen = dict.fromkeys(exact, 0)
    for pattern in block.patterns.tolist():
        if draw.random() < 0.7:
            continue
        values = block.witnesses(np.array([pattern]))[pattern]
        built = LEAK.complete(completion(LEAK, values))
        for claim, count in exact.items():
            test = block.tests[by_id[claim]]
            low, high = (end * test.unit.factor for end in (test.interval.low, test.interval.high))
            holds = low <= count(built) <= high
            assert holds == bool(pattern >> by_id[claim] & 1), (claim, values)
            seen[claim] += holds
    assert all(count for claim, count in seen.items() if "flops" not in claim), seen


@pytest.mark.parametrize("conflict", AUDIT.conflicts, ids=lambda c: "+".join(m.claim.id for m in c.members))
def test_conflicts_are_real_and_minimal(conflict):
    """No completion of the block satisfies all members, and without any one of them some completion does."""
    block = BLOCKS[conflict.block]
    keys = [(member.claim.id, member.figure.readings) for member in conflict.members]
    places = [i for i, test in enumerate(block.tests) if (test.claim.id, test.readings) in keys]
    assert len(places) == len(keys)
    held = [sum(bool(pattern >> i & 1) for i in places) for pattern in block.patterns.tolist()]
    assert max(held) == len(keys) - 1
    for dropped in places:
        rest = sum(1 << i for i in places if i != dropped)
        assert any(pattern & rest == rest for pattern in block.patterns.tolist())
    for release in conflict.releases:
        interval = release.dropped.figure.interval
        assert release.high < interval.low or release.low > interval.high or interval.low_open


@pytest.mark.parametrize(
    ("claim", "old", "new"),
    [
        ("expert-parameters", '"~111e9"', '"~90e9"'),
        ("shared-attention-parameters", '"~55e9"', '"~20e9"'),
        ("layers", 'value = "120", unit = "layers"', 'value = "96", unit = "layers"'),
        ("attention-variant", '{ value = "1", unit = "heads"', '{ value = "77", unit = "heads"'),
        ("experts", 'value = "16", unit = "experts"', 'value = "8", unit = "experts"'),
    ],
)
def test_no_claim_supports_itself(tmp_path, claim, old, new):
    """Whatever its figure, a claim is judged on the same completions, and between the same ends."""
    before, after = finding(AUDIT, claim), finding(audit(edited(tmp_path, (old, new))), claim)
    assert (before.admitted, before.low, before.high) == (after.admitted, after.low, after.high)


def test_a_changed_figure_changes_the_verdict(tmp_path):
    """2.5e12 parameters in place of 1.8e12 contradict the experts they are made of."""
    changed = edited(
        tmp_path,
        ('{ value = "1.8e12", unit = "parameters"', '{ value = "2.5e12", unit = "parameters"'),
        ('{ value = "~1.8e12", unit = "parameters"', '{ value = "~2.5e12", unit = "parameters"'),
    )
    found = audit(changed)
    assert set(outcomes(found, "total-parameters").values()) == {"contradicts"}
    assert {"total-parameters", "expert-parameters"} in conflicts(found)


def test_an_undetermined_claim_names_what_decides():
    """Every undetermined verdict names an unknown, with values at which the figure holds and fails."""
    undetermined = [v for v in AUDIT.verdicts if v.outcome == "undetermined"]
    assert undetermined
    for verdict in undetermined:
        decider = verdict.decisive.decider
        assert decider.holds
        assert decider.fails
    assert finding(AUDIT, "off-peak-reuse", "load").decider.axis == "assumptions.load"


def test_derivations_give_the_value_that_theory_gives():
    """The formula that an explanation prints, worked out by itself, is the quantity at that completion.

    But for formulas that name a procedure (a search, a simulation): these have tests of their own.
    """
    checked, skipped = 0, set()
    for verdict in AUDIT.verdicts:
        for one in verdict.findings:
            quantity = one.test.quantity
            found = worked_out(quantity.formula, names(LEAK, one))
            if found is None:
                skipped.add(quantity.name)
                continue
            values = Values(LEAK, {name: np.array([value]) for name, value in one.example.items()})
            arguments = {argument(axis): values[axis] for axis in quantity.axes}
            theory = float(quantity.nominal(arguments, one.test.claim.given).reshape(-1)[0])
            # 1e-12: formula and theory group their products differently, each rounded to float64;
            # 1e-9: a value that should be 0.
            assert math.isclose(found, theory, rel_tol=1e-12, abs_tol=1e-9), quantity.name
            checked += 1
    assert checked > 80
    procedures = {"speculation.best_length", "batching.finished_sequences", "scaling.more_experts_help"}
    assert skipped <= procedures


@pytest.mark.parametrize(
    ("claim", "block", "link"),
    [
        ("forward-over-davinci", "davinci", "parameters.active"),
        ("training-flops", "run", "parameters.active"),
        ("weights-per-gpu-training", "training layout", "parameters.total"),
        ("weights-per-gpu-serving", "serving layout", "parameters.total"),
    ],
)
def test_what_takes_a_size_as_given_takes_one_that_a_model_has(claim, block, link):
    """The range is over the sizes of the models that the claims on the architecture leave, ends included."""
    stated = {"parameters.active": (2.75e11, 2.85e11), "parameters.total": (1.75e12, 1.85e12)}[link]
    one = finding(AUDIT, claim, block)
    low, high = one.linked[link]
    assert stated[0] < low < high < stated[1]
    assert not one.apart
    if claim == "forward-over-davinci":
        assert (one.low, one.high) == pytest.approx((low / 175e9, high / 175e9), rel=1e-12)


def test_explanations_show_numbers_and_the_way_out():
    """An explanation has the formula in numbers, the printed interval and what dropping a member admits."""
    text = explain(LEAK, "parameters-per-node")
    assert "1.25e11 to 1.35e11 parameters" in text
    assert "parameters_per_node = total / (pipeline_parallel - 1 + head_share) = " in text
    assert "without serving-parallelism (16 ways): 14 ways" in text


def test_explaining_no_claim_is_an_error_with_a_suggestion():
    """A misspelt claim is a SpecError that names the nearest one."""
    with pytest.raises(SpecError, match="total-parameters"):
        explain(LEAK, "total-parameter")


def test_the_audit_is_data():
    """As a dict it survives JSON, counts every verdict, and has open ends as null."""
    data = json.loads(json.dumps(AUDIT.as_dict(), allow_nan=False))
    assert sum(data["counts"].values()) == len(data["verdicts"]) == len(AUDIT.verdicts)
    assert data["completions"] == AUDIT.completions
    tables = {table.title: table for table in AUDIT.tables()}
    assert all(len(row) == len(table.headers) for table in tables.values() for row in table.rows)


def test_solving_finds_the_multi_head_shape():
    """d_model 10752 with d_ff = 4 d_model and multi-head attention gives up one statement only."""
    found = solve(LEAK)
    assert found.completions == sum(option.completions for option in found.options)
    assert len(found.rows) <= 40
    shapes = {
        (row.leaves["d_model"], row.leaves["moe.expert.d_ff"], row.gives_up)
        for row in found.rows
        if row.leaves["attention.n_heads"] == row.leaves["attention.n_kv_heads"]
    }
    assert (10752, 43008, ("attention-variant",)) in shapes
    assert {10752} <= set(found.distinct["d_model"])


def test_solutions_are_exact_and_validate():
    """Every completion that is listed makes an architecture, with the counts that theory gives it."""
    for row in solve(LEAK).rows:
        built = LEAK.complete(row.leaves)
        assert row.counts["parameters.total"] == parameters.total(built)
        assert row.counts["parameters.active"] == parameters.active(built)
        assert row.counts["parameters.expert"] == parameters.one_expert(built)
        assert row.counts["parameters.attention"] == parameters.part(built, "attention")


def test_solving_with_a_claim_kept():
    """With multi-query attention kept, d_ff = 4 d_model and q width = d_model are given up in turn."""
    found = solve(LEAK, keep=["attention-variant"])
    assert {option.gives_up for option in found.options} == {("d-ff-four-times",), ("query-width",)}
    with pytest.raises(SpecError, match="attention-variant"):
        solve(LEAK, keep=["attention-variants"])
    with pytest.raises(SpecError, match="no completion satisfies"):
        solve(LEAK, keep=["forward-flops"])


def test_the_answer_needs_no_torch():
    """An audit and a solution import neither torch nor scipy."""
    code = (
        "import sys; from harness.spec import load; from harness.audit import audit, solve;"
        "s = load('gpt4-leak'); audit(s).tables(); solve(s).tables();"
        "sys.exit(bool({'torch', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_a_million_completions_take_less_than_two_seconds():
    """At least 1e6 completions, and all that follows from them, at a rate of 1e6 in under 2 s."""
    start = time.perf_counter()
    found = audit(LEAK)
    seconds = time.perf_counter() - start
    assert found.completions >= 1e6
    # 0.07 s for each million on one core; 2 s leave room for a busy one
    assert seconds / (found.completions / 1e6) < 2
