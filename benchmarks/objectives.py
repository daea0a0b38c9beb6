"""Every objective on the embedded model and the pairs that ship with the project, at the same size.

    python benchmarks/objectives.py --json benchmarks/results/objectives.json   # CPU, about an hour
    python benchmarks/objectives.py --docs docs/objectives.md    # the tables, from that

Each objective trains 30 steps of 8 pairs in a process of its own (so that peak memory is its own),
with the demo's settings, its default hyper-parameters and the same learning rate; GaPO's margin is
on for `gapo` alone. Then DPO and SimPO train in turns: what an epoch costs once the reference is in
the cache. Exits with 1 if the held-out accuracy of one did not rise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common  # isort: skip  # first: it sets the environment

from gapo_lite.objectives import OBJECTIVES
from gapo_lite.runs import Run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "objectives.json"
ROUNDS = 3
KEYS = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
_NOT_THE_DEMOS = ("objective.beta=null", "margin.gamma=null")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of DPO against SimPO")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--docs", type=Path, help="only write the documentation from RESULTS")
    args = parser.parse_args()
    if args.docs:
        args.docs.write_text(document(json.loads(RESULTS.read_text())), encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        measured = {}
        for name in args.only:
            measured[name] = train(name, args.steps, args.set, Path(folder))
            print(row(name, measured[name]), flush=True)
        against = epochs(args.rounds, args.set, Path(folder)) if args.rounds else {}
    result = {
        "machine": common.machine(),
        "steps": args.steps,
        "objectives": measured,
        "dpo_against_simpo": against,
    }
    print(json.dumps(against, indent=1))
    if args.json:
        common.write_json(args.json, result)
    return 0 if all(record["rose"] for record in measured.values()) else 1


def train(name: str, steps: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """One objective's run: first and last evaluation, seconds a pair and peak memory."""
    run = _run(name, name, steps, overrides, folder)
    rows = run.metrics()
    first, *_, last = (row for row in rows if "eval/loss" in row)
    speeds = [row["pairs_per_second"] for row in rows if "pairs_per_second" in row]
    record: dict[str, Any] = {
        key: [round(row[f"eval/{key}"], 4) for row in (first, last)] for key in KEYS
    }
    tokens = [r["tokens_per_second"] / r["pairs_per_second"] for r in rows if "loss" in r]
    return record | {
        "seconds_a_pair": round(1 / statistics.median(speeds[1:] or speeds), 4),
        "tokens_a_pair": round(statistics.mean(tokens), 1),
        "memory_gib": round(max(row.get("memory_gib", 0.0) for row in rows), 3),
        "rose": has_risen(first, last),
    }


def has_risen(first: dict[str, float], last: dict[str, float]) -> bool:
    """Whether held-out accuracy has risen; at step 0 an objective with a reference has only ties,
    none of which counts as a hit, so its accuracy has to be above a half."""
    return last["eval/rewards/accuracies"] > max(first["eval/rewards/accuracies"], 0.5)


def epochs(rounds: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Seconds a pair of SimPO and DPO in turns, the reference being in the cache."""
    seconds: dict[str, list[float]] = {"simpo": [], "dpo": []}
    for number in range(rounds):
        for name, found in seconds.items():
            run = _run(name, f"{name}-{number}", 12, overrides, folder)
            speeds = [r["pairs_per_second"] for r in run.metrics() if "pairs_per_second" in r]
            found.append(round(1 / statistics.median(speeds[1:] or speeds), 4))
    ratios = [round(dpo / simpo, 3) for simpo, dpo in zip(*seconds.values(), strict=True)]
    return {"seconds_a_pair": seconds, "ratios": ratios, "median": statistics.median(ratios)}


def _run(name: str, run: str, steps: int, overrides: list[str], folder: Path) -> Run:
    settings = [
        f"objective.name={name}",
        *_NOT_THE_DEMOS,
        f"training.max_steps={steps}",
        "training.eval_steps=100000",
        "training.save_steps=100000",
        "training.logging_steps=2",
        *overrides,
    ]
    command = [
        *(sys.executable, "-m", "gapo_lite", "train", str(ROOT / "configs" / "demo.yaml")),
        *("--name", run, "--runs-dir", str(folder)),
        *(part for setting in settings for part in ("--set", setting)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return Run(folder / run)


def row(name: str, record: dict[str, Any]) -> str:
    """A line for the terminal."""
    changes = (f"{record[key][0]:>7.3f} → {record[key][1]:>7.3f}" for key in KEYS)
    cost = f"{record['seconds_a_pair']:>6.3f} s {record['memory_gib']:>6.2f} GiB"
    return f"{name:>9} {'  '.join(changes)} {cost}"


# -- docs/objectives.md --


def document(result: dict[str, Any]) -> str:
    """docs/objectives.md: what the code says of each objective, and what was measured of it."""
    hardware = common.describe(result["machine"])
    facts = _table(
        ("objective", "loss of a pair", "its own settings (defaults)", "margin from", "reference",
         "per token", "source"),
        [
            (
                f"`{name}`",
                spec.formula,
                ", ".join(f"`{key}` {value}" for key, value in spec.parameters.items()),
                ", ".join(spec.margins) or "–",
                "yes" if spec.uses_reference else "no",
                "yes" if spec.length_normalized else "no",
                _source(spec.source),
            )
            for name, spec in OBJECTIVES.items()
        ],
    )  # fmt: skip
    measured = _table(
        ("objective", "held-out accuracy", "reward margin", "chosen logps", "rejected logps",
         "ms a pair", "peak memory"),
        [
            (
                f"`{name}`",
                *(f"{record[key][0]:.3f} → {record[key][1]:.3f}" for key in KEYS),
                f"{1000 * record['seconds_a_pair']:.0f}",
                f"{record['memory_gib']:.2f} GiB",
            )
            for name, record in result["objectives"].items()
        ],
    )  # fmt: skip
    against = result["dpo_against_simpo"]
    tokens = statistics.mean(r["tokens_a_pair"] for r in result["objectives"].values())
    return _TEXT.format(
        facts=facts,
        measured=measured,
        steps=result["steps"],
        hardware=hardware,
        tokens=tokens,
        ratio=against["median"],
        ratios=", ".join(map(str, against["ratios"])),
    )


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _source(number: str) -> str:
    if number[:4].isdigit():
        return f"[arXiv {number}](https://arxiv.org/abs/{number})"
    return f"OpenReview {number}"


_TEXT = """# Objectives

<!-- Written by `python benchmarks/objectives.py --docs docs/objectives.md` from the code and
benchmarks/results/objectives.json; a test keeps it so. -->

One switch, `objective.name`. Symbols: lp is the summed log-probability of a response, a its
average per scored token, ρ = lp − the reference's lp, |y| the scored tokens, NLL = −a; w and l
are chosen and rejected. s is β with `margin_scale: beta` and 1 with `one`. The reference is the
same model without its adapter.

{facts}

**The target margin.** `margin.source: ef` makes it from the pair's evaluation factor (GaPO's), on
every objective that takes one; `rating` from the data's own scores (`chosen_rating −
rejected_rating`, the reward-model scores of `llama3-ultrafeedback-armorm`, or the columns that
`data.rating_columns` names) through the same normalisations; `constant` is the plain method (γ =
0), and SimPO with γ. γ is the average margin, in the units of what β multiplies: nats a token for
`gapo` and `simpo`, nats of a whole response for the others. `gapo` is `simpo` with
`margin.source: ef`.

**The reference** costs one pass over the pairs before training (kept in the cache by tokens,
model and quantisation); `objective.reference: on_the_fly` computes it in every step instead.
There is never a second copy of the model.

**Statistics of a step.** KTO's divergence and β-DPO's mean gap are those of the whole optimizer
step, not of a micro-batch: the same whatever `micro_batch_size` is, at the price of one more
forward pass.

**Settings that an objective does not have are refused**, not passed over: `margin.gamma` with
`kto` is an error.

## Measured

{steps} steps of 8 pairs ({tokens:.0f} tokens a pair with its prompt shared) on the embedded
SmolLM2-135M in 4 bits, default hyper-parameters, learning rate 2e-4 for all, held-out pairs
before → after; each in a process of its own. So small a model and so few pairs show that each
objective learns and what it costs, not which is best. Rewards are each objective's own: margins
of two objectives cannot be compared, and at step 0 those with a reference have only ties, which
count as misses.

{measured}

{hardware}. With the reference in the cache DPO takes {ratio} times as long a pair as SimPO (in
turns: {ratios}).
"""


if __name__ == "__main__":
    raise SystemExit(main())
