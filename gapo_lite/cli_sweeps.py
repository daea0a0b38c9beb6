"""`gapo-lite sweep` and `gapo-lite report`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gapo_lite.cli_app import EXIT_STOPPED, RunsDir, app
from gapo_lite.errors import ConfigError
from gapo_lite.terminal import note

if TYPE_CHECKING:
    from gapo_lite.sweep_config import Cell, SweepConfig
    from gapo_lite.sweep_folder import SweepFolder


@app.command()
def sweep(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file; recipes lie in configs/sweeps/.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Overrides a setting of the sweep (seeds=[1,2]) or of all its runs "
            "(training.max_steps=8). Repeatable.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name; default: the file's.")] = None,
    runs_dir: RunsDir = Path("runs"),
    resume: Annotated[
        str | None, typer.Option(metavar="SWEEP", help="Go on with this one, by name or folder.")
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(min=0.001, help="Stop after this many; the run under way is saved."),
    ] = None,
    max_runs: Annotated[int | None, typer.Option(min=1, help="Train at most this many.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check and list the runs that are to come; train nothing."),
    ] = False,
) -> None:
    """Train every combination of some settings, one after the other, and compare them."""
    from gapo_lite.sweep_config import cells_of
    from gapo_lite.sweep_folder import create_sweep, open_sweep

    if resume is None:
        given = _loaded(config, settings or [])
        if dry_run:
            cells = cells_of(given, name or (config.stem if config else "sweep"))
            _list(cells, f"{len(cells)} runs, {len(given.seeds)} of each contender.")
            return
        default = config.stem if config else "sweep"
        folder = create_sweep(given, runs_dir, name, default)
    else:
        if config is not None or settings or name is not None:
            raise ConfigError(
                f"--resume {resume} goes on with a sweep as it is: leave out its file, --name and "
                "--set, or start a new one."
            )
        folder = open_sweep(resume, runs_dir)
        if dry_run:
            cells = folder.to_come()
            _list(cells, f"{len(cells)} of {len(folder.cells)} runs are to come.")
            return
    _run(folder, hours, max_runs)


def _loaded(config: Path | None, settings: list[str]) -> SweepConfig:
    from gapo_lite.sweep_config import load_sweep

    if config is None:
        raise ConfigError(
            "sweep needs a file: gapo-lite sweep configs/sweeps/demo.yaml, or --resume SWEEP."
        )
    return load_sweep(config, settings)


def _list(cells: list[Cell], words: str) -> None:
    for cell in cells:
        typer.echo(cell.run)
    note(f"{words} Nothing was trained.")


def _run(folder: SweepFolder, hours: float | None, max_runs: int | None) -> None:
    from gapo_lite.sweep import Budget, run_sweep

    own = folder.config
    budget = Budget(hours or own.hours, max_runs or own.max_runs)
    state = run_sweep(folder, budget=budget, tell=note)
    results = [_how_it_ended(record) for record in folder.results().values()]
    typer.echo(
        f"{folder.path}: {state}, {results.count('finished')} of {len(folder.cells)} runs finished"
        + "".join(
            f", {results.count(how)} {how}"
            for how in ("stopped by the drift guard", "dropped", "failed")
            if how in results
        )
    )
    known_as = folder.name if folder.runs_dir == Path("runs") else str(folder.path)
    note(f"Its report: gapo-lite report {shlex.quote(known_as)}")
    if state != "finished":
        raise typer.Exit(EXIT_STOPPED)


def _how_it_ended(record: dict[str, Any]) -> str:
    is_drift = record.get("stopped_by") == "drift"
    return "stopped by the drift guard" if is_drift else str(record["state"])


@app.command()
def report(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's name or folder.")],
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Write a sweep's tables and figures, finished or not: a page and a Markdown file."""
    from gapo_lite.report import write_report
    from gapo_lite.sweep_folder import open_sweep

    page, markdown = write_report(open_sweep(sweep, runs_dir).path)
    typer.echo(f"{page}\n{markdown}")
