"""What both benchmarks of the training step share: two trainers under one clock, and the machine.

Both contenders run in the stock loop of `transformers.Trainer`, through `train()`: `GapoTrainer`
and TRL's `CPOTrainer`, each with its own collation, loss, backward pass and metrics, and the same
optimizer. A step is timed from the end of the step before to its own end, so that fetching and
collating its pairs count.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # all is on the disk, and TRL would send telemetry
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gapo_lite  # noqa: F401  # isort: skip  # before bitsandbytes, which it keeps quiet
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.experimental.cpo import CPOConfig, CPOTrainer

from gapo_lite.model import causal_model
from gapo_lite.trainer import GapoTrainer
from gapo_lite.types import TokenizedPair

TRL = "trl"
_VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


class _Recorded(Trainer):
    """For either trainer: takes the pairs in their order, and keeps each step's loss unread."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.step_losses: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)

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
        warmup: steps that are not timed.
        max_seconds: no further step begins once the timed steps have taken so long.

    Attributes:
        seconds: of each timed step.
        cpu_seconds: of all threads of this process, likewise; a busy machine disturbs them less.
    """

    def __init__(self, warmup: int, max_seconds: float = float("inf")):
        self.warmup, self.max_seconds = warmup, max_seconds
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self._last = self._last_cpu = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped and the gradients are cleared."""
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        now, cpu = time.perf_counter(), time.process_time()
        if state.global_step > self.warmup:
            self.seconds.append(now - self._last)
            self.cpu_seconds.append(cpu - self._last_cpu)
        self._last, self._last_cpu = now, cpu
        if sum(self.seconds) > self.max_seconds:
            control.should_training_stop = True


class TokenCount:
    """Counts the tokens that go through the model, padding included, recomputation not.

    Attributes:
        tokens: of each forward pass.
    """

    def __init__(self, policy: PeftModel):
        self.tokens: list[int] = []
        embedding = causal_model(policy).get_input_embeddings()
        self._hook = embedding.register_forward_hook(self._add)

    def _add(self, module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        self.tokens.append(inputs[0].numel())

    def remove(self) -> None:
        """Stops counting."""
        self._hook.remove()


def shared_arguments(
    folder: Path, *, steps: int, micro_batch: int, learning_rate: float, use_cpu: bool
) -> dict[str, Any]:
    """Training arguments of both: one micro-batch an optimizer step, nothing saved or logged."""
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


def cpo_config(
    arguments: dict[str, Any], *, beta: float, gamma: float, max_length: int, bf16: bool
) -> CPOConfig:
    """SimPO in TRL's words.

    Gradient checkpointing is off here: the benchmarks switch it on in the model itself, by the
    same call for both contenders.
    """
    with warnings.catch_warnings():
        # transformers 5.23 calls it activation_checkpointing; 5.17 has only the old name
        warnings.simplefilter("ignore", FutureWarning)
        return CPOConfig(
            **arguments,
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=beta,
            simpo_gamma=beta * gamma,  # TRL's margin is in reward units
            max_length=max_length,
            bf16=bf16,
            gradient_checkpointing=False,
        )


def cpo_trainer(
    policy: PeftModel, pairs: Sequence[TokenizedPair], config: CPOConfig
) -> RecordedCPOTrainer:
    """CPOTrainer over ready token ids: it is given a stub to tokenise, then the pairs."""
    trainer = RecordedCPOTrainer(
        model=policy,
        args=config,
        train_dataset=Dataset.from_dict({n: ["x"] for n in ("prompt", "chosen", "rejected")}),
        processing_class=stub_tokenizer(),
    )
    trainer.train_dataset = [cpo_row(pair) for pair in pairs]
    return trainer


def stub_tokenizer() -> PreTrainedTokenizerFast:
    """Of three words, for where there has to be one."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def cpo_row(pair: TokenizedPair) -> dict[str, list[int]]:
    """A pair as CPOTrainer's own `tokenize_row` would hand it to its collator."""
    prompt = pair.prompt_ids.tolist()
    row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        response = ids.tolist()
        row[f"{side}_input_ids"] = prompt + response
        row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(response))
        row[f"{side}_labels"] = [-100] * len(prompt) + response
    return row


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def reset_peak() -> None:
    """Lets the peak start again from the memory held now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> dict[str, Any]:
    """What the figures were measured on, and when."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in _VERSIONS},
    }


def describe(machine: dict[str, Any]) -> str:
    """Two lines for the screen."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", *_VERSIONS))
    hardware = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{hardware} · {machine['date']}\n{versions}"


def table(
    rows: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]
) -> str:
    """Rows as aligned text: the first column to the left, the others to the right."""
    lines = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    first, *rest = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join((line[0].ljust(first), *map(str.rjust, line[1:], rest))) for line in lines
    )


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes the whole result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.machine()
