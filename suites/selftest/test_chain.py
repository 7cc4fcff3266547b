"""The whole chain on one document: spec, theory, audit, reference, for the leak and for every control."""

from __future__ import annotations

import pytest
import torch

from harness import audit, reference, spec
from harness.audit.solve import Found
from harness.theory import parameters

LEAK = spec.load("gpt4-leak")
SOLVED = audit.solve(LEAK).rows
CONTROLS = [name for name in spec.names() if not spec.load(name).unknowns]


@pytest.mark.parametrize("row", SOLVED, ids=range(len(SOLVED)))
def test_every_completion_of_the_leak_is_an_executable_model(row: Found) -> None:
    """What the audit leaves of the leak is built on meta, with as many parameters as theory and audit say."""
    architecture = LEAK.complete(row.leaves)
    model = reference.build(architecture, device="meta", dtype=torch.bfloat16)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == parameters.total(architecture) == row.counts["parameters.total"]
    logits = model(torch.zeros(1, 3, dtype=torch.int64, device="meta"))
    assert logits.shape == (1, 3, architecture.vocab_size)


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_is_built_at_full_size(name: str) -> None:
    """The reference at full size on meta has theory's parameters, to the parameter."""
    architecture = spec.load(name).architecture
    model = reference.build(architecture, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters.total(architecture)
