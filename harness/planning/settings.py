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
from harness.theory import parameters
from harness.theory.efficiency import IDEAL, Efficiency
from harness.theory.steps import Overlap

_SECONDS = "_seconds"
_FACTOR = "latency"
"""The one number of an Efficiency that may be above 1 without being seconds."""
LEAST_SHARE, MOST_SECONDS, MOST_FACTOR = 1e-6, 3600.0, 1e6
"""By how much hardware may be slower than its data sheet: what is beyond is taken for a mistake."""
MOST_USD = 10**6
"""Of an hour of one device."""
MOST_SKEW = 10
"""Of experts' popularity: the second gets a thousandth of what the first gets."""
MOST_PARAMETERS = 10**15
"""Of a model: products of its dimensions and of a batch stay within 64 bits."""
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


def rates(efficiency: Efficiency) -> str:
    """What differs from the data sheet, in words."""
    stated = (
        f"{one.name} {getattr(efficiency, one.name):g}"
        for one in fields(Efficiency)
        if getattr(efficiency, one.name) != one.default
    )
    return ", ".join(stated) or "the data sheet's rates"


def refuse_price(usd: float) -> None:
    """Raise SpecError where an hour of a device cannot cost so much."""
    if not 0 <= usd <= MOST_USD:
        raise SpecError(f"{usd:g} USD is no price of an hour; give 0 to {MOST_USD:,}")


def refuse_skew(skew: float) -> None:
    """Raise SpecError where the popularity of experts cannot fall as i^-skew."""
    if not 0 <= skew <= MOST_SKEW:
        raise SpecError(f"a skew of {skew:g} is none; give 0 to {MOST_SKEW}")


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
            if not 0 <= value <= MOST_SECONDS:
                raise SpecError(f"{option} {name}={text} cannot be; give seconds from 0 to {MOST_SECONDS:g}")
        elif name == _FACTOR:
            if not 0 <= value <= MOST_FACTOR:
                right = f"give how many times the link's own, from 0 to {MOST_FACTOR:g}"
                raise SpecError(f"{option} {name}={text} cannot be; {right}")
        elif not (least := LEAST_SHARE if efficiency else 0) <= value <= 1:
            raise SpecError(f"{option} {name}={text} is no share; give {least:g} to 1")
        given[name] = value
    return replace(base, **given)


def completed(document: Spec, texts: Sequence[str]) -> Architecture:
    """The architecture with leaves set, from ("architecture.d_model=10752",). Raises SpecError.

    A spec with unknowns is refused with the --set that each of them wants.
    """
    values = _leaves(texts)
    missing = [leaf.path for leaf in document.unknowns if leaf.path not in values]
    if missing:
        wanted = " ".join(f"--set architecture.{path}=..." for path in missing)
        where = f"(moe-harness solve {document.name} lists what agrees with its claims)"
        raise SpecError(f"{document.name} does not say {', '.join(missing)}; give {wanted} {where}")
    architecture = document.complete(values) if values else document.architecture
    if (size := parameters.total(architecture)) > MOST_PARAMETERS:
        wrong = f"{document.name} would have {size:.3g} parameters"
        raise SpecError(f"{wrong}; give dimensions of at most {MOST_PARAMETERS:g}")
    return architecture


def called(document: Spec, texts: Sequence[str]) -> str:
    """The spec's name, with what --set puts into it."""
    given = (f"{path}={_word(value)}" for path, value in _leaves(texts).items())
    return " with ".join(part for part in (document.name, ", ".join(given)) if part)


def _leaves(texts: Sequence[str]) -> dict[str, Any]:
    short = (text.strip().removeprefix("architecture.") for text in texts)
    return {path: _value(text) for path, text in pairs(tuple(short), "--set").items()}


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(text: str) -> Any:
    """A word, a flag, or a number: whole where it is written or is whole."""
    if text in ("true", "false"):
        return text == "true"
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        return text
    return int(value) if math.isfinite(value) and value == int(value) and "." not in text else value
