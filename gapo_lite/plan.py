"""Will it fit, and how long will it take: memory, speed and the dials that decide them.

    shape = shape_of(model_config, config.lora, dtype)
    plan = best_plan(config, shape, work, GPUS["h100"])

By arithmetic alone, so that it answers for a card that is not here. Peak memory is the weights, the
adapter with its gradient and AdamW's two moments, what autograd keeps of the largest micro-batch,
and the greater of a tile of logits and a layer computed again. Time is the matrix products at a
share of the card's rate, and what is read and written between them at a share of its bandwidth;
these shares are assumptions for a GPU (none was measured yet) and measured on a CPU: see SHARES.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapo_lite.batching import MicroBatchLimits, num_tokens
from gapo_lite.config import RunConfig
from gapo_lite.devices import Device
from gapo_lite.lengths import shortened
from gapo_lite.logps import TILE_ROWS
from gapo_lite.memory import GIB
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.shape import NF4_BYTES, ModelShape

TOKEN_BUDGETS = (1024, 2048, 4096, 8192)
"""Tokens a micro-batch that are tried where none are set. Beyond 8192, dequantising the weights is
below 4 % of a pass."""

RECOMPUTED = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of layers that are tried where none is set."""

SHORTER = (1024, 768, 512, 384, 256)
"""Values of data.max_length that are tried where no dial makes it fit."""

_STEPS_LOOKED_AT = 200  # enough to know how well micro-batches are filled
_AS_FAST = 1.02  # less than 2 % slower counts as equally fast; then less memory wins


@dataclass(frozen=True, slots=True)
class Shares:
    """What is reached in practice.

    Attributes:
        flops: of the matrix rate.
        bandwidth: of the memory's bandwidth.
        memory: of the memory that may be planned with; fragments and the driver take the rest.
        passes_over_activations: how often the bytes that autograd keeps of a layer are read or
            written in its forward and backward pass together.
        layer_seconds: what a layer costs in each pass beside that, however little goes through it:
            Python, and starting kernels.
        activations: how many times the bytes that autograd keeps are held; a CPU's kernels take
            more.
        holes: how many times that where the lengths of the pairs differ: between blocks of many
            sizes, the C library's heap keeps room that it cannot use.
        held: bytes of the process before the model.
        basis: where these come from, for a person.
    """

    flops: float
    bandwidth: float
    memory: float
    passes_over_activations: float
    layer_seconds: float
    activations: float
    holes: float
    held: float
    basis: str


SHARES = {
    False: Shares(
        flops=0.6,
        bandwidth=0.8,
        memory=0.92,
        passes_over_activations=8.0,
        layer_seconds=3e-4,
        activations=1.0,
        holes=1.0,
        held=0.6 * GIB,
        basis="the shares of a card's rate and bandwidth that are reached are assumptions, none of "
        "them measured yet",
    ),
    True: Shares(
        flops=0.58,
        bandwidth=0.62,
        memory=0.7,
        passes_over_activations=8.0,
        layer_seconds=3e-4,
        activations=2.1,
        holes=1.24,
        held=0.75 * GIB,
        basis="with constants fitted to three benchmarks on another day",
    ),
}
"""By Device.is_cpu. Those of a GPU are assumptions: none has been measured. Those of a CPU are
fitted to three benchmarks, and give what these measured within a tenth: tests/test_plan.py."""


@dataclass(frozen=True, slots=True)
class Dials:
    """What decides memory and speed, and nothing else.

    Attributes:
        limits: of a micro-batch.
        recomputed: share of the layers that compute their activations again.
        dequantized: whether the 4-bit weights are kept dequantised.
        offloaded: whether the inputs of recomputed layers wait in the host's memory.
        layout: "packed"; "by pair", where FlashAttention refuses it; or "padded".
    """

    limits: MicroBatchLimits
    recomputed: float
    dequantized: bool
    offloaded: bool = False
    layout: str = "packed"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Dials:
        """From `to_json`."""
        return cls(**{**data, "limits": MicroBatchLimits(**data["limits"])})


@dataclass(frozen=True, slots=True)
class Workload:
    """The pairs to train on, as the model will get them.

    Attributes:
        lengths: (N, 3) tokens of prompt, chosen and rejected, after all cuts.
        heldout: (M, 3) of the held-out pairs.
        batch_size: pairs an optimizer step on this device.
        packed: layout.
        shards: processes that share the layers' weights.
    """

    lengths: NDArray[np.int64]
    heldout: NDArray[np.int64]
    batch_size: int
    packed: bool = True
    shards: int = 1

    def sizes(self) -> list[int]:
        """Tokens of each pair through the model."""
        return [num_tokens(*map(int, row), packed=self.packed) for row in self.lengths]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to expect.

    Attributes:
        dials: with these.
        parts: bytes at the peak, by what takes them.
        fits: whether the device has room for them.
        micro_batch_tokens: of the largest micro-batch.
        pairs_per_second, tokens_per_second: in training.
        step_seconds: of an optimizer step.
        hours: of the whole run, evaluations and reference included.
    """

    dials: Dials
    parts: dict[str, float]
    fits: bool
    micro_batch_tokens: int
    pairs_per_second: float
    tokens_per_second: float
    step_seconds: float
    hours: float

    @property
    def peak(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


def best_plan(config: RunConfig, shape: ModelShape, work: Workload, device: Device) -> Plan:
    """The quickest plan that fits with what the configuration sets, or the smallest if none does.

    Plans that are equally fast, or nearly, are told apart by their memory.
    """
    plans = list(plans_for(config, shape, work, device))
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.peak)
    quickest = min(plan.hours for plan in fitting)
    return min(
        (plan for plan in fitting if plan.hours <= quickest * _AS_FAST),
        key=lambda plan: plan.peak,
    )


def plans_for(
    config: RunConfig, shape: ModelShape, work: Workload, device: Device
) -> Iterator[Plan]:
    """A plan for each setting of the dials that the configuration leaves open."""
    training, model = config.training, config.model
    limits = [MicroBatchLimits(training.micro_batch_size, training.micro_batch_tokens)]
    if limits == [MicroBatchLimits()]:
        limits = [MicroBatchLimits(tokens=budget) for budget in TOKEN_BUDGETS]
    share = training.gradient_checkpointing
    recomputed = RECOMPUTED if share is None else (share,)
    can_dequantize = (
        model.quantization == "nf4" and model.backend != "unsloth" and not training.fsdp
    )
    # On a CPU it does not pay: benchmarks/training_step.py.
    auto = (False,) if device.is_cpu else (False, True)
    caches = {"auto": auto, "always": (True,), "never": (False,)}[model.dequantized_cache]
    # How micro-batches are filled depends on their limits alone, and takes most of the time.
    filled = {limit: _micro_batches(work, limit, config.training.seed) for limit in limits}
    for limit, layers, cache in itertools.product(
        limits, recomputed, caches if can_dequantize else (False,)
    ):
        dials = Dials(limit, layers, cache)
        yield _plan(config, shape, work, device, dials, filled[limit])


def _micro_batches(
    work: Workload, limits: MicroBatchLimits, seed: int
) -> tuple[float, tuple[int, int]]:
    """Micro-batches an optimizer step, and (tokens, response tokens) of the largest."""
    sizes = np.array(work.sizes())
    responses = work.lengths[:, 1:].sum(axis=1)
    order = np.random.default_rng(seed).permutation(len(sizes))
    # The longest pairs of all come together now and then: they are the first step looked at.
    longest = np.argsort(-sizes, kind="stable")[: work.batch_size]
    starts = range(0, len(order), work.batch_size)[:_STEPS_LOOKED_AT]
    steps = [longest, *(order[start : start + work.batch_size] for start in starts)]
    counts, largest = [], (0, 0)
    for step in steps:
        cut = limits.micro_batches(sizes[step].tolist(), packed=work.packed)
        counts.append(len(cut) * work.batch_size / len(step))
        for group in cut:
            chosen = step[group]
            tokens = sizes[chosen].sum() if work.packed else len(group) * sizes[chosen].max()
            largest = max(largest, (int(tokens), int(responses[chosen].sum())))
    return float(np.mean(counts[1:])), largest


def _plan(
    config: RunConfig,
    shape: ModelShape,
    work: Workload,
    device: Device,
    dials: Dials,
    filled: tuple[float, tuple[int, int]],
) -> Plan:
    passes, (tokens, rows) = filled
    shares = SHARES[device.is_cpu]
    parts = memory_parts(
        shape,
        dials,
        tokens,
        rows,
        quantized=config.model.quantization == "nf4",
        device=device,
        shards=work.shards,
        alike=len(np.unique(work.lengths, axis=0)) <= 1,
    )
    step, evaluation = _seconds(shape, work, device, dials, passes)
    training = config.training
    steps = training.max_steps or math.ceil(
        training.epochs * math.ceil(len(work.lengths) / work.batch_size)
    )
    evaluations = (2 + (steps - 1) // training.eval_steps) if len(work.heldout) else 0
    references = OBJECTIVES[config.objective.name].uses_reference
    scale = len(work.lengths) / max(len(work.heldout), 1)  # the reference scores training pairs too
    seconds = steps * step + evaluation * (evaluations + (scale + 1 if references else 0))
    per_step = min(work.batch_size, len(work.lengths))
    return Plan(
        dials=dials,
        parts=parts,
        fits=sum(parts.values()) <= shares.memory * device.memory,
        micro_batch_tokens=tokens,
        pairs_per_second=per_step / step,
        tokens_per_second=per_step / step * float(work.lengths.sum(axis=1).mean()),
        step_seconds=step,
        hours=seconds / 3600,
    )


def memory_parts(
    shape: ModelShape,
    dials: Dials,
    tokens: int,
    rows: int,
    *,
    quantized: bool,
    device: Device,
    shards: int = 1,
    alike: bool = False,
) -> dict[str, float]:
    """Bytes at the peak of a training step.

    Args:
        shape: the model.
        dials: how it is trained.
        tokens: of the largest micro-batch, with padding.
        rows: of it that predict a scored token.
        quantized: whether the base is in NF4.
        device: where.
        shards: processes that share the layers' weights.
        alike: whether all pairs have the same lengths.
    """
    item, shares = shape.item_bytes, SHARES[device.is_cpu]
    held = shares.activations * (1.0 if alike else shares.holes)
    weight = NF4_BYTES if quantized and not dials.dequantized else item
    tile = min(rows, TILE_ROWS["cpu" if device.is_cpu else "cuda"])
    logits = tile * shape.vocabulary * (4 + item)
    kept = dials.recomputed * shape.hidden * item + (1 - dials.recomputed) * shape.activation_bytes
    # The backward pass of one layer: its activations again if they were dropped, and gradients.
    layer = tokens * shape.activation_bytes * (1.0 if dials.recomputed else 0.5)
    largest = max(n * m for n, m in shape.linear) * item if weight == NF4_BYTES else 0
    return {
        "libraries and driver": shares.held,
        "weights": shape.linear_params * weight / shards + shape.other_params * item,
        "adapter and optimizer": shape.adapter_params * 16,
        "activations": tokens * shape.layers * kept * held,
        "head": 3 * rows * shape.hidden * item + tokens * shape.hidden * item,
        "at the peak of a pass": max(logits, layer * held) + largest,
    }


def _seconds(
    shape: ModelShape, work: Workload, device: Device, dials: Dials, passes: float
) -> tuple[float, float]:
    """Seconds of an optimizer step, and of one evaluation."""
    shares = SHARES[device.is_cpu]
    rate, bandwidth = device.flops * shares.flops, device.bandwidth * shares.bandwidth
    pairs = min(work.batch_size, len(work.lengths))
    mean = work.lengths.mean(axis=0)
    padding = np.mean(work.sizes()) / mean.sum()
    flops = float(np.mean(shape.flops(*_columns(work.lengths), dials.recomputed)))
    moved = mean.sum() * shape.layers * shape.activation_bytes
    moved *= shares.passes_over_activations * (1 + dials.recomputed / 3)
    once = 0.0 if dials.dequantized else shape.linear_params * (NF4_BYTES + shape.item_bytes)
    step = pairs * padding * (flops / rate + moved / bandwidth)
    each_pass = once / bandwidth + shape.layers * shares.layer_seconds
    step += passes * (2 + dials.recomputed) * each_pass
    forward = np.sum(shape.forward_flops(*_columns(work.heldout))) / rate
    forward += work.heldout.sum() * shape.layers * shape.activation_bytes * 2 / bandwidth
    return float(step), float(forward)


def _columns(lengths: NDArray[np.int64]) -> tuple[Any, Any, Any]:
    return lengths[:, 0], lengths[:, 1], lengths[:, 2]


def advice(config: RunConfig, shape: ModelShape, work: Workload, device: Device) -> dict[str, Any]:
    """Settings that would make a plan fit that does not, by their keys: the dials if they do, else
    shorter pairs as well; empty where nothing of the kind helps."""
    open_dials = {
        "training": config.training.model_copy(
            update={
                "micro_batch_size": None,
                "micro_batch_tokens": None,
                "gradient_checkpointing": None,
            }
        ),
        "model": config.model.model_copy(update={"dequantized_cache": "auto"}),
    }
    opened = config.model_copy(update=open_dials)
    longest, prompt = config.data.max_length, config.data.max_prompt_length
    shorter = [(length, min(prompt, length // 2)) for length in SHORTER if length < longest]
    for limits in [(longest, prompt), *shorter]:
        lengths = shortened(work.lengths, *limits)
        tried = best_plan(opened, shape, replace(work, lengths=lengths), device)
        if tried.fits:
            cut = dict(zip(("data.max_length", "data.max_prompt_length"), limits, strict=True))
            return _as_settings(tried.dials) | (cut if limits in shorter else {})
    return {}


def _as_settings(dials: Dials) -> dict[str, Any]:
    return {
        "training.micro_batch_tokens": dials.limits.tokens,
        "training.micro_batch_size": dials.limits.pairs,
        "training.gradient_checkpointing": dials.recomputed,
        "model.dequantized_cache": "auto" if dials.dequantized else "never",
    }


def sizes_of(pairs: Sequence[Any]) -> NDArray[np.int64]:
    """(N, 3) lengths of tokenised pairs."""
    return np.array([pair.lengths for pair in pairs], dtype=np.int64).reshape(-1, 3)
