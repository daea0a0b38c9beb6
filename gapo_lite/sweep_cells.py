"""One cell of a sweep: its run, trained from wherever it stands, and the record of what came of it.

{"run", "contender", "seed", "state", "message",
 "stopped_by",                               # of a dropped one: "halving" or "drift", its guard
 "step", "total", "seconds",
 "objective", "metric", "margin_source", "mapping", "normalization", "gamma", "beta",
 "learning_rate", "target_reward_margin", "data_fingerprint", "num_heldout",
 "base": {…}, "tuned": {…},                  # held-out means, under the names of metrics.jsonl
 "decile_metric", "by_ef": [{low, high, num_pairs, base_accuracy, tuned_accuracy}],
 "answers": {…} | null}                      # see measure_answers
"""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gapo_lite.answering import Sampling, answer_prompts, speaker
from gapo_lite.answers import FORMATS
from gapo_lite.chat import Voice, voice_of
from gapo_lite.checkpoints import list_checkpoints, newest_valid_checkpoint
from gapo_lite.compare import group_by_ef
from gapo_lite.config import RunConfig
from gapo_lite.disk import replace_text
from gapo_lite.ef.cache import cached_scores
from gapo_lite.errors import DataError, RunError
from gapo_lite.evaluate import PairScores, summarize
from gapo_lite.journal import open_journal
from gapo_lite.model import load_tokenizer
from gapo_lite.preparation import Shared, prepare, split_once
from gapo_lite.prompts import Prompt
from gapo_lite.repetition import repetition
from gapo_lite.runs import Run, remove_run
from gapo_lite.sweep_config import Answers, Cell, SweepConfig
from gapo_lite.training import train
from gapo_lite.types import Message

logger = logging.getLogger(__name__)

Pause = Callable[[int], bool]


def train_cell(
    cell: Cell, runs_dir: Path, shared: Shared, pause: Pause, *, show_progress: bool
) -> Run:
    """The cell's run, trained until it has finished, `pause` holds or a signal stops it.

    Args:
        cell: what to train.
        runs_dir: folder of all runs.
        shared: pairs and tokens of the sweep's other runs.
        pause: see `train`.
        show_progress: a progress bar on stderr.

    Raises:
        GapoError: it cannot be trained, or its folder holds something else.
    """
    run = Run(runs_dir / cell.run)
    resume = _is_begun(run, cell)
    if resume and is_trained(run.read("status.json")):
        return run  # only its record is missing
    try:
        return train(
            cell.config,
            name=None if resume else cell.run,
            runs_dir=runs_dir,
            resume=run.path if resume else None,
            show_progress=show_progress,
            pause=pause,
            shared=shared,
        )
    finally:
        free_memory()


def is_trained(status: Mapping[str, Any]) -> bool:
    """Whether a run's status.json says that it has come to its end, by itself or by the guard."""
    return status.get("state") == "finished" or bool(status.get("stopped_by"))


def _is_begun(run: Run, cell: Cell) -> bool:
    """Whether the run can go on; what a kill left before the first checkpoint is removed."""
    if not run.path.exists():
        return False
    if run.is_locked():
        raise RunError(f"the run {run.name} is being trained by another process. Wait for it.")
    if not (run.path / "config.yaml").exists():
        if leftover := [path.name for path in run.path.iterdir() if not _is_early(path.name)]:
            raise RunError(
                f"{run.path} is not a run (it holds {leftover[0]}), but a cell of this sweep is to "
                "have that name. Move it away."
            )
    elif run.config() != cell.config:
        raise RunError(
            f"{run.path} is a run with other settings than the sweep's cell of that name. Move it "
            "away."
        )
    elif run.state() == "finished" or _can_resume(run):
        return True
    remove_run(run)
    return False


_EARLIEST = (".lock", "train.log", "status.json")
"""What a run's folder holds before its configuration."""


def _is_early(name: str) -> bool:
    """Whether a kill before the configuration was there leaves it, half written or whole."""
    return name in _EARLIEST or (name.startswith(".") and name.endswith(".part"))


def _can_resume(run: Run) -> bool:
    if not list_checkpoints(run.checkpoints):
        return False
    try:
        newest_valid_checkpoint(run.checkpoints, logger.warning)
    except RunError as error:
        logger.warning("%s: beginning %s anew.", error, run.name)
        return False
    return True


def free_memory() -> None:
    """Gives back what the last model held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- the record --


def cell_record(
    cell: Cell, run: Run, sweep: SweepConfig, shared: Shared, *, state: str, seconds: float
) -> dict[str, Any]:
    """What came of a cell; its answers are measured now, where it has finished.

    Args:
        cell, run: the cell and its run.
        sweep: whose cell it is.
        shared: pairs of the sweep.
        state: "finished" or "dropped".
        seconds: that it took in this process; its own clock counts where that says more.

    Raises:
        GapoError: the run has no held-out pairs, or its answers cannot be measured.
    """
    config, status, heldout = cell.config, run.read("status.json"), run.read("heldout.json")
    if not heldout:
        raise RunError(
            f"the run {run.name} holds no pairs out, so a sweep has nothing to compare. Set "
            "data.heldout_fraction or data.heldout_source."
        )
    base, tuned = _scores(heldout["base"]), _scores(heldout["newest"])
    clock = [row["elapsed_s"] for row in run.metrics() if "elapsed_s" in row]
    return {
        **_identity(cell, state),
        "message": status.get("message", ""),
        "stopped_by": status.get("stopped_by", "halving") if state == "dropped" else None,
        "step": status["step"],
        "total": status["total"],
        "seconds": round(max([seconds, *clock]), 1),
        **_settings(config, run),
        "data_fingerprint": run.read("environment.json")["data_fingerprint"],
        "num_heldout": len(base.losses),
        "base": summarize(base),
        "tuned": summarize(tuned),
        "decile_metric": sweep.decile_metric,
        "by_ef": _by_ef(config, sweep.decile_metric, shared, base, tuned),
        "answers": _answers(run, config, sweep.answers, shared) if state == "finished" else None,
    }


def failed_record(cell: Cell, message: str) -> dict[str, Any]:
    """Of a cell that could not be trained."""
    return {**_identity(cell, "failed"), "message": message}


def _identity(cell: Cell, state: str) -> dict[str, Any]:
    return {
        "run": cell.run,
        "contender": cell.contender,
        "seed": cell.seed,
        "state": state,
        "message": "",
    }


def _settings(config: RunConfig, run: Run) -> dict[str, Any]:
    by_ef = config.margin.source == "ef"
    return {
        "objective": config.objective.name,
        "metric": config.ef.metric if by_ef else None,
        "margin_source": config.margin.source,
        "mapping": config.margin.mapping if by_ef else None,
        "normalization": config.margin.normalization if by_ef else None,
        "gamma": config.margin.gamma,
        "beta": config.objective.beta,
        "learning_rate": config.training.learning_rate,
        "target_reward_margin": run.read("margins.json")["mean_margin_in_reward_units"]
        if config.margin.source
        else None,
    }


def _scores(columns: dict[str, Any]) -> PairScores:
    return PairScores(**{k: np.asarray(v, float) for k, v in columns.items() if k != "step"})


def _by_ef(
    config: RunConfig, metric: str, shared: Shared, base: PairScores, tuned: PairScores
) -> list[dict[str, Any]]:
    """Which response is likelier a token, by deciles of an evaluation factor that is the same for
    all contenders."""
    options = config.ef.model_copy(update={"metric": metric}).options()
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    heldout = prepare(config, tokenizer, shared=shared).heldout
    assert heldout is not None, "the run has held-out scores"
    pairs = heldout.pairs
    ef = cached_scores([p.chosen for p in pairs], [p.rejected for p in pairs], metric, options)
    hits = [scores.chosen_logps > scores.rejected_logps for scores in (base, tuned)]
    return [asdict(group) for group in group_by_ef(ef, *hits)]


# -- answers --


def _answers(
    run: Run, config: RunConfig, answers: Answers | None, shared: Shared
) -> dict[str, Any] | None:
    if answers is None:
        return None
    prompts, out = heldout_prompts(config, shared), run.path / "answers.jsonl"
    measured = measure_answers(voice_of(run), prompts, answers, out)
    free_memory()
    return measured


def heldout_prompts(config: RunConfig, shared: Shared) -> list[list[Message]]:
    """The different prompts of the held-out pairs, in their order."""
    _, _, heldout, _ = split_once(config, shared)
    return list({str(pair.prompt): pair.prompt for pair in heldout}.values())


def measure_answers(
    voice: Voice, prompts: Sequence[Sequence[Message]], how: Answers, out: Path
) -> dict[str, Any]:
    """A voice's greedy answers to the first prompts: how long, and how repetitive.

    They are given and written to `out` as by `gapo-lite generate`: a prompt that the model cannot
    take is told of, where memory runs out fewer are answered at once, and what was answered before
    a kill is not asked again.

    Returns:
        num_prompts, those that were answered; max_tokens; mean_tokens and mean_characters of an
        answer; cut_short, the share that reached max_tokens; repetition, the mean of `repetition`.

    Raises:
        DataError: no prompt could be answered.
        RunError: memory runs out with one prompt; the disk is full.
    """
    asked = [Prompt(list(messages), [], {}) for messages in prompts[: how.prompts]]
    sampling = Sampling([0.0] * len(asked), max_tokens=how.max_tokens)
    with open_journal(out) as journal:
        who = speaker(voice, batch_size=how.batch_size)
        answered = answer_prompts(who, asked, sampling, journal)
        replace_text(out, FORMATS["answers"](asked, {"answer": answered}, voice.name))
    said = [one.turns[0] for one in answered if not one.problem]
    if not said:
        raise DataError(
            f"none of {len(asked)} held-out prompts could be answered with answers.max_tokens "
            f"{how.max_tokens}: lower it, or measure no answers (answers: null). The first: "
            f"{answered[0].problem}"
        )
    return {
        "num_prompts": len(said),
        "max_tokens": how.max_tokens,
        "mean_tokens": statistics.mean(turn.num_tokens for turn in said),
        "mean_characters": statistics.mean(len(turn.text) for turn in said),
        "cut_short": statistics.mean(turn.cut_short for turn in said),
        "repetition": statistics.mean(repetition(turn.text) for turn in said),
    }
