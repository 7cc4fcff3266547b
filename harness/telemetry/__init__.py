"""What the machine did meanwhile. Absent hardware is a recorded reason, never an error."""

from harness.telemetry.host import machine
from harness.telemetry.nvml import Nvml
from harness.telemetry.reading import Reading
from harness.telemetry.sampler import Sampler, Span

__all__ = ["Nvml", "Reading", "Sampler", "Span", "machine"]
