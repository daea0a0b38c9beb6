"""`train()`: a configuration → a run folder with a trained adapter.

    file → pairs → EF → margins → tokens     (prepare; nothing is written and no GPU is taken)
         → run folder → model → GapoTrainer → adapter

Ctrl-C or SIGTERM stops at the end of the optimizer step, saves, and says how to go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from gapo_lite.checkpoints import newest_valid_checkpoint, remove_stages, replace_folder
from gapo_lite.config import RunConfig, TrainingConfig
from gapo_lite.errors import ConfigError, GapoError
from gapo_lite.model import (
    add_adapter,
    load_base,
    load_tokenizer,
    pick_device,
    pick_precision,
    why_not_packed,
)
from gapo_lite.preparation import PreparedData, prepare
from gapo_lite.records import write_beginnings
from gapo_lite.run_callback import RunCallback, status_record, stopping_on_signals
from gapo_lite.runs import (
    Run,
    create_run,
    device_lease,
    open_run,
    remove_run,
    telling_disk_errors,
)
from gapo_lite.trainer import GapoTrainer

logger = logging.getLogger(__name__)


def train(
    config: RunConfig,
    *,
    name: str | None = None,
    runs_dir: str | Path = "runs",
    resume: str | Path | None = None,
    default_name: str = "run",
    show_progress: bool = True,
) -> Run:
    """Trains as `config` says and returns the run's folder; blocks until it has finished or was
    stopped.

    Args:
        config: the settings; with `resume`, they must be the run's own.
        name: of the new run; None takes `default_name` or the next free `default_name-2`, …
        runs_dir: folder of all runs.
        resume: name or folder of a run to go on with, instead of a new one.
        default_name: see `name`.
        show_progress: a progress bar on stderr.

    Raises:
        GapoError: data, model, settings or run folder cannot be used; a new run then leaves
            nothing behind.
    """
    _check_reporters(config.training)
    state = PartialState()
    _check_processes(config.training, state.num_processes)
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    train_data, heldout_data, loaded = prepare(config, tokenizer, show_progress=show_progress)

    is_main = state.is_main_process
    run = open_run(resume, Path(runs_dir)) if resume else None
    if run is None:
        made = [create_run(Path(runs_dir), name, default_name)] if is_main else [None]
        run = broadcast_object_list(made)[0] if state.num_processes > 1 else made[0]
    assert run is not None
    with contextlib.ExitStack() as stack:
        if is_main:
            stack.enter_context(run.lock())
        if not resume:
            stack.enter_context(_removed_if_it_fails_early(run, is_main))
        stack.enter_context(_gpu_lease())
        if is_main:
            write_beginnings(run, config, train_data, heldout_data, loaded)
            stack.enter_context(_log_file(run))
        state.wait_for_everyone()
        _run_training(
            config,
            run,
            tokenizer,
            train_data,
            heldout_data,
            resume is not None,
            show_progress and is_main,
        )
    return run


def _run_training(
    config: RunConfig,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    train_data: PreparedData,
    heldout_data: PreparedData | None,
    resuming: bool,
    show_progress: bool,
) -> None:
    checkpoint = None
    remove_stages(run.checkpoints)
    if resuming:
        checkpoint = newest_valid_checkpoint(run.checkpoints, logger.warning)
        run.forget_after(int(checkpoint.name.partition("-")[2]))
    run.write("status.json", status_record("starting", 0, 0))
    try:
        callback = RunCallback(run, config.training, tokenizer, show_progress)
        with stopping_on_signals(callback):
            trainer = _trainer(config, run, tokenizer, train_data, heldout_data, resuming, callback)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except GapoError as error:
        run.write(
            "status.json", {**run.read("status.json"), "state": "failed", "message": str(error)}
        )
        logger.error("%s", error)
        raise
    _finish(trainer, run)


def _trainer(
    config: RunConfig,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    train_data: PreparedData,
    heldout_data: PreparedData | None,
    resuming: bool,
    callback: RunCallback,
) -> GapoTrainer:
    device = pick_device()
    policy = _policy(config, device)
    layout = _layout(config, policy)
    set_seed(config.training.seed)
    return GapoTrainer(
        policy,
        training_arguments(
            config.training, run, device, heldout=bool(heldout_data), resuming=resuming
        ),
        train_data.tokenized.pairs,
        heldout_data.tokenized.pairs if heldout_data else [],
        objective=config.objective.name,
        beta=config.objective.beta,
        margin_scale=config.objective.margin_scale,
        layout=layout,
        pad_id=tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0,
        run=run,
        keep_checkpoints=config.training.keep_checkpoints,
        callbacks=[callback],
    )


def _policy(config: RunConfig, device: torch.device) -> PeftModel:
    """The base model with a fresh adapter."""
    source: dict[str, Any] = {
        "revision": config.model.revision,
        "quantization": config.model.quantization,
        "dtype": pick_precision(config.model.precision, device),
    }
    adapter: dict[str, Any] = {
        **config.lora.model_dump(),
        "gradient_checkpointing": config.training.gradient_checkpointing,
        "seed": config.training.seed,
    }
    if config.model.backend == "unsloth":
        from gapo_lite.unsloth_backend import load_unsloth_policy

        return load_unsloth_policy(
            config.model.name, max_length=config.data.max_length, **source, **adapter
        )
    return add_adapter(load_base(config.model.name, device=device, **source), **adapter)


def training_arguments(
    training: TrainingConfig,
    run: Run,
    device: torch.device,
    *,
    heldout: bool,
    resuming: bool = False,
) -> TrainingArguments:
    """The stock trainer's arguments for our settings."""
    processes = PartialState().num_processes
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.path / "tensorboard"))
    os.environ.setdefault("WANDB_DIR", str(run.path))
    return TrainingArguments(
        output_dir=str(run.path),
        run_name=run.name,
        report_to=list(training.report_to),
        use_cpu=device.type == "cpu",
        seed=training.seed,
        data_seed=training.seed,
        learning_rate=training.learning_rate,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.micro_batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        gradient_accumulation_steps=training.batch_size // (training.micro_batch_size * processes),
        lr_scheduler_type="constant_with_warmup"
        if training.schedule == "constant"
        else training.schedule,
        warmup_steps=training.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",
        logging_steps=training.logging_steps,
        eval_strategy="steps" if heldout else "no",
        eval_steps=training.eval_steps,
        eval_on_start=heldout and not resuming,  # step 0 is the base model
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=None,  # checkpoints.py rotates
        logging_nan_inf_filter=False,  # it would log 0.0 while the weights are NaN already
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )


def _finish(trainer: GapoTrainer, run: Run) -> None:
    """Puts the adapter where peft loads it from, and says what comes next."""
    if not trainer.is_world_process_zero():
        return
    stage = run.path / ".adapter-stage"
    shutil.rmtree(stage, ignore_errors=True)
    with telling_disk_errors(run.adapter):
        trainer.policy.save_pretrained(str(stage), save_embedding_layers=False)
        replace_folder(stage, run.adapter)
    if run.read("status.json")["state"] == "stopped":
        logger.info("Stopped and saved. Go on with: gapo-lite train --resume %s", run.path)
    else:
        logger.info("Finished. Chat with it: gapo-lite chat %s", run.path)


def _layout(config: RunConfig, policy: PeftModel) -> str:
    """packed where the model can do it; says so where it cannot.

    Raises:
        ConfigError: packed was asked for, and the model cannot do it.
    """
    wanted = config.training.layout
    if wanted == "padded":
        return wanted
    unsloth = config.model.backend == "unsloth"
    reason = "Unsloth has its own attention" if unsloth else why_not_packed(policy)
    if not reason:
        return "packed"
    if wanted == "packed":
        raise ConfigError(
            f"training.layout: packed does not work with this model: {reason}. Use auto or padded."
        )
    logger.warning("Using the padded layout, which is slower: %s.", reason)
    return "padded"


def _check_reporters(training: TrainingConfig) -> None:
    missing = [name for name in training.report_to if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"training.report_to names {', '.join(missing)}, which is not installed: pip install "
            f"{' '.join(missing)}."
        )


def _check_processes(training: TrainingConfig, processes: int) -> None:
    if training.batch_size % (training.micro_batch_size * processes):
        raise ConfigError(
            f"training.batch_size ({training.batch_size}) must be a multiple of micro_batch_size "
            "× processes "
            f"({training.micro_batch_size} × {processes})."
        )


@contextlib.contextmanager
def _removed_if_it_fails_early(run: Run, is_main: bool) -> Iterator[None]:
    """A new run that fails before its first saved state leaves nothing behind."""
    try:
        yield
    except GapoError:
        if is_main and not (run.path / "metrics.jsonl").exists():
            remove_run(run)
        raise


@contextlib.contextmanager
def _gpu_lease() -> Iterator[None]:
    device = pick_device()
    if device.type == "cpu":
        yield
        return
    with device_lease(f"cuda-{torch.cuda.get_device_properties(device).uuid}"):
        yield


@contextlib.contextmanager
def _log_file(run: Run) -> Iterator[None]:
    """Everything that gapo_lite logs also goes to train.log."""
    handler = logging.FileHandler(run.path / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("gapo_lite")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()
