"""`gapo-lite doctor`: whether this machine can train, one line a thing.

Each check is a function that returns a `Check` and never raises: a broken library is what it is
there to find.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version

from gapo_lite.embedded import EMBEDDED_MODELS, cache_dir, embedded_path
from gapo_lite.errors import GapoError

Mark = Literal["ok", "warn", "fail"]

SUPPORTED = {
    "torch": ("2.11", "2.13"),
    "transformers": ("5.17", "5.23"),
    "peft": ("0.21", "0.21"),
    "accelerate": ("1.14", "1.15"),
    "datasets": ("4.8", "5.2"),
    "bitsandbytes": ("0.50", "0.50"),
}
"""Package → (oldest, newest) version that the code runs on, as in pyproject.toml."""

OPTIONAL = {"liger": "liger-kernel", "unsloth": "unsloth"}
"""What `model.backend` takes beside transformers → the package that it needs."""

GIB = 2**30
FREE_GIB = 5
"""Less free disk than this is worth a warning: checkpoints and a merged 8B model take 17 GB."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line.

    Attributes:
        mark: ok; warn, where something is untested or missing that one can train without; fail,
            where one cannot.
        name: what was looked at.
        text: what was found, and what to do.
    """

    mark: Mark
    name: str
    text: str


def examine(runs_dir: Path) -> Iterator[Check]:
    """All checks, in the order of the screen."""
    yield _python()
    yield from (_package(name) for name in SUPPORTED)
    yield _guarded("GPU", _gpu)
    yield _guarded("4-bit layer", _four_bit_layer)
    yield _guarded("attention", _attention)
    yield from (_embedded_model(name) for name in EMBEDDED_MODELS)
    yield _guarded("disk for runs", lambda: _disk("disk for runs", runs_dir.absolute()))
    yield _guarded("disk for cache", lambda: _disk("disk for cache", cache_dir()))
    yield _guarded("Hub login", _hub_login)
    for name, package in OPTIONAL.items():
        yield _guarded(name, partial(_optional, name, package))


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """What the check says, or how it broke."""
    try:
        return check()
    except Exception as error:  # any library may fail in its own way: that is the finding
        return Check("fail", name, " ".join(f"{type(error).__name__}: {error}".split())[:300])


def _python() -> Check:
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    text = platform.python_version() + ("" if fits else " (supported: 3.11 and 3.12)")
    return Check("ok" if fits else "fail", "Python", text)


def _package(name: str) -> Check:
    oldest, newest = SUPPORTED[name]
    wanted = oldest if oldest == newest else f"{oldest} to {newest}"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check("fail", name, f"not installed: pip install '{name}=={newest}.*'")
    if Version(found) < Version(oldest):
        return Check("fail", name, f"{found} is too old: {wanted} is needed")
    if Version(found).release[:2] > Version(newest).release:
        return Check("warn", name, f"{found} is newer than what is tested: {wanted}")
    if name == "datasets" and Version(found) < Version("5"):
        text = f"{found} unpickles what a data folder tells it to: load only folders that you trust"
        return Check("warn", name, text)
    return Check("ok", name, found)


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None and Path("/proc/driver/nvidia/version").exists():
            return Check(
                "warn",
                "GPU",
                "there is an NVIDIA GPU, but this torch is built for the CPU: it would not be used",
            )
        return Check("warn", "GPU", "none: training runs on the CPU, which is enough for the demo")
    free, total = torch.cuda.mem_get_info()
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    text = (
        f"{torch.cuda.get_device_name()}, {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free, "
        f"{'bfloat16' if has_bf16 else 'no bfloat16: float16 is used'}, CUDA {torch.version.cuda}"
    )
    return Check("ok" if free > total / 2 else "warn", "GPU", text)


def _four_bit_layer() -> Check:
    """Runs a 4-bit layer forward and backward, and compares with its dequantised weights."""
    import bitsandbytes
    import torch

    from gapo_lite.model import pick_device, pick_precision

    device = pick_device()
    dtype = pick_precision("auto", device)
    layer: Any = bitsandbytes.nn.Linear4bit(
        128, 128, bias=False, compute_dtype=dtype, quant_type="nf4"
    ).to(device)
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    weight = weight.to(dtype)
    given = torch.ones(4, 128, device=device, dtype=dtype, requires_grad=True)
    made = layer(given)
    made.sum().backward()
    errors = (
        _relative_error(made.detach(), given.detach() @ weight.T),
        _relative_error(given.grad, weight.sum(0).expand(4, -1)),
    )
    where = f"forward and backward on {device} in {str(dtype).removeprefix('torch.')}"
    if not max(errors) < 0.05:  # nan is wrong too
        text = f"{where} is wrong by {max(errors):.1%}: reinstall bitsandbytes"
        return Check("fail", "4-bit layer", f"{text}, or train with model.quantization: none")
    return Check("ok", "4-bit layer", where)


def _attention() -> Check:
    """Tries FlashAttention's varlen kernels, forward and backward, which packed pairs want."""
    from gapo_lite.attention import why_not_flash
    from gapo_lite.model import pick_device, pick_precision

    device = pick_device()
    if device.type == "cpu":
        return Check("ok", "attention", "on the CPU, by scaled_dot_product_attention")
    dtype = pick_precision("auto", device)
    if refusal := why_not_flash(device, dtype, 128):
        text = f"FlashAttention does not run here ({refusal}): slower layouts are used"
        return Check("warn", "attention", text)
    return Check("ok", "attention", "FlashAttention, forward and backward, tried with heads of 128")


def _relative_error(found: Any, expected: Any) -> float:
    return float((found - expected).float().norm() / expected.float().norm())


def _embedded_model(name: str) -> Check:
    try:
        embedded_path(name)
    except GapoError as error:
        return Check("warn", name, str(error))
    return Check("ok", name, f"from {EMBEDDED_MODELS[name].requirement}")


def _disk(name: str, folder: Path) -> Check:
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free / GIB
    if not os.access(place, os.W_OK):
        return Check("fail", name, f"{place} cannot be written to: choose another folder")
    text = f"{free:.1f} GiB free at {place}"
    return Check("ok" if free >= FREE_GIB else "warn", name, text)


def _hub_login() -> Check:
    from huggingface_hub import get_token

    if get_token():
        return Check("ok", "Hub login", "a token is there (not tried)")
    return Check(
        "warn", "Hub login", "none: gated models such as Llama-3 need `hf auth login` or HF_TOKEN"
    )


def _optional(name: str, package: str) -> Check:
    try:
        return Check("ok", name, version(package))
    except PackageNotFoundError:
        return Check("ok", name, f"not installed (optional: requirements-{name}.txt)")
