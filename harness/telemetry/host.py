"""What the host did: CPU time, peak memory, page faults; and which machine it is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.telemetry.nvml import Nvml
from harness.telemetry.reading import Reading, unavailable


@dataclass(frozen=True)
class HostSample:
    """Counters of this process since it started (getrusage(2)); peak memory is its high-water mark."""

    cpu_user_s: float
    cpu_system_s: float
    peak_rss_bytes: int
    minor_faults: int
    major_faults: int

    def since(self, start: HostSample) -> dict[str, Reading]:
        """What was spent after `start`. The peak is the process's own: it never falls."""
        return {
            "cpu_s": Reading(self.cpu_user_s + self.cpu_system_s - start.cpu_user_s - start.cpu_system_s),
            "peak_rss_bytes": Reading(float(self.peak_rss_bytes)),
            "peak_rss_growth_bytes": Reading(float(self.peak_rss_bytes - start.peak_rss_bytes)),
            "minor_faults": Reading(float(self.minor_faults - start.minor_faults)),
            "major_faults": Reading(float(self.major_faults - start.major_faults)),
        }


def sample() -> HostSample:
    """The counters now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if platform.system() == "Darwin" else 1024
    return HostSample(
        usage.ru_utime, usage.ru_stime, usage.ru_maxrss * unit, usage.ru_minflt, usage.ru_majflt
    )


def machine() -> dict[str, Any]:
    """The machine, its CPU, memory, torch build and devices, for a run file's header.

    Nothing in it names a person or a place: no host name, no path. torch is not imported.
    """
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory().as_json(),
        "torch": _version("torch"),
        "devices": _devices(),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory() -> Reading:
    try:
        import psutil

        return Reading(float(psutil.virtual_memory().total))
    except ImportError as error:
        return unavailable(str(error))


def _devices() -> list[dict[str, Any]] | dict[str, str]:
    nvml = Nvml()
    if nvml.reason:
        return {"unavailable": nvml.reason}
    devices: list[dict[str, Any]] = [
        {
            "name": device.name,
            "memory_bytes": device.memory_bytes.as_json(),
            "mig": device.mig,
            "driver": nvml.driver,
        }
        for device in nvml.devices
    ]
    nvml.close()
    return devices
