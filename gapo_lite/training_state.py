"""What an exact resume needs besides the adapter, as files without pickles: optimizer, schedule
and random states.

Floats in JSON survive to the last bit (Python writes the shortest text that reads back the same).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from gapo_lite.errors import RunError


def save_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Writes optimizer.safetensors and optimizer.json."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value.contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    safetensors.torch.save_file(tensors, folder / "optimizer.safetensors")
    rest = {"param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    (folder / "optimizer.json").write_text(json.dumps(rest))


def load_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Restores what `save_optimizer` wrote.

    Raises:
        RunError: it was written for another adapter (rank or layers).
    """
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in safetensors.torch.load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    rest = json.loads((folder / "optimizer.json").read_text())
    try:
        optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
    except ValueError as error:
        raise RunError(
            f"the optimizer state in {folder} was made for another adapter: {error}. Resume with "
            "the run's own "
            "configuration."
        ) from None
    scheduler.load_state_dict(rest["scheduler"])


def save_random_states(path: Path) -> None:
    """Writes the states of Python's, NumPy's and torch's generators."""
    version, keys, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    name, numpy_keys, position, has_gauss, cached = legacy
    states = {
        "python": [version, list(keys), gauss],
        "numpy": [name, numpy_keys.tolist(), position, has_gauss, cached],
        "cpu": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": _cuda_state(),
    }
    path.write_text(json.dumps(states))


def load_random_states(path: Path) -> None:
    """Restores what `save_random_states` wrote."""
    states = json.loads(path.read_text())
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_bytes_tensor(states["cpu"]))
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(states["cuda"]))


def _cuda_state() -> str:
    return torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else ""


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
