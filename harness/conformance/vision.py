"""Text with images, and the model that looks at them: the twin with gated cross-attention around it.

Letters: B sequences, S tokens per sequence, N images of a sequence, M frames of one, P features of a frame,
W their width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.conformance.case import Case, replaced, seeded
from harness.conformance.comparison import Margin, monte_carlo_margin
from harness.evidence.margins import Rounding, Spread, monte_carlo, unit_roundoff
from harness.implementations.protocols import Unsupported
from harness.reference import vision as reference
from harness.spec.vision import Sight, Vision

SHAPE = Vision(
    Sight(width=20, features=5, frames=3),
    latents=4,
    resampler_layers=2,
    heads=3,
    head_dim=6,
    d_ff=28,
    every=2,
)
"""No two widths are equal, and no count of images, frames, features or latents."""
LAYERS = 3
"""Of the text model: blocks stand before the first and the last layer, and none before the second."""
IMAGES = 3
FLOAT32 = torch.float32
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Illustrated:
    """A batch of text with images."""

    tokens: Tensor
    """[B, S]."""
    features: Tensor
    """[B, N, M, P, W]."""
    visible: Tensor
    """[B, S, N]."""
    mask: Tensor
    """[B, S] bool: True at real tokens."""

    def with_images(self, other: Tensor, which: Tensor) -> Illustrated:
        """The same with other features [B, N, M, P, W] in the place of some images [B, N]."""
        return replace(self, features=torch.where(which[..., None, None, None], other, self.features))

    @property
    def open(self) -> Tensor:
        """[B, S]: tokens that may depend on some image, their own or one that a token before them sees."""
        return self.visible.any(-1).cumsum(1) > 0


@dataclass(frozen=True)
class Looker:
    """The model under test, and the reference where its weights are known."""

    model: Any
    sight: Sight
    exact: reference.SeeingModel | None = None

    def forward(self, batch: Illustrated) -> Tensor:
        """Logits [B, S, V]."""
        logits: Tensor = self.model.see(batch.tokens, batch.features, batch.visible, mask=batch.mask)
        return logits

    def see(self, batch: Illustrated) -> Tensor:
        """Logits [B, S, V] without gradients."""
        with torch.no_grad():
            return self.forward(batch)


def looker(case: Case, change: Callable[[dict[str, Tensor]], None] = lambda _: None) -> Looker:
    """A fresh model under test. Of known weights those of the vision are first handed to `change`."""
    if case.architecture is None:
        model = case.model()
        if model.sight is None:
            raise Unsupported("its cross-attention is to be loaded, and nothing is known of its weights")
        return Looker(model, model.sight)
    architecture = replaced(case.architecture, {"n_layers": max(LAYERS, case.architecture.n_layers)})
    # At std 0.2 every token that is seen is felt, and the images are not drowned by the text.
    text = case.weights(architecture, std=0.2)
    generator = seeded(case.seed, "vision", architecture.model_dump_json())
    drawn = reference.draw(architecture, SHAPE, generator)
    vision = {name: case.drawn(value).float().double() for name, value in drawn.items()}
    change(vision)
    model = case.model(architecture, text)
    model.load_vision(SHAPE, vision)
    exact = reference.SeeingModel(case.reference(architecture, text), SHAPE)
    reference.load(exact, vision)
    return Looker(model, SHAPE.sight, exact)


def last_images(case: Case, sight: Sight, length: int = 11) -> Illustrated:
    """Flamingo's rule: two images, after some text; three, two of them side by side; and none. What a
    sequence has no image for is padding."""
    tokens = case.tokens(3, length)
    at = torch.zeros_like(tokens, dtype=torch.bool)
    for row, places in enumerate(((2, 7), (0, 4, 5), ())[: len(tokens)]):
        at[row, [place for place in places if place < tokens.shape[1]]] = True
    return _illustrated(case, sight, tokens, reference.last_image(at, IMAGES))


def any_images(case: Case, sight: Sight, length: int = 11) -> Illustrated:
    """Every token sees none, one or several images; those after one that sees something may see nothing."""
    tokens = case.tokens(3, length)
    visible = torch.rand(*tokens.shape, IMAGES, generator=case.generator()) < 0.5
    visible[:, :2], visible[:, 6:7] = False, False
    visible[:1, 3:4], visible[:1, 4:5] = True, torch.tensor([True, False, True])
    visible[1:2, :, 1] = False  # an image that nothing of its sequence sees
    return _illustrated(case, sight, tokens, visible)


def padded(batch: Illustrated) -> Illustrated:
    """The same with padding on the right of one sequence, on the left of the next, on both sides of one."""
    mask, length = batch.mask.clone(), batch.mask.shape[1]
    for row, (left, right) in enumerate(((0, 3), (2, 0), (1, 2))[: len(mask)]):
        end = max(length - right, 1)  # a real token is left of each sequence, however short
        mask[row, : min(left, end - 1)], mask[row, end:] = False, False
    return replace(batch, mask=mask)


def _illustrated(case: Case, sight: Sight, tokens: Tensor, visible: Tensor) -> Illustrated:
    real = torch.ones_like(tokens, dtype=torch.bool)
    return Illustrated(tokens, features(case, sight, len(tokens)), case.drawn(visible), real)


def features(case: Case, sight: Sight, batch: int) -> Tensor:
    """[B, N, M, P, W] float32, normal, of IMAGES videos of all the frames that there may be."""
    shape = (batch, IMAGES, sight.frames, sight.features, sight.width)
    return case.drawn(torch.randn(shape, generator=case.generator()))


def margin(case: Case, looks: Looker, batch: Illustrated) -> Margin:
    """How far rounding may leave logits [B, S, V] from exact ones: as in `comparison.margin`."""
    if looks.exact is None:
        size = float(looks.see(batch).double().abs().amax())
        radius = math.sqrt(unit_roundoff(FLOAT32)) * size
        shape = batch.tokens.shape
        return Margin(torch.full(shape, radius, dtype=torch.float64), torch.ones(shape, dtype=torch.bool))
    exact = looks.exact
    return monte_carlo_margin(
        case, exact.text, lambda at: _pass(exact, batch, at), batch.tokens, around=exact, mask=batch.mask
    )


def felt(one: Tensor, other: Tensor, bound: Margin) -> Tensor:
    """[B, S] bool: where logits [B, S, V] of two passes differ by more than rounding of both explains."""
    return (one - other).abs().amax(-1).double() > 2 * bound.radius


def _pass(exact: reference.SeeingModel, batch: Illustrated, positions: Tensor) -> Any:
    return exact.run(batch.tokens, None, batch.visible, batch.features.double(), batch.mask, positions)


def expected_gradients(
    case: Case, exact: reference.SeeingModel, batch: Illustrated, loss: Callable[[Tensor], Tensor]
) -> dict[str, Spread]:
    """d loss(logits) / d each tensor of the vision, in float64, with how far float32 may move it."""
    at = (batch.mask.cumsum(1) - 1).clamp(min=0)

    def run(err: Rounding) -> dict[str, Tensor]:
        learned = exact.text.architecture.positions == "learned"
        logits = _pass(exact, batch, at if learned else err(at.double()))[0]
        return exact.gradients(loss(logits))

    return monte_carlo(exact, run, dtype=FLOAT32, generator=case.generator())
