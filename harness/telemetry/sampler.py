"""A background sampler whose readings are attributed to spans of work by time.

One thread reads every device at a fixed interval; a span (one property, one benchmark) takes what was
read between its start and its end, and reads once itself at both, so that a short span has two samples.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from harness.telemetry import host
from harness.telemetry.nvml import METRICS, Device, DeviceSample, Nvml
from harness.telemetry.reading import Reading, as_json, unavailable

Reduce = Callable[[list[float]], float]

REDUCTIONS: dict[str, dict[str, Reduce]] = {
    "power_w": {"mean": lambda v: sum(v) / len(v), "max": max},
    "utilisation_percent": {"mean": lambda v: sum(v) / len(v)},
    "memory_utilisation_percent": {"mean": lambda v: sum(v) / len(v)},
    "memory_used_bytes": {"max": max},
    "sm_clock_mhz": {"min": min, "mean": lambda v: sum(v) / len(v)},
    "memory_clock_mhz": {"min": min, "mean": lambda v: sum(v) / len(v)},
    "temperature_c": {"max": max},
}


@dataclass
class Span:
    """One piece of work; `summary` is filled when it ends."""

    label: str
    start: float
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stamped:
    time: float
    sample: DeviceSample


class Sampler:
    """`with Sampler() as sampler: with sampler.span("slug") as span: ...; span.summary`."""

    def __init__(self, interval_s: float = 0.1, nvml: Nvml | None = None) -> None:
        """Sample each device every `interval_s` seconds. Raises ValueError unless it is positive."""
        if not interval_s > 0:
            raise ValueError(f"interval_s must be above 0, not {interval_s}")
        self._interval = interval_s
        self._nvml = nvml if nvml is not None else Nvml()
        self._series: dict[int, list[_Stamped]] = {d.index: [] for d in self._nvml.devices}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._started = 0.0
        self._sampling_s = 0.0
        self._samples = 0

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._nvml.devices:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._nvml.devices:
            self._nvml.close()

    @contextmanager
    def span(self, label: str) -> Iterator[Span]:
        """Attribute everything sampled in this block to `label`."""
        self._take()
        before = self._host()
        span = Span(label, time.monotonic())
        try:
            yield span
        finally:
            self._take()
            end = time.monotonic()
            span.summary = {
                "wall_s": end - span.start,
                "host": as_json(self._host().since(before)),
                "devices": self._devices(span.start, end),
            }

    def overhead(self) -> dict[str, float]:
        """Seconds spent in sampling, the number of samples, and the share of wall time so far."""
        with self._lock:
            wall = max(time.monotonic() - self._started, 1e-9)
            return {
                "samples": float(self._samples),
                "sampling_s": self._sampling_s,
                "share_of_wall": self._sampling_s / wall,
            }

    def _devices(self, start: float, end: float) -> list[dict[str, Any]] | dict[str, str]:
        if self._nvml.reason:
            return {"unavailable": self._nvml.reason}
        with self._lock:
            return [
                {"name": device.name, "index": device.index, "mig": device.mig}
                | _summary(_within(self._series[device.index], start, end))
                for device in self._nvml.devices
            ]

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._take()

    def _host(self) -> host.HostSample:
        begin = time.perf_counter()
        sample = host.sample()
        with self._lock:
            self._samples += 1
            self._sampling_s += time.perf_counter() - begin
        return sample

    def _take(self) -> None:
        with self._lock:
            begin = time.perf_counter()
            for device in self._nvml.devices:
                self._series[device.index].append(self._stamped(device))
                self._samples += 1
            self._sampling_s += time.perf_counter() - begin

    def _stamped(self, device: Device) -> _Stamped:
        return _Stamped(time.monotonic(), self._nvml.sample(device))


def _within(series: list[_Stamped], start: float, end: float) -> list[_Stamped]:
    """The samples of [start, end], and the one just before it (the span's own first reading)."""
    first = max((i for i, s in enumerate(series) if s.time <= start), default=0)
    return [s for s in series[first:] if s.time <= end]


def _summary(series: list[_Stamped]) -> dict[str, Any]:
    readings: dict[str, Reading] = {"energy_j": _energy(series)}
    for metric, reductions in REDUCTIONS.items():
        values, reason = _values(series, metric)
        for name, reduce in reductions.items():
            key = f"{metric}_{name}"
            readings[key] = Reading(float(reduce(values))) if values else unavailable(reason)
    throttle: set[str] = set()
    unknown = ""
    for stamped in series:
        if isinstance(stamped.sample.throttle, Reading):
            unknown = stamped.sample.throttle.reason
        else:
            throttle |= set(stamped.sample.throttle)
    lost = {m: _values(series, m) for m in METRICS}
    partial = {m: reason for m, (values, reason) in lost.items() if values and reason}
    return as_json(readings) | {
        "samples": len(series),
        "energy_method": _energy_method(series),
        "throttle": {"unavailable": unknown} if unknown and not throttle else sorted(throttle),
        "lost_in_mid_run": partial,
    }


def _values(series: list[_Stamped], metric: str) -> tuple[list[float], str]:
    readings = [s.sample.readings[metric] for s in series]
    values = [r.value for r in readings if r.value is not None]
    reasons = [r.reason for r in readings if r.reason]
    return values, reasons[-1] if reasons else ("" if values else "no sample was taken")


def _energy_method(series: list[_Stamped]) -> str:
    if len(_values(series, "energy_j")[0]) >= 2:
        return "counter"
    return "integral of power" if len(_values(series, "power_w")[0]) >= 2 else "none"


def _energy(series: list[_Stamped]) -> Reading:
    """Joules: the device's own counter where it has one, else the trapezoid rule over power."""
    method = _energy_method(series)
    if method == "counter":
        counter, _ = _values(series, "energy_j")
        if counter[-1] <= counter[0]:  # the driver advances it every some ten milliseconds
            return unavailable(
                f"the energy counter did not advance in {series[-1].time - series[0].time:.3g} s"
            )
        return Reading(counter[-1] - counter[0])
    if method == "none":
        return unavailable(_values(series, "power_w")[1] or "fewer than two samples")
    points = [
        (s.time, s.sample.readings["power_w"].value)
        for s in series
        if s.sample.readings["power_w"].value is not None
    ]
    return Reading(
        sum((b[0] - a[0]) * ((a[1] or 0.0) + (b[1] or 0.0)) / 2 for a, b in itertools.pairwise(points))
    )
