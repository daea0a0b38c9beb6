"""`gapo-lite export` and `gapo-lite share`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from gapo_lite.cli_app import RunName, RunsDir, app
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.terminal import show_shipment

Merged = Annotated[
    bool | None,
    typer.Option(
        "--merged/--adapter",
        help="The base model with the adapter merged in, or the adapter alone. With --gguf alone "
        "merged, with --ollama the adapter; `share` takes the adapter where nothing is said.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of merged weights: bfloat16, or float32, which does not round and is twice as large."
    ),
]
Ollama = Annotated[
    bool, typer.Option("--ollama", help="Add a Modelfile for Ollama, with the adapter as GGUF.")
]
OllamaBase = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="What the Modelfile of an adapter builds on: a model of Ollama's."
    ),
]
Gguf = Annotated[
    bool,
    typer.Option("--gguf", help="Add a GGUF file; a merged model's by llama.cpp's converter."),
]
LlamaCpp = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where llama.cpp lies; default: $LLAMA_CPP, the PATH."),
]


@app.command()
def export(
    run: RunName,
    merged: Merged = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder; default: exports/RUN-merged or exports/RUN-adapter."),
    ] = None,
    dtype: Dtype = None,
    ollama: Ollama = False,
    ollama_base: OllamaBase = None,
    gguf: Gguf = False,
    llama_cpp: LlamaCpp = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Write a run's adapter, or the merged model, with a model card."""
    if merged is None and not (ollama or gguf):
        raise ConfigError(
            "say what to export: --merged (base and adapter in one model) or --adapter (the "
            "adapter alone)."
        )
    folder = _exported(
        run, runs_dir, merged, out, dtype, ollama, ollama_base, gguf, llama_cpp, repository=None
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    typer.echo(f"{folder}: {size / 2**20:,.1f} MiB. Its README.md says how to load it.")
    if ollama:
        file = shlex.quote(str(folder / "Modelfile"))
        typer.echo(f"  give it to Ollama        ollama create NAME -f {file}")
    place = shlex.quote(str(folder))
    typer.echo(f"  share it                 gapo-lite share {place} --to OWNER/NAME")


def _exported(
    run: str,
    runs_dir: Path,
    merged: bool | None,
    out: Path | None,
    dtype: str | None,
    ollama: bool,
    ollama_base: str | None,
    gguf: bool,
    llama_cpp: Path | None,
    *,
    repository: str | None,
) -> Path:
    """The folder of a new export; what can be refused is, before torch is loaded."""
    if merged is None:
        merged = gguf and not ollama
    if dtype is not None and not merged:
        raise ConfigError("--dtype is for merged weights: an adapter keeps its own. Leave it out.")
    if ollama_base is not None and not ollama:
        raise ConfigError("--ollama-base is for a Modelfile: add --ollama, or leave it out.")
    if llama_cpp is not None and not (gguf and merged):
        raise ConfigError("--llama-cpp is for --merged --gguf: add them, or leave it out.")
    from gapo_lite.runs import open_run

    opened = open_run(run, runs_dir)
    opened.trained_adapter()
    kind = "merged" if merged else "adapter"
    folder = out or Path("exports") / f"{opened.path.resolve().name}-{kind}"
    if repository and (folder / "README.md").is_file():
        raise ConfigError(
            f"{folder} is there already: share it as it is (gapo-lite share {folder} --to "
            f"{repository}), or export to another folder with --out."
        )
    from gapo_lite.export import export_run

    return export_run(
        opened,
        merged=merged,
        out=folder,
        dtype=dtype or "bfloat16",
        ollama=ollama,
        base_in_ollama=ollama_base,
        gguf=gguf,
        llama_cpp=llama_cpp,
        repository=repository,
    )


@app.command()
def share(
    run: Annotated[
        str, typer.Argument(metavar="RUN|FOLDER", help="A run, or a folder that export wrote.")
    ],
    to: Annotated[str, typer.Option(metavar="OWNER/NAME", help="The repository on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who may see a new repository.")
    ] = True,
    merged: Merged = None,
    update: Annotated[
        bool, typer.Option("--update", help="Replace files of a repository that has some already.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without asking.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the export, which stays.")
    ] = None,
    dtype: Dtype = None,
    ollama: Ollama = False,
    ollama_base: OllamaBase = None,
    gguf: Gguf = False,
    llama_cpp: LlamaCpp = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Upload a run's adapter, or the merged model, to the Hugging Face Hub."""
    from gapo_lite import sharing

    sharing.check_repository(to)
    sharing.check_login()
    if sharing.is_exported(Path(run)):
        if any(option is not None for option in (merged, out, dtype, ollama_base, llama_cpp)) or (
            ollama or gguf
        ):
            raise ConfigError(
                f"{run} is exported already, and goes out as it is: leave the export's options out."
            )
        folder = Path(run)
    else:
        folder = _exported(
            *(run, runs_dir, merged, out, dtype, ollama, ollama_base, gguf, llama_cpp),
            repository=to,
        )
    shipment = sharing.look_over(folder, to, private=private)
    show_shipment(shipment, to, private=private)
    if not (yes or _agreed(f"Upload them to {to}?")):
        raise RunError(f"nothing was uploaded; the export stays in {folder}.")
    address = sharing.upload(shipment, to, private=private, update=update)
    typer.echo(f"uploaded to {address}")


def _agreed(question: str) -> bool:
    """A person's yes; no where there is nobody to ask."""
    try:
        return typer.confirm(question)
    except typer.Abort:
        return False
