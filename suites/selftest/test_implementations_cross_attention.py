"""Cross-attention families of transformers under the vision properties, each in a shape of its own."""

from __future__ import annotations

import pytest

from harness.results.runfile import read
from suites.selftest.stubs import moe_harness

LEAKS = {
    "vision.company-does-not-matter",
    "vision.gradients-pass-through-visible-images",
    "vision.sees-the-visible-images-only",
    "vision.text-before-images-does-not-change",
}
"""What Llama 3.2 Vision fails in transformers 5.23.0 (transformers#39379): see results/findings.md."""
REFERENCE_ONLY = {
    "vision.blind-tokens-are-text",
    "vision.frames-have-an-order",
    "vision.gates-at-zero-leave-the-text",
    "vision.gradients-are-the-references",
    "vision.latents-are-a-set",
    "vision.logits-are-the-references",
}
"""Those that need the reference's weights, or videos."""


@pytest.mark.parametrize(("family", "failing"), [("idefics", set()), ("mllama", LEAKS)])
def test_what_a_family_fails(family, failing, tmp_path):
    """Idefics passes whatever can be asked of it; Llama 3.2 Vision fails all that its leak shows in."""
    pytest.importorskip("transformers")
    run = tmp_path / "run.jsonl"
    done = moe_harness(
        "check", "--impl", f"transformers:{family}", "-k", "test_vision", "--run-file", str(run)
    )
    assert done.returncode == (1 if failing else 0), done.stdout
    ended = {
        outcome: {r.slug for r in read(run).records if r.outcome == outcome}
        for outcome in ("failed", "unsupported", "passed")
    }
    assert ended["failed"] == failing
    assert ended["unsupported"] == REFERENCE_ONLY
    assert len(ended["passed"]) == 8 - len(failing)
