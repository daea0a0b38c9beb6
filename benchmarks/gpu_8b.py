"""Training Llama-3-8B's shape on one GPU: beside TRL and Unsloth, lever by lever, and in 12 GB.

    python benchmarks/gpu_8b.py --parts quick --json benchmarks/results/gpu_8b.json    # first
    python benchmarks/gpu_8b.py --parts trl --json benchmarks/results/gpu_8b.json
    python benchmarks/gpu_8b.py --parts levers caps --json benchmarks/results/gpu_8b.json
    python benchmarks/gpu_8b.py --tiny          # a small model anywhere, to see that it runs

It needs no network, no weights and no tokenizer: see gpu_model.py. The parts:

    quick   about 5 minutes, the most telling first: `GapoTrainer` and TRL at 8 and 2 pairs a step,
            all levers, each lever, and 12 GiB
    trl     TRL's `CPOTrainer` (SimPO), Unsloth's patched one where it is installed, and
            `GapoTrainer` (objective `simpo`, packed) take turns, at 2, 4 and 8 pairs a step, over
            the same pairs in the same order; they get them tokenised
    levers  `GapoTrainer` without any lever (padded, 2 pairs a forward pass, every layer recomputed,
            4-bit weights, PEFT's and transformers' own layers), with each lever alone, and with
            all of them; beside each what `gapo-lite plan` predicts for this card
    caps    within the memory of smaller cards, by a cap on the process: the largest token budget

Each turn is a process of its own with its own model; in "trl" a turn has one contender, so that
nothing of another's is in its peak. In "quick" ours and TRL share a process, which spares building
the model again: between two cases the adapter starts anew, what the case before held is given back,
and the peak is counted from there. TRL comes first, since a model's layers are fused for good.

The file is replaced after every case, so that a kill at any moment leaves what was measured; a part
is "complete" once none of its cases was left out. A case that runs out of memory is recorded, and
the next goes on; one whose process dies is recorded with its last words, and the next goes on in a
new process. After `--minutes` the running turn is stopped. A second call with other parts adds them
to the same file; a part that is measured again is replaced. What is timed is in common.py.

"busy" is what was executed, padding included, as a share of the rate that a large bfloat16 matrix
product reached in the same process; "useful" divides only the work that the pairs need (packed,
without recomputation) by it. "tokens/s" counts each pair's prompt and responses once.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__" and '"unsloth"' in " ".join(sys.argv):
    import unsloth  # noqa: F401  # first: it patches TRL and transformers

import common  # isort: skip  # first of the rest: it sets the environment
import gpu_model
import torch
from datasets import disable_progress_bars
from gpu_model import BETA, GAMMA, LEARNING_RATE, RANK, Scale, executed_flops, processed
from gpu_report import (
    COLUMNS,
    HEADINGS,
    LEFT_OUT,
    OURS,
    TRL,
    UNSLOTH,
    check_losses,
    compare,
    line,
    ratio_line,
    summarize,
    with_rates,
)
from peft import PeftModel
from transformers import TrainingArguments

from gapo_lite import logps
from gapo_lite.attention import SHARED_PREFIX
from gapo_lite.batching import MicroBatchLimits, num_tokens
from gapo_lite.config import ObjectiveConfig, RunConfig, parse_config
from gapo_lite.disk import replace_text
from gapo_lite.errors import ModelError, RunError
from gapo_lite.forecast import matrix_rate, this_device
from gapo_lite.fused import fuse_layers
from gapo_lite.memory import GIB, is_out_of_memory, peak_resident_bytes
from gapo_lite.model import (
    add_adapter,
    causal_model,
    dequantize_base,
    pick_device,
    pick_precision,
    set_recomputation,
)
from gapo_lite.plan import SHARES, Plan, Workload, best_plan, sizes_of
from gapo_lite.shape import shape_of
from gapo_lite.types import TokenizedPair

BUDGETS = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
QUICK_BUDGETS = (2048, 4096, 8192)
BUDGET = 8192
READY = "the model is there"
"""What a turn's process prints between building its model and the first case."""


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement.

    Attributes:
        contender: who trains.
        pairs: of an optimizer step.
        recomputed: share of the layers that compute their activations again.
        lever: what is switched on, for people; "" beside TRL.
        packed: layout; the others pad.
        at_once: pairs a forward pass, at most.
        tokens: of a forward pass, at most.
        tile_rows: of the head; None for the usual ones.
        offloaded: whether the inputs of recomputed layers wait in the host's memory.
        prepared: levers that change the model for good: of LEVERS.
        round: of turns.
    """

    contender: str
    pairs: int
    recomputed: float
    lever: str = ""
    packed: bool = True
    at_once: int | None = None
    tokens: int | None = None
    tile_rows: int | None = None
    offloaded: bool = False
    prepared: tuple[str, ...] = ()
    round: int = 1

    @property
    def limits(self) -> MicroBatchLimits:
        """Of a forward pass."""
        return MicroBatchLimits(self.at_once, self.tokens)


@dataclass(frozen=True, slots=True)
class Turn:
    """Cases that one process measures, one after the other, on one model.

    Attributes:
        part: of PARTS.
        cases: the measurements; what they have `prepared` only grows.
        cap_gib: memory of the card that it stands for; None for all there is.
    """

    part: str
    cases: tuple[Case, ...]
    cap_gib: float | None = None

    def to_json(self) -> str:
        """For the command line of its process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Turn:
        """From `to_json`."""
        data = json.loads(text)
        cases = (Case(**{**case, "prepared": tuple(case["prepared"])}) for case in data["cases"])
        return cls(data["part"], tuple(cases), data["cap_gib"])


@dataclass(frozen=True, slots=True)
class Bench:
    """What the cases of a turn share.

    Attributes:
        policy: the model with its adapter.
        start: the adapter's values at the start of every case.
        scale: how large everything is.
        rate: operations a second of a large matrix product, measured.
        dtype: of the arithmetic.
        options: of the command line.
        prepared: levers that have changed the model.
    """

    policy: PeftModel
    start: dict[str, torch.Tensor]
    scale: Scale
    rate: float
    dtype: torch.dtype
    options: argparse.Namespace
    prepared: set[str] = field(default_factory=set)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and keeps the file; ends with an error where the losses disagree."""
    options = _options(argv)
    if options.turn:
        for row in work(Turn.from_json(options.turn), options):
            print(json.dumps(row), flush=True)
        return
    deadline = time.monotonic() + options.minutes * 60
    if pick_device().type == "cpu" and not options.tiny:
        raise SystemExit("There is no GPU here. --tiny runs the same on a small model anywhere.")
    machine = common.machine()
    print(common.describe(machine), flush=True)
    hidden = ("json", "turn", "parts")
    settings = {name: value for name, value in vars(options).items() if name not in hidden}
    file = ResultFile(options.json, settings, machine)
    results: dict[str, list[dict[str, Any]]] = {part: [] for part in options.parts}
    for part, rows in results.items():
        for turn in PARTS[part](options):
            for row in run_turn(turn, options, deadline):
                rows.append(row)
                file.write(part, rows, ended=False)
                if row.get("failed") != LEFT_OUT:
                    print(line(row), flush=True)
        file.write(part, rows, ended=True)
    ratios = []
    for part, rows in results.items():
        ratios += compare(rows)
        summary = summarize(rows)
        shown = [row for row in summary if row["failed"] != LEFT_OUT]
        print(f"\n{HEADINGS[part]}\n{common.table(shown, COLUMNS[part])}")
        if len(shown) < len(summary):
            print(f"{LEFT_OUT}: {len(summary) - len(shown)} of {len(summary)} cases")
    print("", *map(ratio_line, ratios), sep="\n")
    check_losses(ratios)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    everyone = (TRL, UNSLOTH, OURS)
    add("--tiny", action="store_true", help="a small model and short pairs, on any machine")
    add("--parts", nargs="+", choices=PARTS, default=["trl", "levers", "caps"])
    add("--micro-batch", type=int, nargs="+", default=[2, 4, 8], help="pairs a step beside TRL")
    add("--checkpointing", nargs="+", choices=("on", "off"), default=["on", "off"])
    add("--contenders", nargs="+", choices=everyone, default=list(everyone))
    add("--batch", type=int, default=16, help="pairs of an optimizer step, for levers")
    add("--caps-gib", type=float, nargs="+", default=[12.0, 16.0, 24.0])
    add("--rounds", type=int, default=2, help="turns that each contender gets")
    add("--steps", type=int, default=8, help="timed steps of a case, at most")
    add("--warmup", type=int, default=2, help="steps before them that are not timed")
    add("--seconds-per-case", type=float, default=5.0, help="no step begins after so much time")
    add("--minutes", type=float, default=8.5, help="of the whole call; what runs then is stopped")
    add("--seed", type=int, default=0, help="of weights, lengths and tokens")
    add("--json", type=Path, help="also write all figures to this file")
    add("--turn", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# -- what is measured --


def quick_turns(options: argparse.Namespace) -> Iterator[Turn]:
    """The most telling first. All at 8 pairs a step, so that levers and TRL can be compared."""
    beside_ours = tuple(
        beside(contender, pairs, 1.0) for contender in (TRL, OURS) for pairs in (8, 2)
    )
    plain, fused, liger = levers(8)
    yield Turn("quick", (*beside_ours, *fused))
    yield Turn("quick", plain)
    yield Turn("quick", liger)
    yield cap_turn("quick", 12.0, 16, QUICK_BUDGETS)


def trl_turns(options: argparse.Namespace) -> Iterator[Turn]:
    """Round by round, so that running out of time costs repetitions first."""
    for number in range(1, options.rounds + 1):
        for contender in options.contenders:
            both = [
                tuple(
                    replace(beside(contender, pairs, float(checkpointing == "on")), round=number)
                    for pairs in options.micro_batch
                )
                for checkpointing in options.checkpointing
            ]
            if contender == UNSLOTH:  # is told of recomputation when it loads the model
                yield from (Turn("trl", cases) for cases in both)
            else:
                yield Turn("trl", sum(both, ()))


def beside(contender: str, pairs: int, recomputed: float) -> Case:
    """Of one beside the others: ours as a run has it."""
    if contender == OURS:
        return Case(OURS, pairs, recomputed, prepared=("fused",))
    return Case(contender, pairs, recomputed, packed=False)


def lever_turns(options: argparse.Namespace) -> Iterator[Turn]:
    """No lever, each alone, and all."""
    for cases in levers(options.batch):
        yield Turn("levers", cases)


def levers(pairs: int) -> tuple[tuple[Case, ...], ...]:
    """The cases of three models: what changes none, and dequantised weights at last; fused layers,
    and all levers; Liger's kernels."""
    none = Case(OURS, pairs, 1.0, "none", packed=False, at_once=2)
    plain = (
        none,
        replace(none, lever="packed", packed=True),
        replace(none, lever=f"{BUDGET:,} tokens a pass", at_once=None, tokens=BUDGET),
        replace(none, lever="half recomputed", recomputed=0.5),
        replace(none, lever="nothing recomputed", recomputed=0.0),
        replace(none, lever="tiles of 4,096 rows", tile_rows=4096),
        replace(none, lever="offloaded", offloaded=True),
        replace(none, lever="dequantised", prepared=("dequantized",)),
    )
    fused = replace(none, lever="fused layers", prepared=("fused",))
    liger = replace(none, lever="Liger's kernels", prepared=("liger",))
    prepared = ("fused", "dequantized", *(["liger"] if find_spec("liger_kernel") else []))
    everything = Case(OURS, pairs, 0.0, "all that is faster", tokens=BUDGET, prepared=prepared)
    return plain, (fused, everything), (liger,)


def cap_turns(options: argparse.Namespace) -> Iterator[Turn]:
    """A turn a card."""
    for gib in options.caps_gib:
        yield cap_turn("caps", gib, 2 * options.batch, BUDGETS)


def cap_turn(part: str, gib: float, pairs: int, budgets: Sequence[int]) -> Turn:
    """Growing budgets on one card."""
    ours = beside(OURS, pairs, 1.0)
    cases = (replace(ours, lever=f"{budget:,} tokens", tokens=budget) for budget in budgets)
    return Turn(part, tuple(cases), gib)


PARTS = {"quick": quick_turns, "trl": trl_turns, "levers": lever_turns, "caps": cap_turns}


# -- a turn's process, from outside --


def run_turn(turn: Turn, options: argparse.Namespace, deadline: float) -> Iterator[dict[str, Any]]:
    """The rows of a turn. Where its process dies, the case that it was at fails, or all of them
    while the model was not there yet; a new process measures the rest.

    Args:
        turn: what to measure.
        options: of the command line.
        deadline: by `time.monotonic`.
    """
    if reason := _not_installed(turn.cases[0]):
        yield _failed(turn.cases[0], turn, reason)
        return
    left = turn.cases
    while left:
        lost = len(left)
        try:
            for printed in _output(replace(turn, cases=left), options, deadline):
                if printed.startswith(READY):
                    lost = 1
                elif printed.startswith('{"contender"') and printed.endswith("\n"):
                    # not what libraries print, nor half a line of a process that was stopped
                    left = left[1:]
                    yield json.loads(printed)
            return
        except ChildProcessError as error:
            reason = str(error)
        except TimeoutError:
            reason, lost = LEFT_OUT, len(left)
        yield from (_failed(case, turn, reason) for case in left[:lost])
        left = left[lost:]


def _not_installed(case: Case) -> str:
    """Why there is no point in building a model; "" if there is."""
    if case.contender == UNSLOTH and find_spec("unsloth") is None:
        return "not installed: requirements-unsloth.txt"
    if "liger" in case.prepared and find_spec("liger_kernel") is None:
        return "not installed: requirements-liger.txt"
    return ""


def _failed(case: Case, turn: Turn, reason: str) -> dict[str, Any]:
    return {**asdict(case), "cap_gib": turn.cap_gib, "failed": reason}


def _output(turn: Turn, options: argparse.Namespace, deadline: float) -> Iterator[str]:
    """The lines that the process of a turn prints.

    Raises:
        TimeoutError: the deadline has come; the process has been stopped.
        ChildProcessError: it died; the text says of what.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    command = [sys.executable, __file__, "--turn", turn.to_json()]
    for name in ("steps", "warmup", "seconds_per_case", "seed"):
        command += [f"--{name.replace('_', '-')}", str(vars(options)[name])]
    command += ["--tiny"] * options.tiny
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        timer = threading.Timer(seconds, _stop, [process])
        timer.start()
        try:
            yield from process.stdout
            code = process.wait()
        finally:  # also where whoever reads the lines is stopped
            timer.cancel()
            process.kill()
        if code and time.monotonic() >= deadline:
            raise TimeoutError
        if code:
            errors.seek(0)
            raise ChildProcessError(_last_words(code, errors.read().strip().splitlines()))


def _last_words(code: int, lines: list[str]) -> str:
    """Why a process died, in a line; more of what it said goes to the screen."""
    print("\n".join(lines[-30:]), file=sys.stderr)
    signalled = [f"killed by {signal.Signals(-code).name}"] if code < 0 else []
    errors = [line for line in lines if re.match(r"[\w.]+Error: ", line)]  # CUDA's go on after it
    said = (errors or lines)[-1:]
    return "; ".join(signalled + said)[:300] or "no message"


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()


# -- one turn, in its own process --


def work(turn: Turn, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures the cases of a turn; of a cap's, up to the first that does not fit."""
    disable_progress_bars()
    scale = gpu_model.TINY if options.tiny else gpu_model.LLAMA_3_8B
    device = pick_device()
    if turn.cap_gib and device.type == "cuda" and not _cap(turn, device):
        yield _failed(turn.cases[0], turn, f"this GPU has less than {turn.cap_gib:g} GiB")
        return
    dtype = pick_precision("auto", device)
    rate = matrix_rate(scale.matrix, dtype, device)
    policy = _policy(turn, options, scale, device, dtype)
    start = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    bench = Bench(policy, start, scale, rate, dtype, options)
    print(READY, flush=True)
    for case in turn.cases:
        try:
            row = measure(case, bench)
        except ModelError as error:
            yield _failed(case, turn, str(error))
            continue
        row |= {"matrix_rate": rate, "cap_gib": turn.cap_gib}
        if case.contender == OURS:
            row |= predicted(case, bench, turn)
        yield with_rates(row)
        if turn.cap_gib and (row.get("out_of_memory") or row["cut_to"]):
            return


def _cap(turn: Turn, device: torch.device) -> bool:
    """Leaves PyTorch what a card of this size has beside the driver's own; False if there is not
    as much."""
    assert turn.cap_gib is not None
    total = torch.cuda.get_device_properties(device).total_memory
    share = (turn.cap_gib * GIB - SHARES[False].held) / total
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)
    return share < 1


def _policy(
    turn: Turn,
    options: argparse.Namespace,
    scale: Scale,
    device: torch.device,
    dtype: torch.dtype,
) -> PeftModel:
    base = gpu_model.random_base(scale, device, dtype, options.seed)
    if turn.cases[0].contender == UNSLOTH:
        with tempfile.TemporaryDirectory() as folder:
            gpu_model.save_base(base, Path(folder), dtype)
            del base
            gc.collect()
            torch.cuda.empty_cache()
            return _unsloth_policy(folder, turn, scale, dtype)
    return add_adapter(base, rank=RANK, alpha=2 * RANK)


def _unsloth_policy(folder: str, turn: Turn, scale: Scale, dtype: torch.dtype) -> PeftModel:
    """The same weights through Unsloth's own loader."""
    from gapo_lite.unsloth_backend import load_unsloth_policy

    if "Unsloth" not in common.CPOTrainer.__name__:
        raise ModelError("Unsloth has not patched TRL's CPOTrainer: nothing to compare with")
    return load_unsloth_policy(
        folder,
        revision=None,
        quantization="nf4",
        dtype=dtype,
        max_length=scale.max_length,
        rank=RANK,
        alpha=2 * RANK,
        dropout=0.0,
        target_modules="all-linear",
        gradient_checkpointing=bool(turn.cases[0].recomputed),
        seed=42,
    )


def measure(case: Case, bench: Bench) -> dict[str, Any]:
    """Trains some steps and says what they took; or that memory ran out.

    Raises:
        ModelError: a lever does not fit this machine.
    """
    usual_tiles = logps.TILE_ROWS
    logps.TILE_ROWS = case.tile_rows or usual_tiles
    try:
        _prepare(case, bench)
        return {**asdict(case), "model_gib": _held_bytes() / GIB, **_train(case, bench)}
    except (RuntimeError, RunError) as error:
        if not is_out_of_memory(error) and "out of memory" not in str(error):
            raise  # the trainer says the latter where a single pair is too much
        return {**asdict(case), "out_of_memory": " ".join(str(error).split())[:300]}
    finally:
        logps.TILE_ROWS = usual_tiles
        # accelerate's wrappers would pile up, and not be put where it believes them to be
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            bench.policy.__dict__.pop(name, None)


def _prepare(case: Case, bench: Bench) -> None:
    """The same adapter for every case, nothing left of the case before, peaks from here on."""
    for lever in case.prepared:
        if lever not in bench.prepared:
            LEVERS[lever](bench.policy)
            bench.prepared.add(lever)
    if case.contender != UNSLOTH:
        causal_model(bench.policy).set_attn_implementation(SHARED_PREFIX if case.packed else "sdpa")
        offload = case.offloaded and torch.cuda.is_available()
        set_recomputation(bench.policy, case.recomputed, offload=offload)
    bench.policy.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, parameter in bench.policy.named_parameters():
            if name in bench.start:
                parameter.copy_(bench.start[name])
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        common.reset_peak()


def _put_liger_into(policy: PeftModel) -> None:
    from gapo_lite.liger_backend import put_kernels_into

    put_kernels_into(causal_model(policy), "this model")


LEVERS = {"fused": fuse_layers, "dequantized": dequantize_base, "liger": _put_liger_into}


def _pairs(case: Case, bench: Bench) -> list[TokenizedPair]:
    steps = bench.options.warmup + bench.options.steps
    return gpu_model.synthetic_pairs(bench.scale, steps * case.pairs, bench.options.seed)


def _train(case: Case, bench: Bench) -> dict[str, Any]:
    options, pairs = bench.options, _pairs(case, bench)
    clock = common.StepClock(options.warmup, options.seconds_per_case)
    with tempfile.TemporaryDirectory() as folder:
        arguments = common.shared_arguments(
            Path(folder),
            steps=options.warmup + options.steps,
            micro_batch=case.pairs,
            learning_rate=LEARNING_RATE,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = _trainer(case, bench, pairs, arguments)
        trainer.add_callback(clock)
        trainer.train()
    first, last = options.warmup, options.warmup + len(clock.seconds)
    steps = [pairs[i * case.pairs : (i + 1) * case.pairs] for i in range(first, last)]
    config = causal_model(bench.policy).config
    passes = [_passes(case, step) for step in steps]
    return {
        "step_seconds": clock.seconds,
        "step_tokens": [sum(pair.num_tokens for pair in step) for step in steps],
        "step_passes": [len(groups) for groups in passes],
        "step_tokens_processed": [
            sum(processed(group, _layout(case))[0] for group in groups) for groups in passes
        ],
        "step_flops": [
            sum(executed_flops(config, group, _layout(case), case.recomputed) for group in groups)
            for groups in passes
        ],
        "step_useful_flops": [executed_flops(config, step, "packed", 0.0) for step in steps],
        # Limits after memory ran out; None where it did not.
        "cut_to": asdict(trainer.limits)
        if case.contender == OURS and trainer.limits != case.limits
        else None,
        "first_loss": float(trainer.step_losses[0]),
        **_peaks(),
    }


def _trainer(
    case: Case, bench: Bench, pairs: list[TokenizedPair], arguments: dict[str, Any]
) -> common.RecordedGapoTrainer | common.RecordedCPOTrainer:
    # accelerate keeps one precision a process: bf16 is TRL's. It only wraps the policy's own
    # forward, which GaPO-Lite does not call.
    bf16 = bench.dtype == torch.bfloat16
    if case.contender == OURS:
        return common.RecordedGapoTrainer(
            bench.policy,
            TrainingArguments(**arguments, bf16=bf16),
            pairs,
            objective=ObjectiveConfig(name="simpo", beta=BETA),
            layout="packed" if case.packed else "padded",
            limits=case.limits,
        )
    length = bench.scale.max_length
    config = common.cpo_config(arguments, beta=BETA, gamma=GAMMA, max_length=length, bf16=bf16)
    return common.cpo_trainer(bench.policy, pairs, config)


def _layout(case: Case) -> str:
    if case.contender != OURS:
        return "full logits"
    return "packed" if case.packed else "padded"


def _passes(case: Case, step: list[TokenizedPair]) -> list[list[TokenizedPair]]:
    """The pairs of each forward pass of a step."""
    if case.contender != OURS:
        return [step]
    sizes = [num_tokens(*pair.lengths, packed=case.packed) for pair in step]
    groups = case.limits.micro_batches(sizes, packed=case.packed)
    return [[step[index] for index in group] for group in groups]


def _held_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else common.resident_bytes()


def _peaks() -> dict[str, float]:
    """On a GPU as PyTorch's allocator counts; else resident memory, which has no reserve."""
    if not torch.cuda.is_available():
        return {"peak_gib": peak_resident_bytes() / GIB, "reserved_gib": 0.0}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


def predicted(case: Case, bench: Bench, turn: Turn) -> dict[str, float]:
    """What `gapo-lite plan` says of this case: pairs a second, and the peak of PyTorch's
    allocator, so without the driver's share.

    The plan takes fused layers and the usual tiles for granted, and does not know Liger's kernels.
    """
    model = {"dequantized_cache": "always" if "dequantized" in case.prepared else "never"}
    training = {
        "batch_size": case.pairs,
        "micro_batch_size": case.at_once,
        "micro_batch_tokens": case.tokens,
        "gradient_checkpointing": case.recomputed,
        "offload": "always" if case.offloaded else "never",
    }
    settings = {"model": model, "training": training, "lora": {"rank": RANK}}
    if case.limits == MicroBatchLimits():
        training["micro_batch_size"] = case.pairs
    plan = _plan_of(parse_config(settings), case, bench)
    peak = plan.peak
    if torch.cuda.is_available():
        peak -= plan.parts["libraries and driver"]
    return {
        "predicted_pairs_per_second": plan.pairs_per_second,
        "predicted_peak_gib": peak / GIB,
        "predicted_to_fit": turn.cap_gib is None
        or plan.peak <= SHARES[False].memory * turn.cap_gib * GIB,
    }


def _plan_of(config: RunConfig, case: Case, bench: Bench) -> Plan:
    shape = shape_of(gpu_model.llama_config(bench.scale), config.lora, bench.dtype)
    lengths = sizes_of(_pairs(case, bench))
    work = Workload(lengths, lengths[:0], batch_size=case.pairs, packed=case.packed)
    return best_plan(config, shape, work, this_device(config, measure=True))


# -- the file --


class ResultFile:
    """What `--json` names, replaced as a whole whenever something has been measured.

    Parts of an earlier call stay, unless one of their cases has been measured again.

    Args:
        path: of the file; None for no file.
        settings: of this call.
        machine: what is measured on.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], machine: dict[str, Any]):
        self.path, self.settings, self.machine = path, settings, machine
        self.earlier = json.loads(path.read_text()) if path and path.is_file() else {}
        self.parts = dict(self.earlier)

    def write(self, part: str, rows: list[dict[str, Any]], *, ended: bool) -> None:
        """Writes the rows of a part so far, and what follows from them."""
        left_out = [row.get("failed") == LEFT_OUT for row in rows]
        if self.path is None or (part in self.earlier and all(left_out)):
            return
        self.parts[part] = {
            "machine": self.machine,
            "settings": self.settings,
            "complete": ended and not any(left_out),
            "summary": summarize(rows),
            "measurements": rows,
            "ratios": compare(rows),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps(self.parts, indent=1) + "\n")


if __name__ == "__main__":
    main()
