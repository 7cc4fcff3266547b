"""The page of published tables: its rows and fits, what was worked out about the leak, and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cli import main
from harness.results.render import render
from harness.results.validation import page
from harness.spec import SpecError
from harness.spec.printed import interval
from harness.validation import leak_table, published, silicon_rows, training_tables
from harness.validation.fit import fitted, halves, held_out, singles
from harness.validation.held import HEADERS, Row, tally
from harness.validation.page import SECTIONS, published_tables, sections, silicon_tables, tables
from harness.validation.worked import Worked

ROOT = Path(__file__).resolve().parents[2]


def test_an_error_beyond_10_per_cent_wants_a_reason() -> None:
    """A row that is far off, or not predicted, cannot be without a reason; one within 10 % prints none."""
    for predicted in (1.2, None):
        with pytest.raises(ValueError, match="no reason why"):
            Row("a figure", 1.0, predicted)
        assert Row("a figure", 1.0, predicted, why="it rained").cells()[-1] == "it rained"
    near = Row("a figure", 1.0, 1.09, why="it rained")
    assert dict(zip(HEADERS, near.cells(), strict=True)) == {
        "figure": "a figure",
        "published": "1",
        "predicted": "1.09",
        "unit": "",
        "error": "+9.0 %",
        "within 10 %": True,
        "why not closer, or not predicted": "",
    }


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_a_bound_has_an_error_on_one_side_only(figure: float, predicted: float) -> None:
    """A prediction on the published side of a bound has no error, and on the other side the whole one."""
    above = Row("a figure", figure, predicted, why="it rained", bound=">").error
    below = Row("a figure", figure, predicted, why="it rained", bound="<").error
    assert above is not None
    assert below is not None
    assert above <= 0 <= below
    assert above + below == pytest.approx(predicted / figure - 1)
    assert above == 0 or below == 0


def test_the_tally_counts_every_row_once() -> None:
    """The kinds of ending of each table, and of all, add up to its rows."""
    found = tally(sections())
    for _, rows, *endings in found.rows:
        assert sum(map(int, endings)) == rows
    assert found.rows[-1][1] == sum(len(one.rows) for one in sections())


@given(st.floats(0.3, 0.9), st.lists(st.floats(0.5, 50), min_size=2, max_size=8))
def test_a_fit_finds_the_parameter_that_made_the_rows(true: float, work: list[float]) -> None:
    """Where rows follow the model exactly, every fold gives the parameter, and every row is predicted."""
    rows = [one / true + 0.1 for one in work]
    found = held_out(lambda row, share: work[row] / share + 0.1, rows, halves(len(rows)), (0.1, 2.0))
    # Bisection ends at double precision; the logarithm of a ratio near 1 keeps half of its digits.
    assert found.parameters == pytest.approx([true] * len(rows), rel=1e-7)
    assert found.predicted == pytest.approx(rows, rel=1e-7)


def test_a_fit_that_cannot_be_is_refused() -> None:
    """No rows, and an interval in which predictions stay on one side, end in a sentence with the numbers."""
    with pytest.raises(ValueError, match="no rows"):
        fitted(lambda _, x: x, [1.0], [], (0.5, 2.0))
    with pytest.raises(ValueError, match=r"\+0\.69 at 2\.0 and \+1\.10 at 3\.0"):
        fitted(lambda _, x: x, [1.0], [0], (2.0, 3.0))


@pytest.mark.parametrize("row", [0, 3, 9])
def test_a_row_does_not_tell_its_own_prediction(row: int) -> None:
    """If a published time were twice as long, its own prediction would stay, and the other half's change."""
    times = list(training_tables.megatron_seconds())
    folds = halves(len(times))

    def model(place: int, compute: float) -> float:
        return float(training_tables.megatron_step(place, compute).seconds)

    before = held_out(model, times, folds, training_tables.COMPUTE).predicted
    times[row] *= 1.2
    after = held_out(model, times, folds, training_tables.COMPUTE).predicted
    mine = folds[row % 2]
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (old == new) == (place in mine), place


def test_folds_cover_every_row_once() -> None:
    """Halves and singles part the rows."""
    for rows in (2, 3, 10):
        for folds in (halves(rows), singles(rows)):
            assert sorted(row for fold in folds for row in fold) == list(range(rows))


def test_every_worked_figure_has_a_verdict_and_a_derivation() -> None:
    """Nothing worked by hand is left out: each has theory's figure, and how it comes about."""
    found = leak_table.worked()
    assert len({one.statement for one in found}) >= 85
    for one in found:
        assert one.verdict in ("reproduced", "refuted")
        assert one.how
        if one.verdict == "refuted":
            assert any(digit in one.how for digit in "0123456789"), one.statement


def test_what_theory_refutes_of_the_leak_worked() -> None:
    """Figures printed too finely, a model with too few experts, roundings, a latency, a range too narrow."""
    refuted = {one.statement: one for one in leak_table.worked() if one.verdict == "refuted"}
    assert set(refuted) == {
        "the same, printed to three digits",
        "multi-query attention with queries twice as wide",
        "63e6 USD is off by, at most",
        "training FLOPs over the leak's",
        "activations, selective recomputation, first stage",
        "bubble x failures x kernels at 58 %",
        "tensor parallelism in a step",
    }
    # More than 34 s b h / t: a second expert for each token.
    assert refuted["activations, selective recomputation, first stage"].theory > 45


@pytest.mark.parametrize("factor", [0.98, 1.02, 1000.0])
def test_a_wrong_figure_would_be_refuted(factor: float) -> None:
    """Theory that was 2 % or 1,000 times off would refute nearly every statement of three digits."""
    fine = [one for one in leak_table.worked() if one.verdict == "reproduced" and _digits(one.hand) >= 3]
    assert len(fine) > 40
    wrong = [replace(one, theory=one.theory * factor) for one in fine]
    # 0.0117 of four decimals, and the like, have an interval of 1 % of their own.
    assert sum(one.verdict == "refuted" for one in wrong) >= 0.97 * len(fine)


def _digits(text: str) -> int:
    """Significant digits of a printed figure, by the width of its interval."""
    printed = interval(text)
    middle = (printed.low + printed.high) / 2
    width = printed.high - printed.low
    return 0 if not middle or width <= 0 or width == float("inf") else len(str(int(middle / width)))


def test_verdicts_follow_the_printed_rounding() -> None:
    """A figure is reproduced to half a unit of its last digit, or to half a per cent."""
    one = Worked("a statement", "1.83e12", 1.8349e12, "", "a derivation")
    assert one.verdict == "reproduced"
    assert replace(one, theory=1.845e12).verdict == "refuted"
    assert replace(one, hand="<30", theory=29.9).verdict == "reproduced"
    assert replace(one, hand="<30", theory=31.0).verdict == "refuted"


@pytest.mark.parametrize(
    "words",
    [
        "GPT-3, table D.1",
        "Megatron-LM, table 1: parameters",
        "Megatron-LM, table 1: training steps",
        "PaLM, table 3",
        "PaLM 540B on 64 TPU v4",
        "Llama 3 405B, table 4",
        "DeepSeek-V3, table 1",
        "Korthikanti et al. 2022, figure 1",
        "Korthikanti et al. 2022: iterations",
        "Mixtral 8x7B: a decode step against the batch",
        "gpt-oss, table 1",
        "GShard, table 1",
        "Llama 3.1 70B: prefill and decode",
        "Keys and values of one token",
        "Effective time",
        "Measured serving rows",
        "The leak, worked: training",
    ],
)
def test_every_published_table_is_on_the_page(words: str) -> None:
    """Each published table has one of its own, with rows."""
    found = [one for one in tables(silicon=False) if one.title.startswith(words)]
    assert len(found) == 1
    assert found[0].rows


def test_every_published_row_is_on_the_page() -> None:
    """No row of the data is left out."""
    rows = {one.title: len(one.rows) for one in sections()}
    assert len(rows) == len(SECTIONS)
    counted = [
        ("Megatron-LM, table 1: parameters", len(published.MEGATRON)),
        ("Megatron-LM, table 1: training", 2 * len(published.MEGATRON)),
        ("Llama 3 405B", 2 * len(published.LLAMA) + 1),
        ("Korthikanti et al. 2022, figure 1", 3 * len(published.KORTHIKANTI)),
        ("Korthikanti et al. 2022: iterations", 3 * len(published.KORTHIKANTI)),
        ("Mixtral", 5 * len(published.MIXTRAL)),
        ("GShard", len(published.GSHARD)),
        ("gpt-oss", 6 * len(published.GPT_OSS)),
        ("MegaScale", 2 * len(published.MEGASCALE)),
        ("PaLM 540B on", 3 * len(published.POPE) + 4),
    ]
    for start, count in counted:
        assert [number for title, number in rows.items() if title.startswith(start)] == [count]


def test_the_page_on_file_is_what_the_command_writes() -> None:
    """results/validation.md holds every published table as it is computed now."""
    text = (ROOT / "results" / "validation.md").read_text(encoding="utf-8")
    stale = [one.title for one in published_tables() if render(one, "markdown") not in text]
    stale += [one.title for one in leak_table.tables() if render(one, "markdown") not in text]
    assert not stale, "write it again: moe-harness validation --output results/validation.md"


def test_without_its_wheel_the_page_says_that_rows_were_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where aiconfigurator-core is absent there is a table that says so, and what to install."""

    def absent() -> Path:
        raise SpecError("the measured rows are not installed; install them")

    monkeypatch.setattr(silicon_rows, "path", absent)
    (only,) = silicon_tables()
    assert only.rows == ((False, "the measured rows are not installed; install them"),)


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints all tables, writes them as Markdown, says how it was made, and ends with 0."""
    path = tmp_path / "new" / "mine.md"
    with pytest.raises(SystemExit) as ending:
        main(["validation", "--no-silicon", "--output", str(path), "--format", "json"])
    assert ending.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert [one["title"] for one in printed] == [one.title for one in tables(silicon=False)]
    text = path.read_text(encoding="utf-8")
    assert text == page("mine.md", silicon=False).text()
    assert "Written by `moe-harness validation --no-silicon`; not to be edited." in text


def test_an_output_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder in the place of a file ends with 78, and no traceback."""
    with pytest.raises(SystemExit) as ending:
        main(["validation", "--no-silicon", "--output", str(tmp_path)])
    assert ending.value.code == 78
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"moe-harness: {tmp_path}: cannot be used")
