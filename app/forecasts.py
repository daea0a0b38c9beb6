"""Will it fit: what a form would take on a card, worked out by a process of its own.

    question = asked(config, "RTX 4090")
    for outlook in answers(question, runs_dir): ...     # the last one holds the answer

That process reads the data and counts their tokens, which takes the model's tokenizer and so torch;
it loads no weights, does not take the GPU that a training may have, and ends with its answer, when
nobody waits for it any more, or when it has taken too long.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app import jobs
from app.worker import run_task
from gapo_lite.config import RunConfig
from gapo_lite.devices import GPUS, device_named
from gapo_lite.errors import ConfigError, RunError

THIS_MACHINE = "this machine"
CARDS = (THIS_MACHINE, *(gpu.name for gpu in GPUS.values()))
"""What is offered; any other name and any size that `gapo-lite plan --gpu` takes can be asked about
as well."""

PATIENCE_S = 600.0
"""Tokens of 60,000 pairs are counted in a minute; the rest is for a download."""

_DECISIVE = ("model", "lora", "data", "training")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Attributes:
        config: what would be trained.
        card: THIS_MACHINE, or what `gapo-lite plan --gpu` takes.
    """

    config: RunConfig
    card: str

    def is_like(self, other: Question) -> bool:
        """Whether the answer to the other one is the answer to this one."""
        return self._decisive() == other._decisive()

    def _decisive(self) -> tuple[Any, ...]:
        sections = [getattr(self.config, name) for name in _DECISIVE]
        return self.card, self.config.objective.name, *sections


@dataclass(frozen=True, slots=True)
class Outlook:
    """How far an answer is.

    Attributes:
        done: pairs whose tokens are counted.
        total: all pairs, 0 while unknown.
        found: the answer, empty before it is there: see gapo_lite.forecast.Forecast.to_json.
        beside: the run that was being trained meanwhile, "" without one.
    """

    done: int = 0
    total: int = 0
    found: dict[str, Any] = field(default_factory=dict)
    beside: str = ""


def asked(config: RunConfig, card: Any) -> Question:
    """The question, if it is one.

    Raises:
        ConfigError: there is no such card.
    """
    if not isinstance(card, str):
        raise ConfigError("choose a card, or write the size of its memory, such as 24GB.")
    if card != THIS_MACHINE:
        device_named(card)
    return Question(config, card)


def answers(question: Question, runs_dir: Path) -> Iterator[Outlook]:
    """How far it is, at least twice a second; the last one holds the answer. Closing the iterator
    ends the process.

    Raises:
        GapoError: model or data are not usable, or it takes too long.
    """
    deadline, found = time.monotonic() + PATIENCE_S, dict[str, Any]()
    beside = jobs.active(runs_dir) or ""
    arguments = {
        "config": question.config.model_dump(mode="json"),
        "gpu": None if question.card == THIS_MACHINE else question.card,
        "runs_dir": str(runs_dir),
    }
    for done, total in run_task("forecast", arguments, found):
        if time.monotonic() > deadline:
            raise RunError(
                f"this was given up after {PATIENCE_S / 60:.0f} minutes. Ask for fewer pairs "
                "(data.max_pairs), or in a terminal: gapo-lite plan."
            )
        yield Outlook(done, total)
    yield Outlook(done=1, total=1, found=found, beside=beside)
