"""Win rates by hand, and what length alone explains."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest

from gapo_lite import win_rates
from gapo_lite.errors import ConfigError, DataError
from gapo_lite.pairing import AnswerPair, Entry
from gapo_lite.prompts import text_prompt
from gapo_lite.win_rates import (
    alpaca_eval_win_rate,
    in_alpaca_eval_order,
    length_controlled,
    win_rate,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_the_win_rate_is_the_mean_and_its_interval_that_of_a_share():
    verdicts = np.array([1.0] * 60 + [0.0] * 40)
    found = win_rate(verdicts, range(100), seed=0)
    assert found.value == 0.6
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)  # 9.6 points
    assert found.low == pytest.approx(0.6 - half, abs=0.02)
    assert found.high == pytest.approx(0.6 + half, abs=0.02)
    assert found == win_rate(verdicts, range(100), seed=0) != win_rate(verdicts, range(100), seed=1)


def test_pairs_of_one_prompt_are_drawn_together():
    verdicts = np.tile([1.0, 0.0], 50)
    apart = win_rate(verdicts, range(100), seed=0)
    together = win_rate(verdicts, [n // 2 for n in range(100)], seed=0)
    assert apart.low < 0.42
    assert together.low == together.high == 0.5  # every prompt has one win and one loss


def test_without_an_effect_of_length_the_controlled_rate_is_the_raw_one():
    verdicts = np.array([1.0, 1.0, 0.0, 0.5] * 25)  # the same at each difference of lengths
    differences = np.repeat([-300.0, -20.0, 0.0, 20.0, 300.0], 20)
    found = length_controlled(verdicts, 500 + differences, np.full(100, 500.0), range(100), 0)
    assert found.value == pytest.approx(0.625, abs=1e-9)
    assert found.low < 0.625 < found.high


@pytest.mark.parametrize("certain", [True, False])
def test_where_length_alone_decides_the_controlled_rate_is_about_a_half(certain):
    draw = np.random.default_rng(0)
    lengths_a, lengths_b = draw.normal(1500, 400, 805), draw.normal(1200, 400, 805)
    difference = lengths_a - lengths_b  # A is longer, and so it wins: always, or mostly
    chance = sigmoid(3 * np.tanh(difference / difference.std(ddof=1)))
    verdicts = np.where(difference > 0, 1.0, 0.0) if certain else draw.binomial(1, chance) * 1.0
    found = length_controlled(verdicts, lengths_a, lengths_b, range(805), 0)
    assert verdicts.mean() > 0.65
    assert found.value == pytest.approx(0.5, abs=0.05)
    assert found.low < 0.5 < found.high


def test_a_known_effect_is_taken_out():
    draw = np.random.default_rng(1)
    difference = draw.normal(200, 300, 3_000)
    x = np.tanh(difference / difference.std(ddof=1))
    verdicts = (draw.random(3_000) < sigmoid(0.4 + 1.5 * x)).astype(float)
    found = length_controlled(verdicts, 1000 + difference, np.full(3_000, 1000.0), range(3_000), 0)
    assert verdicts.mean() > 0.68
    assert found.value == pytest.approx(sigmoid(0.4), abs=0.03)  # 59.9 %


@pytest.mark.parametrize(("share", "interval"), [(0.0, (0, 0.2775)), (1.0, (0.7225, 1))])
def test_one_sided_verdicts_stay_one_sided_and_are_not_certain(share, interval):
    verdicts, lengths = np.full(10, share), np.arange(10.0)
    controlled = length_controlled(verdicts, lengths, lengths[::-1], range(10), 0)
    for found in (win_rate(verdicts, range(10), 0), controlled):
        assert found.value == share  # 10 / (10 + 1.96²) = 0.7225
        assert (found.low, found.high) == pytest.approx(interval, abs=1e-4)


def test_verdicts_that_are_the_same_count_by_their_prompts():
    of_five = win_rate(np.ones(10), [n // 2 for n in range(10)], 0)
    assert of_five == win_rate(np.ones(5), range(5), 0)
    assert of_five.low == pytest.approx(5 / (5 + 1.96**2), abs=1e-4)
    ties = win_rate(np.full(12, 0.5), range(12), 0)  # at most 1.96² / (12 + 1.96²) are none
    assert (ties.low, ties.high) == pytest.approx((0.3788, 0.6212), abs=1e-4)


def test_equal_lengths_need_no_control_and_a_constant_difference_allows_none():
    verdicts, lengths = np.array([1.0, 0.0, 1.0]), np.array([5.0, 6.0, 7.0])
    assert length_controlled(verdicts, lengths, lengths, range(3), 0).value == pytest.approx(2 / 3)
    assert length_controlled(verdicts, lengths + 1, lengths, range(3), 0) is None
    one = np.ones(1)
    assert length_controlled(one, one, one, [0], 0).value == 1


@pytest.fixture
def alpaca_eval():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports pkg_resources
        pytest.importorskip("alpaca_eval")
        from alpaca_eval.metrics import glm_winrate
    return glm_winrate


@pytest.mark.filterwarnings("ignore")
def test_our_estimate_agrees_with_the_package_s_own_fit_of_the_same_two_terms(alpaca_eval):
    import pandas as pd

    draw = np.random.default_rng(2)
    difference = draw.normal(150, 300, 805)
    x = np.tanh(difference / difference.std(ddof=1))
    verdicts = (draw.random(805) < sigmoid(-0.3 + 1.2 * x)).astype(float)
    ours = length_controlled(verdicts, 900 + difference, np.full(805, 900.0), range(805), 0)
    data = pd.DataFrame({"x": x, "one": 1.0, "preference": verdicts})
    model = alpaca_eval.fit_LogisticRegressionCV(data, "preference", n_splits=5)
    theirs = model.predict_proba(pd.DataFrame({"x": [0.0], "one": [1.0]}))[0, 1]
    assert ours.value == pytest.approx(theirs, abs=0.01)


def pair(prompt, a, b):
    talks = (
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": x}] for x in (a, b)
    )
    return AnswerPair(*(Entry("", talk, None) for talk in talks))


@pytest.mark.filterwarnings("ignore")
def test_alpaca_eval_s_own_regression_runs_on_its_own_prompts(alpaca_eval, tmp_path, monkeypatch):
    """With a df_gamed.csv of the form that it loads from the Hub, which no test may reach."""
    import pandas as pd

    draw = np.random.default_rng(3)
    index = np.tile(np.arange(805), 2)
    pd.DataFrame(
        {
            "model": "m",
            "index": index,
            "preference": draw.random(1610).round(),
            "std_delta_len": draw.normal(size=1610),
            "instruction_difficulty": np.tile(draw.normal(size=805), 2),
            "not_gamed_baseline": False,
        }
    ).to_csv(tmp_path / "df_gamed.csv", index=False)
    monkeypatch.setattr(alpaca_eval, "hf_hub_download", lambda **_: str(tmp_path / "df_gamed.csv"))
    lengths = draw.integers(1, 400, (805, 2))
    pairs = [pair(str(n), "x" * a, "y" * b) for n, (a, b) in enumerate(lengths)]
    verdicts = [float(a > b) for a, b in lengths]
    verdicts[3] = None
    found = alpaca_eval_win_rate(pairs, verdicts, "mine", "baseline")
    raw = 100 * np.mean([verdict for verdict in verdicts if verdict is not None])
    assert found["win_rate"] == pytest.approx(raw)
    assert found["length_controlled_winrate"] == pytest.approx(50, abs=10)
    json.dumps(found)


@pytest.fixture
def own_prompts(monkeypatch):
    """Three prompts, of which two are the same, in place of AlpacaEval's on the Hub."""
    monkeypatch.setattr(win_rates.importlib.util, "find_spec", lambda name: name)
    prompts = [text_prompt(text) for text in ("one", "two", "one")]
    monkeypatch.setattr(win_rates, "load_prompts", {win_rates.ALPACA_EVAL_BASELINE: prompts}.get)


def test_alpaca_eval_s_prompts_are_brought_into_its_order(own_prompts):
    pairs = [pair("one", "a", "b"), pair("one", "c", "d"), pair("two", "e", "f")]
    found = in_alpaca_eval_order(pairs)
    assert [each.a.answer for each in found] == ["a", "e", "c"]


@pytest.mark.parametrize(
    ("others", "num"), [((), 2), (("three",), 2), (("two", "three"), 2), (("one", "three"), 3)]
)
def test_alpaca_eval_s_regression_is_refused_for_other_prompts(own_prompts, others, num):
    pairs = [pair(text, "a", "b") for text in ("one", "two", *others)]
    says = f"own 3 prompts, each once; of the {len(pairs)} pairs, {num} are on them"
    with pytest.raises(DataError, match=says):
        in_alpaca_eval_order(pairs)


def test_alpaca_eval_s_regression_is_refused_without_its_package_or_its_prompts(monkeypatch):
    monkeypatch.setattr(win_rates.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"requirements-alpaca-eval\.txt"):
        in_alpaca_eval_order([])
    monkeypatch.setattr(win_rates.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(DataError, match=r"alpaca_eval_gpt4_baseline\.json is no file here"):
        in_alpaca_eval_order([pair("one", "a", "b")])
