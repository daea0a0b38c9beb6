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
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import webbrowser
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gapo_lite.errors import ConfigError, GapoError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from app.services import Services

DEFAULT_PORT = 7860
_LOOK_S = 2.0


def main() -> None:
    """Entry point: reads the options, serves until Ctrl-C or SIGTERM."""
    temporary = _own_environment()
    page = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    page.command()(serve)
    try:
        page()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # uploads and downloads


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
        _ask_no_proxy_for(host)
        from app.services import Services  # takes a second: last

        services = Services.over(runs_dir=runs_dir, data_dir=data_dir, models_dir=models_dir)
        url, end = launch(services, host, port, login, name or [], max_upload_mb * 1_000_000)
    except GapoError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"GaPO-Lite is at {url}  (Ctrl-C ends the page; training goes on)")
    if open_browser and _has_screen():
        webbrowser.open(url)
    _wait_for_the_end()
    end()


def launch(
    services: Services,
    host: str,
    port: int,
    login: tuple[str, str] | None,
    names: list[str],
    max_upload: int,
) -> tuple[str, Callable[[], None]]:
    """Starts the server in the background; returns its address and what ends it.

    Args:
        services: what the page is over.
        host: address to listen on.
        port: the same.
        login: user and password, None for no login.
        names: further names that the page is reached by.
        max_upload: bytes.

    Raises:
        ConfigError: the port is in use.
    """
    from starlette.routing import Route

    from app import theme
    from app.live import live_endpoint
    from app.sweep_live import report_endpoint, sweep_endpoint
    from app.ui import build_app

    demo = build_app(services)
    try:
        _, url, _ = demo.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            auth=login,
            auth_message="GaPO-Lite" if login else None,
            max_file_size=max_upload,
            app_kwargs={
                "lifespan": _guarding(host, names, max_upload),
                "routes": [
                    Route("/live", live_endpoint(services)),
                    Route("/sweep", sweep_endpoint(services)),
                    Route("/report", report_endpoint(services)),
                ],
            },
            theme=theme.theme(),
            css=theme.css(),
            head=theme.head(),
            prevent_thread_lock=True,
            max_threads=100,
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
        )
    except OSError:
        raise ConfigError(
            f"cannot listen on port {port} of {host}: another program does already (another page, "
            "say), or that is no address of this machine. Choose another one with --port or --host."
        ) from None

    if services.has_gpu:
        threading.Thread(target=_give_way, args=(services,), daemon=True).start()

    def end() -> None:
        services.voices.unload("the page is being closed")
        services.evaluations.end()
        demo.close(verbose=False)

    return url, end


def _guarding(
    host: str, names: list[str], max_upload: int
) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """Puts the guard before everything. As an ordinary middleware it would stand behind Gradio's
    own, of which one answers other origins by itself."""
    from app.guard import Guard

    @asynccontextmanager
    async def guarding(app: Starlette) -> AsyncIterator[None]:
        assert app.middleware_stack is not None  # built to get here
        app.middleware_stack = Guard(app.middleware_stack, host, names, max_upload)
        yield

    return guarding


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
    user = user.strip()  # as Gradio does with what is typed
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


def _own_environment() -> Path:
    """Before gradio is imported: its variables could open the page to others, or report its use.

    Returns:
        The folder, this user's alone, for all that is temporary.
    """
    for variable in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[variable]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="gapo-lite-page-")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    return Path(tempfile.tempdir)


def _ask_no_proxy_for(host: str) -> None:
    """Gradio asks its own page whether it is up; a proxy would not find it."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    direct = ",".join(filter(None, [known, "localhost,127.0.0.1,::1", host]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = direct


def _has_screen() -> bool:
    """Whether a browser would open beside the terminal, not in it."""
    return sys.platform != "linux" or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


def _wait_for_the_end() -> None:
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()


if __name__ == "__main__":
    main()
