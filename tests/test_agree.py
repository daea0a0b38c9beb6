"""Rank correlation of gaps with the data's own judgement: its arithmetic, its intervals, and what
the command says."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from commands import assert_refused, call, write_jsonl

from gapo_lite.agree import agree
from gapo_lite.data import load_pairs
from gapo_lite.ef import score_pairs
from gapo_lite.errors import ConfigError, DataError
from gapo_lite.margins import MAPPINGS
from gapo_lite.ranks import RESAMPLES, bootstrap, partial_spearman, spearman
from gapo_lite.types import PreferencePair

WORDS = [
    "a",
    "quiet",
    "river",
    "bends",
    "slowly",
    "past",
    "the",
    "old",
    "mill",
    "and",
    "under",
    "two",
    "stone",
    "bridges",
]
ENCODER = "embedded:all-minilm-l6-v2"


def average_ranks(values):
    """Ranks from 1, tied ones at their average, in the plainest way."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def pearson(x, y):
    return float(np.corrcoef(x, y)[0, 1])


def made_pairs(count, prompts, seed=0, **fields):
    """Pairs whose responses share the more words the less they differ in strength."""
    random = np.random.default_rng(seed)
    pairs = []
    for index in range(count):
        shared = int(random.integers(1, len(WORDS)))
        rejected = WORDS[:shared] + ["else"] * int(random.integers(1, 9))
        pairs.append(
            PreferencePair(
                [{"role": "user", "content": f"question {index % prompts}"}],
                " ".join(WORDS),
                " ".join(rejected),
                strength=1 - shared / len(WORDS),
                **fields,
            )
        )
    return pairs


def test_ties_take_their_average_rank():
    # By scipy.stats.spearmanr: 0.9486832980505138 and 0.7071067811865475.
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138, abs=1e-15)
    assert spearman([0, 0, 1, 1], [1, 1, 1, 2]) == pytest.approx(1 / np.sqrt(3), abs=1e-15)


def test_a_rank_correlation_without_ties_is_the_textbook_sum():
    # ρ = 1 − 6 Σd² / n(n² − 1), d = 0, 1, −1, 2, −2
    assert spearman([10, 20, 30, 40, 50], [1, 9, 4, 100, 16]) == pytest.approx(
        1
        - 6 * sum((a - b) ** 2 for a, b in zip((1, 2, 3, 4, 5), (1, 3, 2, 5, 4), strict=True)) / 120
    )


def test_it_equals_ranking_and_correlating_naively():
    random = np.random.default_rng(3)
    for _ in range(20):
        x, y, z = random.integers(0, 6, (3, 40)).astype(float)
        xy, xz, yz = (
            pearson(average_ranks(a), average_ranks(b)) for a, b in ((x, y), (x, z), (y, z))
        )
        assert spearman(x, y) == pytest.approx(xy, abs=1e-12)
        partial = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
        assert partial_spearman(x, y, z) == pytest.approx(partial, abs=1e-12)


def test_the_partial_correlation_is_that_of_what_the_fixed_ranks_leave():
    random = np.random.default_rng(5)
    z = random.normal(size=200)
    x, y = z + random.normal(size=200), z + random.normal(size=200)
    ranks = [np.array(average_ranks(values)) for values in (x, y, z)]
    rest = [row - np.polyval(np.polyfit(ranks[2], row, 1), ranks[2]) for row in ranks[:2]]
    assert partial_spearman(x, y, z) == pytest.approx(pearson(*rest), abs=1e-9)
    assert abs(partial_spearman(x, y, z)) < 0.2 < spearman(x, y)


def test_what_is_constant_or_follows_entirely_from_the_lengths_has_no_correlation():
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert np.isnan(partial_spearman([1, 2, 3], [3, 1, 2], [1, 2, 3]))
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0, abs=1e-15)


def test_the_bootstrap_equals_ranking_each_resample_of_whole_prompts():
    random = np.random.default_rng(7)
    table = random.integers(0, 9, (4, 30)).astype(float)
    prompts = np.arange(30) % 11
    draws = bootstrap(table, prompts, seed=4)
    assert draws.shape == (RESAMPLES, 2, 4)
    again = np.random.default_rng(4)
    for draw in draws[:5]:
        picked = [
            i for prompt in again.integers(0, 11, 11) for i in np.flatnonzero(prompts == prompt)
        ]
        for row in range(1, 4):
            naive = pearson(*(average_ranks(table[k, picked]) for k in (0, row)))
            assert draw[0, row] == pytest.approx(naive, abs=1e-12)


def test_pairs_of_one_prompt_are_not_taken_for_independent():
    pairs = made_pairs(60, 60)
    repeated = [replace(pair) for pair in pairs for _ in range(20)]
    few, many = agree(pairs, metrics=["rougeL"]), agree(repeated, metrics=["rougeL"])
    widths = [found.metrics[0].gap.high - found.metrics[0].gap.low for found in (few, many)]
    assert many.num_pairs == 20 * few.num_pairs
    assert widths[1] == pytest.approx(widths[0], rel=0.05)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(11)
    held = 0
    for _ in range(40):
        x, z = random.normal(size=(2, 80))
        table = np.stack([x, z, random.normal(size=80)])  # ρ is 0
        low, high = np.quantile(bootstrap(table, np.arange(80), seed=0)[:, 0, 2], [0.025, 0.975])
        held += low <= 0 <= high
    assert 34 <= held <= 40


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_it_is_the_correlation_of_the_gap_under_any_mapping(mapping):
    pairs = made_pairs(40, 40)
    ef = score_pairs([p.chosen for p in pairs], [p.rejected for p in pairs], "rouge1")
    gaps = MAPPINGS[mapping](np.clip(ef, 0.01, 1)).round(10)  # 2/3 is not always 4/6 in floats
    found = agree(pairs, metrics=["rouge1"]).metrics[0].gap.rho
    assert found == pytest.approx(spearman(gaps, [pair.strength for pair in pairs]), abs=1e-12)


def test_the_same_seed_gives_the_same_agreement_and_json_reads_it_back():
    pairs = made_pairs(40, 20)
    found = agree(pairs, seed=1)
    assert found == agree(pairs, seed=1) != agree(pairs, seed=2)
    read = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert [row["metric"] for row in read["metrics"]] == ["jaccard", "rouge1", "rouge2", "rougeL"]
    assert (read["num_pairs"], read["num_prompts"], read["resamples"]) == (40, 20, RESAMPLES)


def test_ratings_go_before_strength_unless_twice_as_many_pairs_have_one():
    pairs = made_pairs(30, 30)
    rated = [replace(p, chosen_rating=-(p.strength or 0), rejected_rating=0.0) for p in pairs]
    assert agree(rated).judgement == "ratings"
    assert agree([*rated[:15], *pairs[15:]]).judgement == "ratings"
    assert agree([*rated[:14], *pairs[14:]]).judgement == "strength"
    found = agree([rated[0], *pairs[1:]])
    assert (found.judgement, found.num_pairs, found.num_unjudged) == ("strength", 30, 0)


def test_what_is_not_judged_is_left_out_and_counted():
    pairs = made_pairs(30, 30)
    rated = [replace(p, chosen_rating=-(p.strength or 0), rejected_rating=0.0) for p in pairs[:25]]
    found = agree([*rated, *(replace(pair, strength=None) for pair in pairs[25:])])
    assert (found.judgement, found.num_pairs, found.num_unjudged) == ("ratings", 25, 5)
    assert found.metrics[0].gap.rho == pytest.approx(-agree(pairs[:25]).metrics[0].gap.rho)
    nan = [replace(pair, chosen_rating=float("nan"), rejected_rating=0.0) for pair in pairs]
    assert agree(nan).judgement == "strength"


def test_metrics_that_go_the_opposite_way_for_certain_are_told_of_so():
    pairs = [replace(pair, strength=1 - pair.strength) for pair in made_pairs(60, 60)]
    found = agree(pairs, metrics=["rougeL", "jaccard"])
    least = max(found.metrics, key=lambda row: row.gap.rho)
    assert least.gap.high < 0
    assert found.sentence.startswith(
        "No metric's gap follows the judged strength: all go the opposite way, "
        f"{least.metric}'s the least (ρ -0."
    )
    few = agree(pairs[:9], metrics=["rougeL"])
    assert "does so not at all (ρ -0." in few.sentence
    assert all(words not in found.sentence for words in ("not for certain", "best"))


def test_without_any_judgement_it_says_what_to_bring():
    with pytest.raises(DataError, match=r"none of 3 pairs was judged.*--strength"):
        agree([replace(pair, strength=None) for pair in made_pairs(3, 3)])
    with pytest.raises(DataError, match="none of 0 pairs"):
        agree([])


def test_few_prompts_get_no_interval_and_one_verdict_gets_no_correlation():
    few = agree(made_pairs(9, 3))
    assert few.resamples == 0
    assert few.metrics[0].gap.rho is not None
    assert few.metrics[0].gap.low is None
    assert "With 3 prompts all of this may be chance" in few.sentence
    sure = agree([replace(pair, strength=1.0) for pair in made_pairs(20, 20)])
    assert sure.length.rho is None
    assert all(row.gap.rho is None for row in sure.metrics)
    assert sure.sentence.startswith("Nothing can be said")
    assert agree(made_pairs(1, 1)).metrics[0].gap.rho is None


def test_bertscore_comes_in_with_an_encoder_and_is_scored_once(monkeypatch, tmp_path):
    monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path))
    pairs = made_pairs(12, 12)
    from gapo_lite.ef import semantic

    passes = []
    scores = semantic.bert_scores

    def counted(*args, **kwargs):
        passes.append(kwargs["model"])
        return scores(*args, **kwargs)

    monkeypatch.setattr(semantic, "bert_scores", counted)
    found = agree(pairs, options={"model": ENCODER, "tokenizer": "unicode"})
    assert [row.metric for row in found.metrics][-3:] == [
        "bertscore_p",
        "bertscore_r",
        "bertscore_f1",
    ]
    assert agree(pairs, options={"model": ENCODER, "tokenizer": "unicode"}) == found
    assert passes == [ENCODER]
    ef = score_pairs(
        [p.chosen for p in pairs], [p.rejected for p in pairs], "bertscore_r", model=ENCODER
    )
    strengths = [pair.strength for pair in pairs]
    assert found.metrics[-2].gap.rho == pytest.approx(spearman(1 - ef, strengths), abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"metrics": ["rougel"]}, "Did you mean 'rougeL'"),
        ({"options": {"layer": 3}}, "None of jaccard.* has an option 'layer'"),
        ({"options": {"tokenizer": "bytes"}}, "tokenizer of jaccard"),
    ],
)
def test_unknown_metrics_and_options_are_refused_before_anything_is_scored(settings, says):
    with pytest.raises(ConfigError, match=says):
        agree(made_pairs(3, 3), **settings)


# -- the command --


def rows_of(pairs):
    return [
        {
            "prompt": pair.prompt[0]["content"],
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "sure": 100 * (pair.strength or 0),
            "good": 5,
            "bad": 5 * (1 - (pair.strength or 0)),
        }
        for pair in pairs
    ]


@pytest.mark.parametrize("judged", [("--strength", "sure"), ("--rating-columns", "good, bad")])
def test_the_command_reads_the_judgement_from_any_columns(tmp_path, judged):
    pairs = made_pairs(24, 24)
    file, out = write_jsonl(tmp_path / "pairs.jsonl", rows_of(pairs)), tmp_path / "agree.json"
    result = call("agree", file, *judged, "--json", out)
    assert result.exit_code == 0, result.stderr
    read = json.loads(out.read_text(encoding="utf-8"))
    assert read["judgement"] == "ratings"
    expected = agree(pairs)
    for row, own in zip(read["metrics"], expected.metrics, strict=True):
        assert row["gap"]["rho"] == pytest.approx(own.gap.rho)
    assert read["sentence"] in result.stdout
    for name in ("rougeL", "difference of lengths alone", "24 prompts"):
        assert name in result.stdout


def test_columns_that_are_asked_for_count_though_more_pairs_have_a_strength(tmp_path):
    rows = [row | {"strength": 0.5} for row in rows_of(made_pairs(24, 24))]
    for row in rows[12:]:
        row["sure"] = None
    file, out = write_jsonl(tmp_path / "pairs.jsonl", rows), tmp_path / "agree.json"
    assert call("agree", file, "--strength", "sure", "--json", out).exit_code == 0
    read = json.loads(out.read_text(encoding="utf-8"))
    assert (read["judgement"], read["num_pairs"]) == ("ratings", 12)


@pytest.mark.parametrize("said", ["yes", float("inf"), None])
def test_a_column_without_numbers_is_not_taken_for_the_usual_one(tmp_path, said):
    rows = [
        {"prompt": f"{n}", "chosen": "a b", "rejected": "b", "strength": n / 9} for n in range(9)
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", [row | {"s": said} for row in rows])
    result = call("agree", path, "--strength", "s")
    assert_refused(result, "holds no judgement in s")


def test_the_command_says_which_columns_there_are(tmp_path):
    file = write_jsonl(tmp_path / "pairs.jsonl", rows_of(made_pairs(3, 3)))
    assert_refused(call("agree", file, "--strength", "shure"), "no column 'shure'", "sure, good")
    assert_refused(call("agree", file), "none of 3 pairs was judged")
    for wrong in (
        ("--strength", ""),
        ("--rating-columns", "good"),
        ("--rating-columns", "good,"),
        ("--strength", "sure", "--rating-columns", "good,bad"),
    ):
        assert_refused(call("agree", file, *wrong), "one column", "CHOSEN,REJECTED")
    assert_refused(call("agree", file, "--json", file), "would be overwritten")


def test_of_real_pairs_the_lengths_say_more_than_any_metric(real_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path))
    file = write_jsonl(tmp_path / "real.jsonl", real_rows[:2696])  # those to train on
    found = agree(load_pairs(file).pairs)
    rho = {row.metric: round(row.gap.rho, 2) for row in found.metrics}
    assert rho == {"jaccard": 0.15, "rouge1": 0.18, "rouge2": 0.10, "rougeL": 0.15}
    assert round(found.length.rho, 2) == 0.61
    assert all(row.at_equal_lengths.rho < 0 for row in found.metrics)
    assert "The difference of lengths alone does better" in found.sentence
    assert "no metric's gap follows it for certain any more" in found.sentence
