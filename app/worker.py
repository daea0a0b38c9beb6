"""What the Data tab and Will it fit? need torch for, in a short-lived process:
`python -m app.worker TASK`.

It is a process of its own so that the server never imports torch and a person can stop it at any
time. It reads its arguments as one line of JSON on stdin, and ends when stdin does, which is when
the server has ended or nobody wants the result any more. On stdout it writes

    {"done": 256, "total": 3101}                     as often as there is something to say
    {"error": message, "kind": "ModelError"}         where it is a person's to mend
    {"answer": {…}}                                  of a forecast or a margin, at its end

and what it measures goes into the cache: token lengths into `lengths/` (see `lengths_path`), scores
into the same files that training looks for (gapo_lite.ef.cache).
"""

from __future__ import annotations

import hashlib
import json
import os
import selectors
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from app.children import environment, own_stdout
from gapo_lite.config import parse_config
from gapo_lite.data import data_fingerprint, load_pairs
from gapo_lite.ef import cache as ef_cache
from gapo_lite.ef import check_options
from gapo_lite.embedded import cache_dir, model_state
from gapo_lite.errors import ConfigError, DataError, GapoError, ModelError, RunError
from gapo_lite.memory import is_out_of_memory
from gapo_lite.outputs import whole_file
from gapo_lite.types import PreferencePair

Progress = Callable[[int, int], None]

LENGTHS_VERSION = 1
"""Raise it when the lengths of the same texts and model change."""

BERTSCORES = ("bertscore_p", "bertscore_r", "bertscore_f1")
"""In the order in which `bert_scores` returns them; each costs what all three cost."""

_ERRORS = {error.__name__: error for error in (ConfigError, DataError, ModelError, RunError)}
_SECONDS_A_SIGN = 0.5


# -- the server's side --


def run_task(
    task: str, arguments: dict[str, Any], answer: dict[str, Any] | None = None
) -> Iterator[tuple[int, int]]:
    """Runs a task in a process of its own; closing the iterator ends that process.

    Args:
        task: a key of TASKS.
        arguments: what JSON can hold.
        answer: what the task returns is put in here.

    Yields:
        (done, total), at least twice a second, so that whoever waits can also stop; (0, 0) while
        the total is not known.

    Raises:
        GapoError: what the task says, or the process ended without a word.
    """
    needs_no_gpu = task == "lengths" or bool(arguments.get("gpu"))  # a card that need not be here
    process = subprocess.Popen(
        [sys.executable, "-m", "app.worker", task],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment() | ({"CUDA_VISIBLE_DEVICES": ""} if needs_no_gpu else {}),
        start_new_session=True,
    )
    try:
        stdin = cast("IO[bytes]", process.stdin)
        with suppress(BrokenPipeError):  # it has ended already; its end says why
            stdin.write(json.dumps(arguments).encode() + b"\n")
            stdin.flush()
        yield from _messages(cast("IO[bytes]", process.stdout), {} if answer is None else answer)
        if process.wait() != 0:
            raise RunError(
                f"the process for the {task} has ended unexpectedly (status {process.returncode}), "
                "often because memory ran out. The server's log may say more; try again."
            )
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                cast("IO[bytes]", pipe).close()


def lengths_path(fingerprint: str, model: str, revision: str | None) -> Path:
    """Where token lengths are kept; the name is a digest of all that they depend on.

    Args:
        fingerprint: data_fingerprint of the pairs.
        model: as in `model.name`.
        revision: as in `model.revision`.

    Raises:
        RunError: there is no folder for the cache.
    """
    key = [LENGTHS_VERSION, fingerprint, model, revision, model_state(model)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return cache_dir() / "lengths" / f"{digest}.npz"


def read_lengths(path: Path, num_pairs: int) -> NDArray[np.int32] | None:
    """Lengths (N, 3) kept at `path`; None if they are not there, or not as they were written."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            lengths = file["lengths"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return lengths if lengths.shape == (num_pairs, 3) and lengths.dtype == np.int32 else None


def _messages(stdout: IO[bytes], answer: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Progress until the end of `stdout`; an answer is put into `answer`."""
    last, rest = (0, 0), b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while True:
            if selector.select(_SECONDS_A_SIGN):
                piece = os.read(stdout.fileno(), 1 << 16)
                if not piece:
                    return
                *lines, rest = (rest + piece).split(b"\n")
                for message in map(json.loads, lines):
                    if "error" in message:
                        raise _ERRORS[message["kind"]](message["error"])
                    if "answer" in message:
                        answer.update(message["answer"])
                        continue
                    last = (message["done"], message["total"])
            yield last


# -- the worker's side --


def main() -> None:
    """Does one task."""
    tell = own_stdout()
    arguments = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        task = TASKS[sys.argv[1]]
        answer = task(arguments, lambda done, total: tell({"done": done, "total": total}))
        if answer is not None:
            tell({"answer": answer})
    except GapoError as error:
        tell({"error": str(error), "kind": type(error).__name__})


def measure_lengths(arguments: dict[str, Any], progress: Progress) -> None:
    """Counts the tokens of all pairs and keeps the counts.

    Args:
        arguments: source, split, fingerprint, model, revision.
        progress: called with (pairs done, N).

    Raises:
        GapoError: data or tokenizer can't be used, have changed, or the disk is full.
    """
    pairs = _load(arguments)
    progress(0, len(pairs))
    from gapo_lite.lengths import count_tokens
    from gapo_lite.model import load_tokenizer  # imports torch

    model, revision = arguments["model"], arguments["revision"]
    lengths = count_tokens(pairs, load_tokenizer(model, revision), progress)
    path = lengths_path(arguments["fingerprint"], model, revision)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {path.parent}: {error.strerror}.") from None
    with whole_file(path) as part, part.open("wb") as file:
        np.savez_compressed(file, lengths=lengths)


def measure_scores(arguments: dict[str, Any], progress: Progress) -> None:
    """Scores pairs by BERTScore's precision, recall and F1 in one pass, and keeps all three.

    Args:
        arguments: source, split, fingerprint, options (of a BERTScore), and parts: lists of
            indices, each scored and kept by itself, as training does with its splits.
        progress: called with (pairs done, all).

    Raises:
        GapoError: data or encoder can't be used or have changed, or the GPU is full.
    """
    pairs, parts = _load(arguments), arguments["parts"]
    total, done = sum(map(len, parts)), 0
    progress(0, total)
    from gapo_lite.ef.semantic import bert_scores

    options = arguments["options"]
    settings = check_options(BERTSCORES[0], options)
    for part in parts:
        chosen, rejected = [pairs[i].chosen for i in part], [pairs[i].rejected for i in part]
        try:
            scores = bert_scores(
                chosen, rejected, progress=_after(done, total, progress), **settings
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                "the GPU has no room for the BERTScore encoder; a training may be using it. Wait "
                "for its end, or choose a smaller encoder or ef.bertscore_batch_size."
            ) from None
        for metric, column in zip(BERTSCORES, scores.T, strict=True):
            path = ef_cache.cache_path(chosen, rejected, metric, options)
            ef_cache.write_scores(path, np.ascontiguousarray(column))
        done += len(part)


def make_forecast(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """What a run would take: gapo_lite.forecast.

    Args:
        arguments: config, gpu (as `gapo-lite plan --gpu` takes it, or None) and runs_dir.
        progress: called with (pairs whose tokens are counted, all).

    Raises:
        GapoError: data or model can't be used.
    """
    from gapo_lite.forecast import forecast  # imports torch

    config, runs_dir = parse_config(arguments["config"]), Path(arguments["runs_dir"])
    found = forecast(config, gpu=arguments["gpu"], runs_dir=runs_dir, progress=progress)
    return found.to_json()


def find_mean_margin(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Mean target margin of a configuration's training pairs: gapo_lite.sweep_presets.

    Args:
        arguments: config.
        progress: not called.

    Raises:
        GapoError: data or tokenizer can't be used.
    """
    from gapo_lite.sweep_presets import mean_margin  # imports torch

    return {"mean_margin": mean_margin(parse_config(arguments["config"]))}


TASKS: dict[str, Callable[[dict[str, Any], Progress], dict[str, Any] | None]] = {
    "lengths": measure_lengths,
    "scores": measure_scores,
    "forecast": make_forecast,
    "margin": find_mean_margin,
}


def _after(done: int, total: int, progress: Progress) -> Progress:
    return lambda now, _: progress(done + now, total)


def _load(arguments: dict[str, Any]) -> list[PreferencePair]:
    pairs = load_pairs(arguments["source"], split=arguments["split"]).pairs
    if data_fingerprint(pairs) != arguments["fingerprint"]:
        raise DataError(f"{arguments['source']!r} has changed since it was opened: open it again.")
    return pairs


def _end_with_stdin() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock would be in the way of a normal end
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
