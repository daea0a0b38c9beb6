"""The process that holds a chat model: `python -m app.chat_worker RUNS_DIR`, started by `voices`.

It is a process of its own so that the server never imports torch, its end frees the GPU wholly, and
a model that crashes takes nothing along. It reads JSON lines on stdin and answers on stdout, one
request after the other:

    {"id": 7, "voice": run or model, "side": "base" | "tuned", "turns": [{"role", "content"}, …],
     "system", "temperature", "top_p", "max_tokens", "seed"}
    {"stop": 7}                                  ends that answer at its next token

    {"id": 7, "loading": voice}                  only where it is not loaded yet
    {"id": 7, "note": "(the conversation no longer fits …)"}
    {"id": 7, "piece": text}                     as often as it takes
    {"id": 7, "done": true, "tokens": 12, "seconds": 0.8, "step": 200, "loaded": voice}
    {"id": 7, "error": message, "loaded": voice or null}

An error with `"fatal": true` is not a person's to mend; the process ends after it, since nobody
knows what it left on the GPU. At the end of stdin, which is the server's end, it ends at once.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.children import own_stdout
from gapo_lite.errors import GapoError
from gapo_lite.memory import is_out_of_memory
from gapo_lite.runs import Run

if TYPE_CHECKING:
    from gapo_lite.chat import Voice

Reply = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class _Job:
    request: dict[str, Any]
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class _Speaker:
    """The one voice that is loaded.

    Attributes:
        runs_dir: folder of all runs.
        voice: None before the first request, and after a voice could not be loaded.
        name: of the run or model, as it was asked for.
        seen: what its adapter's files were when it was loaded.
        step: optimizer steps that the adapter has seen; None for a model.
    """

    runs_dir: Path
    voice: Voice | None = None
    name: str | None = None
    seen: tuple[tuple[str, int, int], ...] = ()
    step: int | None = None


def main() -> None:
    """Answers until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's: this ends with it
    reply = own_stdout()
    jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    speaker = _Speaker(Path(sys.argv[1]))
    while True:
        _serve(jobs.get(), speaker, reply)


def _read(jobs: queue.SimpleQueue[_Job]) -> None:
    """Hands requests on in their order, stops at once; ends the process when stdin ends."""
    latest: dict[int, _Job] = {}  # every request is stopped in the end, answered or not
    try:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if "stop" in message:
                if job := latest.pop(message["stop"], None):
                    job.stop.set()
            else:
                latest[message["id"]] = job = _Job(message)
                jobs.put(job)
    except Exception:  # a bug: without this thread nothing could be stopped any more
        traceback.print_exc()
    os._exit(0)


def _serve(job: _Job, speaker: _Speaker, send: Reply) -> None:
    number = job.request["id"]

    def reply(fields: dict[str, Any]) -> None:
        send({"id": number, **fields})

    try:
        _answer(job, speaker, reply)
    except GapoError as error:
        reply({"error": str(error), "loaded": speaker.name})
    except Exception as error:
        traceback.print_exc()
        reply({"error": _explained(error), "loaded": None, "fatal": True})
        os._exit(1)


def _answer(job: _Job, speaker: _Speaker, reply: Reply) -> None:
    request, text, started = job.request, "", time.monotonic()
    if not job.stop.is_set():
        voice = _voice(speaker, request["voice"], reply)
        started = time.monotonic()
        with closing(_pieces(voice, request, reply)) as pieces:
            for piece in pieces:
                if piece:  # a token that ends no word gives an empty one
                    text += piece
                    reply({"piece": piece})
                if job.stop.is_set():
                    break
    reply(
        {
            "done": True,
            "tokens": _num_tokens(speaker, text),
            "seconds": round(time.monotonic() - started, 3),
            "step": speaker.step,
            "loaded": speaker.name,
        }
    )


def _pieces(voice: Voice, request: dict[str, Any], reply: Reply) -> Generator[str, None, None]:
    """The core's own conversation, so that what fits and what is drawn is as in its chat."""
    from gapo_lite.chat import Conversation

    *earlier, question = request["turns"]
    conversation = Conversation(
        voice,
        **{key: request[key] for key in ("system", "temperature", "top_p", "max_tokens", "seed")},
        tell=lambda text: reply({"note": text}),
        turns=earlier,
    )
    if request["side"] == "base" and voice.tuned is not None:
        return conversation.ask_base(question["content"])
    return conversation.ask(question["content"])


def _num_tokens(speaker: _Speaker, text: str) -> int:
    if speaker.voice is None or not text:
        return 0
    return len(speaker.voice.tokenizer(text, add_special_tokens=False)["input_ids"])


def _voice(speaker: _Speaker, name: str, reply: Reply) -> Voice:
    """The voice of that name; loaded where another is, or where its adapter has changed on disk."""
    run = Run(speaker.runs_dir / name)
    seen = _adapter_files(run)
    if speaker.voice is not None and (speaker.name, speaker.seen) == (name, seen):
        return speaker.voice
    reply({"loading": name})
    _unload(speaker)
    from gapo_lite.chat import load_voice
    from gapo_lite.compare import adapter_step

    voice = load_voice(name, speaker.runs_dir)
    speaker.step = adapter_step(run, run.trained_adapter()) if voice.tuned else None
    speaker.voice, speaker.name, speaker.seen = voice, name, seen
    return voice


def _unload(speaker: _Speaker) -> None:
    """Makes room first: two voices may not fit beside each other."""
    if speaker.voice is None:
        return
    speaker.voice = speaker.name = None
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _adapter_files(run: Run) -> tuple[tuple[str, int, int], ...]:
    """(path, time, size) of what a run speaks with; another tuple when that has changed."""
    paths = sorted(run.adapter.glob("*")) or sorted(run.checkpoints.glob("*/manifest.json"))
    found = []
    for path in paths:
        with suppress(FileNotFoundError):  # a training that goes on removes its oldest
            status = path.stat()
            found.append((str(path), status.st_mtime_ns, status.st_size))
    return tuple(found)


def _explained(error: Exception) -> str:
    if is_out_of_memory(error):
        return (
            "the GPU has no memory left for this answer. Ask for a shorter one, start a new "
            "conversation, or end what else uses the GPU. The model is loaded again next time."
        )
    text = " ".join(str(error).split())[:300]
    return (
        f"the model failed: {type(error).__name__}: {text} It is loaded again when you next ask; "
        "the server's chat log has the details."
    )


if __name__ == "__main__":
    main()
