"""What the page costs: its start, its first paint, a live update, and what viewers cost a training.

    python benchmarks/page.py [--json FILE]   # about 6 minutes; needs Chromium for the first paint

Viewers: a training of the embedded model in 4 bits logs every step while 20 connections to the live
view are open or not, in turns of some steps; their step times are compared within that one run.
Since steps differ among themselves by more than viewers cost, the server's own processor time in
both kinds of turns is counted, too: the training, which uses all cores, cannot lose more than that.
Writes benchmarks/results/page.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import common  # isort: skip  # first: it sets the environment

from gapo_lite.disk import read_jsonl

VIEWERS = 20
TURN_STEPS = 4
TURNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS, help="with and without viewers")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as (url, started, pid):
        results = {
            "machine": common.machine(),
            "seconds_until_it_answers": round(started, 2),
            "first_contentful_paint_s": first_paint(url),
            "redraw_of_5000_steps_s": redraw(),
            "viewers": step_times(url, pid, Path(folder) / "runs", args.turns),
        }
    print(json.dumps(results, indent=1))
    if args.json:
        common.write_json(args.json, results)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, float, int]]:
    """A page over empty folders, the seconds until it answered, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "app", "--port", str(port)),
        *("--runs-dir", str(folder / "runs"), "--data-dir", str(folder / "data")),
    ]
    start, url = time.monotonic(), f"http://127.0.0.1:{port}/"
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                break
            time.sleep(0.05)
        yield url, time.monotonic() - start, server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)


def first_paint(url: str) -> float | None:
    """Seconds to the first contentful paint, the median of three loads; None without Chromium."""
    browser_path = shutil.which("chromium")
    if browser_path is None:
        return None
    from playwright.sync_api import sync_playwright

    paints = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for _ in range(3):
            page = browser.new_page()
            page.goto(url)
            page.wait_for_selector("h1")
            script = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
            paints.append(page.evaluate(script) / 1000)
            page.close()
        browser.close()
    return round(statistics.median(paints), 3)


def redraw() -> float:
    """Seconds to draw all figures of a run of 5,000 steps after one more step was logged."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "app"))
    from types import SimpleNamespace

    from test_live import forged, training_row

    from app.live import View, live_parts

    with tempfile.TemporaryDirectory() as folder:
        services, view = SimpleNamespace(runs_dir=Path(folder)), View("one", 0.6)
        run = forged(Path(folder), "one", steps=5000)
        live_parts(services, view)  # type: ignore[arg-type]
        times = []
        for step in range(5001, 5006):
            run.append("metrics.jsonl", training_row(step))
            start = time.perf_counter()
            live_parts(services, view)  # type: ignore[arg-type]
            times.append(time.perf_counter() - start)
    return round(statistics.median(times), 4)


def step_times(
    url: str, pid: int, runs_dir: Path, turns: int
) -> dict[str, float | int | list[float]]:
    """Seconds a step without and with viewers, in turns within one run."""
    steps = (2 * turns + 1) * TURN_STEPS
    settings = ("training.logging_steps=1", f"training.max_steps={steps}", "training.epochs=100",
                "training.eval_steps=100000", "training.save_steps=100000")  # fmt: skip
    command = [sys.executable, "-m", "gapo_lite", "train", "configs/demo.yaml", "--name", "watched"]
    command += ["--runs-dir", str(runs_dir), *(part for s in settings for part in ("--set", s))]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows: dict[bool, list[float]] = {False: [], True: []}
    used: dict[bool, list[float]] = {False: [], True: []}
    try:
        _wait_for(runs_dir, TURN_STEPS)
        for turn in range(2 * turns):
            is_watched, first = bool(turn % 2), TURN_STEPS * (turn + 1)
            with viewers(url) if is_watched else contextlib.nullcontext():
                began = _processor_seconds(pid), time.monotonic()
                _wait_for(runs_dir, first + TURN_STEPS)
                share = (_processor_seconds(pid) - began[0]) / (time.monotonic() - began[1])
                used[is_watched].append(share / (os.cpu_count() or 1))
            times = {row["step"]: row["elapsed_s"] for row in _logged(runs_dir)}
            # The step in which viewers come or go belongs to neither.
            span = times[first + TURN_STEPS] - times[first + 1]
            rows[is_watched].append(span / (TURN_STEPS - 1))
    finally:
        training.kill()
        training.wait()
    alone, watched = (statistics.median(rows[key]) for key in (False, True))
    return {
        "viewers": VIEWERS,
        "turns": turns,
        "seconds_a_step_alone": [round(value, 3) for value in rows[False]],
        "seconds_a_step_watched": [round(value, 3) for value in rows[True]],
        "slower_by": round(watched / alone - 1, 4),
        "servers_share_of_the_processor_alone": round(statistics.mean(used[False]), 4),
        "servers_share_of_the_processor_watched": round(statistics.mean(used[True]), 4),
    }


@contextlib.contextmanager
def viewers(url: str) -> Iterator[None]:
    """Open live views that read what they are sent."""
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    request = f"GET /live?run=watched HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
    sockets = [socket.create_connection((host, int(port))) for _ in range(VIEWERS)]
    for connection in sockets:
        connection.sendall(request)
        threading.Thread(target=_read_all, args=(connection,), daemon=True).start()
    try:
        yield
    finally:
        for connection in sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _read_all(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(1 << 20):
            pass


def _logged(runs_dir: Path) -> list[dict]:
    rows = read_jsonl(runs_dir / "watched" / "metrics.jsonl")
    return [row for row in rows if "elapsed_s" in row]


def _wait_for(runs_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while not any(row["step"] >= step for row in _logged(runs_dir)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"step {step} was not reached in 10 minutes")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
