"""A configuration → its plan: the model's shape, the data's real lengths, and a card.

Training takes its dials from here (`settle`); `gapo-lite plan` and the page show it before
(`forecast`). Which dials are taken depends on the model, the data and the device's total memory
alone, so that the same run on the same kind of machine is cut in the same way.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig

from gapo_lite.batching import MicroBatchLimits
from gapo_lite.config import DataConfig, RunConfig
from gapo_lite.devices import UNKNOWN_BANDWIDTH, UNKNOWN_FLOPS, Device, device_named, known_card
from gapo_lite.errors import ConfigError, DataError, ModelError, RunError
from gapo_lite.lengths import count_tokens, shortened
from gapo_lite.memory import GIB, total_memory_bytes
from gapo_lite.model import load_model_config, load_tokenizer, pick_device, pick_precision
from gapo_lite.plan import SHARES, Dials, Plan, Workload, advice, best_plan, sizes_of
from gapo_lite.preparation import Prepared, load_and_split
from gapo_lite.published import DATA_SETS, published_config, published_lengths
from gapo_lite.runs import list_runs
from gapo_lite.shape import ModelShape, shape_of

logger = logging.getLogger(__name__)

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
        notes: what was taken as published instead of read, and what other programs hold, a
            sentence each.
    """

    config: RunConfig
    shape: ModelShape
    work: Workload
    device: Device
    plan: Plan
    advice: dict[str, Any]
    measured: list[tuple[str, float, float]]
    notes: list[str]

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
            "notes": self.notes,
        }


def forecast(
    config: RunConfig,
    *,
    gpu: str | None = None,
    runs_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Forecast:
    """Reads the data and counts its tokens; loads no weights.

    What cannot be had, offline or of a gated model, is taken as published where that is known.

    Args:
        config: what is planned.
        gpu: a card as `device_named` takes it; None plans for this machine.
        runs_dir: where runs lie that may have measured the same.
        progress: called with (pairs whose tokens are counted, all pairs) now and then.

    Raises:
        ConfigError: there is no such card.
        GapoError: model or data cannot be read, and are not known.
    """
    device = device_named(gpu) if gpu else this_device(config, measure=True)
    source = _read_source(config, progress)
    limits = config.data.max_length, config.data.max_prompt_length
    work = Workload(
        shortened(source.lengths.astype(np.int64), *limits),
        shortened(source.heldout.astype(np.int64), *limits),
        batch_size=config.training.batch_size,
        packed=_is_packed(config),
    )
    if not len(work.lengths):
        raise ConfigError("with these limits no pair has a token left: raise data.max_length.")
    shape = shape_of(source.model_config, config.lora, _precision_on(device, config))
    plan = best_plan(config, shape, work, device)
    measured = [] if gpu or runs_dir is None else _measured(config, runs_dir)
    remedy = {} if plan.fits else advice(config, shape, work, device)
    taken = "" if gpu else _taken_by_others(plan)
    notes = [*source.notes, *filter(None, [taken])]
    return Forecast(config, shape, work, device, plan, remedy, measured, notes)


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
    if note := _taken_by_others(plan):
        logger.warning("%s", note)
    return plan.dials, describe(plan, device)


def _taken_by_others(plan: Plan) -> str:
    """Says so where other programs hold memory of this machine's GPU that the plan counts on."""
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info(pick_device())
    free += torch.cuda.memory_reserved()  # this process's own, of a run before
    # What libraries and driver take is taken by now, and not in `free`.
    if plan.peak - plan.parts["libraries and driver"] <= free:
        return ""
    return (
        f"Only {free / GIB:.1f} of this GPU's {total / GIB:.1f} GiB is free, and about "
        f"{plan.peak / GIB:.1f} GiB are planned with: end what else uses it (nvidia-smi lists it), "
        "or training may run out of memory and go on in smaller passes."
    )


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
        "their inputs kept in the host's memory" if dials.offloaded else "",
        "4-bit weights kept dequantised" if dials.dequantized else "",
        {"by pair": "attention pair by pair (no FlashAttention)", "padded": "padded"}.get(
            dials.layout, ""
        ),
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
    name, capability = torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place)
    known = known_card(name)
    if known:
        return replace(known, name=name, memory=memory, capability=capability)
    return Device(name, memory, UNKNOWN_FLOPS, UNKNOWN_BANDWIDTH, capability=capability)


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


def _dtype(config: RunConfig) -> torch.dtype:
    return pick_precision(config.model.precision, pick_device())


def _is_packed(config: RunConfig) -> bool:
    return config.training.layout != "padded" and config.model.backend != "unsloth"


def _precision_on(device: Device, config: RunConfig) -> torch.dtype:
    """What training computes in on a device: `pick_precision`, also for a card that is not here."""
    if device.is_cpu or config.model.precision != "auto":
        return _dtype(config)
    return torch.bfloat16 if device.has_bfloat16 else torch.float16


@dataclass(frozen=True, slots=True)
class _Source:
    """What a plan is made from.

    Attributes:
        model_config: the model's.
        lengths, heldout: (N, 3) and (M, 3) tokens of the pairs before any cut.
        notes: what of it is as published, a sentence each.
    """

    model_config: PretrainedConfig
    lengths: NDArray[Any]
    heldout: NDArray[Any]
    notes: list[str]


def _read_source(config: RunConfig, progress: Callable[[int, int], None] | None) -> _Source:
    """The model's configuration and the pairs' lengths, or what is published of them.

    Raises:
        GapoError: they cannot be had, and are not known.
    """
    model, data = config.model, config.data
    known = _published_lengths(data)
    try:
        model_config = load_model_config(model.name, model.revision)
    except ModelError as error:
        published = published_config(model.name)
        if published is None or known is None:
            raise
        # Its tokenizer cannot be had either; a try would take as long again without a network.
        notes = [_about_shape(model.name, error), _about_lengths(data)]
        return _Source(published, *known, notes)
    try:
        tokenizer = load_tokenizer(model.name, model.revision)
        _, train_pairs, heldout_pairs = load_and_split(config, [])
    except (ModelError, DataError):
        if known is None:
            raise
        return _Source(model_config, *known, [_about_lengths(data)])
    counted = count_tokens([*train_pairs, *heldout_pairs], tokenizer, progress)
    lengths, heldout = np.split(counted, [len(train_pairs)])
    return _Source(model_config, lengths, heldout, [])


def _published_lengths(data: DataConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """(N, 3) and (M, 3) of the pairs to train on and to hold out, None where they are unknown."""
    train = published_lengths(data.source, data.split)
    if train is None:
        return None
    if data.heldout_source:
        heldout = published_lengths(data.heldout_source, data.heldout_split)
        return None if heldout is None else (train[: data.max_pairs], heldout)
    heldout, train = np.split(train, [round(data.heldout_fraction * len(train))])
    return train[: data.max_pairs], heldout


def _about_shape(name: str, error: ModelError) -> str:
    text = str(error).removeprefix(f"the model {name} could not be loaded: ")
    reason = re.split(r"\.(?= |$)", text)[0]
    return f"The model's shape is the published one: it could not be loaded here ({reason})."


def _about_lengths(data: DataConfig) -> str:
    known = DATA_SETS[data.source]
    return (
        f"Lengths are not counted, but typical of {data.source} as published: "
        f"{known.rows[data.split]:,} pairs, around {known.prompt_tokens} tokens of a prompt and "
        f"{known.response_tokens} of a response."
    )


def _careful(config: RunConfig) -> Dials:
    training = config.training
    limits = MicroBatchLimits(training.micro_batch_size, training.micro_batch_tokens)
    share = training.gradient_checkpointing
    return Dials(
        MicroBatchLimits(pairs=1) if limits == MicroBatchLimits() else limits,
        1.0 if share is None else share,
        config.model.dequantized_cache == "always",
        offloaded=config.training.offload == "always" and share != 0,
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
        *(training.layout, training.offload, training.batch_size, config.data.max_length),
    )
