"""What happens at the edges of a training step: status, progress, samples, stopping when asked."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerCallback

from gapo_lite.config import TrainingConfig
from gapo_lite.generate import answer
from gapo_lite.progress import TrainingProgress
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
            control.should_evaluate = False  # who stops a process seldom waits for long
        elif self.pause and self.pause(state.global_step):
            control.should_evaluate = control.should_save = control.should_training_stop = True

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
            self.run.write("status.json", status_record(status, state.global_step, state.max_steps))


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
