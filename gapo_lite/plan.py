"""Will it fit, and how long will it take: memory, speed and the dials that decide them.

    shape = shape_of(model_config, config.lora, dtype)
    plan = best_plan(config, shape, work, GPUS["h100"])

By arithmetic alone, so that it answers for a card that is not here. Peak memory is the weights, the
adapter with its gradient and AdamW's two moments, what autograd keeps of the largest micro-batch,
and the greater of a tile of logits and a layer computed again; for a GPU it is held against a
simulated step (benchmarks/gpu_simulated.py). Time is the matrix products at a share of the card's
rate, and what is read and written between them at a share of its bandwidth, or what it takes to
start the kernels if that is more; these shares are assumptions for a GPU (none was measured yet)
and measured on a CPU: see SHARES.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gapo_lite.batching import MicroBatchLimits
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

LOWER_RANKS = (16, 8)
"""Values of lora.rank that are tried where shorter pairs are not enough."""

Layout = Literal["packed", "by pair", "padded"]

_STEPS_LOOKED_AT = 200  # enough to know how well micro-batches are filled
_AS_FAST = 1.02  # less than 2 % slower counts as equally fast; then less memory wins
_OFFLOADED = 1.05  # assumed: what a step takes longer, its copies being made beside the products
_BY_PAIR = 0.2  # assumed: kernels of a layer that each pair of a pass starts without FlashAttention


@dataclass(frozen=True, slots=True)
class Shares:
    """What is reached in practice.

    Attributes:
        flops: of the matrix rate.
        bandwidth: of the memory's bandwidth.
        memory: of the memory that may be planned with; fragments and the driver take the rest.
        passes_over_activations: how often the bytes that autograd keeps of a layer are read or
            written in its forward and backward pass together.
        layer_seconds: what a layer takes in each pass, however little goes through it: Python, and
            starting kernels. On a GPU beside what it computes, on a CPU on top of it.
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
        layer_seconds=8e-4,  # about 80 launches at 10 µs
        activations=1.02,  # keys and values of a prompt are gathered twice
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
        layout: "by pair" is packed where FlashAttention refuses it, two calls a pair.
    """

    limits: MicroBatchLimits
    recomputed: float
    dequantized: bool
    offloaded: bool = False
    layout: Layout = "packed"

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
        packed: whether it may be packed.
        shards: processes that share the layers' weights.
    """

    lengths: NDArray[np.int64]
    heldout: NDArray[np.int64]
    batch_size: int
    packed: bool = True
    shards: int = 1

    def sizes(self, layout: Layout) -> NDArray[np.int64]:
        """(N,) tokens of each pair through the model; see `batching.num_tokens`."""
        if layout != "padded":
            return self.lengths.sum(axis=1)
        return 2 * (self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1))


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
    choices = {"auto": auto, "always": (True,), "never": (False,)}
    caches = choices[model.dequantized_cache] if can_dequantize else (False,)
    can_offload = not device.is_cpu and model.backend != "unsloth"
    offloads = choices[training.offload] if can_offload else (False,)
    # How micro-batches are filled depends on limits and layout alone, and takes most of the time.
    layouts = _layouts(config, shape, work, device)
    filled = {
        (limit, layout): _micro_batches(work, limit, layout, training.seed)
        for limit, layout in itertools.product(limits, layouts)
    }
    for limit, layers, cache, offload, layout in itertools.product(
        limits, recomputed, caches, offloads, layouts
    ):
        if layers or not offload:
            dials = Dials(limit, layers, cache, offload, layout)
            yield _plan(config, shape, work, device, dials, filled[limit, layout])


def _layouts(
    config: RunConfig, shape: ModelShape, work: Workload, device: Device
) -> tuple[Layout, ...]:
    """Those to choose from: `attention.why_not_flash`, foretold for a card that is not here."""
    if not work.packed:
        return ("padded",)
    flash = device.has_flash_attention and shape.item_bytes == 2
    if device.is_cpu or (flash and shape.head_size <= 256 and shape.head_size % 8 == 0):
        return ("packed",)
    return ("by pair",) if config.training.layout == "packed" else ("by pair", "padded")


def _micro_batches(
    work: Workload, limits: MicroBatchLimits, layout: Layout, seed: int
) -> tuple[float, tuple[int, int]]:
    """Micro-batches an optimizer step, and (tokens, response tokens) of the largest."""
    sizes, packed = work.sizes(layout), layout != "padded"
    responses = work.lengths[:, 1:].sum(axis=1)
    order = np.random.default_rng(seed).permutation(len(sizes))
    # The longest pairs of all come together now and then: they are the first step looked at.
    longest = np.argsort(-sizes, kind="stable")[: work.batch_size]
    starts = range(0, len(order), work.batch_size)[:_STEPS_LOOKED_AT]
    steps = [longest, *(order[start : start + work.batch_size] for start in starts)]
    counts, largest = [], (0, 0)
    for step in steps:
        cut = limits.micro_batches(sizes[step].tolist(), packed=packed)
        counts.append(len(cut) * work.batch_size / len(step))
        for group in cut:
            chosen = step[group]
            tokens = sizes[chosen].sum() if packed else len(group) * sizes[chosen].max()
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
        alike=bool((work.lengths == work.lengths[:1]).all()),
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
    weight = NF4_BYTES if quantized and not dials.dequantized else item
    # float32 weight, gradient, Adam's m and v, and on a GPU a copy in the arithmetic's type
    adapter = 4 * 4 if device.is_cpu else 4 * 4 + item
    held = shares.activations * (1.0 if alike else shares.holes)
    layer = held * layer_activations(shape, dials, device, fused=shards == 1)
    # Offloaded, three are here: the one in use, the next on its way back, the last on its way out.
    inputs = 3 if dials.offloaded else dials.recomputed * shape.layers
    kept = inputs * held * shape.hidden * item + (1 - dials.recomputed) * shape.layers * layer
    dequantized = max(n * m for n, m in shape.linear) * item if weight == NF4_BYTES else 0
    peak = (_cpu_peak if device.is_cpu else _gpu_peak)(
        shape, tokens, rows, layer, dequantized, again=dials.recomputed > 0
    )
    return {
        "libraries and driver": shares.held,
        "weights": shape.linear_params * weight / shards + shape.other_params * item,
        "adapter and optimizer": shape.adapter_params * adapter,
        "activations": tokens * kept,
        "at the peak of a pass": peak,
    }


def _gpu_peak(
    shape: ModelShape, tokens: int, rows: int, layer: float, dequantized: float, *, again: bool
) -> float:
    """What a pass holds beside what is kept, at the greatest of three moments: a tile of the head;
    the MLP's last product, differentiated with its weight dequantised; the MLP's activation
    function, whose three gradients are as wide as it is.

    Args:
        shape: the model.
        tokens, rows: of the micro-batch; see `memory_parts`.
        layer: what autograd keeps of a layer for a token.
        dequantized: bytes of the largest weight, for as long as it is multiplied.
        again: whether layers compute their activations again (their inputs are kept in any case).
    """
    hidden, widest = (n * shape.item_bytes for n in (shape.hidden, shape.widest))
    head = 2 * (tokens + rows) * hidden + _tile(shape, rows)
    remade = layer - hidden if again else 0.0
    product = tokens * (remade + widest + hidden) + dequantized
    return max(head, product, tokens * (remade + 2 * widest + hidden))


def _cpu_peak(
    shape: ModelShape, tokens: int, rows: int, layer: float, dequantized: float, *, again: bool
) -> float:
    """The same on a CPU, whose layers are not fused: as it fitted what was measured."""
    head = (3 * rows + tokens) * shape.hidden * shape.item_bytes
    gradients = tokens * layer * (1.0 if again else 0.5)
    return head + max(_tile(shape, rows), gradients) + dequantized


def _tile(shape: ModelShape, rows: int) -> float:
    """Bytes of a tile of logits, in the arithmetic's type and in float32."""
    return min(rows, TILE_ROWS) * shape.vocabulary * (4 + shape.item_bytes)


def layer_activations(
    shape: ModelShape, dials: Dials, device: Device, *, fused: bool = True
) -> float:
    """Bytes that autograd keeps of a layer for one token; a sharded model's are not fused."""
    if device.is_cpu:
        return shape.activation_bytes
    kept = shape.fused_bytes if fused else shape.activation_bytes
    # Without FlashAttention keys and values are kept for every head, by pair once a response, too.
    more = {"packed": 0, "padded": 2, "by pair": 3}[dials.layout]
    return kept + more * shape.width * shape.item_bytes


def _seconds(
    shape: ModelShape, work: Workload, device: Device, dials: Dials, passes: float
) -> tuple[float, float]:
    """Seconds of an optimizer step, and of one evaluation."""
    shares = SHARES[device.is_cpu]
    rate, bandwidth = device.flops * shares.flops, device.bandwidth * shares.bandwidth
    pairs = min(work.batch_size, len(work.lengths))
    mean = work.lengths.mean(axis=0)
    padding = np.mean(work.sizes(dials.layout)) / mean.sum()
    flops = float(np.mean(shape.flops(*_columns(work.lengths), dials.recomputed)))
    moved = mean.sum() * shape.layers * layer_activations(shape, dials, device)
    moved *= shares.passes_over_activations * (1 + dials.recomputed / 3)
    once = 0.0 if dials.dequantized else shape.linear_params * (NF4_BYTES + shape.item_bytes)
    step = pairs * padding * (flops / rate + moved / bandwidth)
    through_layers = passes * (2 + dials.recomputed)
    step += through_layers * once / bandwidth
    starting = through_layers * shape.layers * shares.layer_seconds
    if dials.layout == "by pair":
        starting *= 1 + _BY_PAIR * pairs / passes
    step = step + starting if device.is_cpu else max(step, starting)
    if dials.offloaded:
        step *= _OFFLOADED
    forward = np.sum(shape.forward_flops(*_columns(work.heldout))) / rate
    forward += work.heldout.sum() * shape.layers * shape.activation_bytes * 2 / bandwidth
    return float(step), float(forward)


def _columns(lengths: NDArray[np.int64]) -> tuple[Any, Any, Any]:
    return lengths[:, 0], lengths[:, 1], lengths[:, 2]


def advice(config: RunConfig, shape: ModelShape, work: Workload, device: Device) -> dict[str, Any]:
    """Settings that would make a plan fit that does not, by their keys: the dials if they do, else
    shorter pairs as well, else a smaller adapter, too; empty where nothing of the kind helps."""
    open_dials = {
        "training": config.training.model_copy(
            update={
                "micro_batch_size": None,
                "micro_batch_tokens": None,
                "gradient_checkpointing": None,
                "offload": "auto",
            }
        ),
        "model": config.model.model_copy(update={"dequantized_cache": "auto"}),
    }
    opened = config.model_copy(update=open_dials)
    longest, prompt = config.data.max_length, config.data.max_prompt_length
    shorter = [(length, min(prompt, length // 2)) for length in SHORTER if length < longest]
    ranks = [shape.rank, *(rank for rank in LOWER_RANKS if rank < shape.rank)]
    for rank, limits in itertools.product(ranks, [(longest, prompt), *shorter]):
        lengths = shortened(work.lengths, *limits)
        smaller = replace(shape, rank=rank)
        tried = best_plan(opened, smaller, replace(work, lengths=lengths), device)
        if tried.fits:
            cut = dict(zip(("data.max_length", "data.max_prompt_length"), limits, strict=True))
            settings = _as_settings(tried.dials) | (cut if limits in shorter else {})
            return settings | ({"lora.rank": rank} if rank < shape.rank else {})
    return {}


def _as_settings(dials: Dials) -> dict[str, Any]:
    return {
        "training.micro_batch_tokens": dials.limits.tokens,
        "training.micro_batch_size": dials.limits.pairs,
        "training.gradient_checkpointing": dials.recomputed,
        "training.offload": "always" if dials.offloaded else "auto",
        "model.dequantized_cache": "auto" if dials.dequantized else "never",
    }


def sizes_of(pairs: Sequence[Any]) -> NDArray[np.int64]:
    """(N, 3) lengths of tokenised pairs."""
    return np.array([pair.lengths for pair in pairs], dtype=np.int64).reshape(-1, 3)
