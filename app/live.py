"""The live view of a run: parts of HTML, and the event stream that brings them to the browser.

    GET /live?run=NAME&smoothing=0.6&axis=step     → events: {"status": html, "figures": …}

A viewer is one open connection. The server looks at the run's files twice a second (a few `stat`s),
draws only when they have changed, once for all viewers of the same view, and sends only the parts
that are new: twenty people who watch cost the training step next to nothing. The browser connects
again by itself when the server was restarted.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, Self, cast
from urllib.parse import urlencode

import anyio
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from app import curves, figures, history, jobs, verdict, views
from app.guard import is_logged_in
from app.notices import as_html
from app.services import Services
from gapo_lite.axes import number
from gapo_lite.disk import read_jsonl
from gapo_lite.errors import GapoError
from gapo_lite.repetition import repetition
from gapo_lite.runs import ACTIVE_STATES, Run

POLL_S = 0.5
REMIND_S = 2.0
"""What no file's date tells is looked at so often: clocks, and what is printed while preparing."""
PARTS = ("status", "verdict", "figures", "samples", "log")
_ACTIVE = ("preparing", *ACTIVE_STATES, "stopping")


class Watched(Protocol):
    """What a viewer can look at: a run, as below, or a sweep (sweep_live.py). Hashable."""

    def checked(self) -> Self:
        """Itself, if it is one; anything may come from a browser. Raises GapoError."""
        ...

    def parts(self, services: Services) -> dict[str, str]:
        """Name → HTML, as it is now. Raises GapoError where it is gone."""
        ...

    def token(self, services: Services) -> str:
        """Changes when anything but a clock has. Raises GapoError where it is gone."""
        ...


@dataclass(frozen=True, slots=True)
class View:
    """What one viewer looks at.

    Attributes:
        run: name of a run, "" for none.
        smoothing: of training curves, 0 to 0.99.
        axis: "step" or "epoch".
    """

    run: str
    smoothing: float = 0.0
    axis: curves.Axis = "step"

    def checked(self) -> View:
        """The view, if it is one; anything may come from a browser.

        Raises:
            GapoError: the axis or the smoothing is none.
        """
        curves.check_view(self.axis, self.smoothing)
        return self

    def parts(self, services: Services) -> dict[str, str]:
        """See `live_parts`."""
        return live_parts(services, self)

    def token(self, services: Services) -> str:
        """See `Watched`."""
        return _token(services, self.run)


def live_html(services: Services, view: View) -> str:
    """The element that the browser keeps up to date, with what is known now."""
    if not view.run:
        return views.subtle("No run yet. Press Start: the curves appear here.")
    parts = live_parts(services, view)
    query = urlencode({"run": view.run, "smoothing": view.smoothing, "axis": view.axis})
    body = "".join(f'<div data-part="{name}"{_class(name)}>{parts[name]}</div>' for name in PARTS)
    return f'<div class="live" data-stream="live?{as_html(query)}">{body}</div>'


def live_parts(services: Services, view: View) -> dict[str, str]:
    """The parts of the view as they are now.

    Raises:
        GapoError: there is no such run.
    """
    report = jobs.report(services.runs_dir, view.run)
    run = Run(services.runs_dir / view.run)
    known = (run.path / "config.yaml").is_file()
    drawn = _drawn(run, view, history.version(run), report.state) if known else _NOTHING_YET
    log = jobs.tail(services.runs_dir, view.run)
    return {
        "status": _status(report, run if known else None),
        **drawn,
        "log": f'<h3>Log</h3><pre class="log">{views.verbatim(log)}</pre>' if log else "",
    }


def live_endpoint(services: Services) -> Callable[[Request], Awaitable[Response]]:
    """The route's handler."""
    return stream_endpoint(services, _view_of)


def stream_endpoint(
    services: Services, view_of: Callable[[Request], Watched]
) -> Callable[[Request], Awaitable[Response]]:
    """The handler of a route that streams what `view_of` a request is."""
    feed = Feed(services)

    async def live(request: Request) -> Response:
        if not is_logged_in(request):
            return PlainTextResponse("Log in first.\n", 401)
        try:
            view = view_of(request).checked()
            await anyio.to_thread.run_sync(view.token, services)
        except GapoError as error:
            return PlainTextResponse(f"{error}\n", 404)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(
            _events(feed, view, request), media_type="text/event-stream", headers=headers
        )

    return live


class Feed:
    """Parts for all viewers of one server: looked up and drawn once, however many they are."""

    def __init__(self, services: Services):
        self._services = services
        self._lock = threading.Lock()
        self._known: dict[Watched, _Known] = {}

    def parts(self, view: Watched) -> dict[str, str]:
        """The parts of a view, at most half a second old; the same object while nothing is new.

        Raises:
            GapoError: there is no such run or sweep.
        """
        with self._lock:
            now, known = time.monotonic(), self._known.get(view)
            if known and now - known.looked < 0.9 * POLL_S:
                return known.parts
            token = view.token(self._services)
            if known and token == known.token and now - known.drawn < REMIND_S:
                self._known[view] = replace(known, looked=now)
                return known.parts
            parts = view.parts(self._services)
            self._known = {v: k for v, k in self._known.items() if now - k.looked < 60}
            self._known[view] = _Known(parts, token, drawn=now, looked=now)
            return parts


@dataclass(frozen=True, slots=True)
class _Known:
    """Parts, the state of the files that they show, and when they were drawn and last asked for."""

    parts: dict[str, str]
    token: str
    drawn: float
    looked: float


async def _events(feed: Feed, view: Watched, request: Request) -> AsyncIterator[str]:
    """Parts that are new, as they come, until the viewer or the run is gone."""
    sent: dict[str, str] = {}
    while not await request.is_disconnected():
        try:
            parts = await anyio.to_thread.run_sync(feed.parts, view)
        except GapoError as error:  # renamed or deleted meanwhile
            yield _event({"status": views.warnings([str(error)]), "gone": ""})
            return
        if parts is not sent:
            fresh = {name: html for name, html in parts.items() if sent.get(name) != html}
            sent = parts
            if fresh:
                yield _event(fresh)
        await asyncio.sleep(POLL_S)


def _event(parts: dict[str, str]) -> str:
    return f"data: {json.dumps(parts)}\n\n"


def _token(services: Services, name: str) -> str:
    """Changes when anything of a run has, but for its clock."""
    report = replace(jobs.report(services.runs_dir, name), heartbeat_age=None)
    return f"{history.version(Run(services.runs_dir / name))} {report}"


def _view_of(request: Request) -> View:
    query = request.query_params
    try:
        smoothing = float(query.get("smoothing", "0"))
    except ValueError:
        smoothing = math.nan
    return View(query.get("run", ""), smoothing, cast("curves.Axis", query.get("axis", "step")))


# -- the parts --


def _class(name: str) -> str:
    return ' class="chart-grid"' if name == "figures" else ""


_NOTHING_YET = {"verdict": "", "figures": "", "samples": ""}


@lru_cache(maxsize=64)
def _drawn(run: Run, view: View, version: str, state: str) -> dict[str, str]:
    """What depends on the run's files alone: drawn once for all who look at the same."""
    try:
        config, known = history.config_of(run), history.read_history(run)
        findings = verdict.verdict(run)
        drawn = figures.of_run(run, known, axis=view.axis, smoothing=view.smoothing)
    except GapoError as error:
        return {**_NOTHING_YET, "verdict": views.warnings([str(error)])}
    problems = views.warnings([known.problem] if known.problem else [])
    samples = read_jsonl(run.path / "samples.jsonl")
    return {
        "verdict": problems + _findings(findings),
        "figures": drawn,
        "samples": _samples(samples, bool(config.training.sample_prompts)),
    }


def _findings(findings: list[verdict.Finding]) -> str:
    return "".join(
        f'<div class="finding {as_html(found.level)}"><b>{as_html(found.title)}.</b> '
        f'{as_html(found.text)} <span class="advice">{as_html(found.advice)}</span></div>'
        for found in findings
    )


def _samples(rows: list[dict[str, Any]], wanted: bool) -> str:
    """Each fixed prompt with the base model's answer (step 0) and the newest one."""
    if not rows:
        hint = (
            "They are answered at the first evaluation."
            if wanted
            else (
                "None are set: training.sample_prompts holds prompts that base and tuned model "
                "answer at every evaluation."
            )
        )
        return f"<h3>Fixed prompts</h3>{views.subtle(hint)}"
    answers: dict[str, dict[int, str]] = {}
    for row in rows:
        prompt = answers.setdefault(str(row.get("prompt")), {})
        prompt[int(row.get("step", 0))] = str(row.get("answer"))
    last = max(step for steps in answers.values() for step in steps)
    cells = [
        (prompt, steps.get(0, "–"), steps[max(steps)] if max(steps) else "–", _repeated(steps))
        for prompt, steps in answers.items()
    ]
    columns = ("prompt", "base model (step 0)", f"tuned (step {last})", "repeats itself")
    return f"<h3>Fixed prompts</h3>{views.table(columns, cells, text=True)}"


def _repeated(steps: dict[int, str]) -> str:
    """How much of an answer was there before: of the first one known, and of the newest."""
    ends = dict.fromkeys((min(steps), max(steps)))
    return " → ".join(f"{repetition(steps[step]):.0%}" for step in ends)


def _status(report: jobs.JobReport, run: Run | None) -> str:
    """The line above the figures: who, what state, how far, how long, how fast."""
    active = report.state in _ACTIVE
    items = [f'<span class="name">{as_html(report.name)}</span>', _badge(report.state)]
    meter = ""
    if report.total:
        share = min(1.0, report.step / report.total)
        items.append(f"step <b>{report.step}</b> of <b>{report.total}</b>")
        meter = f'<div class="meter"><i style="width:{100 * share:.1f}%"></i></div>'
    items += _pace(run, active) if run else []
    notes = [report.message] if report.message else []
    if report.state == "running" and report.heartbeat_age and report.heartbeat_age > 120:
        notes.append(
            f"No step has ended for {views.duration(report.heartbeat_age)}: a long evaluation, or "
            "the process is stuck. The log below says what it does."
        )
    if report.state == "stopping":
        notes.append("It finishes its step, saves and ends. It can be resumed afterwards.")
    if not active and not report.resumable and report.state != "finished":
        notes.append(f"It cannot be resumed: {report.why_not}")
    return (
        f'<div class="status-line" data-run-state="{as_html(report.state)}">'
        + "".join(f"<span>{item}</span>" for item in items)
        + f"</div>{meter}{views.warnings(notes)}"
    )


def _badge(state: str) -> str:
    return f'<span class="state {as_html(state)}">{as_html(state)}</span>'


def _pace(run: Run, active: bool) -> list[str]:
    try:
        now = curves.progress(run)
    except GapoError:
        return []
    items = []
    if active and now.eta_s is not None:
        items.append(f"about <b>{views.duration(now.eta_s)}</b> to go")
    if now.epoch is not None:
        items.append(f"epoch <b>{now.epoch:.2f}</b>")
    if now.pairs_per_second is not None:
        items.append(f"<b>{number(now.pairs_per_second)}</b> pairs/s")
    if now.tokens_per_second is not None:
        items.append(f"<b>{now.tokens_per_second:,.0f}</b> tokens/s")
    if now.memory_gib is not None:
        items.append(f"<b>{now.memory_gib:.1f}</b> GiB")
    return items
