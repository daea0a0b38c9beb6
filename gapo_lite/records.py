"""What a run's folder says of its beginning: settings, environment and margins."""

from __future__ import annotations

import logging
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
from gapo_lite.preparation import Prepared
from gapo_lite.runs import Run

logger = logging.getLogger(__name__)

_VERSIONS = (
    *("gapo-lite", "torch", "transformers", "peft", "bitsandbytes"),
    *("datasets", "accelerate", "rouge-score"),
)


def write_beginnings(run: Run, config: RunConfig, prepared: Prepared) -> None:
    """config.yaml, environment.json and margins.json of a new run; a resumed run must find its own
    data again. In both cases says what is to be known of the data.

    Raises:
        RunError: the data are not those that the run began with.
    """
    for note in prepared.notes:
        logger.info("%s", note)
    heldout = prepared.heldout.pairs if prepared.heldout else []
    fingerprint = data_fingerprint([*prepared.train.pairs, *heldout])
    known = run.read("environment.json").get("data_fingerprint")
    if known is None:
        run.write_text("config.yaml", config.to_yaml())
        run.write("environment.json", environment(config.training.seed, fingerprint))
        run.write("margins.json", _margins_record(config, prepared))
    elif known != fingerprint:
        raise RunError(
            f"the pairs of {config.data.source} have changed since the run {run.name} began, so it "
            "cannot go on exactly. Restore the data, or start a new run."
        )


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


def _margins_record(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    margins, loaded = prepared.train.margins, prepared.loaded
    mean = float(margins.values.mean())
    record: dict[str, Any] = {
        "objective": config.objective.name,
        "metric": config.ef.metric,
        **config.margin.model_dump(),
        "mean_gap": margins.mean_gap,
        "num_floored": margins.num_floored,
        "num_equal": margins.num_equal,
        "num_negative": margins.num_negative,
        "mean_margin": mean,
        "mean_margin_in_reward_units": mean * config.objective.reward_scale,
        "margin_histogram": _histogram(margins.values),
        "ef_histogram": _histogram(prepared.train.ef, (0.0, 1.0)),
        "data": {
            "num_problems": len(loaded.problems),
            "num_duplicates": loaded.num_duplicates,
            "num_equal_texts": loaded.num_equal,
        },
    }
    for split, data in (("train", prepared.train), ("heldout", prepared.heldout)):
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
