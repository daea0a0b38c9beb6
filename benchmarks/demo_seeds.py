"""The demo on several seeds: do held-out accuracy and reward margin rise each time, and how fast?

    python benchmarks/demo_seeds.py --json benchmarks/results/demo_seeds.json

Exits with 1 if one of them did not rise, or one run took longer than six minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common  # isort: skip  # first: it sets the environment

from gapo_lite import load_config, train

LIMIT_SECONDS = 360
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"


def run_seed(seed: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """First and last evaluation and the training time of one run."""
    config = load_config(CONFIG, [*overrides, f"training.seed={seed}"])
    rows = train(config, runs_dir=folder, name=f"seed-{seed}").metrics()
    first, *_, last = (row for row in rows if "eval/loss" in row)
    record: dict[str, Any] = {
        "seed": seed,
        "seconds": [r["elapsed_s"] for r in rows if "elapsed_s" in r][-1],
    }
    for key in ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"):
        record[key] = [round(row[f"eval/{key}"], 4) for row in (first, last)]
    record["rose"] = all(
        record[k][0] < record[k][1] for k in ("rewards/accuracies", "rewards/margins")
    )
    return record


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records = [run_seed(seed, args.set, Path(folder)) for seed in args.seeds]
    print(f"{'seed':>4} {'seconds':>8} {'accuracy':>18} {'reward margin':>18} {'logps chosen':>18}")
    for r in records:
        columns = (r["rewards/accuracies"], r["rewards/margins"], r["logps/chosen"])
        print(
            f"{r['seed']:>4} {r['seconds']:>8.0f}", *(f"{a:>8.3f} → {b:>7.3f}" for a, b in columns)
        )
    if args.json:
        args.json.write_text(
            json.dumps({"machine": common.machine(), "runs": records}, indent=1) + "\n"
        )
    return int(not all(r["rose"] and r["seconds"] < LIMIT_SECONDS for r in records))


if __name__ == "__main__":
    sys.exit(main())
