"""A configuration → its plan: the model's shape, the data's real lengths, and a card.

Training takes its dials from here (`settle`); `gapo-lite plan` and the page show it before
(`forecast`). Which dials are taken depends on the model, the data and the device's total memory
alone, so that the same run on the same kind of machine is cut in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from gapo_lite.batching import MicroBatchLimits
from gapo_lite.config import RunConfig
from gapo_lite.devices import GPUS, Device, device_named
from gapo_lite.errors import ConfigError, ModelError, RunError
from gapo_lite.lengths import count_tokens, shortened
from gapo_lite.memory import GIB, total_memory_bytes
from gapo_lite.model import load_model_config, load_tokenizer, pick_device, pick_precision
from gapo_lite.plan import SHARES, Dials, Plan, Workload, advice, best_plan, sizes_of
from gapo_lite.preparation import Prepared, load_and_split
from gapo_lite.runs import list_runs
from gapo_lite.shape import ModelShape, shape_of

_UNKNOWN_GPU = 60e12, 500e9  # FLOP/s and bytes/s of a card that is not in GPUS
_NOMINAL_CPU = 1e11, 1e10


@dataclass(frozen=True, slots=True)
class Forecast:
    """A plan and what it was made from.

    Attributes:
        config: what is planned.
        shape: the model.
        work: the pairs.
        device: where.
        plan: what to expect.
        advice: settings that would make it fit, by key; empty where it does or none would.
        measured: of runs like it that have been: each one's name, peak in GiB and tokens a second.
    """

    config: RunConfig
    shape: ModelShape
    work: Workload
    device: Device
    plan: Plan
    advice: dict[str, Any]
    measured: list[tuple[str, float, float]]

    def to_json(self) -> dict[str, Any]:
        """What a person is shown of it, as plain data; memory in GiB."""
        plan, device, shares = self.plan, self.device, SHARES[self.device.is_cpu]
        return {
            "device": device.name,
            "is_cpu": device.is_cpu,
            "matrix_rate": device.flops,
            "memory": device.memory / GIB,
            "usable": shares.memory * device.memory / GIB,
            "basis": shares.basis,
            "pairs": len(self.work.lengths),
            "tokens_a_pair": float(self.work.lengths.sum(axis=1).mean()),
            "fits": plan.fits,
            "peak": plan.peak / GIB,
            "parts": {name: size / GIB for name, size in plan.parts.items()},
            "dials": dials_in_words(plan),
            "pairs_per_second": plan.pairs_per_second,
            "tokens_per_second": plan.tokens_per_second,
            "step_seconds": plan.step_seconds,
            "hours": plan.hours,
            "advice": self.advice,
            "measured": self.measured,
        }


def forecast(
    config: RunConfig,
    *,
    gpu: str | None = None,
    runs_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Forecast:
    """Reads the data and counts its tokens; loads no weights.

    Args:
        config: what is planned.
        gpu: a key of GPUS; None plans for this machine.
        runs_dir: where runs lie that may have measured the same.
        progress: called with (pairs whose tokens are counted, all pairs) now and then.

    Raises:
        ConfigError: there is no such card in the table.
        GapoError: model or data cannot be read.
    """
    device = device_named(gpu) if gpu else this_device(config, measure=True)
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    _, train_pairs, heldout_pairs = load_and_split(config, [])
    limits = config.data.max_length, config.data.max_prompt_length
    counted = count_tokens([*train_pairs, *heldout_pairs], tokenizer, progress)
    lengths, heldout = (shortened(part, *limits) for part in np.split(counted, [len(train_pairs)]))
    work = Workload(
        lengths.astype(np.int64),
        heldout.astype(np.int64),
        batch_size=config.training.batch_size,
        packed=_is_packed(config),
    )
    if not len(work.lengths):
        raise ConfigError("with these limits no pair has a token left: raise data.max_length.")
    shape = _shape(config, torch.bfloat16 if gpu else _dtype(config))
    plan = best_plan(config, shape, work, device)
    measured = [] if gpu or runs_dir is None else _measured(config, runs_dir)
    remedy = {} if plan.fits else advice(config, shape, work, device)
    return Forecast(config, shape, work, device, plan, remedy, measured)


def settle(config: RunConfig, prepared: Prepared, *, processes: int = 1) -> tuple[Dials, str]:
    """The dials that a new run takes, and a sentence about them.

    Raises:
        ModelError: the model cannot be read.
    """
    heldout = prepared.heldout.tokenized.pairs if prepared.heldout else []
    work = Workload(
        sizes_of(prepared.train.tokenized.pairs),
        sizes_of(heldout),
        batch_size=config.training.batch_size // processes,
        packed=_is_packed(config),
        shards=processes if config.training.fsdp else 1,
    )
    device = this_device(config, measure=False)
    model_config = load_model_config(config.model.name, config.model.revision)
    try:
        shape = shape_of(model_config, config.lora, _dtype(config))
    except ModelError as error:
        return _careful(config), f"{error} Taking the dials that need least memory."
    plan = best_plan(config, shape, work, device)
    return plan.dials, describe(plan, device)


def describe(plan: Plan, device: Device) -> str:
    """The plan in a sentence."""
    fit = "" if plan.fits else f"; this may not fit {device.memory / GIB:.0f} GiB"
    return (
        f"{dials_in_words(plan)}: about {plan.peak / GIB:.1f} GiB at the peak on "
        f"{device.name} (estimated){fit}."
    )


def dials_in_words(plan: Plan) -> str:
    """What a plan takes at once, and what it keeps."""
    dials = plan.dials
    parts = [
        f"at most {plan.micro_batch_tokens:,} tokens a forward pass",
        f"activations of {dials.recomputed:.0%} of the layers computed again",
        "4-bit weights kept dequantised" if dials.dequantized else "",
    ]
    return ", ".join(filter(None, parts))


def this_device(config: RunConfig, *, measure: bool) -> Device:
    """This machine's GPU, or its CPU.

    Args:
        config: says the precision.
        measure: whether a CPU's matrix rate is measured (a second); else it has a nominal one,
            with which the dials come out the same every time.
    """
    place = pick_device()
    memory = total_memory_bytes(place)
    if place.type == "cpu":
        flops, bandwidth = _NOMINAL_CPU
        if measure:
            flops = matrix_rate(1024, _dtype(config), place)
        return Device("this machine's CPU", memory, flops, bandwidth, is_cpu=True)
    name = torch.cuda.get_device_name(place)
    known = max((gpu for gpu in GPUS.values() if _is_the(gpu.name, name)), default=None, key=_size)
    flops, bandwidth = (known.flops, known.bandwidth) if known else _UNKNOWN_GPU
    return Device(name, memory, flops, bandwidth)


def matrix_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of a `size`³ matrix product: the best of a few runs."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first ones warm up
        _wait(device)
        began = time.perf_counter()
        for _ in range(10):
            left @ right
        _wait(device)
        best = min(best, (time.perf_counter() - began) / 10)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _is_the(known: str, name: str) -> bool:
    """Whether the driver's name of a card means one of the table, by the word that tells it."""
    words = [word for word in known.split() if any(c.isdigit() for c in word)][:1]
    return all(word.lower() in name.lower() for word in words)


def _size(gpu: Device) -> float:
    return gpu.memory


def _dtype(config: RunConfig) -> torch.dtype:
    return pick_precision(config.model.precision, pick_device())


def _is_packed(config: RunConfig) -> bool:
    return config.training.layout != "padded" and config.model.backend != "unsloth"


def _shape(config: RunConfig, dtype: torch.dtype) -> ModelShape:
    model_config = load_model_config(config.model.name, config.model.revision)
    return shape_of(model_config, config.lora, dtype)


def _careful(config: RunConfig) -> Dials:
    training = config.training
    limits = MicroBatchLimits(training.micro_batch_size, training.micro_batch_tokens)
    share = training.gradient_checkpointing
    return Dials(
        MicroBatchLimits(pairs=1) if limits == MicroBatchLimits() else limits,
        1.0 if share is None else share,
        config.model.dequantized_cache == "always",
    )


_DECISIVE = ("model", "lora")


def _measured(config: RunConfig, runs_dir: Path) -> list[tuple[str, float, float]]:
    """Runs of the same model and adapter with the same dials on a machine like this one."""
    found = []
    for run in list_runs(runs_dir):
        try:
            other, rows = run.config(), run.metrics()
            gpu = run.read("environment.json").get("gpu")
        except (RunError, ConfigError):
            continue
        here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        alike = all(getattr(other, name) == getattr(config, name) for name in _DECISIVE)
        same_dials = _dial_settings(other) == _dial_settings(config)
        speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
        if gpu == here and alike and same_dials and speeds:
            peak = max(row.get("memory_gib", 0.0) for row in rows)
            found.append((run.name, peak, median(speeds)))
    return found


def _dial_settings(config: RunConfig) -> tuple[Any, ...]:
    training = config.training
    return (
        *(training.micro_batch_size, training.micro_batch_tokens, training.gradient_checkpointing),
        *(training.layout, training.batch_size, config.data.max_length),
    )
