"""One entry a model_type: how the keys of its config.json become an Architecture."""

from __future__ import annotations

from collections.abc import Mapping

from harness.spec.families import dbrx, deepseek, dense, experts
from harness.spec.families.parts import Family

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (*dense.FAMILIES, *experts.FAMILIES, *deepseek.FAMILIES, *dbrx.FAMILIES)
}
