"""docs/results.md: SimPO, DPO and GaPO with every EF, mapping and normalisation, on real pairs.

    python benchmarks/results.py                    # trains what is not trained yet: about an hour
    python benchmarks/results.py --docs docs/results.md    # the page, from benchmarks/results/

The sweep configs/sweeps/results.yaml runs on the pairs of `--pairs FILE --heldout FILE` of which
prompt and longer response have at most `--tokens` tokens together, in the embedded model's tokens.
On the way its process is killed (SIGKILL) as often as `--kills` says, and goes on; a call after a
kill of this script itself goes on too. Only numbers are kept, nothing of the pairs' text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common  # noqa: F401  # isort: skip  # first: it sets the environment

from gapo_lite.batching import tokenize_pairs
from gapo_lite.data import load_pairs
from gapo_lite.model import load_tokenizer
from gapo_lite.sweep_folder import SweepFolder, open_sweep

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"
WORK = ROOT / "build" / "results"
SWEEPS = {"results": "configs/sweeps/results.yaml"}
MODEL = "embedded:smollm2-135m-instruct"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, default=REAL / "alpaca_pairs_train.jsonl.gz")
    parser.add_argument("--heldout", type=Path, default=REAL / "alpaca_pairs_test.jsonl.gz")
    parser.add_argument("--tokens", type=int, default=192, help="longest pair that is used")
    parser.add_argument("--sweep", default="results", help="a name under configs/sweeps/")
    parser.add_argument("--kills", type=int, default=2, help="SIGKILLs on the way")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, default=WORK, help="where its runs lie")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name, source in (("train", args.pairs), ("heldout", args.heldout)):
        out = args.work / f"{name}.jsonl"
        if not out.exists():
            print(f"{name}: {write_short(source, out, args.tokens)} pairs", flush=True)
    kept = run_with_kills(args)
    print(json.dumps(kept, indent=1))
    return 0


def write_short(source: Path, out: Path, tokens: int) -> int:
    """Rows of `source` whose pair is short enough, to `out`; how many they are."""
    data = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    rows = [line for line in data.decode().split("\n") if line.strip()]
    loaded = load_pairs(source)
    whole = tokenize_pairs(
        loaded.pairs, load_tokenizer(MODEL), max_length=10**6, max_prompt_length=10**6
    )
    lines = [loaded.pairs[index].line for index in whole.indices]
    short = [
        rows[line - 1]
        for line, pair in zip(lines, whole.pairs, strict=True)
        if pair.lengths[0] + max(pair.lengths[1:]) <= tokens
    ]
    out.write_text("\n".join(short), encoding="utf-8")
    return len(short)


def run_with_kills(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the sweep to its end, and kills it at random moments; what is known of that."""
    runs_dir, log = args.work / "runs", args.work / "kills.jsonl"
    began = time.time()
    while True:
        kills = len(log.read_text().splitlines()) if log.exists() else 0
        command = sweep_command(args, runs_dir)
        print("$", " ".join(command[1:]), flush=True)
        child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        while kills < args.kills and child.poll() is None:
            time.sleep(5)
            if (runs_dir / args.sweep).exists() and _is_due(
                open_sweep(args.sweep, runs_dir), kills, args.kills
            ):
                time.sleep(random.uniform(5, 25))  # anywhere in a cell
                os.killpg(child.pid, signal.SIGKILL)
                _note_kill(log, open_sweep(args.sweep, runs_dir), began)
                break
        if child.wait() == 0:
            return {"kills": [json.loads(line) for line in _lines(log)]}
        if child.returncode != -signal.SIGKILL:
            raise SystemExit(f"the sweep ended with {child.returncode}")


def sweep_command(args: argparse.Namespace, runs_dir: Path) -> list[str]:
    start = [sys.executable, "-m", "gapo_lite", "sweep", "--runs-dir", str(runs_dir)]
    if (runs_dir / args.sweep / "sweep.yaml").exists():
        return [*start, "--resume", args.sweep]
    data = [
        f"data.source={args.work / 'train.jsonl'}",
        f"data.heldout_source={args.work / 'heldout.jsonl'}",
        f"data.max_length={args.tokens}",
    ]
    settings = [part for value in [*data, *args.set] for part in ("--set", value)]
    return [*start, f"configs/sweeps/{args.sweep}.yaml", *settings]


def _is_due(folder: SweepFolder, kills: int, planned: int) -> bool:
    """The kills are spread evenly over the cells."""
    done = len(folder.results())
    return done >= len(folder.cells) * (kills + 1) // (planned + 1)


def _note_kill(log: Path, folder: SweepFolder, began: float) -> None:
    status = folder.read("sweep-status.json")
    row = {
        "after_s": round(time.time() - began),
        "cell": status.get("cell"),
        "done": len(folder.results()),
    }
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


if __name__ == "__main__":
    raise SystemExit(main())
