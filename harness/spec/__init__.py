"""Specs: typed, validated, frozen values of what may be said about a model."""

from harness.spec.architecture import (
    Architecture,
    Attention,
    AuxiliaryLoss,
    FeedForward,
    Mla,
    Moe,
    Norm,
    Rope,
    RopeScaling,
    Router,
)
from harness.spec.document import Assumption, Claim, Domain, Leaf, Pin, Reading, Source, Spec
from harness.spec.errors import SpecError
from harness.spec.loading import load, names
from harness.spec.twin import twin

__all__ = [
    "Architecture",
    "Assumption",
    "Attention",
    "AuxiliaryLoss",
    "Claim",
    "Domain",
    "FeedForward",
    "Leaf",
    "Mla",
    "Moe",
    "Norm",
    "Pin",
    "Reading",
    "Rope",
    "RopeScaling",
    "Router",
    "Source",
    "Spec",
    "SpecError",
    "load",
    "names",
    "twin",
]
