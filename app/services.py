"""What the tabs may call: plain values in and out, no gradio; no browser is trusted.

Everything that can be forged (names of runs, data and models, settings, files) is checked here or
in what is called: `places` for data and models, `jobs` for runs, `forms` for settings.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from app import curves, figures, forecasts, forms, history, jobs, processes, results, talks
from app.data_services import BASE_MODEL, DataServices, uploaded
from app.downloads import text_file
from app.pairs import PairSets
from app.places import Places
from app.run_table import run_row
from app.sweep_services import SweepServices
from app.talks import Settings, Talk
from app.voices import Voices
from app.votes import Duels, tally
from gapo_lite.checkpoints import list_checkpoints
from gapo_lite.config import RunConfig, differing_settings, load_config
from gapo_lite.errors import ConfigError, GapoError, RunError
from gapo_lite.runs import Run, check_name

MAX_YAML_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Services:
    """One server's services.

    Attributes:
        runs_dir: folder of all runs.
        data: the data side.
        sweeps: those of several runs.
        voices: the chat model's process.
        duels: blind comparisons that wait for a vote.
        evaluations: comparisons of base and tuned.
        has_gpu: whether training and chat would share a GPU.
    """

    runs_dir: Path
    data: DataServices
    sweeps: SweepServices
    voices: Voices
    duels: Duels
    evaluations: results.Evaluations
    has_gpu: bool

    @classmethod
    def over(cls, *, runs_dir: Path, data_dir: Path, models_dir: Path) -> Services:
        """The services over these folders."""
        evaluations, places = results.Evaluations(), Places(data_dir, models_dir)
        return cls(
            runs_dir=runs_dir,
            data=DataServices(places, PairSets()),
            sweeps=SweepServices(runs_dir, places),
            voices=Voices(
                runs_dir,
                runs_dir / ".jobs" / "chat.log",
                partial(_why_gpu_is_taken, runs_dir, evaluations) if gpu_is_here() else str,
            ),
            duels=Duels(),
            evaluations=evaluations,
            has_gpu=gpu_is_here(),
        )

    # -- train --

    def start(self, values: Mapping[str, Any], name: str = "") -> str:
        """Starts training what a filled form says; returns the run's name.

        Raises:
            GapoError: a setting, the data, the model or the name is not usable, or another run is
                being trained.
        """
        config = self.data.places.check_config(forms.config_of(values))
        given = name.strip() if isinstance(name, str) else ""
        if given:
            check_name(given)
        run = jobs.start(config, self.runs_dir, given or None, forms.default_name(config))
        self.give_way()
        return run

    def will_it_fit(self, values: Mapping[str, Any], card: Any) -> forecasts.Question:
        """The question what a filled form takes on a card; `outlooks` answers it.

        Raises:
            GapoError: as `start`, of settings, data and model; or there is no such card.
        """
        return forecasts.asked(self.data.places.check_config(forms.config_of(values)), card)

    def outlooks(self, question: forecasts.Question) -> Iterator[forecasts.Outlook]:
        """How far the answer is, and last the answer; see forecasts.answers.

        Raises:
            GapoError: model or data are not usable.
        """
        return forecasts.answers(question, self.runs_dir)

    def resume(self, name: str) -> None:
        """Goes on with a run.

        Raises:
            GapoError: it cannot go on, or another one is being trained.
        """
        jobs.resume(self.runs_dir, name)
        self.give_way()

    def give_way(self) -> None:
        """Ends what else is on the GPU where a training, whoever started it, needs it."""
        is_used = self.voices.loaded() or self.evaluations.is_running()
        if self.has_gpu and is_used and processes.active(self.runs_dir):
            self.evaluations.end()
            self.voices.unload()

    def stop(self, name: str) -> str:
        """Asks a training to save and end; returns what that means, in words.

        Raises:
            RunError: it is not being trained, or not ours to stop.
        """
        busy = processes.active(self.runs_dir)
        jobs.stop(self.runs_dir, name)
        sweep = f" The sweep {busy} stops with it." if busy not in (None, name) else ""
        return f"{name} ends after this step, and saves.{sweep}"

    def kill(self, name: str) -> None:
        """Ends a training at once.

        Raises:
            RunError: as `stop`.
        """
        jobs.kill(self.runs_dir, name)

    def watched(self) -> str:
        """The run that is to be looked at first: the one that is being trained, else the newest."""
        return jobs.active(self.runs_dir) or next(iter(self.run_names()), "")

    def run_names(self) -> list[str]:
        """All runs, the newest first."""
        return jobs.names(self.runs_dir)[::-1]

    def lost_by_killing(self, name: str) -> str:
        """What ending a run at once costs, for the question before it.

        Raises:
            RunError: there is no such run.
        """
        report = jobs.report(self.runs_dir, name)
        saved = _checkpoints(self.runs_dir / name)
        if not saved:
            return (
                f"{name} has saved nothing yet: ended now, it cannot be resumed and "
                f"{report.step} steps are lost."
            )
        return (
            f"{name} was last saved at step {max(saved)}: ended now, it loses "
            f"{max(0, report.step - max(saved))} steps. Stop saves first."
        )

    def history_csv(self, name: str) -> str:
        """A file with all that a run has logged, in a folder of its own.

        Raises:
            RunError: there is no such run, or it has logged nothing.
        """
        run = self.run(name)
        text = history.to_csv(run)
        if "\r\n" not in text.strip():
            raise RunError(f"the run {name} has logged nothing yet.")
        return text_file(f"{name}.csv", text)

    def load_yaml(self, path: str) -> RunConfig:
        """An uploaded configuration.

        Raises:
            GapoError: it is too large, not YAML, or names settings, data or models that are not
                usable here.
        """
        file = uploaded(path)
        if file.suffix.lower() not in (".yaml", ".yml"):
            raise ConfigError(f"{file.name} is no .yaml or .yml file.")
        if file.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{file.name} is larger than 1 MB, which no configuration is.")
        try:
            _refuse_aliases(file)
            return load_config(file)
        except ConfigError as error:  # without the server's path of the upload
            raise ConfigError(str(error).replace(str(file), file.name)) from None
        except (ValueError, RecursionError):  # a date or a number that is none, or [[[[[…
            raise ConfigError(
                f"{file.name} holds a value that cannot be read, or sections within sections "
                "without end. Save one from this page to see how it should look."
            ) from None

    # -- runs --

    def run(self, name: str) -> Run:
        """A run's folder.

        Raises:
            RunError: there is no such run.
        """
        jobs.report(self.runs_dir, name)
        run = Run(self.runs_dir / name)
        if not (run.path / "config.yaml").is_file():
            raise RunError(f"the run {name} ended before it had anything to show.")
        return run

    def run_rows(self) -> list[list[Any]]:
        """A row for each run, newest first: see RUN_COLUMNS."""
        return [run_row(self.runs_dir, name) for name in self.run_names()]

    def rename(self, name: str, new: str) -> None:
        """Gives a run another name.

        Raises:
            RunError: there is no such run, it is being trained, or the name is bad or in use.
        """
        jobs.rename(self.runs_dir, name, new.strip() if isinstance(new, str) else "")

    def lost_by_deleting(self, name: str) -> str:
        """What is asked before a run is deleted.

        Raises:
            RunError: there is no such run.
        """
        state = jobs.report(self.runs_dir, name).state
        return f"Delete {name} ({state}) with its checkpoints and adapter? It cannot be undone."

    def delete(self, name: str) -> None:
        """Removes a run and all in it.

        Raises:
            RunError: there is no such run, or it is being trained.
        """
        jobs.delete(self.runs_dir, name)

    def overlay(self, names: Sequence[str], axis: curves.Axis, smoothing: float) -> str:
        """Figures of several runs together.

        Raises:
            GapoError: none or too many are chosen, or one cannot be read.
        """
        if not names:
            return ""
        if len(names) > figures.MAX_OVERLAID:
            raise ConfigError(f"{figures.MAX_OVERLAID} runs at most fit into one figure.")
        return figures.overlay([self.run(n) for n in names], axis=axis, smoothing=smoothing)

    def difference(self, one: str, other: str) -> list[tuple[str, str, str]]:
        """Key and both values of each setting in which two runs differ.

        Raises:
            GapoError: a run cannot be read.
        """
        configs = [history.config_of(self.run(name)) for name in (one, other)]
        return [
            (key, _setting(a), _setting(b)) for key, (a, b) in differing_settings(*configs).items()
        ]

    def export_merged(self, name: str, *, ollama: bool = False) -> Path:
        """Writes the merged model, with a Modelfile for Ollama or without; see
        results.export_merged.

        Raises:
            RunError: it cannot be written.
        """
        exports = self.runs_dir.parent / "exports"
        return results.export_merged(self.run(name), exports, ollama=ollama)

    def adapter_archive(self, name: str) -> str:
        """A .zip of a run's adapter for download.

        Raises:
            RunError: nothing is saved yet.
        """
        return results.adapter_archive(self.run(name))

    def known_comparison(self, name: str) -> dict[str, Any]:
        """The last comparison of base and tuned that was made of a run; empty without one.

        Raises:
            RunError: there is no such run.
        """
        jobs.report(self.runs_dir, name)
        return Run(self.runs_dir / name).read(results.COMPARISON)

    def evaluate(self, name: str) -> dict[str, Any]:
        """Compares base and tuned on the held-out pairs; see results.Evaluations.

        Raises:
            RunError: it cannot be done, or training has the GPU.
        """
        run = self.run(name)
        if self.has_gpu and (refusal := _why_gpu_is_taken(self.runs_dir, self.evaluations)):
            raise RunError(refusal)
        self.voices.unload("the model has given way to an evaluation")
        return self.evaluations.evaluate(run)

    # -- chat --

    def voice_choices(self) -> list[str]:
        """Runs that have saved an adapter, newest first, then base models."""
        runs = [name for name in self.run_names() if _can_answer(self.runs_dir, name)]
        models = dict.fromkeys([BASE_MODEL, *(_model_of(self.runs_dir, name) for name in runs)])
        return [*runs, *(f"base: {model}" for model in models if model)]

    def answer(
        self, talk: Talk, voice: str, mode: str, question: str, settings: Settings
    ) -> Iterator[Talk]:
        """The talk as it grows with an answer; begins a new one for another voice or mode.

        Raises:
            GapoError: voice, mode, question or settings are not usable.
        """
        name, is_run = self._voice(voice)
        if (talk.voice, talk.is_run, talk.mode) != (name, is_run, mode) or not talk.columns:
            talk = talks.begin(name, is_run=is_run, mode=mode)
        run = Run(self.runs_dir / name) if is_run else None
        yield from talks.reply(self.voices, self.duels, run, talk, question, settings)

    def vote(self, talk: Talk, choice: str) -> tuple[Talk, str]:
        """Records a blind vote; see talks.vote.

        Raises:
            GapoError: there is nothing to vote on.
        """
        if not talk.voice or not talk.is_run:
            raise ConfigError("there is nothing to vote on yet: ask something in the blind mode.")
        return talks.vote(self.duels, Run(self.runs_dir / talk.voice), talk, choice)

    def votes_of(self, voice: str) -> str:
        """How the blind votes on a run stand, in a sentence; "" for a model or without any.

        Raises:
            GapoError: there is no such run or model.
        """
        name, is_run = self._voice(voice)
        return tally(Run(self.runs_dir / name)).sentence if is_run else ""

    def _voice(self, voice: str) -> tuple[str, bool]:
        """Name of a run or a model, and which it is."""
        if not isinstance(voice, str) or not voice:
            raise ConfigError("nobody was chosen to answer: choose a run or a model.")
        if voice.startswith("base: "):
            return self.data.places.check_model(voice.removeprefix("base: ")), False
        return self.run(voice).name, True


def _setting(value: Any) -> str:
    return "–" if value is None else str(value)


def _refuse_aliases(file: Path) -> None:
    """A few lines of YAML that repeat each other by name can stand for more than fits in memory."""
    text = file.read_text(encoding="utf-8", errors="replace")
    with contextlib.suppress(yaml.YAMLError):  # load_config says what is wrong
        if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ConfigError(f"{file.name} repeats a part by its name (*name): write it out.")


def gpu_is_here() -> bool:
    """Whether torch would find an NVIDIA GPU, without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def _why_gpu_is_taken(runs_dir: Path, evaluations: results.Evaluations) -> str:
    """A sentence while a run is being trained or compared, on the one GPU that there is."""
    name = processes.active(runs_dir)
    if name is None and evaluations.is_running():
        return "a run is being compared with its base on this GPU. Ask again when that has ended."
    if name is None:
        return ""
    return (
        f"{processes.doing(runs_dir, name, ' on this GPU')}, and another model beside it would "
        "take its memory. Ask again when it has ended or is stopped."
    )


def _checkpoints(run: Path) -> list[int]:
    """Steps at which a run was saved."""
    return [step for step, _ in list_checkpoints(run / "checkpoints")]


def _can_answer(runs_dir: Path, name: str) -> bool:
    """Whether a run has saved an adapter, and is not being trained further."""
    run = Run(runs_dir / name)
    saved = (run.adapter / "adapter_config.json").is_file() or _checkpoints(run.path)
    return bool(saved) and not run.is_locked()


def _model_of(runs_dir: Path, name: str) -> str:
    try:
        return history.config_of(Run(runs_dir / name)).model.name
    except GapoError:
        return ""
