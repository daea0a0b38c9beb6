"""`train()`: a configuration → a run folder with a trained adapter.

    file → pairs → EF → margins → tokens     (prepare; nothing is written and no GPU is taken)
         → run folder → model → GapoTrainer → adapter

Ctrl-C or SIGTERM stops at the end of the optimizer step, saves, and says how to go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from gapo_lite.batching import TokenizedPairs, tokenize_pairs
from gapo_lite.checkpoints import newest_valid_checkpoint, remove_stages, replace_folder
from gapo_lite.config import RunConfig, TrainingConfig
from gapo_lite.data import data_fingerprint, load_pairs, split_pairs
from gapo_lite.data.report import describe_problems
from gapo_lite.ef.cache import cached_scores
from gapo_lite.errors import ConfigError, GapoError, RunError
from gapo_lite.generate import answer
from gapo_lite.margins import Margins, constant_margins, estimate_margins
from gapo_lite.model import (
    add_adapter,
    load_base,
    load_tokenizer,
    pick_device,
    pick_precision,
    why_not_packed,
)
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.progress import TrainingProgress, scoring_progress
from gapo_lite.runs import (
    Run,
    create_run,
    device_lease,
    now,
    open_run,
    remove_run,
    telling_disk_errors,
)
from gapo_lite.trainer import GapoTrainer
from gapo_lite.types import LoadedPairs, PreferencePair

logger = logging.getLogger(__name__)

_VERSIONS = (
    "gapo-lite",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "rouge-score",
)


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Pairs of one split, scored and tokenised.

    Attributes:
        pairs: the pairs.
        ef: (N,) evaluation factors, unclamped; NaN for objectives without them.
        margins: their target margins.
        tokenized: what is left of them as tokens.
    """

    pairs: list[PreferencePair]
    ef: np.ndarray
    margins: Margins
    tokenized: TokenizedPairs


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
            _write_beginnings(run, config, train_data, heldout_data, loaded)
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


def prepare(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, show_progress: bool = False
) -> tuple[PreparedData, PreparedData | None, LoadedPairs]:
    """Loads, splits, scores and tokenises: (training data, held-out data or None, what the source
    held).

    Raises:
        GapoError: see `train`.
    """
    loaded, train_pairs, heldout_pairs = _load_and_split(config)
    with scoring_progress(config.ef.metric, show_progress) as progress:
        train_ef = _score(config, train_pairs, progress)
        heldout_ef = _score(config, heldout_pairs, progress)
    train_margins = _margins(config, train_ef, None)
    train_data = _tokenized(config, tokenizer, train_pairs, train_ef, train_margins)
    if not heldout_pairs:
        return train_data, None, loaded
    heldout_margins = _margins(config, heldout_ef, train_margins.mean_gap)
    return (
        train_data,
        _tokenized(config, tokenizer, heldout_pairs, heldout_ef, heldout_margins),
        loaded,
    )


def heldout_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """The held-out pairs of a configuration, with the margins that training gave them.

    Raises:
        ConfigError: it holds none out.
    """
    _, heldout, _ = prepare(config, tokenizer)
    if heldout is None:
        raise ConfigError(
            "this configuration holds no pairs out: set data.heldout_fraction or "
            "data.heldout_source."
        )
    return heldout


def _load_and_split(
    config: RunConfig,
) -> tuple[LoadedPairs, list[PreferencePair], list[PreferencePair]]:
    data = config.data
    loaded = load_pairs(data.source, split=data.split)
    if loaded.problems:
        logger.warning("%s", describe_problems(loaded))
    if data.heldout_source:
        train_pairs = loaded.pairs
        heldout_pairs = load_pairs(data.heldout_source, split=data.heldout_split).pairs
        _warn_of_shared_prompts(train_pairs, heldout_pairs)
    else:
        train_pairs, heldout_pairs = split_pairs(
            loaded.pairs, heldout_fraction=data.heldout_fraction, seed=data.split_seed
        )
    return loaded, train_pairs[: data.max_pairs], heldout_pairs


def _warn_of_shared_prompts(
    train_pairs: list[PreferencePair], heldout_pairs: list[PreferencePair]
) -> None:
    trained = {str(pair.prompt) for pair in train_pairs}
    shared = sum(str(pair.prompt) in trained for pair in heldout_pairs)
    if shared:
        logger.warning(
            "%d of %d held-out pairs have a prompt that is also trained on: their scores flatter "
            "the model.",
            shared,
            len(heldout_pairs),
        )


def _score(config: RunConfig, pairs: list[PreferencePair], progress: Any) -> np.ndarray:
    if OBJECTIVES[config.objective.name].takes_margin == "constant" or not pairs:
        return np.full(len(pairs), np.nan)
    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    return cached_scores(chosen, rejected, config.ef.metric, config.ef.options(), progress)


def _margins(config: RunConfig, ef: np.ndarray, mean_gap: float | None) -> Margins:
    if OBJECTIVES[config.objective.name].takes_margin == "constant":
        return constant_margins(len(ef), config.margin.gamma)
    return estimate_margins(ef, **config.margin.model_dump(), mean_gap=mean_gap)


def _tokenized(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[PreferencePair],
    ef: np.ndarray,
    margins: Margins,
) -> PreparedData:
    tokenized = tokenize_pairs(
        pairs,
        margins.values,
        tokenizer,
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
    )
    return PreparedData(pairs, ef, margins, tokenized)


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
    run.write("status.json", _status("starting", 0, 0))
    try:
        callback = RunCallback(run, config.training, tokenizer, show_progress)
        with _stopping_on_signals(callback):
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


def _write_beginnings(
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


class RunCallback(TrainerCallback):
    """What happens at the edges of a step: status, progress, samples, and stopping when asked to.

    Args:
        run: the run's folder.
        training: the run's training settings.
        tokenizer: for the sample prompts.
        show_progress: a progress bar on stderr.
    """

    def __init__(
        self,
        run: Run,
        training: TrainingConfig,
        tokenizer: PreTrainedTokenizerBase,
        show_progress: bool,
    ):
        self.run, self.training, self.tokenizer = run, training, tokenizer
        self.progress = TrainingProgress(run.name, show_progress)
        self.is_main = PartialState().is_main_process
        self.asked_to_stop = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says that it runs."""
        self.progress.begin(state.global_step, state.max_steps)
        self._write_status("running", state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Heartbeat; the last step is evaluated and saved, and so is the one at which a stop was
        asked for."""
        self.progress.advance(state.global_step)
        self._write_status("running", state)
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = control.should_log = True
        elif self._anyone_asked():
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows the newest numbers."""
        self.progress.show(state.global_step, logs)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Answers the fixed prompts."""
        if not self.is_main:
            return
        for prompt in self.training.sample_prompts:
            messages = [{"role": "user", "content": prompt}]
            text = answer(
                model, self.tokenizer, messages, max_tokens=self.training.sample_max_tokens
            )
            self.run.append(
                "samples.jsonl", {"step": state.global_step, "prompt": prompt, "answer": text}
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says how it ended."""
        self.progress.end()
        self._write_status("finished" if state.global_step >= state.max_steps else "stopped", state)

    def ask_to_stop(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: the first one stops at the end of the step, a second one at once."""
        if self.asked_to_stop:
            raise KeyboardInterrupt
        self.asked_to_stop = True
        logger.warning(
            "Stopping at the end of this step, then saving. Once more stops at once, without "
            "saving."
        )

    def _anyone_asked(self) -> bool:
        if PartialState().num_processes == 1:
            return self.asked_to_stop
        flag = torch.tensor(int(self.asked_to_stop), device=PartialState().device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def _write_status(self, status: str, state: Any) -> None:
        if self.is_main:
            self.run.write("status.json", _status(status, state.global_step, state.max_steps))


@contextlib.contextmanager
def _stopping_on_signals(callback: RunCallback) -> Iterator[None]:
    """Ctrl-C and SIGTERM reach the callback while training; elsewhere than in the main thread they
    cannot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, callback.ask_to_stop) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


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


def _status(state: str, step: int, total: int) -> dict[str, Any]:
    return {"state": state, "pid": os.getpid(), "step": step, "total": total, "heartbeat": now()}


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
