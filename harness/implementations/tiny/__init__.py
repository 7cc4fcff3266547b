"""Tiny random checkpoints for servers, whose every weight the reference knows too."""

from harness.implementations.tiny.model import TinyModel, tiny

__all__ = ["TinyModel", "tiny"]
