"""Who answers in the chat: one child process (`chat_worker`), shared by all browsers.

    voices = Voices(Path("runs"), log=Path("runs/chat.log"))
    request = Request("demo", "tuned", [{"role": "user", "content": "What is a leap year?"}])
    with closing(voices.ask(request)) as events:
        for event in events: ...        # loading, piece, piece, …, done

The process holds one model and is started by the first question. Answers are given one after the
other; closing the events stops an answer. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from app.children import environment
from gapo_lite.disk import telling_disk_errors
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.runs import list_runs
from gapo_lite.types import Message

SIDES = ("base", "tuned")
MAX_TURNS = 400
MAX_TURN_CHARACTERS = 100_000
MAX_CONVERSATION_CHARACTERS = 400_000
MAX_SYSTEM_CHARACTERS = 20_000
MAX_TOKENS = 4096
MAX_SEED = 2**32 - 1
LEAST_TEMPERATURE = 0.01
"""Below it, but above 0, logits overflow when they are divided by it."""

_SIGN_S = 0.5
GIVEN_WAY = "the model has given way to training"
_DIED = (
    "the chat model's process has ended unexpectedly (often because memory ran out). Ask again: it "
    "is started anew. The server's chat log may say more."
)


@dataclass(frozen=True, slots=True)
class Request:
    """A question, and who is to answer it how.

    Attributes:
        voice: name of a run in the runs' folder; or of a model that the caller allows.
        side: "base" (the run's model without its adapter, or the model) or "tuned".
        turns: the conversation; the last turn is the question.
        is_run: whether `voice` is a run.
        system: the system message, "" for none.
        temperature: 0 takes the likeliest token each time.
        top_p: share of probability that is sampled from.
        max_tokens: longest answer, in tokens.
        seed: of the sampling; the same for both sides gives both the same draws.
    """

    voice: str
    side: str
    turns: Sequence[Message]
    is_run: bool = True
    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0

    def check(self) -> None:
        """Refuses what cannot be answered, whoever sent it.

        Raises:
            ConfigError: a value is of another kind or out of its range.
        """
        if not isinstance(self.voice, str) or not self.voice:
            raise ConfigError("nobody was chosen to answer: choose a run or a model.")
        if self.side not in SIDES:
            raise ConfigError(f"there is no side {_shown(self.side)}: choose base or tuned.")
        if self.side == "tuned" and not self.is_run:
            raise ConfigError(f"{_shown(self.voice)} is a base model itself: it has no tuned side.")
        if self.temperature != 0:
            _check_number("temperature", self.temperature, LEAST_TEMPERATURE, 2, "0, or ")
        _check_number("top-p", self.top_p, 1e-6, 1)
        _check_whole("the longest answer", self.max_tokens, 1, MAX_TOKENS)
        _check_whole("the seed", self.seed, 0, MAX_SEED)
        _check_text("the system message", self.system, MAX_SYSTEM_CHARACTERS)
        _check_turns(self.turns)


@dataclass(frozen=True, slots=True)
class Event:
    """What became of a question. The last event is `done` or `error`.

    Attributes:
        kind: waiting (another answer is being given), loading (`text` names the voice), piece (of
            the answer), note (turns were forgotten), still (nothing new), done, error.
        text: of the piece or the message.
        tokens: of the whole answer, when done.
        seconds: the answer took, without loading, when done.
        step: optimizer steps that the run's adapter has seen, when done; None for a model.
    """

    kind: Literal["waiting", "loading", "piece", "note", "still", "done", "error"]
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    step: int | None = None


_STILL = Event("still")


class Voices:
    """The chat of one server; its methods may be called from any thread.

    Args:
        runs_dir: folder of all runs.
        log: where the process's stderr goes.
        why_not: asked before each answer; a sentence where there may be no chat now. Whoever makes
            it say one and then calls `unload` can be sure that no chat goes on.
    """

    def __init__(self, runs_dir: Path, log: Path, why_not: Callable[[], str] = str):
        self._runs_dir = runs_dir.absolute()
        self._log = log
        self._why_not = why_not
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._numbers = itertools.count(1)

    def ask(self, request: Request) -> Generator[Event, None, None]:
        """The events of an answer, as they come. Closing them stops it at its next token.

        Closing never blocks: nothing is waited for. What goes wrong later is an event.

        Raises:
            ConfigError: the request is not one that can be answered.
            RunError: there is no such run.
        """
        request.check()
        if request.is_run and request.voice not in {run.name for run in list_runs(self._runs_dir)}:
            raise RunError(f"there is no run {_shown(request.voice)} any more. Choose another one.")
        return self._events(request)

    def unload(self, reason: str = GIVEN_WAY) -> None:
        """Ends the process, which frees the GPU; answers under way end with `reason` as an error.

        Returns when the process is gone. The next question starts a new one.
        """
        with self._lock:
            worker, self._worker = self._worker, None
        if worker:
            worker.end(reason)

    def loaded(self) -> str | None:
        """Name of the run or model that is loaded or being loaded."""
        worker = self._worker
        return worker.loaded if worker else None

    def _events(self, request: Request) -> Generator[Event, None, None]:
        number, inbox = next(self._numbers), queue.SimpleQueue[Event]()
        try:
            worker, must_wait = self._worker_for(number, inbox)
        except RunError as error:
            yield Event("error", str(error))
            return
        except OSError as error:
            yield Event("error", f"the chat model's process could not be started: {error}")
            return
        try:
            worker.send(_message(number, request))
            if must_wait:
                yield Event("waiting", "another answer is being given")
            event = _STILL
            while event.kind not in ("done", "error"):
                try:
                    event = inbox.get(timeout=_SIGN_S)
                except queue.Empty:  # whoever waits can also stop, while a model is loading say
                    event = _STILL
                yield event
        finally:
            worker.send({"stop": number})  # of no effect where the answer has ended

    def _worker_for(self, number: int, inbox: queue.SimpleQueue[Event]) -> tuple[_Worker, bool]:
        """The process with that inbox, and whether others were there before."""
        with self._lock:
            if refusal := self._why_not():
                raise RunError(refusal)
            if self._worker is None or self._worker.has_ended():
                self._worker = _start_worker(self._runs_dir, self._log, self._lock)
            must_wait = bool(self._worker.inboxes)
            self._worker.inboxes[number] = inbox
            return self._worker, must_wait


class _Worker:
    """The child process, with a thread that writes to it and one that reads from it.

    Whoever sends only puts a line into a queue: an abandoned generator may be closed by any thread,
    also one that holds a lock or must not block.
    """

    def __init__(self, process: subprocess.Popen[bytes], lock: threading.Lock):
        self.process = process
        self.inboxes: dict[int, queue.SimpleQueue[Event]] = {}
        self.loaded: str | None = None
        self._lock = lock  # guards `inboxes` and `_ended`, so that no inbox is left unanswered
        self._ended = False
        self._farewell = _DIED
        self._outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._receive, daemon=True)
        self._reader.start()
        threading.Thread(target=self._transmit, daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Returns at once."""
        self._outbox.put(message)

    def has_ended(self) -> bool:
        """To be called with the lock."""
        return self._ended or self.process.poll() is not None

    def end(self, farewell: str) -> None:
        """Kills the process; returns when it is gone and all inboxes have the farewell."""
        self._farewell = farewell
        self.process.kill()
        self._reader.join()

    def _transmit(self) -> None:
        pipe = cast("IO[bytes]", self.process.stdin)
        with contextlib.suppress(BrokenPipeError), pipe:
            while (message := self._outbox.get()) is not None:
                text = readable(json.dumps(message, ensure_ascii=False))
                pipe.write(text.encode() + b"\n")
                pipe.flush()

    def _receive(self) -> None:
        try:
            with cast("IO[bytes]", self.process.stdout) as lines:
                for line in lines:
                    if line.endswith(b"\n"):  # else it was torn by a kill
                        self._deliver(json.loads(line))
        finally:
            self.process.kill()
            self.process.wait()
            self._outbox.put(None)
            with self._lock:
                self._ended = True
                inboxes = list(self.inboxes.values())
                self.inboxes.clear()
                self.loaded = None
            for inbox in inboxes:
                inbox.put(Event("error", self._farewell))

    def _deliver(self, reply: dict[str, Any]) -> None:
        event = _event(reply)
        with self._lock:
            inbox = self.inboxes[reply["id"]]
            if event.kind == "loading":
                self.loaded = event.text
            if event.kind in ("done", "error"):
                self.loaded = reply["loaded"]
                self._ended = "fatal" in reply
                del self.inboxes[reply["id"]]
        inbox.put(event)


def _start_worker(runs_dir: Path, log: Path, lock: threading.Lock) -> _Worker:
    with telling_disk_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "app.chat_worker", str(runs_dir)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment(),
            )
    return _Worker(process, lock)


def _message(number: int, request: Request) -> dict[str, Any]:
    return {
        "id": number,
        "voice": request.voice,
        "side": request.side,
        "turns": list(request.turns),
        "system": request.system,
        "temperature": float(request.temperature),
        "top_p": float(request.top_p),
        "max_tokens": request.max_tokens,
        "seed": request.seed,
    }


def _event(reply: dict[str, Any]) -> Event:
    if "done" in reply:
        return Event("done", tokens=reply["tokens"], seconds=reply["seconds"], step=reply["step"])
    if "piece" in reply:
        return Event("piece", reply["piece"])
    if "loading" in reply:
        return Event("loading", reply["loading"])
    return Event("note", reply["note"]) if "note" in reply else Event("error", reply["error"])


def readable(text: str) -> str:
    """Text that UTF-8 can write: halves of a character, which JSON lets through, become �."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# -- checks --


def _shown(value: object) -> str:
    return f"{value!r:.60}"


def _check_number(name: str, value: object, low: float, high: float, also: str = "") -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} is {_shown(value)}: give a number of {also}{low:g} to {high:g}.")


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} is {_shown(value)}: give a whole number of {low:,} to {high:,}.")


def _check_text(name: str, value: object, most: int) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {_shown(value)}: give text.")
    if len(value) > most:
        raise ConfigError(
            f"{name} has {len(value):,} characters and may have {most:,}: shorten it."
        )


def _check_turns(turns: object) -> None:
    """Question, answer, question, …, and a question last."""
    if not isinstance(turns, list | tuple) or not turns:
        raise ConfigError("there is no question: write one.")
    if len(turns) > MAX_TURNS:
        raise ConfigError(
            f"the conversation has {len(turns):,} turns and may have {MAX_TURNS}: start a new one."
        )
    for index, turn in enumerate(turns):
        role = ("user", "assistant")[index % 2]
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"} or turn["role"] != role:
            raise ConfigError(
                f"turn {index + 1} of the conversation is not the {role}'s: questions and answers "
                "take turns. Start a new conversation."
            )
        name = "the question" if index == len(turns) - 1 else f"turn {index + 1}"
        _check_text(name, turn["content"], MAX_TURN_CHARACTERS)
    if len(turns) % 2 == 0 or not turns[-1]["content"].strip():
        raise ConfigError("the question is empty: write one.")
    if (length := sum(len(turn["content"]) for turn in turns)) > MAX_CONVERSATION_CHARACTERS:
        raise ConfigError(
            f"the conversation has {length:,} characters and may have "
            f"{MAX_CONVERSATION_CHARACTERS:,}: start a new one."
        )
