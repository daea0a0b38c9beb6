"""How much memory this process takes, on the GPU and off it."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30
_STATUS = Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def reset_peak_memory() -> None:
    """Lets `peak_memory_gib` of a GPU start again: a process may train more than once."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    """Peak memory of this process, in GiB: allocated on the GPU, or resident where there is
    none."""
    import torch  # takes seconds, and who reads GIB alone has no use for it

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return peak_resident_bytes() / GIB


_FULL = (
    "out of memory",  # AcceleratorError, where the driver says it
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # of a CPU
)
_FULL_OR_BROKEN = "CUBLAS_STATUS_NOT_INITIALIZED"  # its workspace comes with the first product


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what the error means: PyTorch's allocator, cuBLAS and the driver each have
    words of their own for a card that is full."""
    if not isinstance(error, RuntimeError):
        return False
    import torch

    if _FULL_OR_BROKEN in str(error):
        return torch.cuda.mem_get_info()[0] < GIB / 2
    is_said_so = isinstance(error, torch.OutOfMemoryError)
    return is_said_so or any(text in str(error) for text in _FULL)


def peak_resident_bytes() -> int:
    """Peak resident memory of this process.

    On Linux this is VmHWM: what getrusage calls the peak is never less than what the process had
    that started this one.
    """
    if not _STATUS.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else 0


def total_memory_bytes(device: torch.device) -> int:
    """Memory of the GPU, or what this process may have of the machine's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    return min(installed, int(limit)) if limit.isdigit() else installed
