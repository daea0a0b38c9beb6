"""Pairs per second and peak memory of GaPO-Lite's training step beside TRL's, on a CPU.

    python benchmarks/training_step.py --json benchmarks/results/training_step.json

TRL's `CPOTrainer` (`loss_type="simpo"`, `cpo_alpha=0`) and `GapoTrainer` (objective `simpo`) train
the same 4-bit model with the same LoRA adapter, precision, optimizer, margin and real pairs, in the
same order. Each contender of each round is a process of its own, so that its peak memory is its
own; they take turns (trl, packed, trl, packed, …), and ratios are taken within a round. What is
timed is in common.py; warm-up steps are not. The losses of the first step must agree. Where other
processes compete for the cores, OMP_NUM_THREADS=1 and the CPU time a pair give a steadier ratio.

TRL tokenises for itself. It gets the rendered prompt and the bare response as texts, and adds the
end of turn: those are GaPO-Lite's token ids, but for a response whose first characters merge with
the prompt's last ones, or one that spells out a special token. How many pairs differ is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common  # isort: skip  # first: it sets the environment
import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl.experimental.cpo import CPOConfig

from gapo_lite.batching import render_prompt, tokenize_pairs
from gapo_lite.config import ObjectiveConfig
from gapo_lite.data import load_pairs
from gapo_lite.memory import GIB, peak_resident_bytes
from gapo_lite.model import (
    add_adapter,
    dequantize_base,
    load_base,
    load_tokenizer,
    pick_precision,
    set_recomputation,
    why_not_packed,
)
from gapo_lite.types import PreferencePair, TokenizedPair

REAL_PAIRS = Path(__file__).resolve().parents[2] / "shared/data/alpaca_pairs_train.jsonl.gz"
SHIPPED_PAIRS = "embedded:everyday"
LEARNING_RATE = 2e-5
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""How far the losses of the first step may lie apart; β = 10 magnifies the rounding."""

_FOR_WORKERS = (
    *("steps", "warmup", "max_length", "precision", "rank"),
    *("beta", "gamma", "model", "data", "seed"),
)
_MEASURED = (
    *("pairs_per_second", "cpu_seconds_per_pair", "tokens_per_pair"),
    *("peak_gib", "above_model_gib", "first_loss"),
)
_COMPARED = {
    "pairs_per_second": "pairs per second",
    "cpu_seconds_per_pair": "CPU time a pair",
    "peak_gib": "peak memory",
    "above_model_gib": "memory above model",
}
_COLUMNS = {
    "contender": lambda row: _title(row["contender"]),
    "pairs a step": lambda row: str(row["micro_batch"]),
    "pairs/s": lambda row: f"{row['pairs_per_second']:.3f}",
    "CPU s/pair": lambda row: f"{row['cpu_seconds_per_pair']:.2f}",
    "tokens/pair": lambda row: f"{row['tokens_per_pair']:.0f}",
    "peak GiB": lambda row: f"{row['peak_gib']:.2f}",
    "above model": lambda row: f"{row['above_model_gib']:.2f}",
    "first loss": lambda row: f"{row['first_loss']:.5f}",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes the file; ends with an error where the losses disagree."""
    options = parse_options(argv)
    if options.worker:
        print(json.dumps(measure(options.worker, options)))
        return
    machine = common.machine()
    print(f"{common.describe(machine)}\n{_settings_line(options)}\n", flush=True)
    results = [r for size in options.micro_batch for r in _measure_in_turns(options, size)]
    contenders = (common.TRL, *options.layout)
    summary = [_summary(c, size, results) for size in options.micro_batch for c in contenders]
    ratios = [_ratios(c, size, results) for size in options.micro_batch for c in options.layout]
    print(f"\nMedians of {options.rounds} round(s)\n{common.table(summary, _COLUMNS)}\n")
    print("\n".join(_ratio_lines(ratio) for ratio in ratios))
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "worker")}
        result = {"machine": machine, "settings": {**settings, "dtype": _dtype_name(options)}}
        result |= {"ratios": ratios, "summary": summary, "measurements": results}
        common.write_json(options.json, result)
    _check_losses(ratios, LOSS_TOLERANCE[_dtype_name(options)])


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    layouts = ("packed", "padded", "dequantized")
    add("--rounds", type=int, default=3, help="turns that each contender gets")
    add("--steps", type=int, default=6, help="timed steps of a turn")
    add("--warmup", type=int, default=1, help="steps before them that are not timed")
    add("--micro-batch", type=int, nargs="+", default=[2], help="pairs a step; several: a sweep")
    add(
        "--layout",
        nargs="+",
        choices=layouts,
        default=["packed", "dequantized"],
        help="of our batches; dequantized is packed with the 4-bit weights kept dequantised",
    )
    add("--max-length", type=int, default=1024, help="tokens of prompt and response")
    add("--gradient-checkpointing", action="store_true", help="for both contenders")
    add("--precision", choices=("auto", "bfloat16", "float32"), default="auto")
    add("--rank", type=int, default=16, help="of the LoRA matrices")
    add("--beta", type=float, default=10.0)
    add("--gamma", type=float, default=0.3, help="margin before β; TRL's simpo_gamma is β·γ")
    add("--model", default="embedded:smollm2-135m-instruct")
    add("--data", default=str(REAL_PAIRS) if REAL_PAIRS.is_file() else SHIPPED_PAIRS)
    add("--seed", type=int, default=0, help="which pairs of the data, in which order")
    add("--json", type=Path, help="also write all figures to this file")
    add("--worker", choices=(common.TRL, *layouts), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _settings_line(options: argparse.Namespace) -> str:
    note = " (the real pairs are not beside this checkout)" if options.data == SHIPPED_PAIRS else ""
    checkpointing = "on" if options.gradient_checkpointing else "off"
    return (
        f"{options.model} in NF4, {_dtype_name(options)}, LoRA rank {options.rank}, "
        f"max_length {options.max_length}, gradient checkpointing {checkpointing}\n"
        f"{options.rounds} × {options.steps} steps on pairs of {Path(options.data).name}{note}"
    )


# -- one contender, in its own process --


def measure(contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains `warmup + steps` steps and says what they took.

    Args:
        contender: "trl", or a layout of ours; "dequantized" is packed with weights dequantised
            beforehand.
        options: of the command line, with one micro-batch size.
    """
    disable_progress_bars()
    (micro_batch,) = options.micro_batch
    steps = options.warmup + options.steps
    tokenizer = load_tokenizer(options.model)
    pairs, tokens = _pairs(options, tokenizer, steps * micro_batch)
    policy = make_policy(options)
    model_bytes, loading_peak = common.resident_bytes(), peak_resident_bytes()
    common.reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        arguments = common.shared_arguments(
            Path(folder),
            steps=steps,
            micro_batch=micro_batch,
            learning_rate=LEARNING_RATE,
            use_cpu=True,
        )
        if contender == common.TRL:
            trainer = _cpo_trainer(policy, tokenizer, pairs, arguments, options)
            used = [_ids(row) for row in trainer.train_dataset]
        else:
            if contender == "dequantized":
                dequantize_base(policy)
            layout = "padded" if contender == "padded" else "packed"
            trainer = gapo_trainer(policy, tokens, arguments, layout, options)
            used = [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in tokens]
        clock, count = common.StepClock(options.warmup), common.TokenCount(policy)
        trainer.add_callback(clock)
        trainer.train()
    peak, timed_pairs = peak_resident_bytes(), options.steps * micro_batch
    return {
        "contender": contender,
        "micro_batch": micro_batch,
        "pairs_per_second": timed_pairs / sum(clock.seconds),
        "cpu_seconds_per_pair": sum(clock.cpu_seconds) / timed_pairs,
        "tokens_per_pair": sum(count.tokens[options.warmup :]) / timed_pairs,
        "peak_gib": max(peak, loading_peak) / GIB,
        "above_model_gib": (peak - model_bytes) / GIB,
        "model_gib": model_bytes / GIB,
        "first_loss": float(trainer.step_losses[0]),
        "last_loss": float(trainer.step_losses[-1]),
        "step_seconds": clock.seconds,
        "fingerprints": [_fingerprint(ids) for ids in used],
    }


def _pairs(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, number: int
) -> tuple[list[PreferencePair], list[TokenizedPair]]:
    """The first pairs of a seeded shuffle, from the start again where they run out; their tokens.

    A prompt is not cut unless it fills `max_length` alone: TRL cuts responses only.
    """
    loaded = load_pairs(options.data).pairs
    order = np.random.default_rng(options.seed).permutation(len(loaded))
    pairs = [loaded[i] for i in np.resize(order, number)]
    tokenized = tokenize_pairs(
        pairs,
        tokenizer,
        max_length=options.max_length,
        max_prompt_length=options.max_length - 1,
    )
    return pairs, [replace(pair, margin=options.gamma) for pair in tokenized.pairs]


def make_policy(options: argparse.Namespace) -> PeftModel:
    """The 4-bit model and its adapter; `load_base` keeps bitsandbytes from breaking gradients."""
    dtype = pick_precision(options.precision, torch.device("cpu"))
    base = load_base(options.model, quantization="nf4", dtype=dtype)
    policy = add_adapter(base, rank=options.rank, alpha=2 * options.rank)
    set_recomputation(policy, float(options.gradient_checkpointing))
    return policy


def gapo_trainer(
    policy: PeftModel,
    tokens: list[TokenizedPair],
    arguments: dict[str, Any],
    layout: str,
    options: argparse.Namespace,
) -> common.RecordedGapoTrainer:
    """Ours, with objective `simpo`."""
    if layout == "packed" and (reason := why_not_packed(policy)):
        raise SystemExit(f"{options.model} cannot be trained in the packed layout: {reason}")
    return common.RecordedGapoTrainer(
        policy,
        TrainingArguments(**arguments),
        tokens,
        objective=ObjectiveConfig(name="simpo", beta=options.beta),
        layout=layout,
        pad_id=0,  # masked
    )


def _cpo_trainer(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[PreferencePair],
    arguments: dict[str, Any],
    options: argparse.Namespace,
) -> common.RecordedCPOTrainer:
    rows = {
        "prompt": [render_prompt(tokenizer, pair.prompt) for pair in pairs],
        "chosen": [pair.chosen for pair in pairs],
        "rejected": [pair.rejected for pair in pairs],
    }
    return common.RecordedCPOTrainer(
        model=policy,
        args=cpo_config(arguments, options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )


def cpo_config(arguments: dict[str, Any], options: argparse.Namespace) -> CPOConfig:
    """The same SimPO for TRL."""
    return common.cpo_config(
        arguments,
        beta=options.beta,
        gamma=options.gamma,
        max_length=options.max_length,
        bf16=_dtype_name(options) == "bfloat16",
    )


def _dtype_name(options: argparse.Namespace) -> str:
    return str(pick_precision(options.precision, torch.device("cpu"))).removeprefix("torch.")


def _ids(row: dict[str, list[int]]) -> tuple[Iterable[int], ...]:
    """Prompt, chosen and rejected of a row as CPOTrainer tokenised it (labels of -100: prompt)."""
    labels = (row["chosen_labels"], row["rejected_labels"])
    return row["prompt_input_ids"], *([i for i in side if i != -100] for side in labels)


def _fingerprint(ids: tuple[Iterable[int], ...]) -> str:
    text = json.dumps([[int(i) for i in part] for part in ids])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- all of them --


def _measure_in_turns(options: argparse.Namespace, micro_batch: int) -> list[dict[str, Any]]:
    results = []
    for number in range(1, options.rounds + 1):
        for contender in (common.TRL, *options.layout):
            load = {"round": number, "load_before": os.getloadavg()[0]}
            results.append({**load, **_in_subprocess(contender, options, micro_batch)})
            speed, peak = results[-1]["pairs_per_second"], results[-1]["peak_gib"]
            print(
                f"round {number}, {micro_batch} pairs a step: {_title(contender):16} "
                f"{speed:8.3f} pairs/s {peak:7.2f} GiB",
                flush=True,
            )
    return results


def _in_subprocess(contender: str, options: argparse.Namespace, micro_batch: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", contender, "--micro-batch", str(micro_batch)]
    for name in _FOR_WORKERS:
        command += [f"--{name.replace('_', '-')}", str(vars(options)[name])]
    if options.gradient_checkpointing:
        command.append("--gradient-checkpointing")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{_title(contender)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _title(contender: str) -> str:
    return "TRL" if contender == common.TRL else f"GaPO-Lite {contender}"


def _of(contender: str, micro_batch: int, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A contender's measurements, one a round."""
    return [r for r in results if (r["contender"], r["micro_batch"]) == (contender, micro_batch)]


def _summary(contender: str, micro_batch: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    own = _of(contender, micro_batch, results)
    medians = {name: statistics.median(result[name] for result in own) for name in _MEASURED}
    return {"contender": contender, "micro_batch": micro_batch, **medians}


def _ratios(layout: str, micro_batch: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours divided by TRL's, round by round."""
    ours, theirs = _of(layout, micro_batch, results), _of(common.TRL, micro_batch, results)
    tokens = zip(ours[0]["fingerprints"], theirs[0]["fingerprints"], strict=True)
    differing = [i for i, (mine, other) in enumerate(tokens) if mine != other]
    ratios = {
        name: [mine[name] / other[name] for mine, other in zip(ours, theirs, strict=True)]
        for name in _COMPARED
    }
    return {
        "layout": layout,
        "micro_batch": micro_batch,
        **{
            n: {"median": statistics.median(rounds), "rounds": rounds}
            for n, rounds in ratios.items()
        },
        "first_loss_difference": ours[0]["first_loss"] - theirs[0]["first_loss"],
        "first_step_has_same_tokens": all(i >= micro_batch for i in differing),
        "pairs_with_other_tokens": len(differing),
        "pairs": len(ours[0]["fingerprints"]),
    }


def _ratio_lines(ratio: dict[str, Any]) -> str:
    lines = [f"{_title(ratio['layout'])} / TRL, {ratio['micro_batch']} pairs a step"]
    for name, words in _COMPARED.items():
        rounds = ", ".join(f"{value:.2f}" for value in ratio[name]["rounds"])
        lines.append(f"  {words:20}{ratio[name]['median']:6.2f}   rounds: {rounds}")
    same = "the same" if ratio["first_step_has_same_tokens"] else "other"
    return "\n".join(
        (
            *lines,
            f"  first loss differs by {ratio['first_loss_difference']:+.1e} on {same} tokens; "
            f"{ratio['pairs_with_other_tokens']} of {ratio['pairs']} pairs have other tokens",
        )
    )


def _check_losses(ratios: list[dict[str, Any]], tolerance: float) -> None:
    for ratio in ratios:
        difference = abs(ratio["first_loss_difference"])
        if ratio["first_step_has_same_tokens"] and not difference <= tolerance:
            raise SystemExit(
                f"{_title(ratio['layout'])} and TRL do not compute the same: their first losses "
                f"differ by {difference:.2g} on the same tokens, more than {tolerance}."
            )


if __name__ == "__main__":
    main()
