"""What NVIDIA's management library says of each device, one metric at a time.

Every metric fails on its own: a driver that is absent, a permission that is missing, a metric that
the device does not have, MIG, or a device lost in mid-run is the reason recorded for that metric
(NVML API reference, nvmlReturn_t).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harness.telemetry.reading import Reading, unavailable

METRICS = (
    "power_w",
    "energy_j",
    "utilisation_percent",
    "memory_utilisation_percent",
    "memory_used_bytes",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "temperature_c",
)

THROTTLE_BITS = {
    0x1: "gpu idle",
    0x2: "applications clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake slowdown",
    0x100: "display clock setting",
}
"""nvmlClocksEventReasons (NVML API reference): why clocks are below the highest possible."""


@dataclass(frozen=True)
class Device:
    """One GPU as NVML names it."""

    index: int
    name: str
    uuid: str
    memory_bytes: Reading
    mig: bool
    handle: Any = field(repr=False, compare=False, default=None)


@dataclass(frozen=True)
class DeviceSample:
    """One device at one moment."""

    readings: dict[str, Reading]
    throttle: tuple[str, ...] | Reading
    """Reasons in force (empty: none), or why they are unknown."""


class Nvml:
    """A session with NVML; `reason` says why there is none."""

    def __init__(self, library: Any = None) -> None:
        """`library` stands in for the module `pynvml` (tests inject failures through it)."""
        self.reason = ""
        self.driver = ""
        self.devices: tuple[Device, ...] = ()
        try:
            self._lib = library if library is not None else _import_pynvml()
        except ImportError as error:
            self.reason = f"pynvml cannot be imported: {error}"
            return
        try:
            self._lib.nvmlInit()
        except self._lib.NVMLError as error:
            self.reason = f"NVML does not start: {error}"
            return
        try:
            self.driver = str(self._lib.nvmlSystemGetDriverVersion())
            count = int(self._lib.nvmlDeviceGetCount())
            self.devices = tuple(self._device(index) for index in range(count))
        except self._lib.NVMLError as error:
            self.reason = f"NVML lists no devices: {error}"
            self.close()
            return
        if not self.devices:
            self.reason = "NVML runs, but sees no device"

    def sample(self, device: Device) -> DeviceSample:
        """All metrics of one device now; never raises for what NVML refuses."""
        lib, handle = self._lib, device.handle
        calls: dict[str, Callable[[], float]] = {
            "power_w": lambda: lib.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "energy_j": lambda: lib.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
            "utilisation_percent": lambda: lib.nvmlDeviceGetUtilizationRates(handle).gpu,
            "memory_utilisation_percent": lambda: lib.nvmlDeviceGetUtilizationRates(handle).memory,
            "memory_used_bytes": lambda: lib.nvmlDeviceGetMemoryInfo(handle).used,
            "sm_clock_mhz": lambda: lib.nvmlDeviceGetClockInfo(handle, lib.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: lib.nvmlDeviceGetClockInfo(handle, lib.NVML_CLOCK_MEM),
            "temperature_c": lambda: lib.nvmlDeviceGetTemperature(handle, lib.NVML_TEMPERATURE_GPU),
        }
        readings = {name: self._read(call, device.mig) for name, call in calls.items()}
        throttle: tuple[str, ...] | Reading
        try:
            bits = int(lib.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
            throttle = tuple(name for bit, name in THROTTLE_BITS.items() if bits & bit)
        except lib.NVMLError as error:
            throttle = unavailable(str(error))
        return DeviceSample(readings, throttle)

    def close(self) -> None:
        """End the session; a driver that is gone by now is no error."""
        try:
            self._lib.nvmlShutdown()
        except self._lib.NVMLError as error:
            self.reason = self.reason or f"NVML did not shut down: {error}"

    def _read(self, call: Callable[[], float], mig: bool) -> Reading:
        try:
            return Reading(float(call()))
        except self._lib.NVMLError as error:
            note = " (MIG is enabled: NVML gives it for no instance)" if mig else ""
            return unavailable(f"{error}{note}")

    def _device(self, index: int) -> Device:
        lib = self._lib
        handle = lib.nvmlDeviceGetHandleByIndex(index)
        try:
            mig = lib.nvmlDeviceGetMigMode(handle)[0] == lib.NVML_DEVICE_MIG_ENABLE
        except lib.NVMLError:
            mig = False
        return Device(
            index=index,
            name=str(lib.nvmlDeviceGetName(handle)),
            uuid=str(lib.nvmlDeviceGetUUID(handle)),
            memory_bytes=self._read(lambda: lib.nvmlDeviceGetMemoryInfo(handle).total, mig),
            mig=mig,
            handle=handle,
        )


def _import_pynvml() -> Any:
    import pynvml

    return pynvml
