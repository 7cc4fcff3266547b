"""The layer benchmark measures what it says, checks answers first, and leaves the process as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.reference import benchmark
from harness.reference.benchmark import FLOOR, REFERENCE, Shape
from harness.reference.experts import Experts

TINY = Shape(d_model=24, d_ff=40, n_experts=5, top_k=2)


def test_every_candidate_has_a_row_at_every_size() -> None:
    """Each dtype and size has the reference, the floor and both backends of transformers."""
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    rows = benchmark.layer(TINY, tokens=(3, 20), rounds=2)
    assert torch.get_num_threads() == threads
    sizes = {(row.dtype, row.tokens) for row in rows}
    assert sizes == {(dtype, tokens) for dtype in ("float32", "bfloat16") for tokens in (3, 20)}
    for dtype, tokens in sizes:
        of_size = {row.candidate: row for row in rows if (row.dtype, row.tokens) == (dtype, tokens)}
        assert set(of_size) == {REFERENCE, FLOOR, "transformers, eager", "transformers, grouped_mm"}
        for name, row in of_size.items():
            assert row.ratio == pytest.approx(of_size[FLOOR].seconds / row.seconds)
            assert row.gflops == pytest.approx(6 * tokens * 2 * 24 * 40 / row.seconds / 1e9)
            assert (row.error is None) == (name == FLOOR)
            if row.error is not None and dtype == "float32":
                assert row.error < benchmark.TOLERANCE[torch.float32]  # the same weights in all of them


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference whose combine is wrong gets an error instead of a speed."""
    right = Experts.combine
    monkeypatch.setattr(Experts, "combine", lambda *inputs: 1.01 * right(*inputs))
    with pytest.raises(ArithmeticError, match=r"off by 1\.0e-02 in float32"):
        benchmark.layer(TINY, tokens=(20,), dtypes=(torch.float32,), rounds=2)


def test_the_document_says_what_was_measured() -> None:
    """The Markdown names the machine and the shape, and has a line for every row."""
    row = benchmark.Row("float32", 512, REFERENCE, 0.25, 0.26, 0.9, 90.0, 5e-7)
    text = benchmark.document([row, replace(row, candidate=FLOOR, error=None)], "A machine.", TINY)
    assert "d_model 24, d_ff 40, 5 experts, top-2" in text
    assert "A machine." in text
    lines = [line for line in text.splitlines() if line.startswith("| float32")]
    assert [line.count("|") for line in lines] == [len(benchmark.COLUMNS) + 1] * 2
