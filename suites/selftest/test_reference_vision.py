"""Cross-attention of the reference: the oracle's logits, the theory's parameters, and what is refused."""

from __future__ import annotations

import pytest
import torch

from harness.conformance.vision import SHAPE
from harness.reference import build, weights
from harness.reference.oracle import vision as oracle
from harness.reference.vision import SeeingModel, draw, last_image, load
from harness.theory import vision as theory
from suites.selftest.controls import CONTROLS, generator, ragged, relative, small


def seeing(architecture, seed=1):
    """A float64 model that looks at images, with all of its weights by name."""
    text = build(architecture, dtype=torch.float64)
    drawn = weights.draw(architecture, generator(seed), std=0.2)
    text.load_weights(drawn)
    model, vision = SeeingModel(text, SHAPE), draw(architecture, SHAPE, generator(seed + 1))
    load(model, vision)
    return model, drawn | vision


@pytest.mark.parametrize("name", CONTROLS)
def test_logits_equal_the_oracles(name):
    """On every control, with blind tokens, padding, one image or several, the logits are the oracle's."""
    architecture = small(name, n_layers=3) if not name.startswith("deepseek") else small(name)
    model, known = seeing(architecture)
    tokens, mask = ragged(architecture, 3)
    random = generator(4)
    images = torch.randn(*tokens.shape[:1], 3, 3, 5, 20, generator=random, dtype=torch.float64)
    visible = torch.rand(*tokens.shape, 3, generator=random) < 0.4
    visible[:, :3] = False
    with torch.no_grad():
        logits, _, traces = model.run(tokens, None, visible, images, mask)
    expected = oracle.see(architecture, SHAPE, known, tokens, images, visible, mask=mask)
    # float64 keeps 16 digits, of which sums of a few hundred terms in another order lose 3.
    assert relative(logits[mask], expected.logits[mask]) < 1e-12
    for have, want in zip(traces, expected.routing, strict=True):
        real = mask.flatten()
        assert torch.equal(have.indices[real].sort(-1).values, want.indices[real].sort(-1).values)


def test_single_images_are_videos_of_one_frame():
    """Features without an axis of frames have one frame."""
    model, _ = seeing(small("llama-3.1-8b"))
    images = torch.randn(2, 3, 1, 5, 20, generator=generator(1), dtype=torch.float64)
    tokens, visible = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, 3, dtype=torch.bool)
    video, image = (model.run(tokens, None, visible, given)[0] for given in (images, images[:, :, 0]))
    assert torch.equal(video, image)


def test_parameters_are_the_theorys():
    """A resampler and its blocks have as many parameters as the theory says."""
    architecture = small("mixtral-8x7b")
    model, _ = seeing(architecture)
    sight = SHAPE.sight
    resampler = theory.Resampler(
        width=sight.width,
        layers=SHAPE.resampler_layers,
        heads=SHAPE.heads,
        head_dim=SHAPE.head_dim,
        latents=SHAPE.latents,
        d_ff=SHAPE.d_ff,
        time_positions=sight.frames,
    )
    blocks = theory.CrossAttention(
        d_model=architecture.d_model,
        visual_width=sight.width,
        heads=SHAPE.heads,
        head_dim=SHAPE.head_dim,
        blocks=theory.blocks_every(architecture.n_layers, SHAPE.every),
        d_ff=SHAPE.d_ff,
    )
    have = sum(tensor.numel() for tensor in model.vision_by_name().values())
    assert have == resampler.parameters + blocks.parameters


def test_the_last_image_is_seen():
    """A token sees the last image at or before it: its own, of two in a row the second, and at first none."""
    at = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0] * 6]).bool()
    seen = [[row.index(True) if any(row) else None for row in text] for text in last_image(at, 3).tolist()]
    assert seen == [[None, 0, 0, 1, 2, 2], [0] * 6, [None] * 6]


def test_a_call_with_a_cache_takes_no_new_images():
    """Features belong to the first call, and visible covers the past: anything else is refused."""
    model, _ = seeing(small("llama-3.1-8b"))
    images = torch.zeros(1, 2, 3, 5, 20, dtype=torch.float64)
    tokens, visible = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, 2, dtype=torch.bool)
    _, cache, _ = model.run(tokens, None, visible, images)
    with pytest.raises(ValueError, match="features are given with the first call"):
        model.run(tokens, cache, visible.repeat(1, 2, 1), images)
    with pytest.raises(ValueError, match="past included"):
        model.run(tokens, cache, visible, None)
