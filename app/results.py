"""What is made of a run that has saved an adapter: exports, and base against tuned.

Each is the command line's own work, in a process of its own: it needs torch, which the server does
not load, and memory, which its end gives back.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from app.children import cleaned, environment
from gapo_lite.errors import RunError
from gapo_lite.runs import Run

COMPARISON = "comparison.json"
"""Kept in the run's folder."""


def export_merged(run: Run, exports: Path, *, ollama: bool = False) -> Path:
    """Writes the merged model with its model card to a new folder below `exports`.

    Args:
        run: what to export.
        exports: folder of all exports.
        ollama: whether it gets a Modelfile, and a folder of its own.

    Raises:
        RunError: nothing is saved, the folder is there already, or the disk is full.
    """
    run.trained_adapter()
    out = exports / (f"{run.name}-ollama" if ollama else f"{run.name}-merged")
    if out.exists():
        raise RunError(f"{out} is there already: rename or remove it first.")
    exports.mkdir(parents=True, exist_ok=True)
    _command(run, "export", "--merged", "--out", str(out), *(["--ollama"] if ollama else []))
    return out


def adapter_archive(run: Run) -> str:
    """A .zip of the adapter with its model card, for download.

    Raises:
        RunError: nothing is saved yet, or the disk is full.
    """
    run.trained_adapter()
    out = Path(tempfile.mkdtemp(prefix="gapo-lite-export-")) / f"{run.name}-adapter"
    _command(run, "export", "--adapter", "--out", str(out))
    archive = shutil.make_archive(str(out), "zip", out.parent, out.name)
    shutil.rmtree(out)
    return archive


class Evaluations:
    """Comparisons of base and tuned, which need the GPU; one at a time, and a training ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def is_running(self) -> bool:
        """Whether one is being made."""
        process = self._process
        return process is not None and process.poll() is None

    def end(self) -> None:
        """Ends the one that is being made, if any."""
        process = self._process
        if process is not None:
            process.kill()

    def evaluate(self, run: Run) -> dict[str, Any]:
        """Scores the held-out pairs with the base model and the tuned one; the result is kept.

        Raises:
            RunError: nothing is saved or held out, the model or data are not usable, one is being
                made already, or a training has ended it.
        """
        run.trained_adapter()
        if self.is_running():
            raise RunError("another comparison is being made: wait for its end.")
        with tempfile.TemporaryDirectory(prefix="gapo-lite-") as folder:
            out = Path(folder) / COMPARISON
            process = self._process = _started(run, "evaluate", "--json", str(out))
            _wait_for(process, "evaluate")
            found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        run.write(COMPARISON, found)
        return found


def _command(run: Run, command: str, *options: str) -> None:
    """`gapo-lite COMMAND RUN …`; what it says of a failure is raised."""
    _wait_for(_started(run, command, *options), command)


def _started(run: Run, command: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "gapo_lite", command, run.name),
            *("--runs-dir", str(run.path.parent), *options),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment(),
    )


def _wait_for(process: subprocess.Popen[str], command: str) -> None:
    _, said = process.communicate()
    if process.returncode == -signal.SIGKILL:
        raise RunError(
            f"the process for {command} was ended: by a training that needed its GPU, or because "
            "memory ran out."
        )
    if process.returncode:
        words = cleaned(said).strip().rpartition("error: ")[2]
        raise RunError(words[:1000] or f"the process for {command} ended without a word.")
