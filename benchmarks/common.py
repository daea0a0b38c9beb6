"""What both benchmarks of the training step share: the two trainers under one clock, and what is said of the machine.

Both contenders are driven by the stock loop of `transformers.Trainer`, through `train()`: `GapoTrainer` and TRL's
`CPOTrainer`, each with its own collation, loss, backward pass and metrics, and the same optimizer. A step is timed from
the end of the step before to its own end, so that fetching and collating its pairs count.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from trl.experimental.cpo import CPOTrainer

from gapo_lite.model import causal_model
from gapo_lite.trainer import GapoTrainer

TRL = "trl"
VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


class _Recorded:
    """For either trainer: takes the pairs in their order and keeps the loss of each step (without waiting for it)."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.step_losses: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.step_losses.append(loss)
        return loss


class RecordedGapoTrainer(_Recorded, GapoTrainer):
    """GapoTrainer, watched."""


class RecordedCPOTrainer(_Recorded, CPOTrainer):
    """TRL's CPOTrainer, watched."""


class StepClock(TrainerCallback):
    """Times the optimizer steps, and stops the training when its time is up.

    Args:
        max_seconds: no further step begins when the timed steps have taken so long.
        warmup: steps that are not timed.

    Attributes:
        seconds: of each timed step.
    """

    def __init__(self, warmup: int, max_seconds: float = float("inf")):
        self.warmup, self.max_seconds = warmup, max_seconds
        self.seconds: list[float] = []
        self._last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped and the gradients are cleared."""
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step > self.warmup:
            self.seconds.append(now - self._last)
        self._last = now
        control.should_training_stop = sum(self.seconds) > self.max_seconds


class TokenCount:
    """Counts the tokens, padding included, that go through the model (recomputation does not count again)."""

    def __init__(self, policy: PeftModel):
        self.tokens: list[int] = []  # of each forward pass
        embedding = causal_model(policy).get_input_embeddings()
        self._hook = embedding.register_forward_hook(lambda module, inputs, output: self._add(inputs[0]))

    def _add(self, input_ids: torch.Tensor) -> None:
        self.tokens.append(input_ids.numel())

    def remove(self) -> None:
        self._hook.remove()


def shared_arguments(
    folder: Path, *, steps: int, micro_batch: int, learning_rate: float, use_cpu: bool
) -> dict[str, Any]:
    """Training arguments that are the same for both: one micro-batch an optimizer step, nothing saved or logged."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "use_cpu": use_cpu,
        "seed": 0,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on, and when."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in VERSIONS},
    }


def describe(machine: dict[str, Any]) -> str:
    """One line for the screen."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", *VERSIONS))
    hardware = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{hardware} · {machine['date']}\n{versions}"


def table(rows: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """Rows as aligned text: the first column to the left, numbers to the right."""
    cells = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = (
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
