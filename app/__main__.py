"""Opens the page: `python -m app`, or `make run`.

    python -m app --host 127.0.0.1 --port 7860 --runs-dir runs --data-dir data

On another address than this machine's own it asks for a password (`--auth USER:PASSWORD`, or the
variable GAPO_LITE_AUTH, which other users of the machine cannot see). Training goes on when the
page ends, and is found again by the next one.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gapo_lite.errors import ConfigError, GapoError

if TYPE_CHECKING:
    from app.services import Services

DEFAULT_PORT = 7860
_LOOK_S = 2.0


def main() -> None:
    """Entry point: reads the options, serves until Ctrl-C or SIGTERM."""
    _own_environment()
    typer.run(serve)


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = DEFAULT_PORT,
    runs_dir: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    data_dir: Annotated[
        Path, typer.Option(help="The page opens data files below it only; uploads go there.")
    ] = Path("data"),
    models_dir: Annotated[
        Path, typer.Option(help="The page opens local models below it only.")
    ] = Path("models"),
    auth: Annotated[
        str | None,
        typer.Option(metavar="USER:PASSWORD", envvar="GAPO_LITE_AUTH", help="Ask for this login."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="A further name that the page is reached by, say a proxy's. Repeatable."),
    ] = None,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Largest upload, in MB.")] = 512,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = False,
) -> None:
    """Serve GaPO-Lite's page."""
    os.environ.pop("GAPO_LITE_AUTH", None)  # training processes need not know it
    try:
        login = check_login(host, auth)
        for folder in (runs_dir, data_dir):
            _make_folder(folder)
        url, end = launch(
            host=host,
            port=port,
            runs_dir=runs_dir,
            data_dir=data_dir,
            models_dir=models_dir,
            login=login,
            names=name or [],
            max_upload_mb=max_upload_mb,
        )
    except GapoError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"GaPO-Lite is at {url}  (Ctrl-C ends the page; training goes on)")
    if open_browser:
        webbrowser.open(url)
    _wait_for_the_end()
    end()


def launch(
    *,
    host: str,
    port: int,
    runs_dir: Path,
    data_dir: Path,
    models_dir: Path,
    login: tuple[str, str] | None,
    names: list[str],
    max_upload_mb: int,
) -> tuple[str, Callable[[], None]]:
    """Starts the server in the background; returns its address and what ends it.

    Raises:
        ConfigError: the port is in use.
    """
    from starlette.middleware import Middleware
    from starlette.routing import Route

    from app import theme
    from app.guard import Guard
    from app.live import live_endpoint
    from app.services import Services
    from app.ui import build_app

    services = Services.over(runs_dir=runs_dir, data_dir=data_dir, models_dir=models_dir)
    demo = build_app(services)
    try:
        _, url, _ = demo.launch(
            server_name=host,
            server_port=port,
            auth=login,
            auth_message="GaPO-Lite" if login else None,
            max_file_size=max_upload_mb * 1_000_000,
            app_kwargs={
                "middleware": [Middleware(Guard, host=host, names=names)],
                "routes": [Route("/live", live_endpoint(services))],
            },
            theme=theme.theme(),
            css=theme.css(),
            head=theme.head(),
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
        )
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error}. Is another page open there? Choose another "
            "port with --port."
        ) from None

    if services.has_gpu:
        threading.Thread(target=_give_way, args=(services,), daemon=True).start()

    def end() -> None:
        services.voices.unload("the page is being closed")
        demo.close(verbose=False)

    return url, end


def _give_way(services: Services) -> None:
    """The chat model leaves the GPU also to trainings that the command line starts."""
    while True:
        time.sleep(_LOOK_S)
        services.give_way()


def check_login(host: str, auth: str | None) -> tuple[str, str] | None:
    """User and password from the option.

    Raises:
        ConfigError: it is not of the form USER:PASSWORD, or missing where others can reach the
            page.
    """
    if auth is None:
        if not _is_loopback(host):
            raise ConfigError(
                f"--host {host} lets other machines reach the page, and who reaches it can train "
                "and delete: give it a password (--auth USER:PASSWORD, or GAPO_LITE_AUTH)."
            )
        return None
    user, _, password = auth.partition(":")
    if not user or not password:
        raise ConfigError("--auth has to be USER:PASSWORD, neither of them empty.")
    return user, password


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror}.") from None


def _own_environment() -> None:
    """Before gradio is imported: its variables could open the page to others, or report its use."""
    for variable in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[variable]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="gapo-lite-page-")  # this user's alone
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)


def _wait_for_the_end() -> None:
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()


if __name__ == "__main__":
    main()
