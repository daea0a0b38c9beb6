"""What a run's folder says of its beginning: settings, environment and margins."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from gapo_lite.config import RunConfig
from gapo_lite.data import data_fingerprint
from gapo_lite.errors import RunError
from gapo_lite.preparation import PreparedData
from gapo_lite.runs import Run, telling_disk_errors
from gapo_lite.types import LoadedPairs

_VERSIONS = (
    *("gapo-lite", "torch", "transformers", "peft", "bitsandbytes"),
    *("datasets", "accelerate", "rouge-score"),
)


def write_beginnings(
    run: Run,
    config: RunConfig,
    train_data: PreparedData,
    heldout_data: PreparedData | None,
    loaded: LoadedPairs,
) -> None:
    """config.yaml, environment.json and margins.json; a resumed run must find its own data again.

    Raises:
        RunError: the data are not those that the run began with.
    """
    fingerprint = data_fingerprint(train_data.pairs)
    known = run.read("environment.json").get("data_fingerprint", fingerprint)
    if known != fingerprint:
        raise RunError(
            f"the training pairs of {config.data.source} have changed since the run {run.name} "
            "began, so it cannot "
            "go on exactly. Restore the data, or start a new run."
        )
    with telling_disk_errors(run.path):
        (run.path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    run.write("environment.json", environment(config.training.seed, fingerprint))
    run.write("margins.json", _margins_record(config, train_data, heldout_data, loaded))


def environment(seed: int, fingerprint: str) -> dict[str, Any]:
    """Versions, hardware, seed and data: what a reader needs to trust or repeat a run."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) for name in _VERSIONS},
        },
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda,
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "seed": seed,
        "data_fingerprint": fingerprint,
        "command": sys.argv,
    }


def installed_version(name: str) -> str | None:
    """Version of an installed package, None where it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _margins_record(
    config: RunConfig,
    train_data: PreparedData,
    heldout_data: PreparedData | None,
    loaded: LoadedPairs,
) -> dict[str, Any]:
    margins = train_data.margins
    scale = config.objective.beta if config.objective.margin_scale == "beta" else 1.0
    record = {
        "objective": config.objective.name,
        "metric": config.ef.metric,
        **config.margin.model_dump(),
        "mean_gap": margins.mean_gap,
        "num_floored": margins.num_floored,
        "num_equal": margins.num_equal,
        "num_negative": margins.num_negative,
        "mean_margin": float(margins.values.mean()),
        "mean_margin_in_reward_units": float(margins.values.mean()) * scale,
        "margin_histogram": _histogram(margins.values),
        "ef_histogram": _histogram(train_data.ef, (0.0, 1.0)),
        "data": {
            "num_problems": len(loaded.problems),
            "num_duplicates": loaded.num_duplicates,
            "num_equal_texts": loaded.num_equal,
        },
    }
    for split, data in (("train", train_data), ("heldout", heldout_data)):
        if data:
            record[split] = {
                "num_pairs": len(data.pairs),
                "num_prompts_truncated": data.tokenized.num_prompts_truncated,
                "num_responses_truncated": data.tokenized.num_responses_truncated,
                "num_dropped": data.tokenized.num_dropped,
            }
    return record


def _histogram(
    values: np.ndarray, limits: tuple[float, float] | None = None
) -> dict[str, list[float]]:
    counts, edges = np.histogram(values[~np.isnan(values)], bins=20, range=limits)
    return {"counts": counts.tolist(), "edges": edges.tolist()}
