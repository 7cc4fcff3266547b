"""Tables as text: whole lines for programs, wrapped ones for people, and nothing lost on the way."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.results.render import as_json, render, room
from harness.theory.describe import Table
from suites.selftest.stubs import command

TABLE = Table(
    "What was claimed, what theory says, and why the two cannot agree",
    ("claim", "count", "why"),
    (("parameters-per-node", 130_000_000_000, "not with weights-per-gpu-serving, serving-tensor-parallel"),),
)


def test_lines_are_whole_where_no_one_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a width on a terminal, or where COLUMNS says so; else there is none."""
    monkeypatch.delenv("COLUMNS", raising=False)
    assert room(is_terminal=False) is None
    assert room(is_terminal=True)
    monkeypatch.setenv("COLUMNS", "97")
    assert room(is_terminal=False) == room(is_terminal=True) == 97


def test_a_table_that_fits_is_left_alone() -> None:
    """A width that is wide enough changes nothing."""
    assert render(TABLE, width=200) == render(TABLE)


def test_words_stay_whole_while_they_can() -> None:
    """Identifiers can be copied out of a wrapped table, and numbers stay to the right."""
    lines = render(TABLE, width=70).splitlines()
    assert max(map(len, lines)) <= 70
    assert lines[3] == "parameters-per-node  130,000,000,000  not with"
    assert lines[4].strip() == "weights-per-gpu-serving,"


def test_words_break_after_hyphens_before_they_break_anywhere() -> None:
    """With less room than the longest words, hyphens are where they part."""
    lines = render(TABLE, width=44).splitlines()
    assert max(map(len, lines)) <= 44
    assert [line.split()[0] for line in lines[4:7]] == ["parameters-", "per-node", "gpu-serving,"]


CELLS = st.text(st.sampled_from("ab-, "), max_size=30)


@given(
    rows=st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[CELLS] * n), min_size=2, max_size=4)),
    width=st.integers(20, 90),
)
def test_no_line_is_longer_than_there_is_room(rows: list[tuple[str, ...]], width: int) -> None:
    """Whatever the cells hold, a table of up to four columns fits into 20 characters and more."""
    text = render(Table("", rows[0], tuple(rows[1:])), width=width)
    assert all(len(line) <= width for line in text.splitlines())


@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=3), width=st.integers(8, 60))
def test_wrapping_loses_nothing(rows: list[tuple[str, str]], width: int) -> None:
    """The letters of a wrapped table are those of the whole one."""

    def letters(text: str) -> list[str]:
        return sorted(re.sub(r"[\s-]", "", text))

    table = Table("t", ("x", "y"), tuple(rows))
    assert letters(render(table, width=width)) == letters(render(table))


def test_a_table_without_rows_says_so() -> None:
    """It has a title and no columns, in text and in Markdown."""
    empty = Table("Failures", ("property",), ())
    assert render(empty) == "Failures\n(none)"
    assert render(empty, "markdown") == "### Failures\n\n(none)\n"
    assert as_json(empty) == {"title": "Failures", "rows": []}


def test_markdown_cells_end_where_they_should() -> None:
    """A bar inside of a cell is escaped."""
    assert "| a \\| b |" in render(Table("t", ("x",), (("a | b",),)), "markdown")


def test_an_audit_can_be_read_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No line of an audit or of a derivation is longer than the terminal; in a pipe lines are whole."""
    for arguments in (("audit", "gpt4-leak"), ("audit", "gpt4-leak", "--explain", "parameters-per-node")):
        longest = []
        for columns in ("120", ""):
            monkeypatch.setenv("COLUMNS", columns)
            assert command(*arguments) == 0
            longest.append(max(map(len, capsys.readouterr().out.splitlines())))
        assert longest[0] <= 120 < longest[1]


def test_many_columns_that_do_not_fit_are_written_row_by_row() -> None:
    """Where words would have to be broken for so many columns, each row is a paragraph with its headers."""
    headers = tuple(f"header {i}" for i in range(12))
    table = Table("Wide", headers, (tuple(range(12)), ("", *range(11))))
    text = render(table, width=60)
    assert max(map(len, text.splitlines())) <= 60
    flat = " ".join(text.split())
    assert "- header 0 0, header 1 1, header 2 2," in flat
    assert "header 0 ," not in flat
    assert text.count("\n- ") == 2
