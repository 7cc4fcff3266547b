"""What people type on the command line of a search, made into values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from harness.planning.constraints import known, number, pairs
from harness.spec.architecture import Architecture
from harness.spec.document import Spec
from harness.spec.errors import SpecError
from harness.theory.efficiency import IDEAL, Efficiency
from harness.theory.steps import Overlap

_SECONDS = "_seconds"
_FACTOR = "latency"
"""The one number of an Efficiency that may be above 1 without being seconds."""
MEASURED = "measured"
Settings = TypeVar("Settings", Efficiency, Overlap)


def efficiency_of(texts: Sequence[str], measured: Callable[[str], Efficiency]) -> Efficiency:
    """An Efficiency from ("compute=0.5", "memory=0.8"), the data sheet's but for them. Raises SpecError.

    "measured" or "measured:ENGINE" starts from what `measured` says of an engine ("mean": of all) instead.
    """
    bases = [text for text in texts if text.partition(":")[0] == MEASURED]
    if len(bases) > 1:
        raise SpecError(f"--efficiency {' and '.join(bases)} cannot both be; give one of them")
    base = measured(bases[0].partition(":")[2] or "mean") if bases else IDEAL
    return _settings(base, [text for text in texts if text not in bases], "--efficiency")


def overlap_of(texts: Sequence[str]) -> Overlap:
    """An Overlap from ("expert=1", "data=0.9"). Raises SpecError."""
    return _settings(Overlap(), texts, "--overlap")


def _settings(base: Settings, texts: Sequence[str], option: str) -> Settings:
    """Shares, factors and seconds, as the names of the fields say, in the place of the base's."""
    efficiency = isinstance(base, Efficiency)
    names = tuple(one.name for one in fields(base))
    given: dict[str, float] = {}
    for name, text in pairs(texts, option).items():
        known(name, names)
        value = number(text, name)
        if name.endswith(_SECONDS):
            if value < 0:
                raise SpecError(f"{option} {name}={text} is below 0; give seconds of at least 0")
        elif name == _FACTOR:
            if value < 0:
                raise SpecError(f"{option} {name}={text} is below 0; give how many times the link's own")
        elif not 0 <= value <= 1 or (value == 0 and efficiency):
            least = "more than 0" if efficiency else "0"
            raise SpecError(f"{option} {name}={text} is no share; give {least} to 1")
        given[name] = value
    return replace(base, **given)


def completed(document: Spec, texts: Sequence[str]) -> Architecture:
    """The architecture with leaves set, from ("architecture.d_model=10752",). Raises SpecError.

    A spec with unknowns is refused with the --set that each of them wants.
    """
    values = {
        path.removeprefix("architecture."): _value(text) for path, text in pairs(texts, "--set").items()
    }
    missing = [leaf.path for leaf in document.unknowns if leaf.path not in values]
    if missing:
        wanted = " ".join(f"--set architecture.{path}=..." for path in missing)
        raise SpecError(f"{document.name} does not say {', '.join(missing)}; give {wanted}")
    return document.complete(values) if values else document.architecture


def _value(text: str) -> Any:
    """A word, a flag, or a number: whole where it is written or is whole."""
    if text in ("true", "false"):
        return text == "true"
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        return text
    return int(value) if math.isfinite(value) and value == int(value) and "." not in text else value
