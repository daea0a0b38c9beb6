"""GapoTrainer: a thin `transformers.Trainer` for preference pairs.

It keeps the stock loop (schedule, accumulation, clipping, callbacks, accelerate) and replaces what
that gets wrong for this job: the loss is a mean over pairs whatever the micro-batches, metrics are
counted over pairs and survive a resume, checkpoints are whole or absent, a NaN stops before the
weights change, and running out of memory splits the micro-batch. `training.py` has `train()`, which
prepares everything from a config and runs it.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import distributed
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gapo_lite.batching import MicroBatchLimits, num_tokens, pack, pad
from gapo_lite.checkpoints import commit_checkpoint, stage_path
from gapo_lite.config import ObjectiveConfig
from gapo_lite.disk import telling_disk_errors
from gapo_lite.drift import last_good_step, with_fall
from gapo_lite.errors import RunError
from gapo_lite.evaluate import Collate, PairScores, pair_scores, score_heldout, summarize
from gapo_lite.loss import PairLoss
from gapo_lite.memory import is_out_of_memory, peak_memory_gib
from gapo_lite.runs import Run
from gapo_lite.training_state import (
    load_optimizer,
    load_random_states,
    save_optimizer,
    save_random_states,
)
from gapo_lite.types import LossOutput, PairBatch, PairLogps, TokenizedPair

logger = logging.getLogger(__name__)

MEANS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "margin/mean",
)
"""What is averaged over the pairs between two logged steps."""


class GapoTrainer(Trainer):
    """Trains a LoRA policy on tokenised pairs.

    Args:
        model: the policy, from `model.add_adapter`.
        args: the stock arguments; `per_device_train_batch_size` counts pairs, and `limits` cuts
            them further.
        train_pairs: what to learn from, with their target margins.
        heldout_pairs: what to evaluate on; may be empty.
        objective: what is minimised. Where it compares with the reference, pairs without
            reference log-probabilities cost a forward pass more in every step.
        layout: "packed" or "padded".
        limits: what goes through the model at once; by default a whole batch of `args` does.
        pad_id: token that fills padded rows.
        run: folder that metrics and checkpoints go to; without one nothing is written.
        keep_checkpoints: how many are kept.
        max_chosen_fall: see drift.py; the last checkpoint within it is kept as well.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        train_pairs: Sequence[TokenizedPair],
        heldout_pairs: Sequence[TokenizedPair] = (),
        *,
        objective: ObjectiveConfig | None = None,
        layout: str = "packed",
        limits: MicroBatchLimits | None = None,
        pad_id: int = 0,
        run: Run | None = None,
        keep_checkpoints: int = 2,
        max_chosen_fall: float | None = None,
        **kwargs: Any,
    ):
        self.run = run
        self.keep_checkpoints = keep_checkpoints
        self.max_chosen_fall = max_chosen_fall
        self.heldout_pairs = list(heldout_pairs)
        self.limits = limits or MicroBatchLimits()  # lower once memory has run out
        self.packed = layout == "packed"
        self.policy = model
        self.pair_loss = PairLoss(objective or ObjectiveConfig())
        self.collate: Collate = pack if self.packed else partial(pad, pad_id=pad_id)
        self._step_pairs: list[list[TokenizedPair]] = []  # of the step under way
        self._step_sums = torch.zeros(len(MEANS) + 2, dtype=torch.float64, device=args.device)
        # Since the last logged step: MEANS, pairs, tokens.
        self._window_sums = self._step_sums.clone()
        self._window_start = self._started = time.perf_counter()
        self._seconds_before = 0.0  # of this run, in earlier processes
        self.skipped_steps = 0  # of float16: their gradients overflowed
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_pairs,
            eval_dataset=self.heldout_pairs or None,
            # Splitting a micro-batch needs the pairs: training_step collates.
            data_collator=cast(Any, list),
            **kwargs,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def create_accelerator_and_postprocess(self) -> None:
        """Without DDP around the model: the forward pass goes to what is beneath it, gradients are
        summed here, and it refuses sharded weights."""
        super().create_accelerator_and_postprocess()
        prepare: Any = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.accelerator.prepare_model = prepare

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """On resume the stock epoch steps before it looks whether the last step is done."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # -- one step --

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int:
        """Pairs of the optimizer step, over all processes."""
        self._window_sums += self._step_sums
        self._step_sums.zero_()
        self._step_pairs = []
        self._look_at([pair for batch in batch_samples for pair in batch], is_step=True)
        pairs = sum(len(batch) for batch in batch_samples)
        if self.args.world_size == 1:
            return pairs
        total = torch.tensor(pairs, device=device)
        distributed.all_reduce(total)
        return int(total)

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of a batch, micro-batch by micro-batch; if memory runs out, of this
        step's so far, in smaller ones."""
        self.policy.train()
        self._step_pairs.append(inputs)
        total = torch.zeros((), device=self.args.device)
        for indices in self._cut(self._sizes(inputs)):
            pairs = [inputs[index] for index in indices]
            try:
                total += self._forward_backward(pairs, num_items_in_batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                oom = str(error)
            else:
                continue
            return self._redo_in_halves(pairs, num_items_in_batch, oom)
        self._average_over_processes()
        return total

    def _cut(self, sizes: list[int]) -> list[list[int]]:
        """The micro-batches, of which all processes have equally many: where the base is sharded,
        each pass waits for all of them."""
        cut = self.limits.micro_batches(sizes, packed=self.packed)
        if self.args.world_size == 1:
            return cut
        most = torch.tensor(len(cut), device=self.args.device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        while len(cut) < int(most):
            cut.sort(key=len)
            largest = cut.pop()
            cut += [largest[::2], largest[1::2]]
        return cut

    def _sizes(self, pairs: Sequence[TokenizedPair]) -> list[int]:
        return [num_tokens(*pair.lengths, packed=self.packed) for pair in pairs]

    def _forward_backward(self, pairs: list[TokenizedPair], num_pairs: int) -> torch.Tensor:
        batch = self.collate(pairs).to(self.args.device, non_blocking=True)
        logps = self.pair_loss.logps(self.policy, batch)
        output = self.pair_loss(logps, batch.margin)
        loss = output.losses.sum() / num_pairs  # mean over the pairs of the whole step
        scaler = self.accelerator.scaler  # of float16 alone
        (scaler.scale(loss) if scaler else loss).backward()
        self._step_sums += _sums(batch, logps, output)
        return loss.detach()

    def _look_at(self, pairs: list[TokenizedPair], *, is_step: bool) -> None:
        self.pair_loss.look_at(
            self.policy,
            pairs,
            self.collate,
            self.args.per_device_eval_batch_size,
            self.args.device,
            is_step=is_step,
        )

    def _redo_in_halves(
        self, too_large: list[TokenizedPair], num_pairs: int, oom: str
    ) -> torch.Tensor:
        """Starts the optimizer step again with smaller micro-batches (a broken one may have left
        part gradients)."""
        if len(too_large) == 1 or self.args.world_size > 1:
            hint = (
                "lower data.max_length"
                if len(too_large) == 1
                else "lower training.micro_batch_tokens or training.micro_batch_size"
            )
            raise RunError(
                f"out of memory at step {self.state.global_step + 1} with {len(too_large)} pair(s) "
                f"a forward pass: {hint}, or set training.gradient_checkpointing to 1. "
                f"({oom[:200]})"
            )
        self.limits = self.limits.halved(self._sizes(too_large))
        key, limit = (
            ("micro_batch_size", self.limits.pairs)
            if self.limits.tokens is None
            else ("micro_batch_tokens", self.limits.tokens)
        )
        logger.warning(
            "Out of memory with %d pairs a forward pass: going on with smaller ones (the same "
            "effective batch; set training.%s to %d next time).",
            len(too_large),
            key,
            limit,
        )
        self.policy.zero_grad()
        self._step_sums.zero_()
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()  # copies of the broken pass may still be under way
            torch.cuda.empty_cache()
        batches, self._step_pairs = self._step_pairs, []
        losses = [self.training_step(self.policy, batch, num_pairs) for batch in batches]
        return losses[-1]

    def _average_over_processes(self) -> None:
        """Sums the gradients of all processes once a step (the loss is a share of the whole step's
        mean already)."""
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            for parameter in self.policy.parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    distributed.all_reduce(parameter.grad)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clips, and stops at a NaN before the optimizer spreads it over the weights. In float16
        too large a loss scale overflows: that step is skipped, and the scale is halved."""
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            scaler = self.accelerator.scaler
            # What the forward pass gives does not depend on the scale.
            if scaler and scaler.get_scale() > 1 and self._step_sums.isfinite().all():
                self.skipped_steps += 1
                return norm
            raise RunError(
                f"the gradient norm is {float(norm)} at step {self.state.global_step + 1}; "
                "stopped before the weights changed. Lower training.learning_rate or "
                "objective.beta, or use model.precision: float32; then start again, or resume "
                "from the last checkpoint."
            )
        return norm

    # -- what is recorded --

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replaces the stock averages by means over pairs, and writes the row."""
        if "grad_norm" in logs:  # a logged training step, not the closing summary
            *sums, pairs, tokens = self._window_total().tolist()
            if self.accelerator.scaler:
                logs = {**logs, "skipped_steps": self.skipped_steps}
            if not math.isfinite(logs["grad_norm"]):
                del logs["grad_norm"]
            means = {name: value / pairs for name, value in zip(MEANS, sums, strict=True)}
            logs = {**logs, **means, **self._speed(pairs, tokens)}
            self._restart_window()
        elif not any(key.startswith("eval/") for key in logs):
            return
        super().log(logs, start_time)
        # metrics.jsonl has it; kept here, it would grow every checkpoint
        self.state.log_history.clear()
        if self.run and self.is_world_process_zero():
            self.run.append("metrics.jsonl", {"step": self.state.global_step, **logs})

    def _window_total(self) -> torch.Tensor:
        """(len(MEANS) + 2,) sums since the last logged step, over all processes."""
        total = self._window_sums + self._step_sums
        if self.args.world_size > 1:
            distributed.all_reduce(total)
        return total

    def _speed(self, pairs: float, tokens: float) -> dict[str, float]:
        seconds = time.perf_counter() - self._window_start
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "pairs_per_second": round(pairs / seconds, 3),
            "memory_gib": round(peak_memory_gib(), 3),
            "elapsed_s": round(self.elapsed_seconds(), 1),
        }

    def _restart_window(self) -> None:
        self._window_sums.zero_()
        self._step_sums.zero_()
        self._window_start = time.perf_counter()

    def elapsed_seconds(self) -> float:
        """Wall-clock seconds of the run so far, earlier processes included."""
        return self._seconds_before + time.perf_counter() - self._started

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Logs the held-out pairs' metrics, prefixed `eval/`; nothing where none are held out."""
        if not self.heldout_pairs:
            return {}
        began = time.perf_counter()
        scores = self.heldout_scores()
        if self.run and self.is_world_process_zero():
            self.run.write_heldout(self.state.global_step, scores.columns())
        metrics = {f"eval/{name}": value for name, value in summarize(scores).items()}
        if self.run:
            metrics = with_fall(metrics, self.state.global_step, self.run.metrics())
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._window_start += time.perf_counter() - began  # the pause is not training
        return metrics

    def heldout_scores(self) -> PairScores:
        """Scores of the held-out pairs as the model is now."""
        self._look_at(self.heldout_pairs, is_step=False)
        return score_heldout(
            self.policy,
            self.heldout_pairs,
            self.pair_loss,
            self.collate,
            batch_size=self.args.per_device_eval_batch_size,
            device=self.args.device,
            forward=self.pair_loss.untrained_logps
            if self._is_untrained()
            else self.pair_loss.logps,
        )

    def _is_untrained(self) -> bool:
        """Whether the adapter is as it was made: it adds zeros."""
        updates = [p for name, p in self.policy.named_parameters() if "lora_B" in name]
        return bool(updates) and not any(p.detach().any() for p in updates)

    # -- checkpoints --

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a whole checkpoint or none; see checkpoints.py."""
        if not self.run:
            return
        began, step = time.perf_counter(), self.state.global_step
        stage = stage_path(self.run.checkpoints, step)
        total = self._window_total().tolist()
        with telling_disk_errors(stage):
            stage.mkdir(parents=True, exist_ok=True)
            save_random_states(stage / f"random-{self.args.process_index}.json")
            if self.is_world_process_zero():
                self._save_shared_state(stage, total)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.run.flush_logs()
                good = last_good_step(self.run.metrics(), self.max_chosen_fall)
                commit_checkpoint(self.run.checkpoints, step, self.keep_checkpoints, good)
        self.accelerator.wait_for_everyone()
        self._window_start += time.perf_counter() - began

    def _save_shared_state(self, stage: Path, window: list[float]) -> None:
        # save_embedding_layers="auto", the default, would ask the Hub.
        self.policy.save_pretrained(str(stage), save_embedding_layers=False)
        save_optimizer(stage, self.optimizer, self.lr_scheduler)
        self.state.save_to_json(str(stage / "trainer_state.json"))
        own = {
            "window": window,
            "limits": asdict(self.limits),
            "elapsed_s": self.elapsed_seconds(),
            "running_gap": self.pair_loss.running_gap,
            "processes": self.args.world_size,
        }
        if self.accelerator.scaler:
            own["scaler"] = self.accelerator.scaler.state_dict()
            own["skipped_steps"] = self.skipped_steps
        (stage / "gapo.json").write_text(json.dumps(own))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        result: Any = set_peft_model_state_dict(self.policy, weights)
        if result.unexpected_keys:
            raise RunError(
                f"the adapter in {folder} was made for another model: {result.unexpected_keys[:3]}."
            )
        own = json.loads((folder / "gapo.json").read_text())
        if own["processes"] != self.args.world_size:
            raise RunError(
                f"{folder} was written by {own['processes']} process(es), and this training has "
                f"{self.args.world_size}: the data would come in another order. Use as many."
            )
        if self.is_world_process_zero():  # the saved window is the sum over processes
            self._window_sums += torch.tensor(
                own["window"], dtype=torch.float64, device=self.args.device
            )
        if "limits" in own:  # older checkpoints have none
            self.limits = MicroBatchLimits(**own["limits"])
        self.pair_loss.running_gap = own.get("running_gap", 0.0)  # older checkpoints have none
        if self.accelerator.scaler and "scaler" in own:
            self.accelerator.scaler.load_state_dict(own["scaler"])
            self.skipped_steps = own["skipped_steps"]
        self._seconds_before = own["elapsed_s"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_states(Path(checkpoint) / f"random-{self.args.process_index}.json")

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated here: benchmarks measure it."""
        return 0


def _sums(batch: PairBatch, logps: PairLogps, output: LossOutput) -> torch.Tensor:
    """Sums of MEANS over a batch's pairs, then pairs and tokens; float64, without a device
    synchronisation."""
    losses, chosen, rejected, chosen_logps, rejected_logps, margin = pair_scores(
        logps, output, batch.margin
    )
    columns: tuple[torch.Tensor, ...] = (
        losses,
        chosen,
        rejected,
        chosen - rejected,
        (chosen > rejected).float(),
    )
    columns += (chosen_logps, rejected_logps, margin, torch.ones_like(margin))
    sums = torch.stack(columns).double().sum(dim=1)
    return torch.cat((sums, torch.full_like(sums[:1], batch.num_tokens)))
