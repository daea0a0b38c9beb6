"""docs/results.md and docs/tuning.md: SimPO, DPO and GaPO with every EF, mapping and
normalisation, and GaPO with other γ, β and learning rates, on real pairs.

    python benchmarks/results.py --threads 1 &                  # two sweeps side by side, on two
    python benchmarks/results.py --threads 1 --sweep tuning     # cores: an hour and a half
    python benchmarks/results.py --docs                         # both pages, from what they left

A thread each takes 0.6 of the time that two threads take for one after the other.

The sweeps configs/sweeps/{results,tuning}.yaml run on the pairs of `--pairs FILE --heldout FILE`
of which prompt and longer response have at most `--tokens` tokens together, in the embedded model's
tokens. On the way the sweep's process is killed (SIGKILL) as often as `--kills` says, and goes on;
a call after a kill of this script itself goes on too. Only numbers are kept in benchmarks/results/,
nothing of the pairs' text.
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
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common  # isort: skip  # first: it sets the environment

import yaml

from gapo_lite.batching import tokenize_pairs
from gapo_lite.data import load_pairs
from gapo_lite.model import load_tokenizer
from gapo_lite.report import write_report
from gapo_lite.runs import Run
from gapo_lite.sweep_config import run_name
from gapo_lite.sweep_folder import SweepFolder, open_sweep

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"
WORK = ROOT / "build" / "results"
KEPT = ROOT / "benchmarks" / "results"
MODEL = "embedded:smollm2-135m-instruct"
MAPPINGS = ("linear", "square", "sqrt", "shift", "none")
"""Contenders of the second sweep that belong to the paper's tables."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, default=REAL / "alpaca_pairs_train.jsonl.gz")
    parser.add_argument("--heldout", type=Path, default=REAL / "alpaca_pairs_test.jsonl.gz")
    parser.add_argument("--tokens", type=int, default=192, help="longest pair that is used")
    parser.add_argument("--sweep", default="results", choices=["results", "tuning"])
    parser.add_argument("--threads", type=int, help="CPU threads; by default one a core")
    parser.add_argument("--kills", type=int, default=2, help="SIGKILLs on the way")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, default=WORK, help="where its runs lie")
    parser.add_argument("--docs", action="store_true", help="only write the pages")
    args = parser.parse_args()
    if args.docs:
        for name, text in documents().items():
            (ROOT / "docs" / name).write_text(text, encoding="utf-8")
        return 0
    for source in (args.pairs, args.heldout):
        if not source.is_file():
            raise SystemExit(f"there is no file {source}: name one with --pairs and --heldout")
    args.work.mkdir(parents=True, exist_ok=True)
    for name, source in (("train", args.pairs), ("heldout", args.heldout)):
        out = args.work / f"{name}.jsonl"
        if not out.exists():
            print(f"{name}: {write_short(source, out, args.tokens)} pairs", flush=True)
    run_with_kills(args)
    record = kept(args.work / "runs" / args.sweep, _log_of_kills(args))
    write_kept(record, KEPT / f"sweep_{args.sweep}.json")
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


def run_with_kills(args: argparse.Namespace) -> None:
    """Runs the sweep to its end, and kills it at random moments."""
    runs_dir, log = args.work / "runs", _log_of_kills(args)
    environment = {**os.environ}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    began = time.time()
    while True:
        kills = len(log.read_text().splitlines()) if log.exists() else 0
        command = sweep_command(args, runs_dir)
        print("$", " ".join(command[1:]), flush=True)
        child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
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
            return
        if child.returncode != -signal.SIGKILL:
            raise SystemExit(f"the sweep ended with {child.returncode}")


def _log_of_kills(args: argparse.Namespace) -> Path:
    return args.work / f"kills-{args.sweep}.jsonl"


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


# -- what is kept, and the pages made of it --


def kept(folder: Path, kills: Path) -> dict[str, Any]:
    """A sweep's numbers as one JSON object, without local paths: its own files by their names, and
    of each run that has ended its record and what the report reads of its folder."""
    sweep = SweepFolder(folder)
    settings = yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8"))
    for holder in (settings["settings"], settings["base"]["data"]):
        for key in (*holder,):
            if key.endswith("source") and holder[key]:
                holder[key] = Path(holder[key]).name
    own = {name: sweep.read(name) for name in ("base.json", "agree.json", "sweep-status.json")}
    results = sweep.results()
    log = kills.read_text().splitlines() if kills.exists() else []
    ends = [path.stat().st_mtime for path in (folder / "cells").glob("*.json")]
    return {
        "machine": common.machine(),
        "kills": [json.loads(line) for line in log],
        "wall_s": round(max(ends) - (folder / "sweep.yaml").stat().st_mtime),
        "sweep": {"sweep.yaml": settings, **own},
        "runs": [
            {"cell": results[cell.run], **_left_by(Run(folder.parent / cell.run))}
            for cell in sweep.cells
            if cell.run in results
        ],
    }


def _left_by(run: Run) -> dict[str, Any]:
    environment = run.read("environment.json")
    scores = run.read("heldout.json")["newest"]
    newest = {
        key: [round(value, 6) for value in scores[key]]
        for key in ("chosen_logps", "rejected_logps")
    }
    return {
        "margins.json": run.read("margins.json"),
        "environment.json": {k: environment[k] for k in ("versions", "gpu", "cpu_count")},
        "heldout.json": {"newest": newest},
    }


def write_kept(record: dict[str, Any], path: Path) -> None:
    """A line a run."""
    runs = ",\n".join(json.dumps(run) for run in record["runs"])
    head = json.dumps({key: value for key, value in record.items() if key != "runs"}, indent=1)
    path.write_text(f'{head[:-2]},\n "runs": [\n{runs}\n ]\n}}\n', encoding="utf-8")


def report_of(record: dict[str, Any]) -> str:
    """The report's Markdown of what was kept, without its title and last line."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "sweep"
        for name, content in record["sweep"].items():
            _write(folder / name, content)
        for run in record["runs"]:
            name = run_name(folder.name, run["cell"]["contender"], run["cell"]["seed"])
            _write(folder / "cells" / f"{name}.json", {**run["cell"], "run": name})
            for file, content in run.items():
                if file != "cell":
                    _write(folder.parent / name / file, content)
        text = write_report(folder)[1].read_text(encoding="utf-8")
    return "\n".join(text.rstrip().splitlines()[1:-1]).strip()


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML


def documents() -> dict[str, str]:
    """File name in docs/ → text, of what is kept."""
    results, tuning = records = [
        json.loads((KEPT / f"sweep_{name}.json").read_text(encoding="utf-8"))
        for name in ("results", "tuning")
    ]
    about = {
        "hardware": f"2 CPU cores ({results['machine']['cpu']})",
        "hours": f"{max(record['wall_s'] for record in records) / 3600:.1f}",
        "kills": "; ".join(
            f"{name} {_killed(record['kills'])}"
            for name, record in zip(("the first", "the second"), records, strict=True)
        ),
    }
    shown = {
        "results.md": (_RESULTS, [*contenders(results), *MAPPINGS]),
        "tuning.md": (_TUNING, ["rougeL", *contenders(tuning)]),
    }
    pages = {name: (text, chosen(records, names)) for name, (text, names) in shown.items()}
    return {
        name: text.format(report=report_of(record), **about)
        for name, (text, record) in pages.items()
    }


def contenders(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name → settings over the sweep's base."""
    settings = record["sweep"]["sweep.yaml"]
    return {one["name"]: settings["settings"] | one["settings"] for one in settings["variants"]}


def chosen(records: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """One record of some contenders of sweeps that have base, pairs and seeds in common.

    Args:
        records: the sweeps; all but the contenders is as in the first.
        names: of the contenders, in the order of the tables. The first is the baseline.
    """
    known = {name: own for record in records for name, own in contenders(record).items()}
    shared = {
        key: value
        for record in records
        for key, value in record["sweep"]["sweep.yaml"]["settings"].items()
        if all(known[name].get(key, value) == value for name in names)
    }
    own = {name: {k: v for k, v in known[name].items() if k not in shared} for name in names}
    settings = {
        **records[0]["sweep"]["sweep.yaml"],
        "settings": shared,
        "variants": [{"name": name, "settings": own[name]} for name in names],
        "baseline": names[0],
    }
    runs = [run for record in records for run in record["runs"]]
    return {
        **records[0],
        "sweep": {**records[0]["sweep"], "sweep.yaml": settings},
        "runs": [run for run in runs if run["cell"]["contender"] in names],
    }


def _killed(kills: list[dict[str, Any]]) -> str:
    told = [f"{kill['cell']} ({kill['done']} runs done)" for kill in kills]
    return f"during {' and '.join(told)}" if told else "never"


_NOTE = """<!-- Written by `python benchmarks/results.py --docs` from benchmarks/results/. -->
"""

_RESULTS = f"""# Results

{_NOTE}
SimPO, DPO, and GaPO with all evaluation factors, mappings and normalisations of the paper's Tables
3 and 4, by `python benchmarks/results.py` on real pairs (AlpacaEval's judged outputs, the short
ones; only numbers of them are kept). {{hardware}}: two sweeps side by side, a core each, beside
other work; {{hours}} hours from start to end, pauses included. They were killed on the way
(SIGKILL) and resumed: {{kills}}.

## In plain words

- **No per-pair margin can be told apart from SimPO's constant one.** On average over the seeds
  every EF, mapping and normalisation ends within two of the 61 held-out pairs of SimPO, and no
  interval of a difference in accuracy excludes 0 (three answer at greater length). The seed matters
  more: SimPO's own three runs end at 31, 28 and 27 pairs. The paper's claim is neither confirmed
  nor refuted by that: see below.
- **Why so little could differ.** The margins ask for 3 reward units on average and ten steps reach
  between −0.6 and 0.9 on the held-out pairs. As long as nearly all pairs are far below their
  margins, the loss pulls at all of them almost equally, whatever their margins are. A per-pair
  margin can only tell once some pairs have passed theirs.
- **What does differ is how hard a setting pulls.** Without normalisation the mean margin is 14
  instead of 3; `none` and `shift` move the model most, to more accuracy and to less likely answers.
- **SimPO and all of GaPO rank more pairs rightly, but by making both answers less likely**, the
  chosen ones too, by 0.06 to 0.53 nats a token. DPO leaves them where they were, and by the average
  log-probability, which it does not train, it ranks hardly better than the base; by its own reward
  it is right on about two thirds.
- **Answers become long.** The base stops after 38 tokens; with all but DPO most answers run into
  the limit of 192, and repeat themselves. No judge has read them. Better accuracy is not better
  answers here.
- **The gaps hardly follow the judge on these pairs.** The best EF's correlation is 0.22, that of
  the difference of lengths 0.32; at equal lengths no EF's can be told apart from 0.

A model of 135 million parameters, ten steps and 61 held-out pairs can show what the code does and
whether an effect is large. They cannot show what the paper claims, an 8B model's win rate on
AlpacaEval 2: where an interval includes 0 here, that is no evidence against it, and where one does
not, none for it.

{{report}}
"""

_TUNING = f"""# Tuning: EF, γ, β and the learning rate for QLoRA

{_NOTE}
One setting of GaPO with ROUGE-L changed at a time, by
`python benchmarks/results.py --sweep tuning`, on the pairs and with the settings of
[results.md](results.md), whose contender rougeL is the middle (γ 0.3, β 10, learning rate 1e-3).
## What these runs advise, and nothing else does

1. **The learning rate first; nothing else matters as much.** In ten steps 2e-4 left the model where
   it was. 5e-3 made the chosen answers less likely by 1 to 5 nats a token, all answers endless and
   more than a third of their words repetition, with the best accuracy of all. So do not choose it
   by accuracy: raise it until the chosen log-probabilities begin to fall, and stop at a few tenths
   of a nat (`training.max_chosen_fall` warns at 0.5). With more steps, less.
2. **γ: start at 0.3.** From 0.1 to 1 accuracy stays within two pairs of 61, and the chosen answers
   fall by half as much again. Lower it when they fall too far; a higher one only pulls harder.
3. **β: leave it at 10.** 2.5 and 40 cannot be told apart from it.
4. **EF, mapping: ROUGE-L and log, for want of a difference.** ROUGE-L needs no encoder and takes
   seconds. Ask `gapo-lite agree` first whether any gap follows your data's judgements.
5. **Normalisation: scale.** It makes γ mean the same for all EFs and mappings. With `none` the mean
   margin was 14 reward units instead of 3, and the model ended where γ 1 (10 units) had it: another
   γ by another name.

How far this carries to an 8B model and thousands of steps, these runs cannot say.

{{report}}
"""


if __name__ == "__main__":
    raise SystemExit(main())
