"""The machines that a plan is made for: cards by name, from their data sheets.

Importing this does not import torch, so that the page can list them.
"""

from __future__ import annotations

from dataclasses import dataclass

from gapo_lite.errors import ConfigError
from gapo_lite.memory import GIB


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan is made for.

    Attributes:
        name: for a person.
        memory: bytes that may be taken.
        flops: operations a second of a large matrix product (of a GPU: NVIDIA's dense bfloat16).
        bandwidth: bytes a second of its memory.
        is_cpu: whether it is this machine's CPU.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    is_cpu: bool = False


def _gpu(name: str, gib: float, tflops: float, gbps: float) -> Device:
    return Device(name, gib * GIB, tflops * 1e12, gbps * 1e9)


GPUS = {
    "3060": _gpu("RTX 3060 12 GB", 12, 25, 360),
    "3090": _gpu("RTX 3090", 24, 71, 936),
    "4060ti": _gpu("RTX 4060 Ti 16 GB", 16, 44, 288),
    "4070": _gpu("RTX 4070", 12, 58, 504),
    "4080": _gpu("RTX 4080", 16, 97, 717),
    "4090": _gpu("RTX 4090", 24, 165, 1008),
    "5090": _gpu("RTX 5090", 32, 210, 1792),
    "a10g": _gpu("A10G", 24, 70, 600),
    "l4": _gpu("L4", 24, 60, 300),
    "l40s": _gpu("L40S", 48, 362, 864),
    "a6000": _gpu("RTX A6000", 48, 155, 768),
    "a100-40": _gpu("A100 40 GB", 40, 312, 1555),
    "a100": _gpu("A100 80 GB", 80, 312, 2039),
    "h100": _gpu("H100 SXM", 80, 989, 3350),
    "h200": _gpu("H200", 141, 989, 4800),
    "b200": _gpu("B200", 180, 2250, 8000),
}
"""Cards by the name that `--gpu` takes: memory, dense bfloat16 rate with float32 sums, bandwidth,
from NVIDIA's data sheets."""


def device_named(gpu: str) -> Device:
    """A card of the table.

    Raises:
        ConfigError: it is not in it.
    """
    key = gpu.lower().removeprefix("rtx").strip(" -")
    if key not in GPUS:
        raise ConfigError(f"no card {gpu!r} is known. There are: {', '.join(GPUS)}.")
    return GPUS[key]
