"""A sweep as it goes on, over the same event streams as a run's live view; and its report.

GET /sweep?sweep=NAME     → events: {"list": html, "status": …, "table": …, "log": …}
GET /report?sweep=NAME    → the report as it is now, a page without scripts
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlencode

import anyio
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from app import sweep_jobs, sweep_views, views
from app.guard import is_logged_in
from app.job_files import status_of, whole
from app.live import stream_endpoint
from app.notices import as_html
from app.processes import worker_of
from app.services import Services
from app.sweep_jobs import SweepReport
from gapo_lite.errors import GapoError, RunError
from gapo_lite.sweep_folder import SweepFolder
from gapo_lite.sweep_results import SweepResults, read_sweep_results

PARTS = ("list", "status", "table", "log")

_REPORT_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox allow-popups"
    ),
    "cache-control": "no-store",
}


@dataclass(frozen=True, slots=True)
class SweepView:
    """What one viewer looks at: a sweep by its name."""

    name: str

    def checked(self) -> SweepView:
        """Itself: `parts` and `token` say where it is none."""
        return self

    def parts(self, services: Services) -> dict[str, str]:
        """See `sweep_parts`."""
        return sweep_parts(services, self.name)

    def token(self, services: Services) -> str:
        """Changes when anything of the sweep has, but for its clock."""
        folder = sweep_jobs.existing(services.runs_dir, self.name)
        report = sweep_jobs.report(services.runs_dir, self.name)
        step = status_of(services.runs_dir / report.cell).get("step") if report.cell else None
        return f"{report} {step} {_version(folder.path)}"


def sweep_html(services: Services, name: str) -> str:
    """The element that the browser keeps up to date, with what is known now."""
    if not name:
        return views.subtle("No sweep yet. Build one on the left, and press Start the sweep.")
    parts = sweep_parts(services, name)
    body = "".join(f'<div data-part="{part}">{parts[part]}</div>' for part in PARTS)
    return (
        f'<div class="live sweep" data-stream="sweep?{as_html(urlencode({"sweep": name}))}">'
        f"{body}</div>"
    )


def sweep_parts(services: Services, name: str) -> dict[str, str]:
    """The parts of the view as they are now.

    Raises:
        GapoError: there is no such sweep.
    """
    runs_dir = services.runs_dir
    report = sweep_jobs.report(runs_dir, name)
    folder = runs_dir / name
    log = sweep_jobs.tail(runs_dir, name)
    try:
        known, results = _folder(folder, _age(folder)), _results(folder, _version(folder))
        status, table = _drawn(report, known, results)
    except GapoError as error:  # its file is damaged
        status = sweep_views.status(report, None, 0, None, None)
        table = views.warnings([str(error)])
    return {
        "list": sweep_views.listed(_reports(services), name),
        "status": status,
        "table": table,
        "log": f'<h3>Log</h3><pre class="log">{views.verbatim(log)}</pre>' if log else "",
    }


def sweep_endpoint(services: Services) -> Callable[[Request], Awaitable[Response]]:
    """The stream's handler."""
    return stream_endpoint(
        services, lambda request: SweepView(request.query_params.get("sweep", ""))
    )


def report_endpoint(services: Services) -> Callable[[Request], Awaitable[Response]]:
    """The report's handler: it is made when it is asked for."""

    async def report(request: Request) -> Response:
        if not is_logged_in(request):
            return PlainTextResponse("Log in first.\n", 401)
        name = request.query_params.get("sweep", "")
        try:
            page = await anyio.to_thread.run_sync(services.sweeps.report_page, name)
        except GapoError as error:
            return PlainTextResponse(f"{error}\n", 404)
        return HTMLResponse(page, headers=_REPORT_HEADERS)

    return report


def _drawn(report: SweepReport, folder: SweepFolder, results: SweepResults) -> tuple[str, str]:
    """Status line and table of a sweep that can be read."""
    begun = _begun(folder, results, "waiting" if report.is_active else "stopped")
    runs = [cell.run for cell in folder.cells]
    place = runs.index(report.cell) + 1 if report.cell in runs else 0
    left = folder.seconds_left() if report.is_active else None
    report = replace(report, total=report.total or len(runs))
    status = sweep_views.status(report, folder.config, place, begun.get(report.cell), left)
    return status, sweep_views.table(results, begun)


def _reports(services: Services) -> list[SweepReport]:
    found = []
    for name in services.sweeps.names():
        with contextlib.suppress(RunError):  # deleted meanwhile
            found.append(sweep_jobs.report(services.runs_dir, name))
    return found


def _begun(
    folder: SweepFolder, results: SweepResults, resting: str
) -> dict[str, tuple[str, int, int]]:
    """State, step and total of the runs that have begun and not ended; `resting` is the state of
    those that nobody trains now."""
    ended = {cell.run for cell in results.cells if cell.state != "missing"}
    found = {}
    for cell in folder.cells:
        path = folder.runs_dir / cell.run
        if cell.run in ended or not path.is_dir():
            continue
        status, worker = status_of(path), worker_of(folder.runs_dir, cell.run)
        state = worker.state(status) if worker else resting
        found[cell.run] = (state, whole(status.get("step")), whole(status.get("total")))
    return found


@lru_cache(maxsize=32)
def _folder(path: Path, age: int) -> SweepFolder:
    """A sweep that keeps its cells, which take long to make of its file; `age` is that file's."""
    return SweepFolder(path)


@lru_cache(maxsize=32)
def _results(path: Path, version: str) -> SweepResults:
    """What has been found, read again when a run has ended."""
    return read_sweep_results(path)


def _age(folder: Path) -> int:
    try:
        return (folder / "sweep.yaml").stat().st_mtime_ns
    except OSError:
        return 0


def _version(folder: Path) -> str:
    try:
        cells = (folder / "cells").stat().st_mtime_ns  # each record is renamed into it
    except OSError:
        cells = 0
    return f"{_age(folder)} {cells}"
