"""Statistics over seeds, against published tables and sums one can redo on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gapo_lite.statistics import (
    difference,
    estimate,
    holm,
    t_quantile,
    t_within,
    wilson,
)

# Two-sided 95 % and 99 %, from the table in every textbook.
T_TABLE = [
    (1, 12.706, 63.657),
    (2, 4.303, 9.925),
    (3, 3.182, 5.841),
    (4, 2.776, 4.604),
    (5, 2.571, 4.032),
    (9, 2.262, 3.250),
    (10, 2.228, 3.169),
    (29, 2.045, 2.756),
    (30, 2.042, 2.750),
    (120, 1.980, 2.617),
]


@pytest.mark.parametrize(("df", "at_95", "at_99"), T_TABLE)
def test_quantiles_are_those_of_the_table(df, at_95, at_99):
    assert t_quantile(df) == pytest.approx(at_95, abs=5e-4)
    assert t_quantile(df, 0.99) == pytest.approx(at_99, abs=5e-4)


def test_one_and_two_degrees_of_freedom_have_closed_forms():
    assert t_within(1.0, 1) == pytest.approx(0.5)
    assert t_within(3.7, 1) == pytest.approx(2 / math.pi * math.atan(3.7))
    assert t_within(3.7, 2) == pytest.approx(3.7 / math.sqrt(2 + 3.7**2))
    assert t_within(0.0, 7) == 0


@pytest.mark.parametrize("df", [3, 4, 8, 15])
def test_the_distribution_is_that_of_means_over_their_errors(df):
    draws = np.random.default_rng(df).normal(size=(200_000, df + 1))
    t = np.abs(draws.mean(1)) / (draws.std(1, ddof=1) / math.sqrt(df + 1))
    for at in (0.5, 1.0, 2.0, 3.0):
        assert t_within(at, df) == pytest.approx((t <= at).mean(), abs=0.004)


def test_the_interval_of_three_seeds_can_be_redone_on_paper():
    # mean 4, deviations −2, 0, 2: s = 2, s/√3 = 1.1547, times 4.3027
    found = estimate([2.0, 4.0, 6.0])
    assert found.mean == 4
    assert found.half_width == pytest.approx(4.9683, abs=1e-4)
    # t = 4 / 1.1547 = 3.4641; P(|T₂| ≤ t) = t/√(2 + t²)
    assert found.p == pytest.approx(1 - math.sqrt(12) / math.sqrt(14))
    assert found.includes_zero


def test_the_interval_excludes_zero_exactly_where_p_is_below_5_percent():
    for shift in np.linspace(0.5, 8, 40):
        found = estimate([shift - 2, shift, shift + 2])
        assert found.includes_zero == (found.p > 0.05)


def test_one_seed_has_no_interval_and_none_has_no_mean():
    one, none = estimate([0.7]), estimate([])
    assert (one.mean, one.half_width, one.num, one.p) == (0.7, None, 1, None)
    assert one.includes_zero
    assert math.isnan(none.mean)
    assert none.num == 0


def test_equal_values_have_no_interval_rather_than_one_of_no_width():
    found = estimate([0.1 + 0.2, 0.3, 0.3])
    assert found.half_width is None
    assert found.includes_zero


def test_what_is_no_number_is_left_out_and_counted():
    found = estimate([1.0, math.nan, 3.0, math.inf])
    assert (found.mean, found.num, found.num_lost) == (2.0, 2, 2)


def test_huge_values_do_not_overflow():
    assert estimate([1e308, 1e308, 1.1e308]).mean == pytest.approx(1.0333e308, rel=1e-3)
    assert estimate([1.7e308, -1.7e308]).num == 2


def test_differences_are_taken_seed_by_seed():
    # Seeds differ by far more than the contenders do, which pairing takes out.
    ours = {1: 10.1, 2: 20.2, 3: 30.3, 9: 99.0}
    theirs = {1: 10.0, 2: 20.0, 3: 30.0, 8: 0.0}
    found = difference(ours, theirs)
    assert found.num == 3
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert difference(ours, {7: 1.0}).num == 0


def test_holm_is_the_example_of_the_textbook():
    # 0.01 × 4, 0.02 × 3, 0.03 × 2, 0.04 × 1, never falling: 0.04, 0.06, 0.06, 0.06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_wilson_stays_between_0_and_1():
    # 0.5 of 100: 0.4038 to 0.5962 (Wilson, in Newcombe 1998)
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = wilson(0.0, 10)
    assert low == 0.0
    assert high == pytest.approx(0.2775, abs=1e-4)
    for num in range(1, 50):
        assert wilson(1.0, num)[1] <= 1.0
    assert wilson(1.0, 4) == pytest.approx((0.5101, 1.0), abs=1e-4)  # 4 / (4 + 1.96²)
