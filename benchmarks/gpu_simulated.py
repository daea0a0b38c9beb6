"""Llama-3-8B's training step on GPUs that are not there: GaPO-Lite beside TRL, and card by card.

    python benchmarks/gpu_simulated.py --json benchmarks/results/gpu_simulated.json    # 8 minutes
    python benchmarks/gpu_simulated.py --parts cards

fake_cuda.py counts what a step takes of a GPU without computing anything, and says at its top what
it cannot show; above all, time. NF4 weights, LoRA on all linear layers, fused AdamW, SimPO, one
pass an optimizer step, with AdamW's moments there.

    steps   `GapoTrainer` as `training.train` sets it up, and TRL's `CPOTrainer`, with its Triton
            kernel and without: pairs of 170 + 400 + 400 tokens; operations for lengths like
            UltraFeedback's; the smallest cards
    cards   the memory settings that `gapo-lite plan` takes for a card, what it expects at the peak,
            and what the largest pass of these settings takes

In "steps" two layers and four are simulated; all counts but the peak are linear in the layers, and
so is the peak while it stays at one place. What that gives for 32 is compared with 32 here, and is
recorded as "extrapolation". "cards" simulates all 32.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fake_cuda import GIB, Card, Gpu, Step, fake_gpu  # isort: skip  # before torch
import common
import gpu_model
import numpy as np
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from gpu_model import BETA, GAMMA, LEARNING_RATE, LLAMA_3_8B, RANK, Scale
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import TrainerCallback, TrainingArguments, masking_utils
from trl.trainer import utils as trl_utils

from gapo_lite import model, training
from gapo_lite.attention import why_not_flash
from gapo_lite.batching import MicroBatchLimits
from gapo_lite.config import ObjectiveConfig, parse_config
from gapo_lite.devices import GPUS, VISIBLE, Device, device_named
from gapo_lite.plan import SHARES, Dials, Plan, Workload, best_plan, memory_parts, sizes_of
from gapo_lite.shape import NF4_BYTES, ModelShape, shape_of
from gapo_lite.types import TokenizedPair

LAYERS = 32
EQUAL = (170, 400, 400)
"""Tokens of prompt, chosen and rejected: UltraFeedback's means."""

TRL, OURS, DEQUANTISED, OFFLOAD = "TRL", "GaPO-Lite", "GaPO-Lite, dequantised", "GaPO-Lite, offload"
PAIRS, RECOMPUTED = (2, 4, 8), (1.0, 0.5, 0.0)
CARDS = ("8GB", "10GB", "12GB", "16GB", "24GB", "48GB", "80GB", "t4")
SIZES = (6, 8, 10, 12, 16, 24, 32, 48, 80)
"""GiB of the cards that there are."""

CONFIG = parse_config({"lora": {"rank": RANK, "alpha": 2 * RANK}})
ROOMY = GPUS["h200"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["steps", "cards"])
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    gc.freeze()  # else collecting what was imported takes half of the time
    machine = common.machine() | {"gpu": "none: simulated"}
    result: dict[str, Any] = {"machine": machine, "rank": RANK}
    if "steps" in options.parts:
        result.update(steps_part())
    if "cards" in options.parts:
        result["cards"] = cards_part()
    if options.json:
        common.write_json(options.json, result)


def show(row: dict[str, Any]) -> None:
    """A row on the screen, once it is there."""
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)


# -- beside TRL --

Simulate = Callable[..., Step]  # (pairs, device, layers=…, accumulated=…)


def contenders(recomputed: float) -> dict[str, Simulate]:
    """What is compared with so many layers recomputed, by name."""
    ours = partial(Dials, MicroBatchLimits(), recomputed)
    found: dict[str, Simulate] = {
        TRL: partial(trl_step, recomputed),
        f"{TRL}, no Triton": partial(trl_step, recomputed, triton=False),
        OURS: partial(our_step, ours(dequantized=False)),
        DEQUANTISED: partial(our_step, ours(dequantized=True)),
    }
    if recomputed == 1:
        found[OFFLOAD] = partial(our_step, ours(dequantized=False, offloaded=True))
    return found


def steps_part() -> dict[str, Any]:
    """Prints and returns the rows of all steps, and what the README shows."""
    rows = []
    for recomputed in RECOMPUTED:
        for name, simulate in contenders(recomputed).items():
            for number in PAIRS:
                step = extrapolated(simulate, [pair_of(EQUAL)] * number)
                rows.append(step_row(name, number, recomputed, step))
                show(rows[-1])
    result = {
        "steps": rows,
        "extrapolation": extrapolation_error(rows),
        "tflop_a_pair": tflop_a_pair(),
        "smallest_card": {f"{n * 1024:,} tokens": smallest_cards(n) for n in (1, 4)},
    }
    print(readme_table(result))
    return result


def extrapolated(simulate: Simulate, pairs: list[TokenizedPair], **options: Any) -> Step:
    """The step of the whole model, from one of two layers and one of four."""
    two, four = (simulate(pairs, ROOMY, layers=layers, **options) for layers in (2, 4))

    def whole(name: str) -> Any:
        slope = (getattr(four, name) - getattr(two, name)) / 2
        return round(getattr(two, name) + slope * (LAYERS - 2))

    counts = {name: whole(name) for name in ("peak_bytes", "launches", "flops", "waits")}
    return replace(four, **counts)


def step_row(name: str, pairs: int, recomputed: float, step: Step) -> dict[str, Any]:
    """A step in the units of the README."""
    shape = shape_with(LAYERS, torch.bfloat16)
    weight = shape.item_bytes if name == DEQUANTISED else NF4_BYTES
    weights = shape.linear_params * weight + shape.other_params * shape.item_bytes
    return {
        "contender": name,
        "pairs": pairs,
        "recomputed": recomputed,
        "peak_gib": round(step.peak_bytes / GIB, 3),
        "above_weights_gib": round((step.peak_bytes - weights) / GIB, 3),
        "tflop": round(step.flops / 1e12, 2),
        "launches": step.launches,
        "waits": step.waits,
    }


def extrapolation_error(rows: Sequence[dict[str, Any]]) -> float:
    """The largest relative difference of rows with 8 pairs from all 32 layers simulated."""
    errors = []
    for name in (TRL, OURS, OFFLOAD):
        (row,) = (r for r in rows if (r["contender"], r["pairs"], r["recomputed"]) == (name, 8, 1))
        step = contenders(1.0)[name]([pair_of(EQUAL)] * 8, ROOMY)
        simulated = step_row(name, 8, 1.0, step)
        errors += [abs(row[key] / simulated[key] - 1) for key in row if key != "contender"]
    return max(errors)


def tflop_a_pair(number: int = 400, batch: int = 8) -> dict[str, Any]:
    """Operations a pair with lengths like UltraFeedback's, everything recomputed: by the formula
    over many batches, and how far simulated ones of the first batch are from it."""
    config = gpu_model.llama_config(LLAMA_3_8B)
    pairs = gpu_model.synthetic_pairs(LLAMA_3_8B, number, 0)
    batches = [pairs[start : start + batch] for start in range(0, number, batch)]
    result = {}
    for name, layout in ((TRL, "full logits"), (OURS, "packed")):
        counted = [gpu_model.executed_flops(config, some, layout, 1.0) for some in batches]
        step = extrapolated(contenders(1.0)[name], batches[0])
        result[name] = {
            "mean": round(sum(counted) / number / 1e12, 2),
            "simulated_to_formula": round(step.flops / counted[0], 4),
        }
    return result


def smallest_cards(pairs: int) -> dict[str, int]:
    """GiB of the smallest card for passes of so many pairs of 1,024 tokens, all recomputed."""
    share, found = SHARES[False], {}
    for name in (TRL, OURS, OFFLOAD):
        step = extrapolated(
            contenders(1.0)[name], [pair_of((180, 422, 422))] * pairs, accumulated=True
        )
        needed = (step.peak_bytes + share.held) / share.memory / VISIBLE / GIB
        found[name] = next(size for size in SIZES if size >= needed)
    return found


def readme_table(result: dict[str, Any]) -> str:
    """Markdown: what was simulated, and a column for what a GPU will say."""
    names = (TRL, OURS, OFFLOAD)
    row_of = {
        row["contender"]: row
        for row in result["steps"]
        if row["pairs"] == 8 and row["recomputed"] == 1
    }
    tflop = {name: result["tflop_a_pair"][TRL if name == TRL else OURS]["mean"] for name in names}
    lines = {
        "peak, 8 pairs a pass": [f"{row_of[name]['peak_gib']:.1f} GiB" for name in names],
        "of it above the weights": [f"{row_of[n]['above_weights_gib']:.1f} GiB" for n in names],
        "kernel launches a step": [f"{row_of[name]['launches']:,}" for name in names],
        "waits of the host a step": [str(row_of[name]["waits"]) for name in names],
        "operations a pair, UltraFeedback's lengths": [
            f"{tflop[name]:.0f} TFLOP ({tflop[name] / tflop[OURS]:.2f} ×)" for name in names
        ],
    }
    for tokens, cards in result["smallest_card"].items():
        lines[f"smallest card, {tokens} a pass"] = [f"{cards[name]} GB" for name in names]
    versioned = f"{TRL} {version('trl').removesuffix('.0')}"
    head = ["simulated: Llama-3-8B, all layers recomputed", versioned, *names[1:], "measured"]
    table = [head, ["---"] * len(head), *([key, *cells, ""] for key, cells in lines.items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


# -- against the plan --


def cards_part() -> list[dict[str, Any]]:
    """Prints and returns, card by card, what was planned and what was simulated."""
    pairs = gpu_model.synthetic_pairs(LLAMA_3_8B, 2000, 0)
    lengths = sizes_of(pairs)
    work = Workload(lengths, lengths[:100], batch_size=CONFIG.training.batch_size)
    rows = []
    for card in CARDS:
        device = device_named(card)
        plan = best_plan(CONFIG, shape_with(LAYERS, dtype_on(device)), work, device)
        step = our_step(plan.dials, largest_pass(pairs, work, plan), device, accumulated=True)
        rows.append(card_row(card, plan, device, step))
        show(rows[-1])
    return rows


def card_row(card: str, plan: Plan, device: Device, step: Step) -> dict[str, Any]:
    """A card's plan beside the simulated peak, both with what the process holds before."""
    share, dials = SHARES[False], plan.dials
    simulated = step.peak_bytes + share.held
    return {
        "card": card,
        "tokens": plan.micro_batch_tokens,
        "recomputed": dials.recomputed,
        "dequantized": dials.dequantized,
        "offloaded": dials.offloaded,
        "layout": dials.layout,
        "planned_gib": round(plan.peak / GIB, 2),
        "simulated_gib": round(simulated / GIB, 2),
        "usable_gib": round(share.memory * device.memory / GIB, 2),
        "fits": simulated <= share.memory * device.memory,
        "within_a_tenth_and_not_below": simulated <= plan.peak <= 1.1 * simulated,
    }


def largest_pass(pairs: Sequence[TokenizedPair], work: Workload, plan: Plan) -> list[TokenizedPair]:
    """The pairs of the pass that `plan._micro_batches` counts as the largest."""
    sizes, packed = np.array(work.sizes(plan.dials.layout)), plan.dials.layout != "padded"
    order = np.random.default_rng(CONFIG.training.seed).permutation(len(sizes))
    longest = np.argsort(-sizes, kind="stable")[: work.batch_size]
    starts = range(0, len(order), work.batch_size)
    steps = [longest, *(order[start : start + work.batch_size] for start in starts)]
    passes = [
        [pairs[index] for index in step[group]]
        for step in steps
        for group in plan.dials.limits.micro_batches(sizes[step].tolist(), packed=packed)
    ]
    return max(passes, key=lambda group: tokens_and_rows(group, plan.dials.layout))


def tokens_and_rows(pairs: Sequence[TokenizedPair], layout: str) -> tuple[int, int]:
    """Tokens of a pass, and how many of them predict a scored one."""
    return gpu_model.processed(pairs, "padded" if layout == "padded" else "packed")[:2]


def peak_and_plan(
    dials: dict[str, Any], lengths: Sequence[Sequence[int]], card: str, layers: int = 2
) -> dict[str, Any]:
    """Simulated bytes at the peak of a pass, and `plan.memory_parts` of it; for tests.

    Args:
        dials: arguments of `Dials`, but the limits.
        lengths: of each pair of the pass.
        card: as `device_named` takes it.
        layers: of the model.
    """
    device, settings = device_named(card), Dials(MicroBatchLimits(), **dials)
    pairs = [pair_of(each) for each in lengths]
    step = our_step(settings, pairs, device, layers=layers, accumulated=True)
    parts = memory_parts(
        shape_with(layers, dtype_on(device)),
        settings,
        *tokens_and_rows(pairs, settings.layout),
        quantized=True,
        device=device,
        alike=len(set(map(tuple, lengths))) == 1,
    )
    return {"peak": step.peak_bytes, "parts": parts}


# -- a step --


def our_step(
    dials: Dials,
    pairs: Sequence[TokenizedPair],
    device: Device,
    *,
    layers: int = LAYERS,
    accumulated: bool = False,
) -> Step:
    """GaPO-Lite's step, as `training.train` sets it up.

    Args:
        dials: but their limits; all pairs go through the model together.
        pairs: of the pass.
        device: the card; one without bfloat16 trains in float16.
        layers: of the model.
        accumulated: whether gradients of earlier passes are there.
    """
    dtype = dtype_on(device)
    with _card(device, pairs) as gpu, tempfile.TemporaryDirectory() as folder:
        base = _base(layers, dtype)
        with mock.patch.object(training, "load_base", return_value=base):
            policy = training._policy(CONFIG, torch.device("cuda", 0), dials)
        layout = training._layout(CONFIG, policy, dials)
        trainer = common.RecordedGapoTrainer(
            policy,
            TrainingArguments(**_arguments(folder, pairs), fp16=dtype == torch.float16),
            list(pairs),
            objective=ObjectiveConfig(name="simpo", beta=BETA),
            layout=layout,
        )
        return _watched(gpu, trainer, gpu_model.processed(pairs, layout)[2], accumulated)


def trl_step(
    recomputed: float,
    pairs: Sequence[TokenizedPair],
    device: Device,
    *,
    layers: int = LAYERS,
    triton: bool = True,
    accumulated: bool = False,
) -> Step:
    """TRL's step; see `our_step`.

    Args:
        recomputed: share of the layers that compute their activations again.
        triton: whether it has its Triton kernel for the head.
    """
    with _card(device, pairs) as gpu, tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if triton:
            for name, value in (
                ("is_triton_available", lambda: True),
                ("_fused_logprob_entropy", _triton_kernel),
            ):
                stack.enter_context(mock.patch.object(trl_utils, name, value, create=True))
        policy = model.add_adapter(_base(layers, torch.bfloat16), rank=RANK, alpha=2 * RANK)
        model.set_recomputation(policy, recomputed)
        config = common.cpo_config(
            _arguments(folder, pairs),
            beta=BETA,
            gamma=GAMMA,
            max_length=LLAMA_3_8B.max_length,
            bf16=True,
        )
        trainer = common.cpo_trainer(policy, pairs, config)
        return _watched(gpu, trainer, gpu_model.processed(pairs, "full logits")[2], accumulated)


@cache
def shape_with(layers: int, dtype: torch.dtype) -> ModelShape:
    """What the plan knows of the model with so many layers."""
    return shape_of(gpu_model.llama_config(_scale(layers)), CONFIG.lora, dtype)


def dtype_on(device: Device) -> torch.dtype:
    """`model.precision: auto` on this card."""
    return torch.bfloat16 if device.has_bfloat16 else torch.float16


def pair_of(lengths: Sequence[int]) -> TokenizedPair:
    """A pair with so many tokens of prompt, chosen and rejected."""
    return TokenizedPair(*(np.full(length, 2, np.int32) for length in lengths), GAMMA)


def _scale(layers: int) -> Scale:
    return replace(LLAMA_3_8B, shape={**LLAMA_3_8B.shape, "num_hidden_layers": layers})


def _base(layers: int, dtype: torch.dtype) -> nn.Module:
    return gpu_model.random_base(_scale(layers), torch.device("cuda", 0), dtype, 0)


def _arguments(folder: str, pairs: Sequence[TokenizedPair]) -> dict[str, Any]:
    return common.shared_arguments(
        Path(folder), steps=1, micro_batch=len(pairs), learning_rate=LEARNING_RATE, use_cpu=False
    )


@contextmanager
def _card(device: Device, pairs: Sequence[TokenizedPair]) -> Iterator[Gpu]:
    """The card, and answers to what transformers and we ask about values."""
    sides = {len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)}
    is_unpadded = len({pair.lengths for pair in pairs}) == len(sides) == 1
    answers = (
        (masking_utils, "is_tracing", lambda tensor=None: False),
        (masking_utils, "fast_all", lambda mask: bool(mask.all()) and is_unpadded),
        (model, "_packing_error", lambda causal: 0.0),
        (gpu_model, "_random_linear_4bit", _linear_4bit),
    )
    card = Card(device.name, device.memory / GIB, device.capability)
    why_not_flash.cache_clear()
    with fake_gpu(card) as gpu, ExitStack() as stack:
        for module, name, value in answers:
            stack.enter_context(mock.patch.object(module, name, value))
        yield gpu
    why_not_flash.cache_clear()


def _linear_4bit(linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> Linear4bit:
    """gpu_model's, whose weight cannot be a fake tensor: here it is a parameter that knows what a
    quantised one knows."""
    sizes = linear.in_features, linear.out_features
    with unset_fake_temporarily():
        layer = Linear4bit(*sizes, bias=False, compute_dtype=dtype, device="meta")
    weight = torch.empty(linear.weight.shape, device=device, dtype=dtype)
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    parameter = nn.Parameter(packed, requires_grad=False)
    vars(parameter).update({**vars(layer.weight), "quant_state": state, "bnb_quantized": True})
    layer.weight, layer.quant_state = parameter, state
    return layer


def _watched(gpu: Gpu, trainer: Any, visible: int, accumulated: bool) -> Step:
    watch = _Watch(gpu, visible, accumulated)
    trainer.add_callback(watch)
    trainer.train()
    return watch.step


class _Watch(TrainerCallback):
    """Watches the only step as if others had been before it: AdamW's moments are there."""

    def __init__(self, gpu: Gpu, visible: int, accumulated: bool):
        self.accumulated = accumulated
        self._watch = gpu.watch(visible)
        self.step: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An optimizer step makes the moments."""
        optimizer = kwargs["optimizer"].optimizer
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if not self.accumulated:
            optimizer.zero_grad()
        gc.collect()
        self.step = self._watch.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing after it counts."""
        self._watch.__exit__(None, None, None)


class _TritonKernel(torch.autograd.Function):
    """What TRL's kernel makes and keeps (trl/kernels/logprob_entropy.py): a launch each way."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sizes, device = logits.shape[:-1], logits.device
        entropy, log_z, expected = (torch.empty(sizes, device=device) for _ in range(3))
        ctx.save_for_backward(logits, index, log_z, expected)
        return torch.zeros(sizes, device=device), entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(ctx.saved_tensors[0], memory_format=torch.contiguous_format), None


def _triton_kernel(logits: torch.Tensor, index: torch.Tensor, **_: Any) -> Any:
    return _TritonKernel.apply(logits, index)


if __name__ == "__main__":
    main()
