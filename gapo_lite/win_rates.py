"""Verdicts → win rate with its interval, beside the lengths, and what it were at equal lengths.

A verdict is A's share of a pair: 1 it wins, 0.5 a tie, 0 it loses.

**Length-controlled win rate**, `logistic`. Judges like long answers. With d the difference of the
answers' lengths in characters and s its standard deviation over the pairs, a logistic regression

    P(A wins) = σ(θ + φ · tanh(d / s))

is fitted to the verdicts, and σ(θ) is what it says of answers of equal length. This is AlpacaEval
2.0's regression (Dubois et al. 2024, arXiv 2404.04475) without two of its parts, which exist for
its own 805 prompts only: the difficulty of each instruction, and its regularisation towards the
baseline's own verbose and concise answers. Where theirs picks an L1 penalty by cross-validation,
ours lays a weak normal prior (standard deviation 3) on φ, so that it stays finite where length
decides every verdict; θ has none, so that without an effect of length it is the raw win rate.
`alpaca_eval_win_rate` is theirs, by their package, for their prompts.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gapo_lite.errors import ConfigError, DataError
from gapo_lite.pairing import AnswerPair
from gapo_lite.prompts import load_prompts
from gapo_lite.statistics import wilson

ALPACA_EVAL_BASELINE = "tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json"
"""The prompts in their order, with the answers that its win rate is against; on the Hub."""
_PRIOR_SD = 3.0
_RESAMPLES = 1000
_RESAMPLES_AT_ONCE = 50
_NEWTON_STEPS = 50
_DECIDED = 30.0  # θ grows without end where all verdicts are the same


@dataclass(frozen=True, slots=True)
class WinRate:
    """A share with its 95 % interval, by bootstrap over the prompts. Where all N verdicts are the
    same, so is all that could be drawn from them; then up to Wilson's bound for 0 of N is taken to
    be different.

    Attributes:
        value: in [0, 1].
        low, high: the interval.
    """

    value: float
    low: float
    high: float


def win_rate(verdicts: NDArray[np.float64], groups: Sequence[object], seed: int) -> WinRate:
    """The mean verdict.

    Args:
        verdicts: (N,) in [0, 1], N > 0.
        groups: N; pairs of one prompt belong together and are drawn together.
        seed: of the bootstrap.
    """
    if (verdicts == verdicts[0]).all():
        share, others = float(verdicts[0]), wilson(0.0, len(set(groups)))[1]
        return WinRate(share, share - others * share, share + others * (1 - share))
    rates = [weights @ verdicts / weights.sum(1) for weights in _resamples(groups, seed)]
    return _with_interval(float(verdicts.mean()), np.concatenate(rates))


def length_controlled(
    verdicts: NDArray[np.float64],
    lengths_a: NDArray[np.float64],
    lengths_b: NDArray[np.float64],
    groups: Sequence[object],
    seed: int,
) -> WinRate | None:
    """The win rate at equal lengths; None where length and quality cannot be told apart, because
    A's answers are all longer than B's by the same.

    Args:
        verdicts: (N,) in [0, 1], N > 0.
        lengths_a, lengths_b: (N,) characters.
        groups, seed: as for `win_rate`.
    """
    difference = lengths_a - lengths_b
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    if spread == 0.0:
        return win_rate(verdicts, groups, seed) if not difference.any() else None
    if (verdicts == verdicts[0]).all():
        return win_rate(verdicts, groups, seed)
    x = np.tanh(difference / spread)
    fit = _fit(verdicts, x, np.ones((1, len(x))), np.zeros((1, 2)))
    rates = [
        _at_equal_lengths(verdicts, weights, _fit(verdicts, x, weights, fit))
        for weights in _resamples(groups, seed)
    ]
    value = _at_equal_lengths(verdicts, np.ones((1, len(x))), fit)[0]
    return _with_interval(float(value), np.concatenate(rates))


def _at_equal_lengths(
    verdicts: NDArray[np.float64], weights: NDArray[np.float64], fit: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(R,): σ(θ), or 1 (or 0) where all that is drawn are wins (or losses)."""
    share = weights @ verdicts / weights.sum(1)
    return np.where((share <= 0) | (share >= 1), share, _sigmoid(fit[:, 0]))


def _fit(
    verdicts: NDArray[np.float64],
    x: NDArray[np.float64],
    weights: NDArray[np.float64],
    start: NDArray[np.float64],
) -> NDArray[np.float64]:
    """θ and φ (R, 2) for each row of `weights` (R, N), by Newton's method."""
    theta, phi = (np.broadcast_to(start[:, k], len(weights)).copy() for k in (0, 1))
    for _ in range(_NEWTON_STEPS):
        p = _sigmoid(theta[:, None] + phi[:, None] * x)
        miss, curve = weights * (verdicts - p), weights * p * (1 - p)
        g0, g1 = miss.sum(1), miss @ x - phi / _PRIOR_SD**2
        h00, h01 = curve.sum(1) + 1e-9, curve @ x
        h11 = curve @ (x * x) + 1 / _PRIOR_SD**2
        det = h00 * h11 - h01 * h01
        step0, step1 = (h11 * g0 - h01 * g1) / det, (h00 * g1 - h01 * g0) / det
        length = np.hypot(step0, step1)
        # a step that is too long would leap over the optimum where all is nearly decided
        scale = np.minimum(1.0, 2.0 / np.maximum(length, 1e-12))
        theta, phi = theta + scale * step0, phi + scale * step1
        if length.max() < 1e-8 or np.abs(theta).max() > _DECIDED:
            break
    return np.stack((theta, phi), axis=1)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(x / 2))


def _resamples(groups: Sequence[object], seed: int) -> Iterator[NDArray[np.float64]]:
    """Some rows (r, N) at a time: how often each pair is drawn when prompts are drawn with
    replacement."""
    names = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    of_pair = np.array([names[group] for group in groups])
    draw = np.random.default_rng(seed)
    shares = np.full(len(names), 1 / len(names))
    for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE):
        drawn = draw.multinomial(len(names), shares, size=_RESAMPLES_AT_ONCE)
        yield drawn[:, of_pair].astype(np.float64)


def _with_interval(value: float, rates: NDArray[np.float64]) -> WinRate:
    low, high = np.quantile(rates, [0.025, 0.975])
    return WinRate(value, float(low), float(high))


# -- AlpacaEval's own --


def in_alpaca_eval_order(pairs: Sequence[AnswerPair]) -> list[AnswerPair]:
    """Pairs on AlpacaEval's own prompts, in its order, which its regression goes by: it knows how
    difficult each one is. What it cannot take is refused before anything is paid for.

    Raises:
        ConfigError: the package is not installed.
        DataError: these are not its prompts, or its prompts cannot be loaded.
    """
    if importlib.util.find_spec("alpaca_eval") is None:
        raise ConfigError(
            "--length-control alpaca_eval needs the package alpaca_eval: pip install -r "
            "requirements-alpaca-eval.txt, or take --length-control logistic."
        )
    waiting: dict[tuple[str, ...], list[AnswerPair]] = defaultdict(list)
    for pair in pairs:
        waiting[pair.a.questions].append(pair)
    wanted = [(prompt.text,) for prompt in load_prompts(ALPACA_EVAL_BASELINE)]
    found = [waiting[question].pop(0) for question in wanted if waiting[question]]
    if len(found) != len(wanted) or len(found) != len(pairs):
        raise DataError(
            f"AlpacaEval's regression needs its own {len(wanted)} prompts, each once; of the "
            f"{len(pairs)} pairs, {len(found)} are on them. Take --length-control logistic."
        )
    return found


def alpaca_eval_win_rate(
    pairs: Sequence[AnswerPair], verdicts: Sequence[float | None], a: str, b: str
) -> dict[str, float]:
    """`length_controlled_winrate`, `lc_standard_error` and `win_rate` in percent, by AlpacaEval's
    package with its defaults; it loads the instructions' difficulties from the Hub.

    Args:
        pairs: as `in_alpaca_eval_order` returns them; B is its baseline.
        verdicts: one a pair, None for those without.
        a, b: names of the models.

    Raises:
        DataError: its file cannot be loaded, or its regression fails on these verdicts.
    """
    import warnings

    import pandas as pd

    rows = [
        {
            "output_1": pair.b.answer,
            "output_2": pair.a.answer,
            "generator_1": b,
            "generator_2": a if a != b else f"{a} (A)",
            "annotator": "gapo-lite",
            "preference": float("nan") if verdict is None else 1.0 + verdict,
        }
        for pair, verdict in zip(pairs, verdicts, strict=True)
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports pkg_resources
            from alpaca_eval.metrics import get_length_controlled_winrate

            found = get_length_controlled_winrate(pd.DataFrame(rows), save_weights_dir=None)
    except Exception as error:  # its download, or its solver
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(
            f"AlpacaEval's own regression failed ({reason}). It loads df_gamed.csv from the data "
            "set tatsu-lab/alpaca_eval on the Hub. Take --length-control logistic, which needs "
            "nothing."
        ) from None
    names = ("length_controlled_winrate", "lc_standard_error", "win_rate")
    return {name: float(found[name]) for name in names}
