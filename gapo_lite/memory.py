"""How much memory this process takes, on the GPU and off it."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

GIB = 2**30
_STATUS = Path("/proc/self/status")


def peak_memory_gib() -> float:
    """Peak memory of this process, in GiB: allocated on the GPU, or resident where there is
    none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return peak_resident_bytes() / GIB


def peak_resident_bytes() -> int:
    """Peak resident memory of this process.

    On Linux this is VmHWM: what getrusage calls the peak is never less than what the process had
    that started this one.
    """
    if not _STATUS.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else 0
