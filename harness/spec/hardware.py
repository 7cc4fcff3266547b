"""Hardware as data sheets state it: `specs/hardware.toml`, every figure with its source.

Units: bytes, bytes/s in one direction, FLOP/s of dense matrices, seconds, USD. A decimal GB is 1e9 bytes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Generic, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from harness._resources import specs_dir
from harness.spec.architecture import Count, Model, Positive
from harness.spec.errors import SpecError, did_you_mean, dotted, sentence, wrong_and_right
from harness.spec.locate import Path as KeyPath
from harness.spec.locate import lines_of, nearest

T = TypeVar("T")
Format = Literal["float32", "tf32", "bfloat16", "float16", "fp8", "int8", "fp4", "mxfp4", "int4"]
"""A number format: of what is stored, or of what a matrix unit multiplies."""
HARDWARE = "hardware"
"""The file's stem beside the specs; no spec may be called so."""
Number = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)]


class Sourced(Model, Generic[T]):
    """One figure, and who says so."""

    value: T
    source: str
    note: str = ""


class Link(Model):
    """What joins devices: bytes/s of one device in one direction, and seconds before the first byte."""

    bandwidth: Number
    latency: Positive
    source: str
    """Of the bandwidth."""
    latency_source: str
    note: str = ""


class Hardware(Model):
    """One accelerator and how many of them are joined."""

    name: str
    title: str
    memory: Sourced[Number]
    """Bytes of one device."""
    bandwidth: Sourced[Number]
    """Bytes/s between that memory and the chip."""
    peak: Mapping[Format, Sourced[Number]]
    """FLOP/s of dense matrix products by the format that is multiplied (float16: as bfloat16)."""
    island: Count
    """Devices that the fast link joins: a node, or a rack of them."""
    island_link: Link
    """Inside an island (NVLink, ICI)."""
    network_link: Link
    """Between islands, per device (its share of the NICs)."""
    cluster: Count | None = None
    """Devices that the network joins at its full rate; None: all there are."""
    cluster_link: Link | None = None
    """Between such clusters, per device, where it is slower; given if `cluster` is."""
    in_network: bool = False
    """Whether switches of the island reduce (NVLink SHARP)."""
    gpu_hour_usd: Sourced[Number]

    @model_validator(mode="after")
    def _clusters_are_joined(self) -> Self:
        if (self.cluster is None) != (self.cluster_link is None):
            raise ValueError("cluster and cluster_link belong together: give both, or neither")
        if self.cluster is not None and self.cluster % self.island:
            raise ValueError(f"a cluster of {self.cluster} devices is not made of islands of {self.island}")
        return self

    def peak_flops(self, multiplied: Format) -> float:
        """Dense FLOP/s in a format. Raises SpecError naming the formats that there are."""
        key: Format = "bfloat16" if multiplied == "float16" else multiplied
        if key not in self.peak:
            has = ", ".join(f"{name} ({one.value / 1e12:,.0f} TFLOP/s)" for name, one in self.peak.items())
            raise SpecError(f"{self.name} multiplies no {multiplied}; it has {has}")
        return self.peak[key].value


@cache
def hardware_names() -> tuple[str, ...]:
    """Names of the shipped hardware, in the file's order."""
    return tuple(_read(specs_dir() / f"{HARDWARE}.toml"))


def load_hardware(name: str) -> Hardware:
    """One accelerator: a name of specs/hardware.toml, or FILE.toml:NAME of a file of that form.

    Raises SpecError.
    """
    file, _, inside = name.rpartition(":")
    path = Path(file) if file.endswith(".toml") else specs_dir() / f"{HARDWARE}.toml"
    wanted = inside if file.endswith(".toml") else name
    found = _read(path)
    if wanted not in found:
        raise SpecError(f'no hardware "{wanted}" in {path.name}; {did_you_mean(wanted, found)}')
    return found[wanted]


@cache
def _read(path: Path) -> dict[str, Hardware]:
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except FileNotFoundError:
        raise SpecError(sentence(path, None, "", "no such file", "give a TOML file of hardware")) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(sentence(path, None, "", f"cannot be read ({error})", "give a TOML file")) from None
    lines = lines_of(text)
    for key, value in raw.items():
        if key not in ("source", HARDWARE):
            right = did_you_mean(key, ("source", HARDWARE))
            raise SpecError(sentence(path, nearest(lines, (key,)), key, "is unknown", right))
        if not isinstance(value, dict):
            raise SpecError(sentence(path, nearest(lines, (key,)), key, "is no table", f"write [{key}.NAME]"))
    found: dict[str, Hardware] = {}
    for name, table in raw.get(HARDWARE, {}).items():
        place = (HARDWARE, name)
        if not isinstance(table, dict):
            right = f"write [{HARDWARE}.{name}]"
            raise SpecError(sentence(path, nearest(lines, place), dotted(place), "is no table", right))
        try:
            found[name] = Hardware.model_validate({"name": name, **table})
        except ValidationError as error:
            raise SpecError("\n".join(_sentences(path, lines, name, error))) from None
        for field, cited in _cited(found[name]):
            if cited not in raw.get("source", {}):
                wrong, right = (
                    f'"{cited}" is no source of this file',
                    did_you_mean(cited, raw.get("source", {})),
                )
                line = nearest(lines, (*place, *field))
                raise SpecError(sentence(path, line, dotted((*place, *field)), wrong, right))
    return found


def _sentences(path: Path, lines: Mapping[KeyPath, int], name: str, error: ValidationError) -> Iterator[str]:
    for one in error.errors():
        place = (HARDWARE, name, *one["loc"])
        wrong, right = wrong_and_right(one)
        if one["type"] in ("missing", "extra_forbidden"):
            wrong, right = (
                ("is missing", "give it") if one["type"] == "missing" else ("is unknown", "drop it")
            )
        yield sentence(path, nearest(lines, place), dotted(place), wrong, right)


def _cited(one: Hardware) -> list[tuple[tuple[str, ...], str]]:
    names = ("island_link", "network_link", "cluster_link")
    links = [
        ((name,), source)
        for name in names
        if (link := getattr(one, name)) is not None
        for source in (link.source, link.latency_source)
    ]
    figures = [((name,), getattr(one, name).source) for name in ("memory", "bandwidth", "gpu_hour_usd")]
    return links + figures + [(("peak", name), peak.source) for name, peak in one.peak.items()]
