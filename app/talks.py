"""What is said in one browser's chat: one voice, two side by side, or two blind.

    talk = begin("demo", is_run=True, mode=BLIND)
    for grown in reply(voices, duels, run, talk, "What is a leap year?", Settings()): ...
    talk, sentence = vote(duels, run, grown, "left")

A Talk is a value: each step gives a new one. In a blind talk it knows who is left and right, so it
never goes to the browser itself (`sessions` keeps it, on the server); only its view does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace

from app import views
from app.voices import Event, Request, Voices
from app.votes import Duels, shuffled, tally
from gapo_lite.errors import ConfigError
from gapo_lite.runs import Run
from gapo_lite.types import Message

ONE, BESIDE, BLIND = "One voice", "Side by side", "Blind"
MODES = (ONE, BESIDE, BLIND)
_REDRAW_S = 0.1


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are drawn; see voices.Request."""

    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Column:
    """One side of a talk: who speaks, what was said, what is to be remarked of it, and whether the
    last question is done with (answered, or not to be answered any more)."""

    side: str
    turns: tuple[tuple[str, str], ...] = ()
    remark: str = ""
    done: bool = True

    def messages(self) -> list[Message]:
        """The turns as the model reads them."""
        return [{"role": role, "content": text} for role, text in self.turns]


@dataclass(frozen=True, slots=True)
class Talk:
    """All that is known of a conversation.

    Attributes:
        voice: name of a run or model; "" before one is chosen.
        is_run: which of the two it is.
        mode: one of MODES.
        columns: one side, or two.
        duel: id of the open vote, "" where there is none.
        revealed: whether a blind talk's sides may be told, after a vote.
        step: optimizer steps of the adapter that answered last.
    """

    voice: str = ""
    is_run: bool = False
    mode: str = ONE
    columns: tuple[Column, ...] = ()
    duel: str = ""
    revealed: bool = False
    step: int | None = None


def begin(voice: str, *, is_run: bool, mode: str) -> Talk:
    """An empty talk.

    Raises:
        ConfigError: there is no such mode, or a model without adapter is to be compared.
    """
    if mode not in MODES:
        raise ConfigError(f"there is no such kind of chat. Choose one of: {', '.join(MODES)}.")
    if mode != ONE and not is_run:
        raise ConfigError(
            "a comparison needs a run: its base model answers on one side, the tuned one on the "
            "other. Choose a run, or One voice."
        )
    sides = ("tuned" if is_run else "base",) if mode == ONE else ("base", "tuned")
    sides = shuffled() if mode == BLIND else sides
    return Talk(voice, is_run, mode, tuple(Column(side) for side in sides))


def reply(
    voices: Voices, duels: Duels, run: Run | None, talk: Talk, question: str, settings: Settings
) -> Iterator[Talk]:
    """The talk as it grows with an answer, or two.

    Raises:
        GapoError: the question or the settings are not usable.
    """
    talk = _settled(talk)
    if talk.mode == BLIND and talk.revealed:  # who has been told who is who starts anew
        talk = begin(talk.voice, is_run=talk.is_run, mode=BLIND)
    for column in talk.columns:  # all sides are checked before one speaks
        _request(talk, column, question, settings).check()
    columns = [_with_turn(column, "user", question) for column in talk.columns]
    talk = replace(talk, columns=tuple(columns), duel="", revealed=False)
    for place in range(len(columns)):
        for grown in _answered(voices, talk, place, settings):
            talk = grown
            yield talk
    if talk.mode == BLIND and run is not None:
        yield _for_a_vote(duels, run, talk, settings)


def stopped(talk: Talk) -> Talk:
    """The talk after its answer was stopped; the same where nothing was being written."""
    if all(column.done for column in talk.columns):
        return talk
    if talk.mode == BLIND:  # one whole answer beside half a one would tell who wrote which
        asked = ("user", _last_question(talk.columns[0]))
        remark = "Stopped, so there is nothing to vote on."
        columns = [
            replace(column, turns=(*column.turns, asked), remark=remark)
            for column in _unasked(talk).columns
        ]
    else:
        columns = [c if c.done else replace(c, done=True, remark="Stopped.") for c in talk.columns]
    return replace(talk, columns=tuple(columns))


def again(talk: Talk) -> tuple[Talk, str]:
    """The talk before its last question, and that question.

    Raises:
        ConfigError: nothing has been asked yet.
    """
    if not talk.columns or not talk.columns[0].turns:
        raise ConfigError("nothing has been asked yet, so there is nothing to answer again.")
    return replace(_unasked(talk), revealed=talk.revealed), _last_question(talk.columns[0])


def vote(duels: Duels, run: Run, talk: Talk, choice: str) -> tuple[Talk, str]:
    """Casts the vote, lifts the blindness, and says how the votes stand.

    Raises:
        GapoError: the choice is none, or these answers are not open for a vote.
    """
    cast = duels.vote(talk.duel, choice)
    said = {"tie": "A tie.", "both_bad": "Both bad."}.get(
        cast.winner, f"You preferred {cast.winner}."
    )
    told = f"{said} Left was {cast.sides[0]}, right was {cast.sides[1]}. {tally(run).sentence}"
    return replace(talk, duel="", revealed=True), told


def html(talk: Talk) -> str:
    """The talk as the browser sees it."""
    hidden = talk.mode == BLIND and not talk.duel and not talk.revealed
    columns = [
        views.conversation(
            _title(talk, place), _visible(column, hidden), _visible_remark(talk, place)
        )
        for place, column in enumerate(talk.columns)
    ]
    return views.side_by_side(columns)


def _title(talk: Talk, place: int) -> str:
    if talk.mode == BLIND and not talk.revealed:
        return ("Left", "Right")[place]
    side = talk.columns[place].side
    if not talk.is_run:
        return talk.voice
    return f"{talk.voice}, tuned" if side == "tuned" else f"{talk.voice}, base model"


def _visible(column: Column, hidden: bool) -> list[Message]:
    """While two blind answers are being written, not even their pace may tell who writes."""
    messages = column.messages()
    return messages[:-1] if hidden and messages and messages[-1]["role"] != "user" else messages


def _visible_remark(talk: Talk, place: int) -> str:
    writing = not all(column.done for column in talk.columns)
    if talk.mode != BLIND or talk.revealed or not (writing or talk.duel):
        return talk.columns[place].remark
    return "both answers are being written …" if writing and place == 0 else ""


def _request(talk: Talk, column: Column, question: str, settings: Settings) -> Request:
    turns = [*column.messages(), {"role": "user", "content": question}]
    return Request(talk.voice, column.side, turns, talk.is_run, **asdict(settings))


def _answered(voices: Voices, talk: Talk, place: int, settings: Settings) -> Iterator[Talk]:
    """The talk while the side at `place` answers the question that stands last."""
    asked = talk.columns[place]
    request = Request(talk.voice, asked.side, asked.messages(), talk.is_run, **asdict(settings))
    column, text, drawn = asked, "", 0.0
    with closing(voices.ask(request)) as events:
        for event in events:
            if event.kind == "still":
                yield talk
                continue
            text += event.text if event.kind == "piece" else ""
            done = event.kind in ("done", "error")
            lost = not text or (event.kind == "error" and talk.mode == BLIND)  # half is no answer
            answer = asked if lost else _with_turn(asked, "assistant", text)
            column = replace(answer, remark=_remark(event, column.remark), done=done)
            columns = (*talk.columns[:place], column, *talk.columns[place + 1 :])
            talk = replace(talk, columns=columns, step=event.step or talk.step)
            if event.kind != "piece" or time.monotonic() - drawn > _REDRAW_S:
                drawn = time.monotonic()
                yield talk


def _remark(event: Event, before: str) -> str:
    if event.kind == "piece":
        return before if before.startswith("(") else ""
    if event.kind == "loading":
        return f"loading {event.text} …"
    if event.kind == "done":
        pace = event.tokens / event.seconds if event.seconds else 0.0
        return f"{before} {event.tokens} tokens, {pace:.1f} a second".strip()
    return f"Not answered: {event.text}" if event.kind == "error" else event.text


def _with_turn(column: Column, role: str, text: str) -> Column:
    return replace(column, turns=(*column.turns, (role, text)), remark="", done=False)


def _has_answered(column: Column) -> bool:
    return bool(column.turns) and column.turns[-1][0] == "assistant"


def _last_question(column: Column) -> str:
    return next(text for role, text in reversed(column.turns) if role == "user")


def _settled(talk: Talk) -> Talk:
    """Without a last question that not every side has answered: the next one takes its place."""
    answered = all(_has_answered(column) or not column.turns for column in talk.columns)
    return talk if answered else _unasked(talk)


def _unasked(talk: Talk) -> Talk:
    """The talk before its last question."""
    columns = [
        replace(column, turns=_before_question(column.turns), remark="", done=True)
        for column in talk.columns
    ]
    return replace(talk, columns=tuple(columns), duel="", revealed=False)


def _before_question(turns: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    last = max(place for place, (role, _) in enumerate(turns) if role == "user")
    return turns[:last]


def _for_a_vote(duels: Duels, run: Run, talk: Talk, settings: Settings) -> Talk:
    """A blind talk at its end: with a duel, or without one where a side could not answer."""
    if all(_has_answered(column) for column in talk.columns):
        return replace(talk, duel=_opened(duels, run, talk, settings))
    remark = "Answered; there is no vote, because the other side could not."
    columns = [replace(c, remark=remark) if _has_answered(c) else c for c in talk.columns]
    return replace(talk, columns=tuple(columns))


def _opened(duels: Duels, run: Run, talk: Talk, settings: Settings) -> str:
    """A duel over the two answers that stand last; what was asked is the left side's."""
    left, right = talk.columns
    request = Request(talk.voice, left.side, left.messages()[:-1], talk.is_run, **asdict(settings))
    answers = (left.turns[-1][1], right.turns[-1][1])
    return duels.open(run, request, (left.side, right.side), answers, talk.step).id
