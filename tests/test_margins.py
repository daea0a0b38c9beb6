from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapo_lite.errors import ConfigError, DataError
from gapo_lite.margins import MAPPINGS, constant_margins, estimate_margins

FACTORS = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=50).map(np.array)


@pytest.mark.parametrize(
    ("mapping", "gap_of_a_quarter"),
    [("log", math.log(4)), ("linear", 3 / 4), ("square", 15 / 16), ("sqrt", 1 / 2)],
)
def test_each_mapping_gives_the_gap_of_table_4(mapping, gap_of_a_quarter):
    margins = estimate_margins(np.array([0.25, 1.0]), mapping=mapping, normalization="none")
    assert margins.values == pytest.approx([gap_of_a_quarter, 0.0], abs=1e-15)
    assert not np.signbit(margins.values[1])  # 0.0, not -0.0


def test_scale_by_hand():
    # gaps log 2 and log 8 = 3 log 2; their mean is 2 log 2; margins γ/2 and 3γ/2
    margins = estimate_margins(np.array([1 / 2, 1 / 8]), gamma=0.3)
    assert margins.values == pytest.approx([0.15, 0.45])
    assert margins.mean_gap == pytest.approx(2 * math.log(2))


def test_shift_by_hand_can_be_negative_and_is_counted():
    margins = estimate_margins(
        np.array([0.0, 1.0]), mapping="linear", normalization="shift", gamma=0.3, ef_floor=0.2
    )
    assert margins.values == pytest.approx([0.8 - 0.4 + 0.3, 0.0 - 0.4 + 0.3])
    assert (margins.num_floored, margins.num_equal, margins.num_negative) == (1, 1, 1)


@given(ef=FACTORS, gamma=st.floats(0.01, 10), mapping=st.sampled_from(sorted(MAPPINGS)))
def test_the_mean_margin_is_gamma(ef, gamma, mapping):
    shifted = estimate_margins(ef, mapping=mapping, normalization="shift", gamma=gamma)
    assert shifted.values.mean() == pytest.approx(gamma, abs=1e-9)
    if shifted.mean_gap > 1e-6:
        scaled = estimate_margins(ef, mapping=mapping, normalization="scale", gamma=gamma)
        assert scaled.values.mean() == pytest.approx(gamma, abs=1e-9)


@given(ef=FACTORS.filter(lambda ef: ef.min() < 0.99), mapping=st.sampled_from(sorted(MAPPINGS)))
def test_margins_keep_the_order_of_the_gaps(ef, mapping):
    for normalization in ("scale", "shift", "none"):
        margins = estimate_margins(ef, mapping=mapping, normalization=normalization)
        order = np.argsort(margins.gaps, kind="stable")
        assert (np.diff(margins.values[order]) >= 0).all()


def test_scale_does_not_care_about_the_base_of_the_logarithm():
    ef = np.array([0.9, 0.5, 0.02])
    natural = estimate_margins(ef, gamma=0.3).values
    binary = 0.3 * -np.log2(ef) / (-np.log2(ef)).mean()
    assert natural == pytest.approx(binary, abs=1e-12)


def test_equal_texts_get_margin_zero_and_disjoint_ones_a_finite_margin():
    margins = estimate_margins(np.array([1.0, 0.0, 0.5]))
    assert margins.values[0] == 0.0
    assert np.isfinite(margins.values[1])
    assert margins.values[1] == margins.values.max()


def test_heldout_pairs_are_normalised_by_the_training_gap():
    train = estimate_margins(np.array([0.5, 0.25]))
    heldout = estimate_margins(np.array([0.25]), mean_gap=train.mean_gap)
    assert heldout.values[0] == pytest.approx(train.values[1])


def test_all_gaps_zero_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match="every gap is 0.*shift"):
        estimate_margins(np.ones(3))
    assert estimate_margins(np.ones(3), normalization="shift").values == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("bad", [[-0.1], [1.1], [float("nan")], [], [[0.5]]])
def test_numbers_that_are_no_factors_are_refused(bad):
    with pytest.raises(DataError):
        estimate_margins(np.array(bad))


@pytest.mark.parametrize(
    "bad", [{"mapping": "exp"}, {"normalization": "z"}, {"ef_floor": 0.0}, {"ef_floor": 1.5}]
)
def test_unknown_settings_are_refused(bad):
    with pytest.raises(ConfigError):
        estimate_margins(np.array([0.5]), **bad)


def test_constant_margins_are_gamma():
    assert constant_margins(3, 0.25).values.tolist() == [0.25] * 3
