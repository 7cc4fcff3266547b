"""The progress line: there for what takes long, and only then, and only on stderr."""

from __future__ import annotations

import sys
import time

import pytest

from harness.cli import progress as module
from harness.cli.progress import progress


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of 2 s would be a long one."""
    monkeypatch.setattr(module, "DELAY_S", 0.1)
    monkeypatch.setattr(module, "EVERY_S", {True: 0.05, False: 0.05})


def test_what_is_over_soon_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Below the delay there is no line, and no library is loaded for one."""
    with progress("audit") as state:
        state.step()
    assert capsys.readouterr() == ("", "")


def test_what_takes_long_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the work, the steps that are done of how many, and what is being done."""
    with progress("bench layer", total=4) as state:
        state.step("float32, 512 tokens", done=3)
        time.sleep(0.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert "bench layer:  75%" in err
    assert "3/4 [00:00<00:00, float32, 512 tokens]" in err


def test_work_of_unknown_length_shows_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a total there is no share, and the line still moves."""
    with progress("listing implementations"):
        time.sleep(0.5)
    assert capsys.readouterr().err.count("listing implementations [00:0") >= 2


def test_the_line_ends_with_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    """An exception passes through, and nothing is written after it."""

    def broken() -> None:
        with progress("audit"):
            time.sleep(0.3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_without_a_stderr_there_is_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was started with stderr closed works all the same."""
    monkeypatch.setattr(sys, "stderr", None)
    with progress("audit"):
        time.sleep(0.3)
