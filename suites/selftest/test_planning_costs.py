"""What a plan of serving says of costs, of load and of replicas."""

from __future__ import annotations

import pytest

from harness.spec import SpecError
from suites.selftest.plans import OUTPUT, PROMPT, asked, served


def test_costs_are_split_and_grow_as_the_load_falls() -> None:
    """Input and output add up to the price of a request, and half the load costs twice, in nothing else."""
    question = asked(gpus=8, rank="cost")
    busy, half = served(question), served(question, load=0.5)
    assert "0.5 of it that is served" in half.title
    assert "served" not in busy.title
    for one, other in zip(busy.ranked, half.ranked, strict=True):
        facts, dearer = one.facts, other.facts
        parts = PROMPT * facts["usd_per_1k_input"] + OUTPUT * facts["usd_per_1k_decode"]
        assert parts == pytest.approx(OUTPUT * facts["usd_per_1k"], rel=1e-9)
        assert 0 < facts["usd_per_1k_input"] < facts["usd_per_1k_decode"] < facts["usd_per_1k"]
        for name in ("usd_per_1k", "usd_per_1k_input", "usd_per_1k_decode"):
            assert dearer[name] == pytest.approx(2 * facts[name], rel=1e-12)
        assert (dearer["tpot"], dearer["mfu"]) == (facts["tpot"], facts["mfu"])
        assert 0 < facts["mfu"] < 1
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(SpecError, match="no share of the day"):
            served(question, load=share)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "llama-3.1-8b"])
def test_replicas_are_planned_as_one_alone(name: str) -> None:
    """One sequence a rank has the TTFT and TPOT of a lone one, however many data-parallel ranks there are."""
    found = []
    for ranks in (1, 8):
        tries = {"tensor_parallel": "8", "pipeline_parallel": "1", "expert_parallel": "1", "batch": "1"}
        best = served(asked(name, gpus=8 * ranks, tries=tries), precisions=("fp8",)).ranked[0].facts
        assert best["data_parallel"] == ranks
        found.append((best["ttft"], best["tpot"]))
    assert found[0] == pytest.approx(found[1], rel=1e-9)
