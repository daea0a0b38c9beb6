"""The command line: `gapo-lite train|score|agree|evaluate|generate|…`; `--help` lists all commands.

Each command reads its options, calls one function of the package and prints what came back. What is
a person's to mend is printed as `error: …` with exit code 2; Ctrl-C exits with 130; everything else
keeps its traceback. The modules that import torch are imported by the commands that need them, so
that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
import warnings
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gapo_lite import (  # noqa: F401  (they register their commands)
    cli_answers,
    cli_sharing,
    cli_sweeps,
)
from gapo_lite.cli_app import (
    EXIT_STOPPED,
    IntervalSeed,
    MaxTokens,
    RunName,
    RunOrModel,
    RunsDir,
    Seed,
    Split,
    Temperature,
    TopP,
    app,
)
from gapo_lite.errors import ConfigError, DataError, RunError
from gapo_lite.outputs import SCORE_FILES, check_out, whole_file
from gapo_lite.terminal import (
    is_main_process,
    show_agreement,
    show_comparison,
    show_runs,
    show_scores,
    visible,
)

if TYPE_CHECKING:
    from gapo_lite.chat import Conversation
    from gapo_lite.config import RunConfig
    from gapo_lite.runs import Run

logger = logging.getLogger(__name__)

DEMO_PROMPT = "How do I keep a basil plant alive on a windowsill?"


def main() -> None:
    """Entry point of `gapo-lite`: silences the libraries, then runs the command."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    # Without any handler Python itself prints what libraries log as warnings.
    logging.getLogger().addHandler(logging.NullHandler())
    app(prog_name="gapo-lite")


# -- train --


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file; recipes lie in configs/.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Overrides a setting, as in margin.gamma=0.5. Repeatable.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the new run; default: the config file's.")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with this run, by name or folder.")
    ] = None,
) -> None:
    """Train an adapter, or go on with a run that was stopped."""
    resolved = _resolved_config(config, settings or [], name, runs_dir, resume)
    _import_unsloth_first(resolved)
    from gapo_lite import training

    run = training.train(
        resolved,
        name=name,
        runs_dir=runs_dir,
        resume=resume,
        default_name=config.stem if config else "run",
        show_progress=is_main_process(),
    )
    if not is_main_process():
        return
    _say_what_next(run)
    if run.state() != "finished":
        raise typer.Exit(EXIT_STOPPED)


@app.command()
def demo(
    config: Annotated[Path, typer.Argument(help="A YAML file.")] = Path("configs/demo.yaml"),
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Train the demo, compare it with its base, and let both answer one prompt."""
    resolved = _resolved_config(config, [], None, runs_dir, None)
    from gapo_lite import training
    from gapo_lite.chat import Conversation, load_voice
    from gapo_lite.compare import compare

    run = training.train(resolved, runs_dir=runs_dir, default_name=config.stem)
    if run.state() != "finished":
        _say_what_next(run)
        raise typer.Exit(EXIT_STOPPED)
    show_comparison(compare(run))
    prompt = next(iter(resolved.training.sample_prompts), DEMO_PROMPT)
    conversation = Conversation(load_voice(str(run.path), runs_dir), max_tokens=128)
    typer.echo(f"prompt: {prompt}")
    for name, text in _answers(conversation, prompt).items():
        typer.echo(f"{name + ':':<7} {visible(text)}")
    _say_what_next(run)


def _answers(conversation: Conversation, question: str) -> dict[str, str]:
    base = "".join(conversation.ask_base(question))
    return {"base": base, "tuned": "".join(conversation.ask(question))}


def _import_unsloth_first(config: RunConfig) -> None:
    """Unsloth patches transformers, so it has to come before it; its absence is told later."""
    if config.model.backend == "unsloth":
        with contextlib.suppress(ImportError, NotImplementedError):  # the latter without a GPU
            importlib.import_module("unsloth")


def _resolved_config(
    config: Path | None, settings: list[str], name: str | None, runs_dir: Path, resume: str | None
) -> RunConfig:
    from gapo_lite.config import load_config
    from gapo_lite.runs import open_run

    if resume is None:
        if config is None:
            raise ConfigError(
                "train needs a configuration: gapo-lite train configs/demo.yaml, or --resume RUN."
            )
        return load_config(config, settings)
    if name is not None:
        raise ConfigError(
            f"--name {name} with --resume {resume}: a run keeps its name. Leave one of them out."
        )
    run = open_run(resume, runs_dir)
    given = own = run.config()
    if config is not None or settings:
        given = load_config(config or run.path / "config.yaml", settings)
    if given == own and run.state() == "finished":
        raise RunError(
            f"the run {run.name} is finished, so there is nothing to go on with. Use it "
            f"(gapo-lite chat {run.path}), or start a new run."
        )
    return given  # train refuses other settings than the run's own


def _say_what_next(run: Run) -> None:
    status, state = run.read("status.json"), run.state()
    typer.echo(f"{run.path}: {state}, {status['step']} of {status['total']} steps.")
    if message := status.get("message"):
        typer.echo(f"  {visible(message)}")
    if state != "finished":
        typer.echo(f"  go on with it            gapo-lite train --resume {run.path}")
    typer.echo(f"  chat with it             gapo-lite chat {run.path}")
    typer.echo(f"  compare with its base    gapo-lite evaluate {run.path}")


# -- score --


UseStemmer = Annotated[
    bool, typer.Option("--use-stemmer", help="Porter stemmer, for jaccard and ROUGE.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Words of jaccard and ROUGE: rouge (only a–z, 0–9) or unicode (any script)."),
]
Layer = Annotated[int | None, typer.Option(help="Layer of the encoder.")]


@app.command()
def score(
    file: Annotated[
        str, typer.Argument(help="A file, folder, Hub id or embedded:… of preference pairs.")
    ],
    out: Annotated[Path, typer.Option(help="Where the scores go: .jsonl, .csv or .npy.")],
    ef: Annotated[
        str,
        typer.Option(
            help="jaccard, rouge1, rouge2, rougeL, bertscore_p, bertscore_r, bertscore_f1."
        ),
    ] = "rougeL",
    split: Split = "train",
    use_stemmer: UseStemmer = False,
    tokenizer: Tokenizer = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Encoder for BERTScore; default: roberta-large from the Hub. "
            "embedded:all-minilm-l6-v2 needs no network."
        ),
    ] = None,
    layer: Layer = None,
    batch_size: Annotated[int | None, typer.Option(help="Texts the encoder reads at once.")] = None,
) -> None:
    """Write the evaluation factor of each pair: how alike chosen and rejected are."""
    from gapo_lite.data import load_pairs
    from gapo_lite.data.report import describe_problems
    from gapo_lite.ef import check_options
    from gapo_lite.ef.cache import cached_scores
    from gapo_lite.progress import scoring_progress

    given = {
        "use_stemmer": use_stemmer or None,
        "tokenizer": tokenizer,
        "model": model,
        "layer": layer,
        "batch_size": batch_size,
    }
    options = {key: value for key, value in given.items() if value is not None}
    check_options(ef, options)
    check_out(out, file, SCORE_FILES)
    loaded = load_pairs(file, split=split)
    if loaded.problems:
        logger.warning("%s", describe_problems(loaded))
    with scoring_progress(ef, enabled=True) as progress:
        scores = cached_scores(
            [p.chosen for p in loaded.pairs],
            [p.rejected for p in loaded.pairs],
            ef,
            options,
            progress,
        )
    with whole_file(out) as part:
        SCORE_FILES[out.suffix](part, [p.line for p in loaded.pairs], scores)
    show_scores(loaded, ef, options, scores)
    typer.echo(f"written to {out}")


@app.command()
def agree(
    file: Annotated[
        str, typer.Argument(help="A file, folder, Hub id or embedded:… of judged pairs.")
    ],
    split: Split = "train",
    strength: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="How much better chosen is, if not in `strength`."),
    ] = None,
    rating_columns: Annotated[
        str | None,
        typer.Option(metavar="CHOSEN,REJECTED", help="Ratings, if not in the usual columns."),
    ] = None,
    use_stemmer: UseStemmer = False,
    tokenizer: Tokenizer = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Encoder for BERTScore, which is left out without one: roberta-large from the "
            "Hub, or embedded:all-minilm-l6-v2, which needs no network."
        ),
    ] = None,
    layer: Layer = None,
    seed: IntervalSeed = 0,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the numbers here.")
    ] = None,
) -> None:
    """Say how far each metric's gap follows the data's own judgement, before any training."""
    from gapo_lite.agree import agree as agreement_of
    from gapo_lite.data import load_pairs
    from gapo_lite.data.report import describe_counts, describe_problems

    columns = _judged_columns(strength, rating_columns)
    if json_out:
        check_out(json_out, file)
    given = {"tokenizer": tokenizer, "model": model, "layer": layer}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    loaded = load_pairs(file, split=split, rating_columns=columns)
    if missing := [name for name in columns if name not in loaded.columns]:
        raise DataError(
            f"{file} has no column {missing[0]!r}. Its columns: {', '.join(loaded.columns)}."
        )
    judged = (pair.rating_gap for pair in loaded.pairs)
    if columns and not any(gap is not None and isfinite(gap) for gap in judged):
        raise DataError(
            f"{file} holds no judgement in {' and '.join(columns)}: no number is there."
        )
    if loaded.problems:
        logger.warning("%s", describe_problems(loaded))
    pairs = loaded.pairs
    if columns:  # nothing else is asked for, though more pairs may have a strength
        pairs = [replace(pair, strength=None) for pair in pairs]
    found = agreement_of(
        pairs,
        options={**options, "use_stemmer": use_stemmer},
        seed=seed,
        show_progress=True,
    )
    typer.echo(describe_counts(loaded))
    show_agreement(found)
    if json_out:
        _write_json(json_out, asdict(found))


def _judged_columns(strength: str | None, ratings: str | None) -> list[str]:
    """Where the judgement stands; [] for the usual places."""
    if strength is None and ratings is None:
        return []
    columns = [strength or ""] if ratings is None else [name.strip() for name in ratings.split(",")]
    if (ratings is None or (len(columns) == 2 and strength is None)) and all(columns):
        return columns
    raise ConfigError(
        "the judgement stands in one column (--strength COLUMN) or in two (--rating-columns "
        "CHOSEN,REJECTED): name either, not both, and no empty one."
    )


# -- evaluate --


@app.command()
def evaluate(
    run: RunName,
    runs_dir: RunsDir = Path("runs"),
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pairs per forward pass; default: the run's.")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the numbers here.")
    ] = None,
) -> None:
    """Compare a run's base model with the tuned one on the held-out pairs."""
    from gapo_lite.runs import open_run

    opened = open_run(run, runs_dir)
    if json_out:
        check_out(json_out)
    opened.trained_adapter()  # a run that has saved nothing is told before torch is loaded
    from gapo_lite.compare import compare
    from gapo_lite.progress import scoring_progress

    with scoring_progress("held-out pairs, base and tuned", enabled=True) as progress:
        comparison = compare(opened, batch_size=batch_size, progress=progress)
    show_comparison(comparison)
    if json_out:
        _write_json(json_out, asdict(comparison))


def _write_json(out: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    with whole_file(out) as part:
        part.write_text(text, encoding="utf-8")


# -- chat --


@app.command()
def chat(
    name: RunOrModel,
    runs_dir: RunsDir = Path("runs"),
    system: Annotated[str, typer.Option(help="System message.")] = "",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
) -> None:
    """Talk with a run, and with its base model by /base; or with a model."""
    from gapo_lite.chat import Conversation, load_voice, talk

    talk(Conversation(load_voice(name, runs_dir), system, temperature, top_p, max_tokens, seed))


# -- runs, plan, doctor --


@app.command()
def runs(
    runs_dir: RunsDir = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List all runs."""
    from gapo_lite.overview import overview

    rows = overview(runs_dir)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False))
    elif not rows:
        typer.echo(f"{runs_dir} holds no runs yet: gapo-lite train configs/demo.yaml")
    else:
        show_runs(rows)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file; recipes lie in configs/.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides a setting. Repeatable."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="A card such as 4090 or h100, or a size such as 24GB; default: this one."
        ),
    ] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Say whether it will fit, and how long it will take; exit code 1 if it will not fit."""
    from gapo_lite.config import load_config
    from gapo_lite.forecast import forecast
    from gapo_lite.terminal import note, show_forecast

    found = forecast(load_config(config, settings or []), gpu=gpu, runs_dir=runs_dir)
    for text in found.notes:
        note(text)
    show_forecast(found)
    if not found.plan.fits:
        raise typer.Exit(1)


@app.command()
def doctor(runs_dir: RunsDir = Path("runs")) -> None:
    """Check what training needs, one line each; exit code 1 if something of it fails."""
    from gapo_lite.doctor import examine

    colors = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}
    failed = 0
    for check in examine(runs_dir):
        typer.echo(
            f"{typer.style(f'{check.mark:<5}', fg=colors[check.mark])} {check.name:<30} "
            f"{check.text}"
        )
        failed += check.mark == "fail"
    if failed:
        raise typer.Exit(1)
