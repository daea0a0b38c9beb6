"""What happens at the edges of a training step: status, progress, samples, stopping when asked."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerCallback

from gapo_lite import drift
from gapo_lite.checkpoints import step_of
from gapo_lite.config import TrainingConfig
from gapo_lite.generate import answer
from gapo_lite.progress import TrainingProgress
from gapo_lite.repetition import repetition
from gapo_lite.runs import Run, now

logger = logging.getLogger(__name__)


class RunCallback(TrainerCallback):
    """What happens at the edges of a step: status, progress, samples, and stopping when asked to.

    Args:
        run: the run's folder.
        training: the run's training settings.
        tokenizer: for the sample prompts.
        show_progress: a progress bar on stderr.
        pause: whether to evaluate, save and stop after a step; see `train`.
    """

    def __init__(
        self,
        run: Run,
        training: TrainingConfig,
        tokenizer: PreTrainedTokenizerBase,
        show_progress: bool,
        pause: Callable[[int], bool] | None = None,
    ):
        self.pause = pause
        self.run, self.training, self.tokenizer = run, training, tokenizer
        self.show_progress = show_progress
        self.progress = TrainingProgress(run.name, show_progress)
        self.is_main = PartialState().is_main_process
        self.asked_to_stop = False
        self.drift: drift.Drift | None = None  # of the newest evaluation, in the main process

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says that it runs."""
        self._look_at_drift()
        self.progress.begin(state.global_step, state.max_steps)
        self._write_status("running", state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Heartbeat; the last step is evaluated and saved, and so is the one at which a stop was
        asked for."""
        self.progress.advance(state.global_step)
        self._write_status("running", state)
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = control.should_log = True
        elif self._anyone(self.asked_to_stop):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # who stops a process seldom waits for long
        elif self.pause and self.pause(state.global_step):
            control.should_evaluate = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows the newest numbers."""
        self.progress.show(state.global_step, logs)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Answers the fixed prompts; warns or stops where the model drifts from its base."""
        if self.is_main:
            self._answer_prompts(model, state.global_step)
        self._look_at_drift()
        if self.drift and (self.drift.is_new or self.has_drifted()):
            stops = self.has_drifted()
            logger.warning("%s", self.drift.farewell() if stops else self.drift.warning())
        if self._anyone(self.has_drifted()):
            control.should_save = control.should_training_stop = True

    # -- the drift guard --

    def _look_at_drift(self) -> None:
        if self.is_main:
            self.drift = drift.look(self.run, self.training.max_chosen_fall)

    def has_drifted(self) -> bool:
        """Whether that ends the run (main process only)."""
        return self.drift is not None and self.training.on_drift == "stop"

    def good_checkpoint(self) -> Path | None:
        """The one whose adapter is to be used; None for the model as it is."""
        return self.drift.good if self.drift and self.has_drifted() else None

    # -- samples --

    def _answer_prompts(self, model: Any, step: int) -> None:
        for prompt in self.training.sample_prompts:
            messages = [{"role": "user", "content": prompt}]
            text = answer(
                model, self.tokenizer, messages, max_tokens=self.training.sample_max_tokens
            )
            row = {"step": step, "prompt": prompt, "answer": text}
            self.run.append("samples.jsonl", {**row, "repetition": round(repetition(text), 4)})

    def ask_to_stop(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: the first one stops at the end of the step, a second one at once."""
        if self.asked_to_stop:
            raise KeyboardInterrupt
        self.asked_to_stop = True
        logger.warning(
            "Stopping at the end of this step, then saving. Once more stops at once, without "
            "saving."
        )

    def _anyone(self, own: bool) -> bool:
        """Whether it is so in any of the processes."""
        if PartialState().num_processes == 1:
            return own
        flag = torch.tensor(int(own), device=PartialState().device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def _write_status(self, status: str, state: Any) -> None:
        if self.is_main:
            self.run.write("status.json", self.status(status, state.global_step, state.max_steps))

    def status(self, state: str, step: int, total: int) -> dict[str, Any]:
        """What status.json holds: `status_record`, and what the drift guard has to say."""
        record = status_record(state, step, total)
        if self.asked_to_stop:
            record["stop_asked"] = True  # a sweep wants to know, also of a run that just finished
        if not self.drift:
            return record
        is_its_end = state == "stopped" and self.has_drifted()
        record["message"] = self.drift.farewell() if is_its_end else self.drift.warning()
        if self.drift.good:
            record["last_good_checkpoint"] = self.drift.good.name
        if is_its_end:
            record["stopped_by"] = "drift"
        if is_its_end and self.drift.good:
            record["adapter_step"] = step_of(self.drift.good)
        return record


@contextlib.contextmanager
def stopping_on_signals(callback: RunCallback) -> Iterator[None]:
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


def status_record(state: str, step: int, total: int) -> dict[str, Any]:
    """What status.json holds, with this process and the time."""
    return {"state": state, "pid": os.getpid(), "step": step, "total": total, "heartbeat": now()}
