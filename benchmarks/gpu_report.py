"""What gpu_8b.py makes of its measurements: rates, medians, ratios, tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

OURS, TRL, UNSLOTH = "gapo-lite", "trl", "unsloth"
LOSS_TOLERANCE = 0.1
"""How far the losses of the first step may lie apart in bfloat16; β = 10 magnifies the rounding."""
LEFT_OUT = "left out: --minutes were over"
"""Why a case has not been measured that could have been."""
_TITLES = {OURS: "GaPO-Lite", TRL: "TRL", UNSLOTH: "Unsloth"}


def with_rates(row: dict[str, Any]) -> dict[str, Any]:
    """Adds what follows from the steps' figures; a case out of memory stays as it is."""
    if "out_of_memory" in row:
        return row
    seconds, steps, rate = sum(row["step_seconds"]), len(row["step_seconds"]), row["matrix_rate"]
    pairs = steps * row["pairs"]
    return {
        **row,
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": sum(row["step_tokens"]) / seconds,
        "tokens_per_pair": sum(row["step_tokens_processed"]) / pairs,
        "busy": sum(row["step_flops"]) / seconds / rate,
        "useful": sum(row["step_useful_flops"]) / seconds / rate,
    }


_CASE = ("pairs", "recomputed", "contender", "lever", "cap_gib")
_MEDIANS = (
    *("pairs_per_second", "tokens_per_second", "tokens_per_pair", "peak_gib", "reserved_gib"),
    *("busy", "useful", "first_loss", "predicted_pairs_per_second", "predicted_peak_gib"),
)


def _where(rows: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row.get(name) == v for name, v in fields.items())]


def _distinct(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The different values of these fields, in order of appearance."""
    found = dict.fromkeys(tuple(row.get(name) for name in names) for row in rows)
    return [dict(zip(names, values, strict=True)) for values in found]


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds, a row for each case; or why there are none."""
    summary = []
    for case in _distinct(rows, *_CASE):
        own = _where(rows, **case)
        ran = [row for row in own if "step_seconds" in row]
        medians = {
            n: statistics.median(row[n] for row in ran) for n in _MEDIANS if ran and n in ran[0]
        }
        last = (ran or own)[-1]  # a round that was left out does not hide the one before
        kept = ("failed", "out_of_memory", "cut_to", "predicted_to_fit")
        summary.append(case | medians | {n: last.get(n) for n in kept})
    return summary


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours divided by each other contender's, round by round, over the steps that both took; levers
    and cards are beside nobody."""
    ratios = []
    rows = _where(rows, lever="")
    others = [c for c in _distinct(rows, "contender") if c["contender"] != OURS]
    for setting in _distinct([r for r in rows if "failed" not in r], "pairs", "recomputed"):
        for other in others:
            ran = [row for row in _where(rows, **setting) if "step_seconds" in row]
            rounds = [
                (mine, theirs)
                for mine in _where(ran, contender=OURS)
                for theirs in _where(ran, **other, round=mine["round"])
            ]
            ratios.append({**setting, "other": other["contender"], **_ratio(rounds)})
    return ratios


def _ratio(both: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    if not both:
        return {}
    speed, peak = [], []
    for ours, theirs in both:
        common_steps = list(zip(ours["step_seconds"], theirs["step_seconds"], strict=False))
        mine, other = (sum(seconds) for seconds in zip(*common_steps, strict=True))
        speed.append(other / mine)
        peak.append(ours["peak_gib"] / theirs["peak_gib"])
    ours, theirs = both[0]
    return {
        "pairs_per_second": {"median": statistics.median(speed), "rounds": speed},
        "peak_gib": {"median": statistics.median(peak), "rounds": peak},
        "first_loss_difference": ours["first_loss"] - theirs["first_loss"],
    }


def _cell(name: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: format(row[name], form) if row.get(name) is not None else "–"


def _speed(row: dict[str, Any]) -> str:
    if row.get("failed"):
        return "not measured"
    if "pairs_per_second" not in row:
        return "out of memory"
    return f"{row['pairs_per_second']:.3f}" + (" (cut: memory ran out)" if row["cut_to"] else "")


_WHO: dict[str, Callable[[dict[str, Any]], str]] = {
    "contender": lambda row: _TITLES[row["contender"]],
    "pairs": _cell("pairs", "d"),
    "recomputed": _cell("recomputed", ".0%"),
}
_MEASURED: dict[str, Callable[[dict[str, Any]], str]] = {
    "pairs/s": _speed,
    "tokens/s": _cell("tokens_per_second", ".0f"),
    "tokens/pair": _cell("tokens_per_pair", ".0f"),
    "peak GiB": _cell("peak_gib", ".2f"),
    "reserved": _cell("reserved_gib", ".2f"),
    "busy": _cell("busy", ".1%"),
    "useful": _cell("useful", ".1%"),
}
_PREDICTED: dict[str, Callable[[dict[str, Any]], str]] = {
    "predicted pairs/s": _cell("predicted_pairs_per_second", ".3f"),
    "predicted peak": _cell("predicted_peak_gib", ".2f"),
}


def _name(row: dict[str, Any]) -> str:
    """Whose case, and which."""
    what = row["lever"] or f"{row['pairs']} pairs, {row['recomputed']:.0%} recomputed"
    cap = f"{row['cap_gib']:g} GiB, " if row.get("cap_gib") else ""
    return f"{cap}{_TITLES[row['contender']]}, {what}"


COLUMNS: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    "quick": {"case": _name, **_MEASURED, **_PREDICTED, "first loss": _cell("first_loss", ".4f")},
    "trl": {**_WHO, **_MEASURED, **_PREDICTED, "first loss": _cell("first_loss", ".4f")},
    "levers": {"lever": lambda row: row["lever"], **_MEASURED, **_PREDICTED},
    "caps": {
        "card": lambda row: f"{row['cap_gib'] or math.nan:g} GiB",
        "budget": lambda row: row["lever"],
        **_MEASURED,
        **_PREDICTED,
        "predicted to fit": lambda row: "yes" if row["predicted_to_fit"] else "no",
    },
}
HEADINGS = {
    "quick": "8 pairs a step unless it says otherwise; a card's budgets are of 16 pairs",
    "trl": "Beside the others: medians of the rounds",
    "levers": "Each lever alone on none, and all that are faster; beside, what the plan predicts",
    "caps": "Within the memory of smaller cards: budgets up to the first that does not fit",
}


def line(row: dict[str, Any]) -> str:
    """A case as it has been measured."""
    peak = f" pairs/s, {row['peak_gib']:.2f} GiB" if "peak_gib" in row else ""
    why = f": {row['failed']}" if row.get("failed") else ""
    return f"{_name(row)}: {_speed(row)}{peak}{why}"


def ratio_line(ratio: dict[str, Any]) -> str:
    """One of `compare`."""
    setting = (
        f"GaPO-Lite / {_TITLES[ratio['other']]}, {ratio['pairs']} pairs, "
        f"{ratio['recomputed']:.0%} recomputed"
    )
    if "peak_gib" not in ratio:
        return f"{setting}: not both of them ran"
    speed, peak = ratio["pairs_per_second"], ratio["peak_gib"]
    return (
        f"{setting}: {speed['median']:.2f} times the pairs/s "
        f"({', '.join(f'{v:.2f}' for v in speed['rounds'])}), {peak['median']:.2f} of the peak "
        f"memory, first loss {ratio['first_loss_difference']:+.1e}"
    )


def check_losses(ratios: list[dict[str, Any]]) -> None:
    """Ends the benchmark where the contenders do not compute the same."""
    worst = max((abs(r["first_loss_difference"]) for r in ratios if "peak_gib" in r), default=0.0)
    if not worst <= LOSS_TOLERANCE:
        raise SystemExit(
            f"The contenders do not compute the same: first losses differ by {worst:.2g}, more "
            f"than {LOSS_TOLERANCE}."
        )
