"""Runs and policies for tests: made without training, and compared after it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from peft import PeftModel

from gapo_lite.config import parse_config
from gapo_lite.model import add_adapter, load_base
from gapo_lite.runs import Run
from gapo_lite.training import train

EVALUATIONS = [
    {"step": 0, "accuracies": 0.5, "margins": 0.1},
    {"step": 4, "accuracies": 0.75, "margins": 1.25},
]


def forge_run(path: Path, settings: dict, *overrides: str, adapter: bool = True) -> Run:
    """A finished run of 4 steps whose adapter changes what the model says (B is not 0)."""
    run = Run(path)
    path.mkdir(parents=True)
    config = parse_config(copy.deepcopy(settings), overrides)
    (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    state = "finished" if adapter else "failed"
    run.write("status.json", {"state": state, "pid": 1, "step": 4, "total": 4, "heartbeat": 0})
    for row in EVALUATIONS:
        run.append("metrics.jsonl", evaluation_row(**row))
    if adapter:
        _save_adapter(run.adapter, config.model.name, config.lora.rank)
    return run


def evaluation_row(step: int, accuracies: float, margins: float) -> dict:
    return {
        "step": step,
        "eval/loss": 2.0,
        "eval/rewards/accuracies": accuracies,
        "eval/rewards/margins": margins,
        "eval/logps/chosen": -1.0,
        "eval/logps/rejected": -1.0 - margins / 10,
    }


def _save_adapter(folder: Path, base: str, rank: int) -> None:
    policy = add_adapter(load_base(base, quantization="none", dtype=torch.float32), rank=rank)
    randomize_adapter(policy, 0.1, seed=1)
    policy.save_pretrained(folder, save_embedding_layers=False)


def randomize_adapter(policy: PeftModel, scale: float, seed: int = 0) -> PeftModel:
    """Lets the adapter say something: B is random of that size instead of 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return policy


def settings_with(settings: dict, **sections: dict) -> dict:
    """The settings with some of them changed."""
    return {
        **settings,
        **{name: {**settings.get(name, {}), **values} for name, values in sections.items()},
    }


def run_of(settings: dict, runs_dir: Path, *overrides: str, **kwargs) -> Run:
    """A training of these settings."""
    config = parse_config(settings, overrides)
    return train(config, runs_dir=runs_dir, show_progress=False, **kwargs)


TIMING = {"tokens_per_second", "pairs_per_second", "memory_gib", "elapsed_s"}


def numbers(run: Run) -> list[dict]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in run.metrics()]


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
