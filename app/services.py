"""What the tabs may call: plain values in and out, no gradio; no browser is trusted.

Everything that can be forged (names of runs, data and models, settings, files) is checked here or
in what is called: `places` for data and models, `jobs` for runs, `forms` for settings.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml

from app import children, curves, figures, forms, gaps, history, jobs, measures, talks, views
from app.browser import BrowsedPair, browse
from app.gaps import CONSTANT_MARGINS, GapView
from app.pairs import PairSet, PairSets
from app.places import Places
from app.talks import Settings, Talk
from app.voices import Voices
from app.votes import Duels
from gapo_lite.checkpoints import list_checkpoints
from gapo_lite.config import RunConfig, differing_settings, load_config
from gapo_lite.ef import EVALUATION_FACTORS
from gapo_lite.embedded import EMBEDDED_DATA, EMBEDDED_MODELS
from gapo_lite.errors import ConfigError, DataError, GapoError, RunError
from gapo_lite.runs import Run, check_name

BASE_MODEL = "embedded:smollm2-135m-instruct"
PAPERS_MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"
EXPORTS = Path("exports")
MAX_YAML_BYTES = 1_000_000
FEW_PAIRS = 5000
"""So many pairs are tokenised in seconds."""


@dataclass(frozen=True, slots=True)
class OpenedData:
    """What the form holds for data that were opened; "" for what it leaves empty."""

    source: str
    split: str
    heldout_source: str
    heldout_split: str


@dataclass(frozen=True, slots=True)
class Services:
    """One server's services.

    Attributes:
        runs_dir: folder of all runs.
        places: which data and models may be opened.
        pair_sets: data that were looked at last.
        voices: the chat model's process.
        duels: blind comparisons that wait for a vote.
        has_gpu: whether training and chat would share a GPU.
    """

    runs_dir: Path
    places: Places
    pair_sets: PairSets
    voices: Voices
    duels: Duels
    has_gpu: bool

    @classmethod
    def over(cls, *, runs_dir: Path, data_dir: Path, models_dir: Path) -> Services:
        """The services over these folders."""
        return cls(
            runs_dir=runs_dir,
            places=Places(data_dir, models_dir),
            pair_sets=PairSets(),
            voices=Voices(
                runs_dir,
                runs_dir / ".jobs" / "chat.log",
                partial(_why_chat_waits, runs_dir) if gpu_is_here() else str,
            ),
            duels=Duels(),
            has_gpu=gpu_is_here(),
        )

    # -- data --

    def source_choices(self) -> list[str]:
        """Embedded sets, then files of the data folder, newest first."""
        return [*(name for name in EMBEDDED_DATA if "heldout" not in name), *self.places.files()]

    def model_choices(self) -> list[str]:
        """The embedded model, the paper's, and local ones of the models folder."""
        return [BASE_MODEL, PAPERS_MODEL, *self.places.models()]

    def open_data(self, name: str, split: str) -> OpenedData:
        """Loads what a browser named, and says what the form should hold for it.

        Raises:
            DataError: it may not be opened, or holds no usable row.
        """
        source = self.places.check_source(name.strip() if isinstance(name, str) else name)
        split = (split.strip() if isinstance(split, str) else "") or "train"
        self.pair_sets.load(source, split)
        heldout = f"{source}-heldout"
        return OpenedData(source, split, heldout if heldout in EMBEDDED_DATA else "", "test")

    def keep_upload(self, path: str) -> str:
        """Puts an uploaded file below the data folder; returns its name as a source.

        Raises:
            GapoError: it is no data file, or the disk is full.
        """
        file = _uploaded(path)
        return self.places.keep_upload(file, file.name)

    def data_config(self, values: Mapping[str, Any]) -> RunConfig:
        """What a form says of data and margins, whatever else in it is not usable yet.

        Raises:
            GapoError: one of these settings is not usable, or names data or models that are not.
        """
        about = ("model", "data", "ef", "margin", "objective")
        some = {key: value for key, value in values.items() if key.partition(".")[0] in about}
        return self.places.check_config(forms.config_of(some))

    def pair_set(self, config: RunConfig) -> PairSet:
        """The pairs of a configuration; those on the Hub must have been opened by someone.

        Raises:
            DataError: they cannot be read, or would have to be downloaded.
        """
        source, split = config.data.source, config.data.split
        is_here = source in EMBEDDED_DATA or Path(source).exists()
        if not is_here and not self.pair_sets.is_open(source, split):
            raise DataError(f"{source} is on the Hub: press Load in the Data tab to look at it.")
        return self.pair_sets.load(source, split)

    def measure_lexical(self, config: RunConfig) -> Iterator[tuple[int, int]]:
        """(done, total) while all lexical metrics are measured, which takes one pass.

        Raises:
            GapoError: the data are not usable.
        """
        for name, factor in EVALUATION_FACTORS.items():
            if factor.family == "lexical":
                yield from measures.measure_scores(self.pair_set(config), name, config)

    def measure_bertscore(self, config: RunConfig) -> Iterator[tuple[int, int]]:
        """(done, total) while the configuration's BERTScore is measured, by a process of its own.

        Raises:
            GapoError: another metric is chosen, or data or encoder are not usable.
        """
        metric = config.ef.metric
        if EVALUATION_FACTORS[metric].family != "semantic":
            raise ConfigError(
                f"{metric} is measured already. Choose a BERTScore as EF metric first."
            )
        return measures.measure_scores(self.pair_set(config), metric, config)

    def gaps(self, config: RunConfig) -> GapView | None:
        """Gaps and margins; None while the metric has to be measured.

        Raises:
            GapoError: data or settings are not usable.
        """
        return gaps.gaps(self.pair_set(config), config.ef.metric, config)

    def lengths(self, config: RunConfig) -> Any:
        """(N, 3) tokens of prompt, chosen and rejected, or None while they are not counted."""
        return measures.lengths(self.pair_set(config), config.model.name, config.model.revision)

    def measure_lengths(self, config: RunConfig) -> Iterator[tuple[int, int]]:
        """(done, total) while tokens are counted.

        Raises:
            GapoError: data or tokenizer are not usable.
        """
        return measures.measure_lengths(
            self.pair_set(config), config.model.name, config.model.revision
        )

    def counts_tokens_unasked(self, config: RunConfig) -> bool:
        """Whether counting takes no time or download that somebody should ask for."""
        small = len(self.pair_set(config)) <= FEW_PAIRS
        return small and config.model.name in EMBEDDED_MODELS and self.lengths(config) is None

    def browse(self, config: RunConfig, query: str, sort: str, index: int) -> BrowsedPair | None:
        """One pair of those that hold the query; see browser.browse.

        Raises:
            GapoError: there is no such order, or the data are not usable.
        """
        query = query[:1000] if isinstance(query, str) else ""
        view = self.gaps(config)
        return browse(self.pair_set(config), view, query=query, sort=sort, index=index)

    def margin_line(self, config: RunConfig) -> str:
        """What γ and β come to: the average target margin, where the data say it."""
        try:
            view = self.gaps(self.places.check_config(config))
        except GapoError:
            view = None
        if view is None:
            return "Average target margin: known once the pairs are scored (Data tab)."
        return (
            f"Average target margin **{view.mean_reward_margin:.3g} reward units** "
            f"(SimPO's γ/β: {view.gamma_beta_ratio:.3g})"
        )

    # -- train --

    def start(self, values: Mapping[str, Any], name: str = "") -> str:
        """Starts training what a filled form says; returns the run's name.

        Raises:
            GapoError: a setting, the data, the model or the name is not usable, or another run is
                being trained.
        """
        config = self.places.check_config(forms.config_of(values))
        given = name.strip() if isinstance(name, str) else ""
        if given:
            check_name(given)
        run = jobs.start(config, self.runs_dir, given or None, forms.default_name(config))
        self.give_way()
        return run

    def resume(self, name: str) -> None:
        """Goes on with a run.

        Raises:
            GapoError: it cannot go on, or another one is being trained.
        """
        jobs.resume(self.runs_dir, name)
        self.give_way()

    def give_way(self) -> None:
        """Ends the chat model where a training, whoever started it, needs its GPU."""
        if self.has_gpu and self.voices.loaded() and jobs.active(self.runs_dir):
            self.voices.unload()

    def stop(self, name: str) -> None:
        """Asks a training to save and end.

        Raises:
            RunError: it is not being trained, or not ours to stop.
        """
        jobs.stop(self.runs_dir, name)

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
        file = _uploaded(path)
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
        return [self._run_row(name) for name in self.run_names()]

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
        return [(key, str(a), str(b)) for key, (a, b) in differing_settings(*configs).items()]

    def export(self, name: str, *, merged: bool) -> Path:
        """Writes the adapter or the merged model, by the command line in a process of its own.

        Returns:
            The new folder.

        Raises:
            RunError: nothing is saved, the folder is there already, or the disk is full.
        """
        self.run(name).trained_adapter()
        kind = "merged" if merged else "adapter"
        EXPORTS.mkdir(exist_ok=True)
        out = EXPORTS / f"{name}-{kind}"
        if merged and out.exists():
            raise RunError(f"{out} is there already: rename or remove it first.")
        if not merged:
            out = Path(tempfile.mkdtemp(prefix="gapo-lite-export-")) / f"{name}-{kind}"
        command = [
            *(sys.executable, "-m", "gapo_lite", "export", name, f"--{kind}"),
            *("--out", str(out), "--runs-dir", str(self.runs_dir)),
        ]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=children.environment(),
        )
        if done.returncode:
            words = children.cleaned(done.stderr).strip().rpartition("error: ")[2]
            raise RunError(words[:1000] or "the export ended without a word.")
        return out

    def adapter_archive(self, name: str) -> str:
        """A .zip of a run's adapter with its model card, for download.

        Raises:
            RunError: nothing is saved yet.
        """
        folder = self.export(name, merged=False)
        archive = shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
        shutil.rmtree(folder)
        return archive

    # -- chat --

    def voice_choices(self) -> list[str]:
        """Runs that have saved an adapter, newest first, then base models."""
        runs = [name for name in self.run_names() if _can_answer(self.runs_dir, name)]
        models = dict.fromkeys([BASE_MODEL, *(_model_of(self.runs_dir, name) for name in runs)])
        return [*runs, *(f"base: {model}" for model in models if model)]

    def default_voice(self) -> str:
        """The newest run that can answer, else the embedded model."""
        return self.voice_choices()[0]

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

    def _voice(self, voice: str) -> tuple[str, bool]:
        """Name of a run or a model, and which it is."""
        if not isinstance(voice, str) or not voice:
            raise ConfigError("nobody was chosen to answer: choose a run or a model.")
        if voice.startswith("base: "):
            return self.places.check_model(voice.removeprefix("base: ")), False
        return self.run(voice).name, True

    def _run_row(self, name: str) -> list[Any]:
        state = "?"
        try:
            state = jobs.report(self.runs_dir, name).state
            return [name, state, *_results(Run(self.runs_dir / name))]
        except GapoError as error:
            return [name, state, str(error).partition(":")[0], *[""] * (len(RUN_COLUMNS) - 3)]


RUN_COLUMNS = (
    *("run", "state", "objective", "EF", "γ", "β", "data"),
    *("accuracy", "reward margin", "target", "chosen drift", "steps", "time"),
)
"""Columns of the table of runs; accuracy, margin and drift are of held-out pairs."""


def text_file(name: str, text: str) -> str:
    """A new file for download, in a folder of its own."""
    path = Path(tempfile.mkdtemp(prefix="gapo-lite-")) / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def _uploaded(path: Any) -> Path:
    """Where Gradio, which has checked it, has put an upload."""
    if not isinstance(path, str) or not path:
        raise ConfigError("no file was sent: choose one, then upload it again.")
    return Path(path)


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


def _why_chat_waits(runs_dir: Path) -> str:
    """A sentence while a run is being trained, on the one GPU that there is."""
    name = jobs.active(runs_dir)
    if name is None:
        return ""
    now = jobs.report(runs_dir, name)
    return (
        f"the run {name} is being trained on this GPU (step {now.step} of {now.total or '?'}), and "
        "a chat model beside it would take its memory. Chat waits until it has ended or is stopped."
    )


def _results(run: Run) -> list[Any]:
    """The cells of a run after its name and state."""
    config = history.config_of(run)
    return [*_settings_cells(config), *_result_cells(run, history.version(run))]


def _settings_cells(config: RunConfig) -> list[Any]:
    is_constant = config.objective.name in CONSTANT_MARGINS
    return [
        config.objective.name,
        "–" if is_constant else config.ef.metric,
        f"{config.margin.gamma:g}",
        f"{config.objective.beta:g}",
        config.data.source.rpartition("/")[2],
    ]


@lru_cache(maxsize=1000)
def _result_cells(run: Run, version: str) -> list[str]:
    """What a run's files say; the same while they are the same."""
    found, status = curves.summary(run), run.read("status.json")
    return [
        _number(found.accuracy, "{:.1%}"),
        _number(found.reward_margin, "{:.2f}"),
        _number(found.target_reward_margin, "{:.2f}"),
        _number(found.chosen_drift, "{:+.3f}"),
        f"{status.get('step', 0)} of {status.get('total', 0)}",
        "" if found.duration_s is None else views.duration(found.duration_s),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


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
