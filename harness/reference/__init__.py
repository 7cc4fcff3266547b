"""The executable meaning of an Architecture, and the slow oracle beside it."""

from harness.reference.model import ReferenceModel, build
from harness.reference.trace import Cache, LayerCache, RoutingTrace

__all__ = ["Cache", "LayerCache", "ReferenceModel", "RoutingTrace", "build"]
