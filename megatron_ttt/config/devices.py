"""What a device's data sheet promises. No torch."""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class DeviceFacts:
    """Of one GPU: dense bf16 TFLOP/s without sparsity, and memory in 10**9 bytes."""

    peak_tflops: float
    memory_gb: float


class Device(Enum):
    """NVIDIA's SXM parts (data sheets of 2020 to 2024), and L40S (PCIe)."""

    a100 = DeviceFacts(312.0, 80.0)
    h100 = DeviceFacts(989.0, 80.0)
    h200 = DeviceFacts(989.0, 141.0)
    b200 = DeviceFacts(2250.0, 180.0)
    l40s = DeviceFacts(362.0, 48.0)


def device_named(name: str) -> Device | None:
    """Return the device that a driver's name for it contains; ``None`` for an unknown one."""
    return next((device for device in Device if device.name in name.lower()), None)
