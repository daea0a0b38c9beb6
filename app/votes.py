"""Blind votes: base and tuned answer one question, and a person who cannot tell them apart says
which answer is better. The votes are kept with the run, in its `votes.jsonl`.

    sides = shuffled()                        # ("tuned", "base"): who speaks on the left and right
    duel = duels.open(run, request, sides, answers, step)
    vote = duels.vote(duel.id, "left")        # vote.winner == "tuned"
    print(tally(run).sentence)

Only `duel.id` may go to the browser before the vote. What else could tell the sides apart is the
caller's to hide: ask left first and then right, and show answers, times and token counts only when
both are there, since an adapter makes a model a little slower.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from app.voices import Request, readable
from gapo_lite.disk import read_jsonl, telling_disk_errors
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.runs import Run, now
from gapo_lite.statistics import wilson

CHOICES = ("left", "right", "tie", "both_bad")
VOTES = "votes.jsonl"
MAX_OPEN = 1000
FEWEST = 10
"""Votes below which Wilson's interval is too bold: 4 of 4 would already count as clear."""
NARROW = 0.1
"""Half the width of an interval from which on an even tally means that neither is preferred."""

Sides = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Duel:
    """Two answers to one question that wait for a vote.

    Attributes:
        id: 128 random bits, for the browser.
        run: whose base and tuned model answered.
        request: what was asked, and how; its `side` means nothing here.
        answers: the left and the right one.
        step: optimizer steps that the adapter had seen.
        sides: who gave them; not in the repr, so that no log tells it.
    """

    id: str
    run: Run
    request: Request
    answers: tuple[str, str]
    step: int | None
    sides: Sides = field(repr=False)


@dataclass(frozen=True, slots=True)
class Vote:
    """A vote, which lifts the blindness.

    Attributes:
        winner: base, tuned, tie or both_bad.
        sides: who spoke on the left and right.
    """

    winner: str
    sides: Sides


@dataclass(frozen=True, slots=True)
class Tally:
    """The votes on a run.

    Attributes:
        base, tuned, tie, both_bad: how many there are of each.
        win_rate: share of votes for tuned, where each vote for neither counts half; None without
            votes.
        interval: its 95 % interval (Wilson's); None without votes.
        sentence: all this in words, and whether it says anything yet.
    """

    base: int
    tuned: int
    tie: int
    both_bad: int
    win_rate: float | None
    interval: tuple[float, float] | None
    sentence: str


def shuffled() -> Sides:
    """("base", "tuned") or the reverse; nothing that anyone knows decides it."""
    return ("base", "tuned") if secrets.randbits(1) else ("tuned", "base")


class Duels:
    """The open duels of one server, the oldest dropped; its methods may be called from any thread.

    They are not on the disk: a file could tell the sides before the vote.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Duel] = {}

    def open(
        self, run: Run, request: Request, sides: Sides, answers: tuple[str, str], step: int | None
    ) -> Duel:
        """Keeps two whole answers, left and right, for a vote."""
        duel = Duel(secrets.token_urlsafe(16), run, request, answers, step, sides)
        with self._lock:
            self._open[duel.id] = duel
            while len(self._open) > MAX_OPEN:
                del self._open[next(iter(self._open))]
        return duel

    def vote(self, duel_id: str, choice: str) -> Vote:
        """Records the one vote on a duel with its run.

        Raises:
            ConfigError: there is no such choice.
            RunError: the duel is not open (any more), or the vote cannot be written; then the duel
                stays open.
        """
        if choice not in CHOICES:
            raise ConfigError(f"there is no vote {choice!r:.40}: choose {', '.join(CHOICES)}.")
        with self._lock:  # also while writing: of two votes at once, one is refused
            duel = self._open.get(duel_id) if isinstance(duel_id, str) else None
            if duel is None:
                raise RunError(
                    "these two answers are not open for a vote: it has been cast already, or the "
                    "server was started anew. Ask again for two new ones."
                )
            vote = Vote(_winner(duel.sides, choice), duel.sides)
            _record(duel, choice, vote.winner)
            del self._open[duel_id]
        return vote


def tally(run: Run) -> Tally:
    """Counts the votes on a run; lines of the file that are no votes are left out."""
    rows = [row for row in read_jsonl(run.path / VOTES) if isinstance(row, dict)]
    counts = Counter(row["winner"] for row in rows if row.get("winner") in _WINNERS)
    base, tuned, tie, both_bad = (counts[winner] for winner in _WINNERS)
    total = counts.total()
    rate = (tuned + (tie + both_bad) / 2) / total if total else None
    interval = None if rate is None else wilson(rate, total)
    sentence = _sentence(counts, interval)
    steps = {str(row.get("step")) for row in rows if row.get("winner") in _WINNERS}
    if len(steps) > 1:
        sentence += f" They were cast on the adapter at {len(steps)} different steps."
    return Tally(base, tuned, tie, both_bad, rate, interval, sentence)


_WINNERS = ("base", "tuned", "tie", "both_bad")


def _winner(sides: Sides, choice: str) -> str:
    return dict(zip(("left", "right"), sides, strict=True)).get(choice, choice)


def _record(duel: Duel, choice: str, winner: str) -> None:
    request, run = duel.request, duel.run
    row: dict[str, Any] = {
        "time": now(),
        "step": duel.step,
        "prompt": request.turns[-1]["content"],
        "earlier": list(request.turns[:-1]),
        **dict(zip(duel.sides, duel.answers, strict=True)),
        "left": duel.sides[0],
        "vote": choice,
        "winner": winner,
        "system": request.system,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
    }
    row = json.loads(readable(json.dumps(row, ensure_ascii=False)))
    try:
        with telling_disk_errors(run.path / VOTES):
            run.append(VOTES, row)
    except FileNotFoundError:
        raise RunError(
            f"the run {run.name} is no longer there, so the vote has nowhere to go."
        ) from None


def _sentence(counts: Counter[str], interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "No votes yet."
    total, tie, both_bad = counts.total(), counts["tie"], counts["both_bad"]
    neither = [_counted(tie, "tie")] if tie else []
    neither += [f"both bad in {both_bad}"] if both_bad else []
    found = ", ".join(
        [f"tuned preferred in {counts['tuned']}", f"base in {counts['base']}", *neither]
    )
    return f"{_counted(total, 'vote')}: {found}. {_meaning(interval, total)}"


def _meaning(interval: tuple[float, float], total: int) -> str:
    low, high = interval
    if total >= FEWEST and not low <= 0.5 <= high:
        better, worse = ("tuned", "base") if low > 0.5 else ("base", "tuned")
        return f"{better.capitalize()} is preferred to {worse}, by more than chance explains."
    if (high - low) / 2 > NARROW:
        return "That is too few to say."
    return "Neither is clearly preferred."


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
