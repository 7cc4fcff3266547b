"""The families of Hugging Face transformers as implementations."""

from harness.implementations.transformers.adapter import TransformersImplementation

__all__ = ["TransformersImplementation"]
