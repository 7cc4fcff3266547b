"""Audits of small specs: controls with published truth, and statements that cannot be judged."""

from __future__ import annotations

import pytest

from harness.audit import audit, solve
from harness.spec import SpecError, load, names
from suites.selftest.small_specs import BASE, claim, only, spec

WAITS, NO_FIGURE = "not yet judged", "not quantitative"


def test_completions_are_models_each_counted_once(tmp_path):
    """Fractions, key/value heads that do not divide the heads, and values named twice are no completions."""
    found = audit(spec(tmp_path, claim("size", "parameters.total", (">1", "parameters", "A"))))
    # 2 widths x (160 and 256, or 320 and 512: 2.51 gives a fraction) x (4 heads or 1: 3 does not divide 4)
    assert found.blocks["architecture"] == 2 * 2 * 2


def test_a_stated_leaf_ranges_over_its_domain_while_it_is_judged(tmp_path):
    """With nothing else said, the layers that a source states are one possibility of two."""
    verdict = only(audit(spec(tmp_path, claim("layers", "architecture.n_layers", ("4", "layers", "A")))))
    assert verdict.outcome == "undetermined"
    assert (verdict.findings[0].low, verdict.findings[0].high) == (2, 4)


def test_claims_together_determine_a_leaf(tmp_path):
    """A size that four layers alone have makes the statement on layers consistent."""
    target = load_total(tmp_path, n_layers=4)
    size = claim(
        "size", "parameters.total", (str(target), "parameters", "A"), extra="given = { exact = true }"
    )
    found = audit(spec(tmp_path, size, claim("layers", "architecture.n_layers", ("4", "layers", "A"))))
    assert {v.claim.id: v.outcome for v in found.verdicts}["layers"] == "consistent"


def load_total(tmp_path, n_layers):
    """Parameters of the smallest completion with so many layers."""
    from harness.theory import parameters

    values = {"d_model": 64, "attention.n_kv_heads": 1, "ffn.d_ff": 160, "n_layers": n_layers}
    return parameters.total(spec(tmp_path).complete(values))


def test_a_spec_without_claims_says_so(tmp_path):
    """No claims: one table that says there is nothing to judge, and every completion is a solution."""
    small = spec(tmp_path)
    found = audit(small)
    assert found.verdicts == ()
    assert [table.title for table in found.tables()] == ["small states no claims: there is nothing to judge"]
    assert solve(small).completions == 2 * 2 * 2


@pytest.mark.parametrize(
    ("quantity", "reading", "outcome", "reason"),
    [
        ("parameters.colour", ("1", "", "A"), WAITS, "does not know the quantity parameters.colour"),
        ("parameters.total", ("1", "furlongs", "A"), WAITS, "unit 'furlongs'"),
        ("training.days", ("1", "days", "A"), WAITS, "what training.days may be"),
        (
            "training.mfu",
            ("1", "%", "A"),
            WAITS,
            "training.tokens, training.peak_flops, training.days may be",
        ),
        ("architecture.moe.top_k", ("1", "experts", "A"), WAITS, "what architecture.moe.top_k may be"),
        ("assumptions.rate", ("1", "", "A"), WAITS, "what assumptions.rate may be"),
        (
            "parameters.total",
            ("many", "parameters", "A"),
            NO_FIGURE,
            "'many' is no figure of parameters.total",
        ),
        ("parameters.total", ("yes", "", "A"), NO_FIGURE, "'yes' affirms it, and is no figure"),
        ("training.gpus", ("no", "", "A"), NO_FIGURE, "'no' denies it, and is no figure of training.gpus"),
        ("", ("1", "", "A"), NO_FIGURE, "no quantity of the theory"),
    ],
)
def test_what_cannot_be_judged_says_why(tmp_path, quantity, reading, outcome, reason):
    """What theory lacks is not yet judged, what prints no figure not quantitative, and each says why."""
    verdict = only(audit(spec(tmp_path, claim("c", quantity, reading))))
    assert verdict.outcome == outcome
    assert reason in verdict.reason


def test_a_constant_that_fixes_an_axis_needs_none_in_the_spec(tmp_path):
    """What a claim gives need not be in the file, and is not varied where it is."""
    given = "given = { gpus = 10, days = 2, gpu_hour_usd = 3 }"
    cost = claim("cost", "training.cost", ("1440", "USD", "A"), extra=given)
    assert only(audit(spec(tmp_path, cost))).outcome == "consistent"


def test_a_block_has_the_axes_that_its_axes_are_factors_of(tmp_path):
    """Key/value heads in ratio to heads are judged in any block, beside the heads they are a ratio of."""
    heads = claim("heads", "architecture.attention.n_kv_heads", ("1", "heads", "A"))
    base = BASE.replace(
        "n_heads = 4\n",
        'n_heads = { status = "unknown", domain = { of = "d_model", values = [0.0625] }, why = "?" }\n',
    )
    verdict = only(audit(spec(tmp_path, heads, base=base)))
    assert verdict.outcome == "undetermined"
    assert (verdict.decisive.low, verdict.decisive.high) == (1, 8)


def test_each_figure_of_a_disagreement_is_judged_by_itself(tmp_path):
    """One source's figure may hold where another's cannot; the claim as such does not contradict then."""
    figures = [("10", "GPUs", "A"), ("40", "GPUs", "B")]
    found = audit(spec(tmp_path, claim("gpus", "training.gpus", *figures)))
    assert [v.outcome for v in found.verdicts] == ["undetermined", "contradicts"]
    assert [one.claim for one in found.disagreements] == ["gpus"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("given = { basline = 1e9 }", "baseline"),
        ("", "needs the constant baseline"),
        ("given = { baseline = true }", "baseline: got true"),
        ('given = { baseline = "lots" }', 'baseline: got "lots"'),
        ("given = { baseline = [1, 2] }", "baseline: got"),
        ("given = { baseline = 0 }", "parameters.growth cannot be computed: divide by zero"),
    ],
)
def test_wrong_constants_are_errors(tmp_path, extra, message):
    """A constant that the quantity does not take, or lacks, is an error that names it, with the line."""
    wrong = spec(tmp_path, claim("growth", "parameters.growth", (">1", "x", "A"), extra=extra))
    with pytest.raises(SpecError, match=message) as raised:
        audit(wrong)
    assert "growth.given" in str(raised.value)
    assert f":{wrong.claims[0].line}:" in str(raised.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('gpus = ["ten"]', r":\d+: training\.gpus: got \['ten'\]; it should be a number"),
        ("gpus = [10, -20]", r":\d+: training\.gpus: got"),
        ("gpus = []", r":\d+: training\.gpus: got"),
        ("gpus = true", r":\d+: training\.gpus: got true"),
        ("gpuss = 10", r':\d+: training\.gpuss: unknown key; did you mean "gpus"\?'),
    ],
)
def test_an_axis_that_is_no_number_is_an_error(tmp_path, entry, message):
    """What [training] holds is numbers under known keys, or is refused by file, line and field."""
    with pytest.raises(SpecError, match=message):
        spec(tmp_path, base=BASE.replace("gpus = [10, 20]", entry))


def test_a_fact_at_which_a_formula_has_no_value_is_an_error(tmp_path):
    """A quantity that would be divided by zero ends in a sentence, not in infinity or a warning."""
    base = BASE + "tensor_parallel = [0, 8]\npipeline_parallel = 2\n"
    weights = claim(
        "w", "training.weights_per_gpu", ("1", "GB", "A"), extra="given = { bytes_per_parameter = 2 }"
    )
    with pytest.raises(SpecError, match=r":\d+: w\.given: training\.weights_per_gpu cannot be computed"):
        audit(spec(tmp_path, weights, base=base))


def test_a_claim_on_a_leaf_that_is_none_is_an_error(tmp_path):
    """A misspelt leaf is refused, and a quantity that is nearly a known one is asked about."""
    with pytest.raises(SpecError, match=r'did you mean "architecture\.n_layers"\?'):
        audit(spec(tmp_path, claim("layers", "architecture.n_layer", ("4", "layers", "A"))))
    near = only(audit(spec(tmp_path, claim("gpus", "training.gpuss", ("10", "GPUs", "A")))))
    assert near.outcome == "not yet judged"
    assert near.reason.endswith("is it training.gpus?")


def test_a_claim_in_a_foreign_unit_alone_is_judged_where_the_others_hold(tmp_path):
    """A rate for an amount contradicts, and theory's range is that of the completions the others admit."""
    layers = claim("layers", "architecture.n_layers", ("4", "layers", "A"))
    flop = claim("work", "flops.forward", ("1", "FLOP", "A"), extra="given = { context = 0 }")
    rate = claim("work", "flops.forward", ("1", "FLOP/s", "A"), extra="given = { context = 0 }")
    found = [audit(spec(tmp_path, layers, one)) for one in (flop, rate)]
    amount, other = (one.verdicts[1].findings[0] for one in found)
    assert found[1].verdicts[1].outcome == "contradicts"
    assert (amount.admitted, amount.low, amount.high) == (other.admitted, other.low, other.high)
    assert other.admitted < found[1].blocks["architecture"]


def test_an_unknown_convention_is_an_error(tmp_path):
    """A counting convention that theory does not have is refused with those that it has."""
    named = claim("n", "parameters.total", ("1", "parameters", "A"), extra='given = { convention = "mine" }')
    with pytest.raises(SpecError, match="no-router"):
        audit(spec(tmp_path, named))


def test_a_search_that_is_too_wide_is_an_error(tmp_path):
    """Domains with more completions than can be searched are refused with the axis to cut."""
    wide = BASE.replace("values = [64, 128]", "min = 1, max = 90000, step = 1").replace(
        "vocab_size = 100",
        'vocab_size = { status = "unknown", why = "?", domain = { min = 1, max = 5000, step = 1 } }',
    )
    size = claim("size", "parameters.total", (">1", "parameters", "A"))
    with pytest.raises(SpecError, match=r"completions; at most .* give architecture\.d_model fewer values"):
        audit(spec(tmp_path, size, base=wide))


def test_too_many_figures_in_a_block_are_an_error(tmp_path):
    """More figures on one block than a pattern has bits for are refused."""
    many = [claim(f"c{i}", "parameters.total", (f">{i}", "parameters", "A")) for i in range(21)]
    with pytest.raises(SpecError, match="21 figures to judge; at most 20 fit"):
        audit(spec(tmp_path, *many))


@pytest.mark.parametrize("name", [name for name in names() if name != "gpt4-leak"])
def test_published_models_agree_with_their_figures(name):
    """Every published figure is met under some counting convention, or is cut off and not rounded."""
    cut_off = {"llama-3.1-405b": {"total-parameters"}}  # 405.85e9 is printed as 405e9
    contradicting = {v.claim.id for v in audit(load(name)).verdicts if v.outcome == "contradicts"}
    assert contradicting == cut_off.get(name, set())
