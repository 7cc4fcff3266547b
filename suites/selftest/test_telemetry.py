"""Telemetry without a GPU, through NVML's documented errors, and for real where there is one."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from harness.telemetry import Nvml, Reading, Sampler, machine


class FakeNvml:
    """pynvml with one device; `failing` maps a function's name to the NVML error code that it returns."""

    NVMLError = pynvml.NVMLError
    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM
    NVML_CLOCK_MEM = pynvml.NVML_CLOCK_MEM
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    NVML_DEVICE_MIG_ENABLE = pynvml.NVML_DEVICE_MIG_ENABLE

    def __init__(self, mig: bool = False, lost_after: int | None = None, **failing: int) -> None:
        self.failing = failing
        self.calls = 0
        self.lost_after = lost_after
        self.energy: Iterator[int] = itertools.count(5_000_000, 30_000)
        self.answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlSystemGetDriverVersion": "580.0",
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetName": "Fake GPU",
            "nvmlDeviceGetUUID": "GPU-0",
            "nvmlDeviceGetMigMode": (int(mig), int(mig)),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * 2**30, used=7 * 2**30),
            "nvmlDeviceGetPowerUsage": 300_000,
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=55, memory=20),
            "nvmlDeviceGetClockInfo": 1_410,
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4,
        }

    def __getattr__(self, name: str) -> Any:
        def call(*_: object) -> Any:
            code = self.failing.get(name)
            if name == "nvmlDeviceGetPowerUsage":
                self.calls += 1
            sampled = name.startswith("nvmlDevice") and self.lost_after is not None
            if sampled and self.calls > (self.lost_after or 0):
                code = pynvml.NVML_ERROR_GPU_IS_LOST
            if code is not None:
                raise pynvml.NVMLError(code)
            if name == "nvmlDeviceGetTotalEnergyConsumption":
                return next(self.energy)
            return self.answers[name]

        return call


def summary_of(library: FakeNvml, spans: int = 1) -> dict[str, Any]:
    """The only device's summary of the last of `spans` spans."""
    with Sampler(interval_s=10.0, nvml=Nvml(library)) as sampler:
        for _ in range(spans):
            with sampler.span("work") as span:
                pass
    summary: dict[str, Any] = span.summary["devices"][0]
    return summary


def test_every_metric_reaches_the_summary_with_its_unit() -> None:
    """A healthy device gives power, energy by counter, utilisation, memory, clocks, temperature, throttle."""
    summary = summary_of(FakeNvml())
    assert summary["power_w_mean"] == 300.0
    assert summary["energy_j"] == 30.0
    assert summary["energy_method"] == "counter"
    assert summary["utilisation_percent_mean"] == 55.0
    assert summary["memory_used_bytes_max"] == 7 * 2**30
    assert summary["sm_clock_mhz_min"] == 1410.0
    assert summary["temperature_c_max"] == 61.0
    assert summary["throttle"] == ["software power cap"]


@pytest.mark.parametrize(
    "code",
    [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED],
    ids=["library", "driver"],
)
def test_a_machine_without_a_driver_gives_a_reason(code: int) -> None:
    """Without NVML a span still has host readings, and the devices' reason."""
    with Sampler(nvml=Nvml(FakeNvml(nvmlInit=code))) as sampler, sampler.span("work") as span:
        sum(range(10_000))
    assert span.summary["devices"] == {"unavailable": f"NVML does not start: {pynvml.NVMLError(code)}"}
    assert span.summary["host"]["cpu_s"] >= 0


@pytest.mark.parametrize(
    "code",
    [pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_UNKNOWN],
    ids=["permission", "support", "unknown"],
)
def test_a_refused_metric_is_a_reason_and_leaves_the_others(code: int) -> None:
    """One metric that NVML refuses is recorded as its reason, never as zero."""
    summary = summary_of(FakeNvml(nvmlDeviceGetUtilizationRates=code))
    assert summary["utilisation_percent_mean"] == {"unavailable": str(pynvml.NVMLError(code))}
    assert summary["power_w_max"] == 300.0


def test_a_span_too_short_for_the_energy_counter_has_no_energy() -> None:
    """A counter that did not advance between two samples is a reason, never zero joules."""
    library = FakeNvml()
    library.energy = itertools.repeat(5_000_000)
    assert "counter did not advance" in summary_of(library)["energy_j"]["unavailable"]


def test_energy_falls_back_to_the_integral_of_power_and_says_so() -> None:
    """A device without an energy counter gets the trapezoid over power, named as such."""
    summary = summary_of(FakeNvml(nvmlDeviceGetTotalEnergyConsumption=pynvml.NVML_ERROR_NOT_SUPPORTED))
    assert summary["energy_method"] == "integral of power"
    assert summary["energy_j"] > 0


def test_a_device_lost_in_mid_run_keeps_what_was_measured_and_names_the_loss() -> None:
    """Samples before the loss stay; the reason is beside them; a later span has only the reason."""
    before = summary_of(FakeNvml(lost_after=1))
    assert before["power_w_mean"] == 300.0
    assert before["lost_in_mid_run"]["power_w"] == "GPU is lost"
    after = summary_of(FakeNvml(lost_after=0))
    assert after["power_w_mean"] == {"unavailable": "GPU is lost"}
    assert after["energy_j"] == {"unavailable": "GPU is lost"}


def test_mig_is_named_in_the_reason() -> None:
    """Under MIG a metric that no instance has says that MIG is why."""
    summary = summary_of(FakeNvml(mig=True, nvmlDeviceGetUtilizationRates=pynvml.NVML_ERROR_NOT_SUPPORTED))
    assert summary["mig"] is True
    assert "MIG is enabled" in summary["utilisation_percent_mean"]["unavailable"]


def test_spans_are_attributed_by_time() -> None:
    """The energy of two spans is counted apart."""
    first, second = (summary_of(FakeNvml(), spans=n) for n in (1, 2))
    assert first["energy_j"] == second["energy_j"] == 30.0


def test_the_background_thread_samples_and_its_overhead_is_measured() -> None:
    """Samples arrive while the caller works, and the time they took is reported."""
    with Sampler(interval_s=0.005, nvml=Nvml(FakeNvml())) as sampler:
        with sampler.span("work") as span:
            time.sleep(0.1)
        overhead = sampler.overhead()
    assert span.summary["devices"][0]["samples"] > 2
    assert 0 < overhead["sampling_s"] < span.summary["wall_s"]


def test_a_reading_is_a_value_or_a_reason() -> None:
    """A reading with neither, or with both, cannot be made."""
    with pytest.raises(ValueError, match="either a value or a reason"):
        Reading(None)
    with pytest.raises(ValueError, match="either a value or a reason"):
        Reading(0.0, "broken")


def test_the_machine_is_named_without_importing_torch() -> None:
    """The header's machine is plain JSON and costs no torch import."""
    assert json.loads(json.dumps(machine()))["cpus"] >= 1
    code = "import sys; from harness.telemetry import machine; machine(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
def test_a_real_gpu_is_measured() -> None:
    """On a machine with a GPU, work on it shows as power, energy and memory."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    with Sampler(interval_s=0.02) as sampler, sampler.span("matmul") as span:
        a = torch.ones(4096, 4096, device="cuda")
        for _ in range(200):
            a = (a @ a).clamp(0, 1)
        torch.cuda.synchronize()
    device = span.summary["devices"][0]
    assert device["power_w_mean"] > 0
    assert device["memory_used_bytes_max"] > 3 * a.numel() * 4
