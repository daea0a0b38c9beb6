"""A CUDA device in the host's memory: imported before torch, `cuda` is there, computed by the CPU.

    PYTHONPATH=tests/hostcuda/site python -m pytest tests/gpu   # here and in all that it starts
    import hostcuda, torch                                      # or in this process alone
    torch.ones(3, device="cuda") + 1

What it shows: numbers, devices that do not match, out-of-memory errors at a limit, peaks as
PyTorch's allocator counts them, how often the host waits for the device, autocast, and what
FlashAttention refuses (flash_attention.py).

What it cannot show: time; a kernel's own rounding and its workspace; fragments of the allocator;
overlapping streams (events are over at once), so neither a copy that comes too late nor memory that
is held until one is done; errors that a GPU reports late; kernels that a build lacks; the code of
bitsandbytes', Triton's and cuBLAS' kernels; limits of pinned memory. It relies on the pinned torch,
as a CPU build, and needs g++ once.

Environment: HOSTCUDA_GIB (memory, 24), HOSTCUDA_HELD_GIB (of it in other processes' hands, 0),
HOSTCUDA_CAPABILITY (8.9), HOSTCUDA_NAME.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

GIB = 2**30
_SOURCE = Path(__file__).with_name("hostcuda.cpp")


class Unavailable(ImportError):
    """There can be no emulated device here; the text says why."""


def _load() -> ctypes.CDLL:
    """The library, compiled once for this torch; before torch is imported, which asks it."""
    if "torch" in sys.modules:
        raise Unavailable("import hostcuda before torch")
    home = Path(find_spec("torch").origin).parent
    if list((home / "lib").glob("libtorch_cuda*")):
        raise Unavailable("this torch is built for CUDA: the emulated device is for CPU builds")
    if shutil.which("g++") is None:
        raise Unavailable(
            "g++ is missing, which compiles the emulated device (apt-get install g++)"
        )
    digest = hashlib.sha256(_SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    library = Path(__file__).parent / "__pycache__" / f"hostcuda-{digest}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        handle, made = tempfile.mkstemp(suffix=".so", dir=library.parent)
        os.close(handle)
        compiled = subprocess.run(
            [
                *("g++", "-O1", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include"),
                *(f"-I{home}/include/torch/csrc/api/include", str(_SOURCE), "-o", made),
                *(f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-lc10", "-ltorch_cpu"),
            ],
        )
        if compiled.returncode:
            Path(made).unlink()
            compiled.check_returncode()
        Path(made).rename(library)  # others may compile it at the same time
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


_lib = _load()
for _name in ("live", "peak", "waits"):
    getattr(_lib, f"hostcuda_{_name}").restype = ctypes.c_int64
_lib.hostcuda_limit.argtypes = [ctypes.c_int64]
live = _lib.hostcuda_live
peak = _lib.hostcuda_peak
waits = _lib.hostcuda_waits
reset_peak = _lib.hostcuda_reset_peak

with contextlib.suppress(ImportError):
    import bitsandbytes  # noqa: F401  # before "cuda" is there: it would look for its library
import torch  # noqa: E402

import flash_attention  # isort: skip  # noqa: E402


class Card:
    """What `torch.cuda.get_device_properties` returns, and `held`: bytes in other hands."""

    name = os.environ.get("HOSTCUDA_NAME", "NVIDIA GeForce RTX 4090")
    total_memory = int(float(os.environ.get("HOSTCUDA_GIB", "24")) * GIB)
    major, minor = map(int, os.environ.get("HOSTCUDA_CAPABILITY", "8.9").split("."))
    held = int(float(os.environ.get("HOSTCUDA_HELD_GIB", "0")) * GIB)
    multi_processor_count = 128


def _capability(device=None) -> tuple[int, int]:
    return Card.major, Card.minor


def _properties(device=None) -> type[Card]:
    # A card for each test process, which learns its name after this module is there.
    Card.uuid = f"hostcuda-{os.environ.get('PYTEST_XDIST_WORKER', '')}"
    return Card


def limit(num_bytes: int) -> None:
    """Memory that this process may take of the device from here on."""
    _lib.hostcuda_limit(num_bytes)


def become(capability: tuple[int, int], memory: int, held: int = 0) -> None:
    """Makes the device another card, of `memory` bytes of which `held` are in other hands."""
    (Card.major, Card.minor), Card.total_memory, Card.held = capability, memory, held
    limit(memory - held)


become(_capability(), Card.total_memory, Card.held)


class _Stream:
    """Everything is done at once, in order."""

    def __init__(self, *args, **kwargs):
        self.device = torch.device("cuda", 0)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def wait_stream(self, stream):
        """Nothing to wait for."""

    def wait_event(self, event):
        """Nothing to wait for."""

    def record_event(self, event=None):
        """An event that is over."""
        return event or _Event()

    def synchronize(self):
        """Nothing to wait for."""
        _lib.hostcuda_wait()


class _Event(_Stream):
    def record(self, stream=None):
        """Is over at once."""

    def wait(self, stream=None):
        """Nothing to wait for."""

    def query(self):
        """Always over."""
        return True


_generator = torch.Generator()  # dropout on "cuda" draws from the CPU's default one
for _name, _value in {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": lambda: None,
    "init": lambda: None,
    "_is_compiled": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "is_bf16_supported": lambda including_emulation=True: (
        _capability() >= (8, 0) or including_emulation
    ),
    "get_device_capability": _capability,
    "get_device_name": lambda device=None: Card.name,
    "get_device_properties": _properties,
    "mem_get_info": lambda device=None: (Card.total_memory - Card.held - live(), Card.total_memory),
    "memory_allocated": lambda device=None: live(),
    "memory_reserved": lambda device=None: live(),
    "max_memory_allocated": lambda device=None: peak(),
    "max_memory_reserved": lambda device=None: peak(),
    "reset_peak_memory_stats": lambda device=None: reset_peak(),
    "get_rng_state": lambda device="cuda": _generator.get_state(),
    "set_rng_state": lambda state, device="cuda": _generator.set_state(state),
    "manual_seed": lambda seed: _generator.manual_seed(seed),
    "manual_seed_all": lambda seed: _generator.manual_seed(seed),
    "set_per_process_memory_fraction": lambda share, device=None: limit(
        int(share * Card.total_memory)
    ),
    "set_sync_debug_mode": lambda mode: _lib.hostcuda_forbid_waits(int(mode in ("error", 2))),
    "is_current_stream_capturing": lambda: False,
    "_exchange_device": lambda device: 0,
    "_maybe_exchange_device": lambda device: 0,
    "Stream": _Stream,
    "Event": _Event,
    "current_stream": lambda device=None: _Stream(),
    "default_stream": lambda device=None: _Stream(),
    "stream": lambda stream: stream,
}.items():
    setattr(torch.cuda, _name, _value)
torch.Tensor.record_stream = lambda tensor, stream: None
torch.version.cuda = "13.0 (emulated)"

_aten = torch.library.Library("aten", "IMPL")
flash_attention.register(_aten, _capability, _lib.hostcuda_own)


def _rms_norm_backward(grad, x, *rest):
    """Refuses what a kernel without strides would compute wrongly, and not say so."""
    if not (grad.is_contiguous() and x.is_contiguous()):
        raise RuntimeError("_fused_rms_norm_backward: gradient and input must be contiguous")
    return torch._decomp.decompositions._fused_rms_norm_backward(grad, x, *rest)


_aten.impl("_fused_rms_norm_backward", _rms_norm_backward, "CUDA")
