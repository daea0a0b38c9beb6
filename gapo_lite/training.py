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
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from gapo_lite.batching import pack, pad
from gapo_lite.checkpoints import (
    forget_after,
    list_checkpoints,
    newest_valid_checkpoint,
    replace_folder,
    step_of,
)
from gapo_lite.config import RunConfig, TrainingConfig, settings_difference
from gapo_lite.disk import telling_disk_errors
from gapo_lite.drift import copy_adapter
from gapo_lite.errors import ConfigError, GapoError, RunError
from gapo_lite.evaluate import Collate
from gapo_lite.forecast import settle
from gapo_lite.fused import fuse_layers
from gapo_lite.memory import is_out_of_memory, reset_peak_memory
from gapo_lite.model import (
    add_adapter,
    dequantize_base,
    load_base,
    load_tokenizer,
    pick_device,
    pick_precision,
    set_recomputation,
    why_not_packed,
)
from gapo_lite.plan import Dials
from gapo_lite.preparation import Prepared, Shared, prepare
from gapo_lite.progress import scoring_progress
from gapo_lite.records import write_beginnings
from gapo_lite.reference import with_reference
from gapo_lite.run_callback import RunCallback, status_record, stopping_on_signals
from gapo_lite.runs import Run, create_run, device_lease, open_run, remove_run
from gapo_lite.sharding import shard_base
from gapo_lite.trainer import GapoTrainer
from gapo_lite.types import TokenizedPair

logger = logging.getLogger(__name__)


def train(
    config: RunConfig,
    *,
    name: str | None = None,
    runs_dir: str | Path = "runs",
    resume: str | Path | None = None,
    default_name: str = "run",
    show_progress: bool = True,
    pause: Callable[[int], bool] | None = None,
    shared: Shared | None = None,
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
        pause: called with the step after each one; where it says so, the run is evaluated, saved
            and stopped there, to be resumed.
        shared: pairs and tokens of other runs of this process; see `prepare`.

    Raises:
        GapoError: data, model, settings or run folder cannot be used; a new run then leaves
            nothing behind.
    """
    _check_reporters(config.training)
    _check_precision(config)
    state = PartialState(
        cpu=not torch.cuda.is_available(),  # else CPU processes go unnoticed
        # The others wait while one process computes the reference; sharded, all compute it.
        timeout=None if config.training.fsdp else timedelta(days=1),
    )
    check_launch(config, state.num_processes)
    run = _resumed_run(config, resume, Path(runs_dir)) if resume else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_gpu_lease())
        tokenizer = load_tokenizer(config.model.name, config.model.revision)
        prepared = prepare(config, tokenizer, show_progress=show_progress, shared=shared)
        if run is None:
            run = _new_run(Path(runs_dir), name, default_name)
            stack.enter_context(_removed_if_nothing_is_saved(run))
        checkpoint = None
        if state.is_main_process:
            stack.enter_context(run.lock())
            stack.enter_context(_log_file(run))
            write_beginnings(run, config, prepared)
            checkpoint = _rewound(run) if resume else None
            run.write("status.json", status_record("starting", 0, 0))
        checkpoint = _same_everywhere(checkpoint)
        dials = _same_everywhere(_dials(config, run, prepared) if state.is_main_process else None)
        callback = RunCallback(
            run, config.training, tokenizer, show_progress and state.is_main_process, pause
        )
        with (
            _failures_recorded(run),
            _full_memory_explained(),
            callback.progress,
            stopping_on_signals(callback),
        ):
            trainer = _trainer(
                config, run, prepared, tokenizer, callback, dials, resuming=bool(checkpoint)
            )
            trainer.train(resume_from_checkpoint=checkpoint)
            _finish(trainer, run, callback)
    return run


def _resumed_run(config: RunConfig, resume: str | Path, runs_dir: Path) -> Run:
    run = open_run(resume, runs_dir)
    differences = settings_difference(run.config(), config)
    if differences:
        raise ConfigError(
            f"the run {run.name} was begun with other settings, so it cannot go on exactly with "
            "these.\n"
            + "".join(f"  {line}\n" for line in differences)
            + f"Go on with its own (gapo-lite train --resume {run.path}), or start a new run."
        )
    return run


def _new_run(runs_dir: Path, name: str | None, default_name: str) -> Run:
    """A new run folder, made by the main process and known to all."""
    is_main = PartialState().is_main_process
    run = _same_everywhere(create_run(runs_dir, name, default_name) if is_main else None)
    assert run is not None
    return run


def _rewound(run: Run) -> str:
    """The checkpoint to go on from; all that came after it is forgotten, and the adapter of an
    earlier stop with it."""
    checkpoint = newest_valid_checkpoint(run.checkpoints, logger.warning)
    step = step_of(checkpoint)
    forget_after(run.checkpoints, step)
    run.forget_after(step)
    shutil.rmtree(run.adapter, ignore_errors=True)
    return str(checkpoint)


def _same_everywhere(value: Any) -> Any:
    """The main process's value, in all processes."""
    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value


def _dials(config: RunConfig, run: Run, prepared: Prepared) -> Dials:
    """What the configuration leaves open of memory and speed; a resumed run goes on as it began."""
    known = run.read("plan.json")
    if known:
        return Dials.from_json(known["dials"])
    dials, sentence = settle(config, prepared, processes=PartialState().num_processes)
    run.write("plan.json", {"dials": dials.to_json(), "in_words": sentence})
    logger.info("%s", sentence)
    return dials


def _trainer(
    config: RunConfig,
    run: Run,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    callback: RunCallback,
    dials: Dials,
    *,
    resuming: bool,
) -> GapoTrainer:
    device = pick_device()
    reset_peak_memory()
    policy = _policy(config, device, dials)
    if config.training.fsdp:
        shard_base(policy)
    layout = _layout(config, policy, dials)
    set_seed(config.training.seed)
    heldout = prepared.heldout.tokenized.pairs if prepared.heldout else []
    pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_id = next(i for i in pad_ids if i is not None)
    collate = pack if layout == "packed" else partial(pad, pad_id=pad_id)
    train_pairs = prepared.train.tokenized.pairs
    # Of held-out pairs every run wants to know what its base model says.
    if config.objective.reference != "on_the_fly":
        heldout = _with_reference(config, policy, heldout, collate, device, callback.show_progress)
    if config.objective.reference == "cached":
        train_pairs = _with_reference(
            config, policy, train_pairs, collate, device, callback.show_progress
        )
    return GapoTrainer(
        policy,
        training_arguments(
            config.training,
            run,
            device,
            heldout=bool(heldout),
            resuming=resuming,
            float16=pick_precision(config.model.precision, device) == torch.float16,
        ),
        train_pairs,
        heldout,
        objective=config.objective,
        layout=layout,
        limits=dials.limits,
        pad_id=pad_id,
        run=run,
        keep_checkpoints=config.training.keep_checkpoints,
        max_chosen_fall=config.training.max_chosen_fall,
        callbacks=[callback],
    )


def _with_reference(
    config: RunConfig,
    policy: PeftModel,
    pairs: list[TokenizedPair],
    collate: Collate,
    device: torch.device,
    show_progress: bool,
) -> list[TokenizedPair]:
    """The pairs with what the base model says of them."""
    if not pairs:
        return pairs
    # Sharded, all compute it together; else the others find it in the cache.
    first = contextlib.nullcontext if config.training.fsdp else PartialState().main_process_first
    with (
        first(),
        scoring_progress("by the reference", show_progress) as progress,
    ):
        return with_reference(
            policy,
            pairs,
            collate,
            model=config.model,
            batch_size=config.training.eval_batch_size,
            device=device,
            progress=progress,
        )


def _policy(config: RunConfig, device: torch.device, dials: Dials) -> PeftModel:
    """The base model with a fresh adapter, ready to train."""
    source: dict[str, Any] = {
        "revision": config.model.revision,
        "quantization": config.model.quantization,
        "dtype": pick_precision(config.model.precision, device),
    }
    adapter: dict[str, Any] = {**config.lora.model_dump(), "seed": config.training.seed}
    if config.model.backend == "unsloth":
        from gapo_lite.unsloth_backend import load_unsloth_policy

        return load_unsloth_policy(
            config.model.name,
            max_length=config.data.max_length,
            gradient_checkpointing=dials.recomputed > 0,
            **source,
            **adapter,
        )
    if config.model.backend == "liger":
        from gapo_lite.liger_backend import load_liger_base

        base = load_liger_base(config.model.name, device=device, **source)
    else:
        base = load_base(config.model.name, device=device, **source)
    policy = add_adapter(base, **adapter)
    set_recomputation(policy, dials.recomputed, offload=dials.offloaded)
    if dials.dequantized:
        dequantize_base(policy)
    if device.type == "cuda" and not config.training.fsdp:
        fuse_layers(policy)
    return policy


def training_arguments(
    training: TrainingConfig,
    run: Run,
    device: torch.device,
    *,
    heldout: bool,
    resuming: bool = False,
    float16: bool = False,
) -> TrainingArguments:
    """The stock trainer's arguments for our settings."""
    processes = PartialState().num_processes
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.path / "tensorboard")
    os.environ["WANDB_DIR"] = str(run.path)
    arguments = TrainingArguments(
        output_dir=str(run.path),
        run_name=run.name,
        report_to=list(training.report_to),
        use_cpu=device.type == "cpu",
        fp16=float16,  # its loss scaling; the forward pass has an autocast of its own
        seed=training.seed,
        data_seed=training.seed,
        learning_rate=training.learning_rate,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size // processes,
        per_device_eval_batch_size=training.eval_batch_size,
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
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs only by `accelerate launch`
    return arguments


def _finish(trainer: GapoTrainer, run: Run, callback: RunCallback) -> None:
    """Puts the adapter where peft loads it from, then says how it ended. Where the drift guard
    stopped it, that is the last good checkpoint's."""
    if not trainer.is_world_process_zero():
        return
    stage, good = run.path / ".adapter-stage", callback.good_checkpoint()
    shutil.rmtree(stage, ignore_errors=True)
    with telling_disk_errors(run.adapter):
        if good:
            copy_adapter(good, stage)
        else:
            trainer.policy.save_pretrained(str(stage), save_embedding_layers=False)
        replace_folder(stage, run.adapter)
    step, total = trainer.state.global_step, trainer.state.max_steps
    state = "finished" if step >= total and not callback.has_drifted() else "stopped"
    run.write("status.json", callback.status(state, step, total))
    if callback.has_drifted():
        logger.info("Stopped and saved by the drift guard; the adapter is in %s.", run.adapter)
    elif state == "stopped":
        logger.info("Stopped and saved. Go on with: gapo-lite train --resume %s", run.path)
    else:
        logger.info("Finished. Chat with it: gapo-lite chat %s", run.path)


def _layout(config: RunConfig, policy: PeftModel, dials: Dials) -> str:
    """packed where the model can do it; says so where it cannot.

    Raises:
        ConfigError: packed was asked for, and the model cannot do it.
    """
    wanted = config.training.layout
    if wanted == "padded":
        return wanted
    if config.model.backend == "unsloth":
        reason = "Unsloth has its own attention"
    else:
        without_flash = dials.layout == "by pair" or wanted == "packed"
        reason = why_not_packed(policy, without_flash=without_flash)
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


def _check_precision(config: RunConfig) -> None:
    if config.model.precision == "float16" and pick_device().type == "cpu":
        raise ConfigError(
            "model.precision: float16 trains on a GPU only. On a CPU use auto, bfloat16 or float32."
        )


def check_launch(config: RunConfig, processes: int) -> None:
    """Whether so many processes, started as they were, can train with these settings.

    Raises:
        ConfigError: they cannot.
    """
    training = config.training
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise ConfigError(
                f"accelerate launch was told to use {engine}, whose wrapper the training step does "
                "not go through. Launch with configs/accelerate/data_parallel.yaml; for a model "
                "that one GPU cannot hold, set training.fsdp to true."
            )
    if training.fsdp:
        _check_fsdp(config, processes)
    if training.batch_size % processes:
        raise ConfigError(
            f"training.batch_size ({training.batch_size}) must be a multiple of the number of "
            f"processes ({processes})."
        )


def _check_fsdp(config: RunConfig, processes: int) -> None:
    """Refuses what one process alone would do with the model: the others would never follow."""
    if processes == 1:
        raise ConfigError(
            "training.fsdp shards the model over several processes, and there is one: start with "
            "`accelerate launch --config_file configs/accelerate/data_parallel.yaml "
            "--num_processes N -m gapo_lite train …`, or set it to false."
        )
    if config.training.sample_prompts:
        raise ConfigError(
            "training.sample_prompts are answered by one process, which cannot run a sharded "
            "model alone: remove them, or set training.fsdp to false."
        )
    if config.model.backend == "unsloth":
        raise ConfigError(
            "training.fsdp does not work with model.backend: unsloth. Use transformers."
        )
    if config.model.dequantized_cache == "always":
        raise ConfigError(
            "training.fsdp shards the 4-bit weights, which then cannot be kept dequantised: set "
            "model.dequantized_cache to auto or never."
        )


@contextlib.contextmanager
def _removed_if_nothing_is_saved(run: Run) -> Iterator[None]:
    """A new run that fails before it has logged or saved anything leaves nothing behind."""
    try:
        yield
    except GapoError:
        saved = (run.path / "metrics.jsonl").exists() or list_checkpoints(run.checkpoints)
        if PartialState().is_main_process and not saved:
            remove_run(run)
        raise


@contextlib.contextmanager
def _failures_recorded(run: Run) -> Iterator[None]:
    """A failure that a person can mend stands in status.json, unless the disk is what failed."""
    try:
        yield
    except GapoError as error:
        logger.error("%s", error)
        if PartialState().is_main_process:
            with contextlib.suppress(GapoError):
                status = run.read("status.json")
                run.write("status.json", {**status, "state": "failed", "message": str(error)})
        raise


@contextlib.contextmanager
def _full_memory_explained() -> Iterator[None]:
    """Where no smaller micro-batch helps: the weights, the adapter, the optimizer's first step."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory: {' '.join(str(error).split())[:200]} `gapo-lite plan` says what the "
            "configuration needs and which settings need less; it does not know what other "
            "programs hold."
        ) from error


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
