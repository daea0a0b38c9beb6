"""Sweep folders without a training: what gapo_lite/sweep_folder.py and its cells leave on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

BASE = {
    "model": {"name": "embedded:smollm2-135m-instruct"},
    "data": {"source": "embedded:everyday", "max_length": 256},
    "training": {"max_steps": 12, "batch_size": 16},
}
BASE_MEASURES = {
    "loss": 2.5,
    "rewards/chosen": -18.0,
    "rewards/rejected": -18.2,
    "rewards/margins": 0.2,
    "rewards/accuracies": 0.5,
    "logps/chosen": -1.8,
    "logps/rejected": -1.82,
    "margin/mean": 0.3,
    "logps/accuracies": 0.5,
}
ANSWERS = {
    "num_prompts": 16,
    "max_tokens": 192,
    "mean_tokens": 90.0,
    "mean_characters": 400.0,
    "cut_short": 0.25,
    "repetition": 0.04,
}
SETTINGS = {
    "simpo": {"objective.name": "simpo"},
    "gapo": {"objective.name": "gapo", "ef.metric": "rougeL"},
}


def forge_sweep(
    runs_dir: Path,
    name: str = "sweep",
    *,
    contenders: dict[str, dict[str, Any]] = SETTINGS,
    seeds: tuple[int, ...] = (1, 2, 3),
    baseline: str | None = "simpo",
    **more: Any,
) -> Path:
    """A new sweep's folder, none of whose cells has ended."""
    folder = runs_dir / name
    (folder / "cells").mkdir(parents=True)
    sweep = {
        "base": BASE,
        "variants": [{"name": key, "settings": value} for key, value in contenders.items()],
        "seeds": list(seeds),
        "baseline": baseline,
        **more,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    status = {"state": "running", "pid": 1, "done": 0, "total": 6, "started": 1_795_860_000.5}
    write(folder / "sweep-status.json", status)
    write(folder / "base.json", {"answers": ANSWERS})
    return folder


def add_cell(
    folder: Path,
    contender: str,
    seed: int,
    *,
    accuracy: float = 0.7,
    chosen: float = 0.1,
    tokens: float | None = 100.0,
    **more: Any,
) -> dict[str, Any]:
    """Writes a finished cell and its run, and returns the record; `more` replaces its keys."""
    run = f"{folder.name}-{contender}-s{seed}"
    tuned = BASE_MEASURES | {
        "rewards/accuracies": accuracy,
        "logps/accuracies": accuracy,
        "rewards/margins": 2.5,
        "logps/chosen": -1.8 + chosen,
        "logps/rejected": -2.0 + chosen,
    }
    record = {
        "run": run,
        "contender": contender,
        "seed": seed,
        "state": "finished",
        "message": "",
        "step": 12,
        "total": 12,
        "seconds": 61.2,
        "objective": "gapo",
        "metric": "rougeL",
        "margin_source": "ef",
        "target_reward_margin": 3.0,
        "num_heldout": 84,
        "base": BASE_MEASURES,
        "tuned": tuned,
        "decile_metric": "rougeL",
        "by_ef": [_group(at, accuracy) for at in range(10)],
        "answers": None if tokens is None else ANSWERS | {"mean_tokens": tokens},
        **more,
    }
    write(folder / "cells" / f"{run}.json", record)
    forge_leavings(folder.parent / run, seed)
    return record


def _group(at: int, accuracy: float) -> dict[str, float]:
    return {
        "low": at / 10,
        "high": at / 10 + 0.09,
        "num_pairs": 8,
        "base_accuracy": 0.5,
        "tuned_accuracy": min(1.0, accuracy + 0.02 * (5 - at)),
    }


def keep_hits(folder: Path, contender: str, seed: int, hits: list[bool]) -> None:
    """Writes which held-out pairs a run ranks rightly, as its last evaluation leaves it."""
    scores = {
        "chosen_logps": [-1.0] * len(hits),
        "rejected_logps": [-2.0 + 2 * (not h) for h in hits],
    }
    run = folder.parent / f"{folder.name}-{contender}-s{seed}"
    write(run / "heldout.json", {"base": scores, "newest": {"step": 12, **scores}})


def forge_leavings(run: Path, seed: int) -> None:
    """What a run's folder says of its margins and its machine."""
    run.mkdir(exist_ok=True)
    draws = np.random.default_rng(seed).beta(2, 6, 400)
    margins = np.log(1 / draws) * 0.3
    record = {
        "mean_margin": 0.3,
        "mean_margin_in_reward_units": 3.0,
        "ef_histogram": _histogram(draws, (0.0, 1.0)),
        "margin_histogram": _histogram(margins, None),
        "train": {"num_pairs": 400},
    }
    write(run / "margins.json", record)
    environment = {
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        "gpu": None,
        "cpu_count": 2,
        "platform": "Linux-6.1-x86_64",
        "command": ["/home/ada/secret/gapo-lite", "sweep"],
    }
    write(run / "environment.json", environment)


def _histogram(values: np.ndarray, limits: tuple[float, float] | None) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, 20, limits)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
