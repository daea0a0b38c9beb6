"""The typer application that the commands register on, and the options that several of them share.

cli.py            train, demo, score, agree, evaluate, chat, runs, plan, doctor
cli_answers.py    generate, judge
cli_sharing.py    export, share
cli_sweeps.py     sweep, report
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gapo_lite.errors import GapoError
from gapo_lite.terminal import log_to_stderr, show_error

EXIT_STOPPED = 130
"""Of a training that Ctrl-C or SIGTERM stopped, so that `train && export` does not go on."""


class _Commands(TyperGroup):
    """Prints a person's mistakes as one message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        with log_to_stderr():
            try:
                return super().invoke(ctx)
            except GapoError as error:
                show_error(error)
        raise typer.Exit(2)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Align a chat model with GaPO by 4-bit QLoRA, look at the result, and share it.",
)

RunsDir = Annotated[Path, typer.Option(help="Folder of all runs.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder.")]
RunOrModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL", help="A run's name or folder, or a model: Hub id, folder or embedded:…"
    ),
]
Temperature = Annotated[
    float, typer.Option(min=0, max=10, help="0 takes the likeliest token each time.")
]
TopP = Annotated[
    float, typer.Option(min=0.01, max=1, help="Share of probability that is sampled from.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampling.")]
IntervalSeed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the intervals.")]
Split = Annotated[str, typer.Option(help="Split of a Hub id or datasets folder.")]
