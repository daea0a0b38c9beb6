"""Verdicts → what is printed and stored of a comparison: win rate and length, always together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np

from gapo_lite.errors import DataError
from gapo_lite.judge import Verdict
from gapo_lite.pairing import AnswerPair, Entry
from gapo_lite.terminal import note, show_table
from gapo_lite.win_rates import alpaca_eval_win_rate, length_controlled, win_rate

_FEWEST_PAIRS = 10  # drawing from fewer says little of how other prompts would have come out
LENGTH_CONTROL = {
    "logistic": "logistic regression of the verdict on tanh of the standardised difference of "
    "lengths, at difference 0; see gapo_lite/win_rates.py",
    "alpaca_eval": "AlpacaEval 2.0's, by its package",
}


def summarize(
    a: str,
    b: str,
    judge: str,
    pairs: Sequence[AnswerPair],
    verdicts: Sequence[Verdict],
    *,
    num_unpaired: int = 0,
    length_control: str = "logistic",
    seed: int = 0,
) -> dict[str, Any]:
    """All that is stored of a comparison except the verdicts.

    Raises:
        DataError: no pair has a verdict, or AlpacaEval's own regression fails.
    """
    usable = [(p, v.score) for p, v in zip(pairs, verdicts, strict=True) if v.score is not None]
    if not usable:
        reason = _first_reason(verdicts) or "no prompt has an answer in either file"
        raise DataError(f"no pair has a usable verdict, so there is no win rate: {reason}.")
    scores = np.array([score for _, score in usable])
    of_a, of_b = (
        np.array([float(len(pair[side].answer)) for pair, _ in usable]) for side in (0, 1)
    )
    groups = [pair.a.prompt for pair, _ in usable]
    controlled = length_controlled(scores, of_a, of_b, groups, seed)
    how = Counter(verdict.how for verdict in verdicts)
    bias = Counter(verdict.bias for verdict in verdicts if verdict.bias)
    summary = {
        "a": a,
        "b": b,
        "judge": judge,
        "num_pairs": len(pairs),
        "num_usable": len(usable),
        "num_unusable": how["unusable"],
        "unusable_reason": _first_reason(verdicts),
        "num_unanswered": how["unanswered"],
        "num_equal": how["equal"],
        "num_empty": how["empty"],
        "num_unpaired": num_unpaired,
        "wins": int((scores == 1).sum()),
        "ties": int((scores == 0.5).sum()),
        "losses": int((scores == 0).sum()),
        "win_rate": asdict(win_rate(scores, groups, seed)),
        "length_controlled_win_rate": asdict(controlled) if controlled else None,
        "length_control": LENGTH_CONTROL["logistic"],
        "interval": "95 %, bootstrap over prompts; from Wilson's where all verdicts are the same",
        "seed": seed,
        "characters": [float(of_a.mean()), float(of_b.mean())],
        "tokens": [_mean_tokens([pair[side] for pair, _ in usable]) for side in (0, 1)],
        "position_bias": {place: bias[place] for place in ("first", "second", "mixed")},
    }
    if length_control == "alpaca_eval":
        shares = [verdict.score for verdict in verdicts]
        summary["alpaca_eval"] = alpaca_eval_win_rate(pairs, shares, a, b)
    return summary


def verdict_rows(pairs: Sequence[AnswerPair], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Every verdict, with its prompt and the lengths of its answers."""
    return [
        {
            "id": pair.a.key,
            "prompt": "\n\n".join(pair.a.questions),
            "characters": [len(pair.a.answer), len(pair.b.answer)],
            "bias": verdict.bias,
            **asdict(verdict),
        }
        for pair, verdict in zip(pairs, verdicts, strict=True)
    ]


def show_summary(summary: dict[str, Any]) -> None:
    """The summary as a table on stdout, remarks on stderr."""
    rate, controlled = summary["win_rate"], summary["length_controlled_win_rate"]
    characters, tokens = summary["characters"], summary["tokens"]
    counts = f"{summary['wins']} / {summary['ties']} / {summary['losses']}"
    lengths = " against ".join(
        f"{mean:,.0f}" + ("" if count is None else f" ({count:,.0f} tokens)")
        for mean, count in zip(characters, tokens, strict=True)
    )
    rows = [
        ("win rate of A", _shown(rate)),
        ("the same at equal lengths", _shown(controlled) if controlled else "not to be told"),
        ("mean length in characters, A against B", lengths),
        ("wins, ties, losses", counts),
        ("pairs with a verdict", f"{summary['num_usable']} of {summary['num_pairs']}"),
    ]
    if theirs := summary.get("alpaca_eval"):
        error = theirs["lc_standard_error"]
        rows[2:2] = [
            (
                "AlpacaEval's LC win rate",
                f"{theirs['length_controlled_winrate']:.1f}% ± {error:.1f}",
            )
        ]
    title = f"A {summary['a']}, B {summary['b']}; judged by {summary['judge']}"
    show_table(("", "A"), rows, title)
    _show_remarks(summary)


def _show_remarks(summary: dict[str, Any]) -> None:
    bias = summary["position_bias"]
    if summary["num_usable"] < _FEWEST_PAIRS:
        note(
            f"With {summary['num_usable']} pairs all of this may be chance; an interval from so "
            "few is too narrow."
        )
    if any(bias.values()):
        note(
            f"The two orders disagree in {sum(bias.values())} pairs, counted as ties: the first "
            f"answer is preferred in {bias['first']}, the second in {bias['second']}, one order is "
            f"a tie in {bias['mixed']}."
        )
    if summary["num_unusable"]:
        note(
            f"{summary['num_unusable']} pairs have no usable verdict, and count for nobody; the "
            f"first: {summary['unusable_reason']}."
        )
    if summary["num_unanswered"]:
        note(f"{summary['num_unanswered']} prompts have no answer in either file: left out.")
    if summary["num_equal"] or summary["num_empty"]:
        note(
            f"Not asked about: {summary['num_equal']} pairs of equal answers (ties), "
            f"{summary['num_empty']} with an empty one (which loses)."
        )
    if summary["num_unpaired"]:
        note(f"{summary['num_unpaired']} answers of the two files have no partner.")


def _first_reason(verdicts: Sequence[Verdict]) -> str:
    return next((verdict.reason for verdict in verdicts if verdict.reason), "")


def _shown(rate: dict[str, float]) -> str:
    return f"{rate['value']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"


def _mean_tokens(entries: Sequence[Entry]) -> float | None:
    known = [entry.num_tokens for entry in entries if entry.num_tokens is not None]
    return fmean(known) if len(known) == len(entries) else None
