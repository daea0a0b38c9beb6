"""How the cost of a training step grows with pairs a batch, prompt share and length, on a CPU.

    python benchmarks/step_cost.py --json benchmarks/results/step_cost.json \\
        --figure docs/step_cost.png

The contenders, the model and the clock of training_step.py, each point and contender a process of
its own. The pairs are cut from the tokens of real pairs to exactly the lengths asked for, all of a
batch alike, so that TRL has nothing to pad: its best case. One of the three is varied at a time:

    pairs a batch      1, 2, 4, 8     at 512 tokens of prompt and response, a quarter of them prompt
    prompt share       1/16 to 15/16  at 512 tokens, 2 pairs
    prompt + response  128 to 1,024   a quarter of them prompt, 2 pairs

The figure has the seconds a pair and the memory above that of the loaded model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common  # isort: skip  # first: it sets the environment
import numpy as np
import training_step
from datasets import disable_progress_bars

from gapo_lite.batching import tokenize_pairs
from gapo_lite.data import load_pairs
from gapo_lite.memory import GIB, peak_resident_bytes
from gapo_lite.model import load_tokenizer
from gapo_lite.types import TokenizedPair

OURS = "packed"
_TITLES = {common.TRL: "TRL", OURS: "GaPO-Lite"}


@dataclass(frozen=True, slots=True)
class Point:
    """What a batch is like.

    Attributes:
        pairs: in it.
        prompt: tokens of each prompt.
        response: tokens of each response.
    """

    pairs: int
    prompt: int
    response: int

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return self.prompt + self.response


def points(longest: int) -> dict[str, list[Point]]:
    """The points of each axis, by its label; the middle one is in all."""
    middle = longest // 2
    quarter = lambda pairs, length: Point(pairs, length // 4, length - length // 4)  # noqa: E731
    return {
        "pairs a batch": [quarter(pairs, middle) for pairs in (1, 2, 4, 8)],
        "prompt share": [
            Point(2, middle * share // 16, middle - middle * share // 16)
            for share in (1, 4, 8, 12, 15)
        ],
        "tokens of prompt + response": [
            quarter(2, length) for length in (longest // 8, longest // 4, middle, longest)
        ],
    }


def position(axis: str, point: Point) -> float:
    """Where a point lies on its axis."""
    if axis == "pairs a batch":
        return point.pairs
    return point.prompt / point.length if axis == "prompt share" else point.length


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, writes the file and the figure."""
    options = _options(argv)
    if options.worker:
        print(json.dumps(measure(options.worker, Point(*options.point), options)))
        return
    machine = common.machine()
    print(common.describe(machine), flush=True)
    axes = points(options.longest)
    distinct = dict.fromkeys(point for of_axis in axes.values() for point in of_axis)
    results = []
    for point in distinct:
        for contender in _TITLES:
            results.append(_in_subprocess(contender, point, options))
            print(_line(results[-1]), flush=True)
    settings = {k: str(v) for k, v in vars(options).items() if k not in ("json", "figure")}
    result = {"machine": machine, "settings": settings, "measurements": results}
    if options.json:
        common.write_json(options.json, result)
    if options.figure:
        draw(result, axes, options.figure)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--longest", type=int, default=1024, help="tokens of prompt and response, at most")
    add("--steps", type=int, default=2, help="timed steps of a point; of small ones more")
    add("--model", default="embedded:smollm2-135m-instruct")
    add("--data", default=training_step.parse_options([]).data)
    add("--json", type=Path, help="also write all figures to this file")
    add("--figure", type=Path, help="also draw them, as PNG or SVG")
    add("--worker", choices=_TITLES, help=argparse.SUPPRESS)
    add("--point", type=int, nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _in_subprocess(contender: str, point: Point, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", contender]
    command += ["--point", *map(str, (point.pairs, point.prompt, point.response))]
    for name in ("steps", "model", "data"):
        command += [f"--{name}", str(vars(options)[name])]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{_TITLES[contender]} failed at {point}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -- one point, in its own process --


def measure(contender: str, point: Point, options: argparse.Namespace) -> dict[str, Any]:
    """Trains a warm-up step and the timed ones, and says what they took."""
    disable_progress_bars()
    settings = training_step.parse_options(["--model", options.model])
    timed = options.steps * max(1, round(2 * 512 / (point.pairs * point.length)))
    steps = 1 + timed
    pairs = cut_pairs(options, point, steps * point.pairs, settings.gamma)
    policy = training_step.make_policy(settings)
    model_bytes = common.resident_bytes()
    common.reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        arguments = common.shared_arguments(
            Path(folder),
            steps=steps,
            micro_batch=point.pairs,
            learning_rate=training_step.LEARNING_RATE,
            use_cpu=True,
        )
        if contender == common.TRL:
            config = training_step.cpo_config(arguments, settings)
            trainer = common.cpo_trainer(policy, pairs, config)
        else:
            trainer = training_step.gapo_trainer(policy, pairs, arguments, OURS, settings)
        clock = common.StepClock(warmup=1)
        trainer.add_callback(clock)
        trainer.train()
    peak, timed_pairs = peak_resident_bytes(), timed * point.pairs
    return {
        "contender": contender,
        **asdict(point),
        "steps": timed,
        "seconds_per_pair": sum(clock.seconds) / timed_pairs,
        "cpu_seconds_per_pair": sum(clock.cpu_seconds) / timed_pairs,
        "peak_gib": peak / GIB,
        "above_model_gib": (peak - model_bytes) / GIB,
        "first_loss": float(trainer.step_losses[0]),
    }


def cut_pairs(
    options: argparse.Namespace, point: Point, number: int, gamma: float
) -> list[TokenizedPair]:
    """Pairs of exactly these lengths from the real ones' tokens, end to end."""
    tokenizer = load_tokenizer(options.model)
    loaded = load_pairs(options.data).pairs[: max(64, 4 * number)]
    tokenized = tokenize_pairs(loaded, tokenizer, max_length=4096, max_prompt_length=2048).pairs
    parts = {
        "prompt_ids": point.prompt,
        "chosen_ids": point.response,
        "rejected_ids": point.response,
    }
    cut = {
        name: np.resize(
            np.concatenate([getattr(pair, name) for pair in tokenized]), (number, length)
        )
        for name, length in parts.items()
    }
    return [
        TokenizedPair(*(ids[row] for ids in cut.values()), margin=gamma) for row in range(number)
    ]


# -- what is said --


def _line(result: dict[str, Any]) -> str:
    where = f"{result['pairs']} pairs, {result['prompt']} + {result['response']} tokens"
    return (
        f"{where:28} {_TITLES[result['contender']]:10} {result['seconds_per_pair']:7.3f} s/pair "
        f"{result['above_model_gib']:6.2f} GiB above the model"
    )


def draw(result: dict[str, Any], axes: dict[str, list[Point]], file: Path) -> None:
    """Two rows, seconds and memory, and a column for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {
        (row["contender"], Point(row["pairs"], row["prompt"], row["response"])): row
        for row in result["measurements"]
    }
    rows = {"seconds_per_pair": "seconds a pair", "above_model_gib": "GiB above the model"}
    figure, places = pyplot.subplots(2, 3, figsize=(10, 5), sharey="row", sharex="col")
    for line, (key, label) in zip(places, rows.items(), strict=True):
        line[0].set_ylim(0, 1.05 * max(row[key] for row in result["measurements"]))
        for place, (axis, of_axis) in zip(line, axes.items(), strict=True):
            x = [position(axis, point) for point in of_axis]
            for contender, colour in ((common.TRL, "#8a8f98"), (OURS, "#2563eb")):
                y = [found[contender, point][key] for point in of_axis]
                place.plot(x, y, "o-", color=colour, label=_TITLES[contender], markersize=4)
            place.grid(alpha=0.25)
            place.spines[["top", "right"]].set_visible(False)
            if axis != "prompt share":
                place.set_xscale("log", base=2)
                place.set_xticks(x, [f"{value:,}" for value in x])
        line[0].set_ylabel(label)
    for place, axis in zip(places[1], axes, strict=True):
        place.set_xlabel(axis)
    places[0, 0].legend(frameon=False)
    machine = result["machine"]
    figure.suptitle(
        f"SmolLM2-135M in NF4, {machine['cpu']}, {machine['threads']} threads, {machine['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
