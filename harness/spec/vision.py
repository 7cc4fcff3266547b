"""Cross-attention to images beside a language model: its sizes.

Letters: M frames of an image or video, P features of a frame, W their width, R latents of an image.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sight:
    """The sizes of the features that a model looks at."""

    width: int
    """W."""
    features: int
    """P, of one frame."""
    frames: int
    """The largest M."""


@dataclass(frozen=True)
class Vision:
    """A resampler, and gated cross-attention before every `every`-th layer of a language model (Flamingo,
    arXiv 2204.14198, sections 2.1 and 2.2).

    It is no part of an Architecture: a property puts it around the twin.
    """

    sight: Sight
    latents: int
    """R, of one image or video, whatever its frames."""
    resampler_layers: int
    heads: int
    """Of the resampler and of each cross-attention; as many key/value heads."""
    head_dim: int
    d_ff: int
    """Of the feed-forward networks of both."""
    every: int
    """A block stands before layers 0, every, 2 every, ..."""

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """Those of a model's layers that a block stands before."""
        return tuple(range(0, n_layers, self.every))
