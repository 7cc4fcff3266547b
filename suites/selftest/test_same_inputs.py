"""One seed, one input for all: what two implementations were given is the same, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.results.runfile import read
from suites.selftest.stubs import ROOT, moe_harness

PARTS = "not decoding and not serving"
"""What is generated draws by the same functions, and takes minutes."""
SUBJECTS = ("reference", "transformers:mixtral")


def test_the_same_inputs_reach_every_implementation(tmp_path: Path) -> None:
    """Every property that both pass was passed on inputs of one digest, weights included."""
    pytest.importorskip("transformers")
    run = tmp_path / "run.jsonl"
    addresses = [word for subject in SUBJECTS for word in ("--impl", f"{subject}@mixtral-8x7b")]
    known = ("--baseline", str(ROOT / "results" / "baseline.toml"))
    done = moe_harness("check", *addresses, "-k", PARTS, "--run-file", str(run), *known)
    assert done.returncode == 0, done.stdout
    passed = [
        {
            r.slug: r.input_digest
            for r in read(run).records
            if r.outcome == "passed" and r.implementation == name
        }
        for name in SUBJECTS
    ]
    both = passed[0].keys() & passed[1].keys()
    assert {slug: passed[0][slug] for slug in both} == {slug: passed[1][slug] for slug in both}
    drawn = [passed[0][slug] for slug in both if passed[0][slug]]
    assert len(drawn) > 0.8 * len(both)  # the rest counts what is not drawn
    assert len(set(drawn)) > 0.8 * len(drawn)  # and properties do not share one input
