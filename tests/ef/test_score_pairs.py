"""What `score_pairs` takes, gives and refuses, whatever the factor."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

import gapo_lite
from gapo_lite.ef import EVALUATION_FACTORS, OPTIONS, check_options, score_pairs
from gapo_lite.errors import ConfigError, DataError

MINILM = "embedded:all-minilm-l6-v2"


def test_the_factors_are_those_of_table_1():
    lexical, semantic = (
        [key for key, factor in EVALUATION_FACTORS.items() if factor.family == family]
        for family in OPTIONS
    )
    assert lexical == ["jaccard", "rouge1", "rouge2", "rougeL"]
    assert semantic == ["bertscore_p", "bertscore_r", "bertscore_f1"]
    directed = [key for key, factor in EVALUATION_FACTORS.items() if not factor.symmetric]
    assert directed == ["bertscore_p", "bertscore_r"]
    assert all(factor.family in OPTIONS for factor in EVALUATION_FACTORS.values())
    assert all("\n" not in factor.description for factor in EVALUATION_FACTORS.values())


def test_a_factor_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EVALUATION_FACTORS["rougeL"].symmetric = False


@pytest.mark.parametrize("ef", EVALUATION_FACTORS)
def test_scores_are_float64_of_one_a_pair_in_0_to_1(ef):
    options = {"model": MINILM} if ef.startswith("bertscore") else {}
    chosen, rejected = ["Water boils.", "Yes", "", "a"], ["Water freezes.", "Yes", "no", ""]
    scores = score_pairs(chosen, rejected, ef, **options)
    assert scores.dtype == np.float64
    assert scores.shape == (4,)
    assert np.all((scores >= 0) & (scores <= 1))
    assert list(scores[2:]) == [0.0, 0.0]


@pytest.mark.parametrize("ef", EVALUATION_FACTORS)
def test_no_pairs_give_no_scores(ef):
    scores = score_pairs([], [], ef)
    assert scores.dtype == np.float64
    assert scores.shape == (0,)


def test_rouge_l_is_the_default_and_the_package_offers_the_function():
    pair = ["the cat sat"], ["sat the cat"]
    np.testing.assert_array_equal(gapo_lite.score_pairs(*pair), score_pairs(*pair, "rougeL"))


def test_tuples_and_arrays_of_strings_are_as_good_as_lists():
    expected = score_pairs(["a b", "c"], ["a", "c"])
    np.testing.assert_array_equal(score_pairs(("a b", "c"), np.array(["a", "c"])), expected)


def test_importing_the_factors_and_lexical_scoring_do_not_import_torch():
    code = (
        "import sys, gapo_lite.ef, gapo_lite.ef.cache; gapo_lite.ef.score_pairs(['a'], ['a']);"
        "sys.exit('torch' in sys.modules or 'nltk' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("ef", "near"),
    [
        ("rougel", "rougeL"),
        ("rouge-l", "rougeL"),
        ("rouge3", "rouge"),
        ("Jaccard", "jaccard"),
        ("bertscore", "bertscore_"),
        ("bert_score_f1", "bertscore_f1"),
        (None, ""),
        ([], ""),
    ],
)
def test_an_unknown_factor_is_refused_with_the_nearest_one(ef, near):
    with pytest.raises(ConfigError, match=f"Did you mean '{near}"):
        score_pairs(["a"], ["a"], ef)


def test_an_unknown_option_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"no option 'use_stemer' of rougeL.*mean 'use_stemmer'"):
        score_pairs(["a"], ["a"], use_stemer=True)
    with pytest.raises(ConfigError, match=r"no option 'layers' of bertscore_p.*mean 'layer'"):
        score_pairs(["a"], ["a"], "bertscore_p", layers=3)
    with pytest.raises(ConfigError, match="no option 'use_stemmer' of bertscore_f1"):
        score_pairs(["a"], ["a"], "bertscore_f1", use_stemmer=True)
    with pytest.raises(ConfigError, match="no option 'tokenizer' of bertscore_f1"):
        score_pairs(["a"], ["a"], "bertscore_f1", tokenizer="unicode")


@pytest.mark.parametrize(
    ("ef", "option"),
    [
        ("rouge1", {"use_stemmer": "yes"}),
        ("rouge1", {"use_stemmer": 1}),
        ("rougeL", {"tokenizer": "bpe"}),
        ("rougeL", {"tokenizer": None}),
        ("rougeL", {"tokenizer": ["rouge"]}),
        ("bertscore_p", {"model": ""}),
        ("bertscore_p", {"model": None}),
        ("bertscore_p", {"layer": 0}),
        ("bertscore_p", {"layer": True}),
        ("bertscore_p", {"layer": 2.0}),
        ("bertscore_p", {"batch_size": 0}),
        ("bertscore_p", {"batch_size": "64"}),
        ("bertscore_p", {"device": 0}),
    ],
)
def test_a_value_that_an_option_cannot_take_is_refused_by_name(ef, option):
    with pytest.raises(ConfigError, match=f"option {next(iter(option))} of {ef} is .* has to be"):
        score_pairs(["a"], ["a"], ef, **option)


@pytest.mark.parametrize("ef", ["jaccard", "rouge1", "rouge2", "rougeL"])
def test_every_lexical_factor_takes_the_tokenizer(ef):
    texts = ["Всё это хорошо.", "这很好"], ["всё ЭТО хорошо", "这很好！"]
    assert score_pairs(*texts, ef).tolist() == [0.0, 0.0]
    assert score_pairs(*texts, ef, tokenizer="unicode").tolist() == [1.0, 1.0]


def test_a_wrong_tokenizer_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match="it has to be 'rouge' or 'unicode'"):
        score_pairs(["a"], ["a"], tokenizer="words")


def test_options_are_completed_with_their_defaults():
    assert check_options("rouge2", {}) == {"use_stemmer": False, "tokenizer": "rouge"}
    assert check_options("bertscore_r", {"layer": 3}) == {
        "model": "roberta-large",
        "layer": 3,
        "batch_size": 64,
        "device": None,
    }


def test_texts_that_do_not_make_pairs_are_refused_with_the_index():
    with pytest.raises(DataError, match=r"3 chosen and 2 rejected .* index 2"):
        score_pairs(["a", "b", "c"], ["a", "b"])


@pytest.mark.parametrize("item", [None, 3, b"bytes", ["list"], float("nan")])
def test_an_item_that_is_no_string_is_refused_with_its_index(item):
    with pytest.raises(DataError, match=r"rejected\[1\] is "):
        score_pairs(["a", "b"], ["a", item])


@pytest.mark.parametrize("texts", ["one text", b"bytes", None, 3])
def test_something_else_than_a_list_is_refused(texts):
    with pytest.raises(DataError, match=r"chosen is .* has to be a list of strings"):
        score_pairs(texts, ["a"])
