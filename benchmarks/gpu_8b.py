"""Training Llama-3-8B's shape on one GPU: speed, memory and share of the matrix rate, beside TRL.

    python benchmarks/gpu_8b.py --json benchmarks/results/gpu_8b.json
    python benchmarks/gpu_8b.py --tiny          # a small model anywhere, to see that it runs

It needs no network, no weights and no tokenizer: the model has Llama-3-8B's shape with random
weights, made layer by layer and quantised to NF4 where they lie, and the pairs are random tokens
with lengths like UltraFeedback's. `GapoTrainer` (objective `simpo`, packed) and TRL's `CPOTrainer`
(SimPO) take turns on this one model, from the same adapter, over the same pairs in the same order;
`CPOTrainer` gets them tokenised, in the format that its own tokenisation makes. What is timed is in
common.py. A contender that runs out of memory is recorded, and the next case goes on.

How floating point operations are counted (a multiply-add is 2; `executed_flops`):

    base weights    2 a weight and token forward, 2 backward (they are frozen: no weight gradient)
    adapters        2 a weight and token forward, 4 backward
    attention       4 · hidden a visible key and layer forward, 8 backward
    recomputation   with gradient checkpointing, all of the forward pass above once more
    head            2 · hidden · vocabulary a row forward, 2 backward, never recomputed; GaPO-Lite's
                    rows are the scored tokens, TRL's all tokens with padding

"busy" is what was executed, padding included, as a share of the rate that a large bfloat16 matrix
product reached in the same run; "useful" divides only the work that the pairs need (packed, without
recomputation) by it, the same for both contenders. "tokens/s" counts each pair's prompt and
responses once, "tokens/pair" what went through the model.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common  # isort: skip  # first: it sets the environment
import bitsandbytes as bnb
import numpy as np
import torch
from datasets import disable_progress_bars
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gapo_lite.attention import SHARED_PREFIX
from gapo_lite.config import ObjectiveConfig
from gapo_lite.errors import RunError
from gapo_lite.forecast import matrix_rate
from gapo_lite.memory import GIB, peak_resident_bytes
from gapo_lite.model import (
    _keep_trainable_layout,
    add_adapter,
    causal_model,
    pick_device,
    pick_precision,
    set_recomputation,
)
from gapo_lite.shape import causal
from gapo_lite.types import TokenizedPair

OURS = "gapo-lite"
RANK, BETA, GAMMA, LEARNING_RATE = 16, 10.0, 0.3, 1e-5
LOSS_TOLERANCE = 0.1
"""How far the losses of the first step may lie apart in bfloat16; β = 10 magnifies the rounding."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is.

    Attributes:
        shape: of the model, as LlamaConfig takes it.
        prompt_tokens, response_tokens: mean lengths of the pairs.
        max_length: tokens of prompt and response together, at most.
        matrix: rows and columns of the matrix product that measures the rate.
    """

    shape: dict[str, int]
    prompt_tokens: int
    response_tokens: int
    max_length: int
    matrix: int


LLAMA_3_8B = Scale(
    shape={
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    prompt_tokens=170,
    response_tokens=400,
    max_length=2048,
    matrix=8192,
)
TINY = Scale(
    shape={
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
    },
    prompt_tokens=8,
    response_tokens=16,
    max_length=64,
    matrix=256,
)


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: who, with how many pairs a step, with or without recomputation, when."""

    contender: str
    micro_batch: int
    checkpointing: bool
    round: int


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cases share.

    Attributes:
        policy: the model with its adapter.
        start: the adapter's values at the start of every case.
        pairs: synthetic pairs.
        dtype: of the arithmetic.
        options: of the command line.
    """

    policy: PeftModel
    start: dict[str, torch.Tensor]
    pairs: list[TokenizedPair]
    dtype: torch.dtype
    options: argparse.Namespace


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes the file; ends with an error where the losses disagree."""
    began = time.monotonic()
    options = _options(argv)
    disable_progress_bars()
    device, scale = pick_device(), TINY if options.tiny else LLAMA_3_8B
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("There is no GPU here. --tiny runs the same on a small model anywhere.")
    machine = common.machine()
    print(common.describe(machine), flush=True)
    bench = _bench(options, scale, device)
    rate, model_gib = matrix_rate(scale.matrix, bench.dtype, device), _held_bytes() / GIB
    print(
        f"model {model_gib:.2f} GiB with its adapter; matrix product {rate / 1e12:.1f} TFLOP/s; "
        f"{time.monotonic() - began:.0f} s to here\n",
        flush=True,
    )
    results = []
    for case in _cases(options):
        if time.monotonic() - began > options.minutes * 60:
            print(f"--minutes {options.minutes:g} are over: the remaining cases are left out")
            break
        results.append(_with_rates(measure(case, bench), rate))
        print(_case_line(results[-1]), flush=True)
    summary, ratios = summarize(results), compare(results)
    print(f"\nMedians of the rounds\n{common.table(summary, _COLUMNS)}\n")
    print("\n".join(_ratio_line(ratio) for ratio in ratios))
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        result = {"machine": machine, "settings": settings, "shape": scale.shape}
        result |= {"matrix_rate": rate, "model_gib": model_gib, "ratios": ratios}
        common.write_json(options.json, {**result, "summary": summary, "measurements": results})
    _check_losses(ratios)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--tiny", action="store_true", help="a small model and short pairs, on any machine")
    add("--micro-batch", type=int, nargs="+", default=[2, 4, 8], help="pairs a step")
    add("--checkpointing", nargs="+", choices=("on", "off"), default=["on", "off"])
    add("--contenders", nargs="+", choices=(OURS, common.TRL), default=[OURS, common.TRL])
    add("--rounds", type=int, default=2, help="turns that each case gets")
    add("--steps", type=int, default=10, help="timed steps of a turn, at most")
    add("--warmup", type=int, default=2, help="steps before them that are not timed")
    add("--seconds-per-case", type=float, default=6.0, help="no step begins after so much time")
    add("--minutes", type=float, default=7.0, help="no case begins after so much time")
    add("--seed", type=int, default=0, help="of weights, lengths and tokens")
    add("--json", type=Path, help="also write all figures to this file")
    return parser.parse_args(argv)


def _cases(options: argparse.Namespace) -> list[Case]:
    """Round by round, so that running out of time costs repetitions first."""
    return [
        Case(contender, micro_batch, checkpointing == "on", number)
        for number in range(1, options.rounds + 1)
        for checkpointing in options.checkpointing
        for micro_batch in options.micro_batch
        for contender in options.contenders
    ]


# -- model and pairs --


def _bench(options: argparse.Namespace, scale: Scale, device: torch.device) -> Bench:
    dtype = pick_precision("auto", device)
    policy = add_adapter(random_base(scale, device, dtype, options.seed), rank=RANK, alpha=2 * RANK)
    start = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    steps = options.warmup + options.steps
    pairs = synthetic_pairs(scale, steps * max(options.micro_batch), options.seed)
    return Bench(policy, start, pairs, dtype, options)


def random_base(
    scale: Scale, device: torch.device, dtype: torch.dtype, seed: int
) -> LlamaForCausalLM:
    """A Llama of this shape with random weights, quantised as `gapo_lite.model.load_base` does.

    It is laid out without memory; then one matrix after the other is drawn on the device in
    `dtype` and quantised there, so that at most one of them is ever held unquantised.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        **scale.shape,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, _random_linear_4bit(child, device, dtype))
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is model.lm_head:
            module.weight = nn.Parameter(_random(module.weight.shape, device, dtype))
        elif "RMSNorm" in type(module).__name__:
            module.weight = nn.Parameter(torch.ones_like(module.weight, device=device, dtype=dtype))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    model.is_loaded_in_4bit = True  # what PEFT and TRL ask a quantised model
    model.requires_grad_(False)
    _keep_trainable_layout(model)
    return model


def _random_linear_4bit(
    linear: nn.Linear, device: torch.device, dtype: torch.dtype
) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    weight = _random(linear.weight.shape, device, dtype)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    return layer.to(device)  # quantises


def _random(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype) * 0.02


def synthetic_pairs(scale: Scale, number: int, seed: int) -> list[TokenizedPair]:
    """Random tokens with lengths like UltraFeedback's.

    Lengths are log-normal around the scale's means. Chosen and rejected of a pair resemble each
    other in length (correlation 0.8 of the logarithms, both written by one model), which spares
    TRL padding.
    """
    draw = np.random.default_rng(seed)
    shared, own = draw.standard_normal((number, 1)), draw.standard_normal((number, 2))
    prompts = _lengths(draw.standard_normal(number), scale.prompt_tokens, 0.8)
    responses = _lengths(0.8**0.5 * shared + 0.2**0.5 * own, scale.response_tokens, 0.6)
    prompts = np.minimum(prompts, scale.max_length // 2)
    responses = np.minimum(responses, scale.max_length - prompts[:, None])
    tokens = scale.shape["vocab_size"]
    return [
        TokenizedPair(*(draw.integers(0, tokens, n).astype(np.int32) for n in lengths), GAMMA)
        for lengths in np.column_stack((prompts, responses)).tolist()
    ]


def _lengths(normal: np.ndarray, mean: int, spread: float) -> np.ndarray:
    """Log-normal whole numbers from standard normal ones, at least 1."""
    return np.maximum(np.rint(mean * np.exp(spread * normal - spread**2 / 2)), 1).astype(int)


# -- one case --


def measure(case: Case, bench: Bench) -> dict[str, Any]:
    """Trains some steps and says what they took; or that memory ran out."""
    _prepare(case, bench)
    try:
        return {**asdict(case), **_train(case, bench)}
    except (torch.OutOfMemoryError, RunError) as error:
        if "out of memory" not in str(error).lower():
            raise
        return {**asdict(case), "out_of_memory": " ".join(str(error).split())[:300]}
    finally:
        for name in ("forward", "_original_forward"):  # accelerate's wrappers would pile up
            vars(bench.policy).pop(name, None)


def _prepare(case: Case, bench: Bench) -> None:
    """The same adapter for every case, nothing left of the case before, peaks from here on."""
    causal = causal_model(bench.policy)
    causal.set_attn_implementation(SHARED_PREFIX if case.contender == OURS else "sdpa")
    set_recomputation(bench.policy, float(case.checkpointing))
    bench.policy.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, parameter in bench.policy.named_parameters():
            if name in bench.start:
                parameter.copy_(bench.start[name])
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        common.reset_peak()


def _train(case: Case, bench: Bench) -> dict[str, Any]:
    options = bench.options
    clock = common.StepClock(options.warmup, options.seconds_per_case)
    with tempfile.TemporaryDirectory() as folder:
        arguments = common.shared_arguments(
            Path(folder),
            steps=options.warmup + options.steps,
            micro_batch=case.micro_batch,
            learning_rate=LEARNING_RATE,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = (_gapo_trainer if case.contender == OURS else _cpo_trainer)(bench, arguments)
        trainer.add_callback(clock)
        trainer.train()
    first, last = options.warmup, options.warmup + len(clock.seconds)
    size = case.micro_batch
    batches = [bench.pairs[i * size : (i + 1) * size] for i in range(first, last)]
    config = causal_model(bench.policy).config
    work = [executed_flops(config, batch, case.contender, case.checkpointing) for batch in batches]
    useful = [executed_flops(config, batch, OURS, checkpointing=False) for batch in batches]
    return {
        "step_seconds": clock.seconds,
        "step_tokens": [sum(pair.num_tokens for pair in batch) for batch in batches],
        "step_tokens_processed": [processed(batch, case.contender)[0] for batch in batches],
        "step_flops": work,
        "step_useful_flops": useful,
        # Pairs at once since memory ran out; None where it did not.
        "cut_to": trainer.limits.pairs if case.contender == OURS else None,
        "first_loss": float(trainer.step_losses[0]),
        **_peaks(),
    }


def _gapo_trainer(bench: Bench, arguments: dict[str, Any]) -> common.RecordedGapoTrainer:
    # accelerate keeps one precision a process: bf16 is TRL's. It only wraps the policy's own
    # forward, which GaPO-Lite does not call.
    return common.RecordedGapoTrainer(
        bench.policy,
        TrainingArguments(**arguments, bf16=bench.dtype == torch.bfloat16),
        bench.pairs,
        objective=ObjectiveConfig(name="simpo", beta=BETA),
    )


def _cpo_trainer(bench: Bench, arguments: dict[str, Any]) -> common.RecordedCPOTrainer:
    config = common.cpo_config(
        arguments,
        beta=BETA,
        gamma=GAMMA,
        max_length=LLAMA_3_8B.max_length,
        bf16=bench.dtype == torch.bfloat16,
    )
    return common.cpo_trainer(bench.policy, bench.pairs, config)


def _held_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else common.resident_bytes()


def _peaks() -> dict[str, float]:
    """On a GPU as PyTorch's allocator counts; else resident memory, which has no reserve."""
    if not torch.cuda.is_available():
        return {"peak_gib": peak_resident_bytes() / GIB, "reserved_gib": 0.0}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


# -- what is counted --


def processed(batch: Sequence[TokenizedPair], contender: str) -> tuple[int, int, int]:
    """(tokens through the model, rows through the head, visible keys summed over the queries).

    GaPO-Lite: no padding, each prompt once, head rows of scored tokens only. TRL: two rows a pair,
    padded to the longest, all of them through the head; the keys that a causal mask lets through.
    """
    sides = [(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in batch]
    if contender == OURS:
        visible = sum(causal(p + w) + r * p + causal(r) for p, w, r in sides)
        return sum(map(sum, sides)), sum(w + r for _, w, r in sides), visible
    rows, width = 2 * len(sides), max(p + max(w, r) for p, w, r in sides)
    return rows * width, rows * width, rows * causal(width)


def executed_flops(
    config: LlamaConfig, batch: Sequence[TokenizedPair], contender: str, checkpointing: bool
) -> int:
    """Floating point operations of the matrix products of one training step; see above."""
    tokens, head_rows, _ = processed(batch, contender)
    shapes = _linear_shapes(config) * config.num_hidden_layers
    base = 2 * tokens * sum(n * m for n, m in shapes)
    adapters = 2 * tokens * RANK * sum(n + m for n, m in shapes)
    head = 2 * head_rows * config.hidden_size * config.vocab_size
    forwards = 2 if checkpointing else 1
    return (
        base * (forwards + 1)
        + adapters * (forwards + 2)
        + attention_flops(config, batch, contender, checkpointing)
        + head * 2
    )


def attention_flops(
    config: LlamaConfig, batch: Sequence[TokenizedPair], contender: str, checkpointing: bool
) -> int:
    """The part of the attention scores and of the values that they weigh."""
    visible = processed(batch, contender)[2]
    forward = 4 * visible * config.num_hidden_layers * config.hidden_size
    return forward * ((2 if checkpointing else 1) + 2)


def _linear_shapes(config: LlamaConfig) -> list[tuple[int, int]]:
    """(in, out) of the seven linear layers of a block."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    attention = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


# -- what is said --


def _with_rates(result: dict[str, Any], rate: float) -> dict[str, Any]:
    """Adds what follows from the steps' figures; a case out of memory stays as it is."""
    if "out_of_memory" in result:
        return result
    seconds, steps = sum(result["step_seconds"]), len(result["step_seconds"])
    pairs = steps * result["micro_batch"]
    return {
        **result,
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": sum(result["step_tokens"]) / seconds,
        "tokens_per_pair": sum(result["step_tokens_processed"]) / pairs,
        "busy": sum(result["step_flops"]) / seconds / rate,
        "useful": sum(result["step_useful_flops"]) / seconds / rate,
    }


def _keys(results: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    """The different values of these fields, in order of appearance."""
    return list(dict.fromkeys(tuple(result[name] for name in names) for result in results))


def _where(results: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    return [r for r in results if all(r[name] == value for name, value in fields.items())]


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds, a row for each contender, micro-batch and setting."""
    rows = []
    for micro_batch, checkpointing, contender in _keys(
        results, "micro_batch", "checkpointing", "contender"
    ):
        row = {"contender": contender, "micro_batch": micro_batch, "checkpointing": checkpointing}
        own = [r for r in _where(results, **row) if "out_of_memory" not in r]
        rows.append(row | {n: statistics.median(r[n] for r in own) for n in _MEDIANS if own})
    return rows


def compare(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours divided by TRL's, round by round, over the steps that both took in that round."""
    ratios = []
    for micro_batch, checkpointing in _keys(results, "micro_batch", "checkpointing"):
        row = {"micro_batch": micro_batch, "checkpointing": checkpointing}
        rounds = [_where(results, **row, round=number) for (number,) in _keys(results, "round")]
        both = [
            {r["contender"]: r for r in pair}
            for pair in rounds
            if len(pair) == 2 and not any("out_of_memory" in r for r in pair)
        ]
        ratios.append(row | _ratio([(pair[OURS], pair[common.TRL]) for pair in both]))
    return ratios


def _ratio(both: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    if not both:
        return {}
    speed, peak = [], []
    for ours, theirs in both:
        common_steps = list(zip(ours["step_seconds"], theirs["step_seconds"], strict=False))
        mine, other = (sum(seconds) for seconds in zip(*common_steps, strict=True))
        speed.append(other / mine)
        peak.append(ours["peak_gib"] / theirs["peak_gib"])
    ours, theirs = both[0]
    return {
        "pairs_per_second": {"median": statistics.median(speed), "rounds": speed},
        "peak_gib": {"median": statistics.median(peak), "rounds": peak},
        "first_loss_difference": ours["first_loss"] - theirs["first_loss"],
    }


_MEDIANS = (
    *("pairs_per_second", "tokens_per_second", "tokens_per_pair", "peak_gib", "reserved_gib"),
    *("busy", "useful", "first_loss"),
)


def _cell(name: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: format(row[name], form) if name in row else "–"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "contender": lambda row: _title(row["contender"]),
    "pairs": _cell("micro_batch", "d"),
    "checkpointing": lambda row: "on" if row["checkpointing"] else "off",
    "pairs/s": lambda row: _speed(row),
    "tokens/s": _cell("tokens_per_second", ".0f"),
    "tokens/pair": _cell("tokens_per_pair", ".0f"),
    "peak GiB": _cell("peak_gib", ".2f"),
    "reserved": _cell("reserved_gib", ".2f"),
    "busy": _cell("busy", ".1%"),
    "useful": _cell("useful", ".1%"),
    "first loss": _cell("first_loss", ".4f"),
}


def _speed(row: dict[str, Any]) -> str:
    if "pairs_per_second" not in row:
        return "out of memory"
    split = f" ({row['cut_to']} at once: memory ran out)" if row.get("cut_to") else ""
    return f"{row['pairs_per_second']:.3f}{split}"


def _title(contender: str) -> str:
    return "TRL" if contender == common.TRL else "GaPO-Lite"


def _case_line(result: dict[str, Any]) -> str:
    setting = f"{result['micro_batch']} pairs, checkpointing {_on(result)}"
    cells = f"{_title(result['contender']):10}{_speed(result)}"
    if "out_of_memory" not in result:
        cells += f" pairs/s, {result['peak_gib']:.2f} GiB, {len(result['step_seconds'])} steps"
    return f"round {result['round']}, {setting}: {cells}"


def _ratio_line(ratio: dict[str, Any]) -> str:
    setting = f"{ratio['micro_batch']} pairs, checkpointing {_on(ratio)}"
    if "peak_gib" not in ratio:
        return f"GaPO-Lite / TRL, {setting}: not both of them ran"
    speed, peak = ratio["pairs_per_second"], ratio["peak_gib"]
    return (
        f"GaPO-Lite / TRL, {setting}: {speed['median']:.2f} times the pairs/s "
        f"({', '.join(f'{v:.2f}' for v in speed['rounds'])}), {peak['median']:.2f} of the peak "
        f"memory, first loss {ratio['first_loss_difference']:+.1e}"
    )


def _on(row: dict[str, Any]) -> str:
    return "on" if row["checkpointing"] else "off"


def _check_losses(ratios: list[dict[str, Any]]) -> None:
    worst = max((abs(r["first_loss_difference"]) for r in ratios if "peak_gib" in r), default=0.0)
    if not worst <= LOSS_TOLERANCE:
        raise SystemExit(
            f"The contenders do not compute the same: first losses differ by {worst:.2g}, more "
            f"than {LOSS_TOLERANCE}."
        )


if __name__ == "__main__":
    main()
