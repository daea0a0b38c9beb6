"""A model card says what is known of a run, shows it in figures that stand alone, and gives away
nothing that is its owner's own."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from typing import get_args

import pytest
import yaml
from forging import forge_run, settings_with

from gapo_lite.card_figures import margin_histogram, training_curves
from gapo_lite.config import ObjectiveConfig, load_config, parse_config
from gapo_lite.model_card import _TITLES, card_figures, model_card
from gapo_lite.public import (
    has_licensed_name,
    is_local,
    left_out,
    licence_of,
    public_config,
    public_name,
)

SVG = "{http://www.w3.org/2000/svg}"
HISTOGRAM = {"counts": [1, 5, 2], "edges": [0.0, 0.2, 0.4, 0.6]}


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory):
    run = forge_run(tmp_path_factory.mktemp("runs") / "kind", tiny_settings)
    run.write(
        "margins.json",
        {
            "mean_margin": 0.3,
            "mean_margin_in_reward_units": 3.0,
            "margin_histogram": HISTOGRAM,
            **{"num_floored": 1, "num_equal": 2, "num_negative": 0},
            "train": {"num_pairs": 1234},
            "heldout": {"num_pairs": 6},
        },
    )
    run.write("environment.json", {"data_fingerprint": "abc123", "versions": {"torch": "2.13.0"}})
    run.append("samples.jsonl", {"step": 4, "prompt": "my secret", "text": "my answer"})
    for step in (1, 2, 3, 4, 9):
        row = {"loss": 3 - step / 2, "rewards/margins": step / 2, "rewards/accuracies": 0.5}
        run.append("metrics.jsonl", {"step": step, **row})
    return run


def card_of(run, **options):
    return model_card(run, **{"merged": False, "folder": "kind-adapter", **options})


def with_config(run_path, tiny_settings, **sections):
    run = forge_run(run_path, tiny_settings)
    config = parse_config(settings_with(tiny_settings, **sections))
    (run.path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return run


# -- the card --


def test_the_card_tells_data_margins_results_versions_and_how_to_repeat_it(run):
    card = card_of(run)
    for words in (
        "| data | everyday.jsonl, 1,234 training pairs |",
        "| data fingerprint | abc123 |",
        "| pairs of note | 1 raised to the EF floor, 2 with EF = 1, 0 with a negative margin |",
        "Means over 6 pairs that were not trained on. Step 0 is the base model.",
        "| rewards/margins | 0.1000 | 1.2500 |",
        '<img src="training_curves.svg" alt="Loss, reward margin with its target',
        '<img src="target_margins.svg" alt="How the training pairs',
        "```sh\ngapo-lite train gapo_config.yaml\n```",
        "`data.source`: your copy of `everyday.jsonl`",
        "`model.name`: your copy of `tiny`",
        "torch 2.13.0",
    ):
        assert words in card, words
    assert "secret" not in card
    assert str(run.path.parent) not in card


def test_the_front_matter_is_what_the_hub_reads(tiny_settings, tmp_path):
    run = with_config(
        tmp_path / "hub", tiny_settings, data={"source": "princeton-nlp/llama3-ultrafeedback"}
    )
    front = yaml.safe_load(card_of(run).split("---\n")[1])
    assert front["datasets"] == ["princeton-nlp/llama3-ultrafeedback"]
    assert front["base_model_relation"] == "adapter"
    assert front["tags"] == ["preference-optimization", "lora", "gapo-lite", "gapo"]
    merged = yaml.safe_load(card_of(run, merged=True).split("---\n")[1])
    assert (merged["base_model_relation"], merged["library_name"]) == ("finetune", "transformers")


@pytest.mark.parametrize("name", get_args(ObjectiveConfig.model_fields["name"].annotation))
def test_every_objective_is_called_by_its_own_name(tiny_settings, tmp_path, name):
    run = forge_run(tmp_path / "run", tiny_settings, f"objective.name={name}")
    card = card_of(run)
    assert f"trained with {_TITLES[name]} on the base model" in card.replace(" in 4-bit NF4", "")
    assert ("Gap-Aware" in card) == (name == "gapo")
    assert "None" not in card
    assert "nan" not in card


def test_gapos_margin_on_another_objective_is_said(tiny_settings, tmp_path):
    run = forge_run(
        tmp_path / "dpo", tiny_settings, "objective.name=dpo", "margin.source=ef", "margin.gamma=1"
    )
    card = card_of(run)
    assert "trained with DPO with a target margin for each pair, from its evaluation factor" in card
    assert "arxiv.org/abs/2305.18290" in card
    assert "Gap-Aware Preference Optimization" in card


def test_a_formula_with_bars_stays_in_its_cell(tiny_settings, tmp_path):
    card = card_of(forge_run(tmp_path / "rdpo", tiny_settings, "objective.name=rdpo"))
    (row,) = [line for line in card.splitlines() if line.startswith("| loss of a pair |")]
    assert row.count("|") - row.count("\\|") == 3
    assert "\\|y_w\\|" in row


def test_a_run_with_a_hostile_name_stays_a_heading(tiny_settings, tmp_path):
    path = tmp_path / "<script>x\n## y\x1b[2J"
    card = card_of(forge_run(path, tiny_settings))
    assert "<script>" not in card
    assert "\n## y" not in card
    assert "\x1b" not in card


def test_a_run_that_has_measured_nothing_or_nan_has_a_card_all_the_same(tiny_settings, tmp_path):
    run = forge_run(tmp_path / "bare", tiny_settings)
    (run.path / "metrics.jsonl").unlink()
    assert "Held-out" not in card_of(run)
    assert card_figures(run) == {}
    run.append("metrics.jsonl", {"step": 0, "eval/loss": math.nan, "loss": math.inf})
    run.append("metrics.jsonl", {"step": 1, "loss": 1.0})
    assert "| loss | – | – |" in card_of(run)
    assert list(card_figures(run)) == ["training_curves.svg"]


# -- figures --


def test_the_figures_stand_alone_and_hold_what_was_logged(run):
    figures = card_figures(run)
    assert list(figures) == ["training_curves.svg", "target_margins.svg"]
    for text in figures.values():
        svg = ET.fromstring(text)
        assert svg.tag == f"{SVG}svg"
        tags = {element.tag.removeprefix(SVG) for element in svg.iter()}
        assert tags <= {"svg", "g", "title", "rect", "text", "line", "polyline", "circle"}
        assert "href" not in text
        assert "url(" not in text
    words = [e.text for e in ET.fromstring(figures["training_curves.svg"]).iter(f"{SVG}text")]
    for title in ("loss", "reward margin", "reward accuracy", "training", "held out", "target"):
        assert title in words
    bars = ET.fromstring(figures["target_margins.svg"]).iter(f"{SVG}rect")
    heights = [float(bar.get("height")) for bar in bars][1:]  # the first is the background
    assert heights == pytest.approx([heights[0], 5 * heights[0], 2 * heights[0]], abs=0.2)


def test_steps_after_the_exported_one_are_left_out():
    rows = [{"step": step, "loss": 1.0} for step in range(1, 11)]
    ten, five = (training_curves(rows, None, last_step=step) for step in (10, 5))
    points = [
        next(ET.fromstring(svg).iter(f"{SVG}polyline")).get("points").split() for svg in (ten, five)
    ]
    assert [len(some) for some in points] == [10, 5]


@pytest.mark.parametrize(
    "histogram",
    [
        {},
        {"counts": [], "edges": []},
        {"counts": [0, 0], "edges": [0, 1, 2]},
        {"counts": [1], "edges": [0.0]},
        {"counts": [1], "edges": [math.nan, 1.0]},
    ],
)
def test_there_is_no_histogram_of_nothing(histogram):
    assert margin_histogram(histogram, 0.3) is None


def test_curves_of_nothing_or_of_odd_values_are_left_out():
    assert training_curves([], 3.0, last_step=9) is None
    odd = [{"step": 1, "loss": "high", "rewards/margins": None}, {"step": 2, "loss": math.nan}]
    assert training_curves(odd, 3.0, last_step=9) is None
    assert training_curves([{"step": 0, "loss": 1e-320}], math.nan, last_step=9) is not None


# -- what is public --


def test_the_shipped_configuration_repeats_the_run_without_what_is_its_owners(tmp_path):
    own = parse_config(
        {
            "model": {"name": "/home/ada/llama"},
            "data": {"source": "~/private/pairs.jsonl", "heldout_source": "C:\\Users\\ada\\x.csv"},
            "ef": {"metric": "bertscore_f1", "bertscore_model": "/opt/models/roberta"},
            "training": {"sample_prompts": ["my secret"], "report_to": ["wandb"], "seed": 7},
        }
    )
    path = tmp_path / "gapo_config.yaml"
    path.write_text(public_config(own).to_yaml(), encoding="utf-8")
    found = load_config(path)
    assert (found.model.name, found.ef.bertscore_model) == ("llama", "roberta")
    assert (found.data.source, found.data.heldout_source) == ("pairs.jsonl", "x.csv")
    assert found.training.seed == 7
    for secret in ("ada", "private", "secret", "wandb", "/opt"):
        assert secret not in path.read_text()
    assert [line.partition(":")[0] for line in left_out(own)] == [
        "`model.name`",
        "`data.source`",
        "`data.heldout_source`",
        "`ef.bertscore_model`",
    ]


def test_a_configuration_of_public_things_is_shipped_as_it_is():
    config = parse_config({"data": {"source": "ada/pairs"}})
    assert public_config(config) == config
    assert left_out(config) == []


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("embedded:everyday", False),
        ("ada/pairs", False),
        ("/data/pairs", True),
        ("\\\\server\\pairs", True),
        ("./pairs", True),
        ("tests/test_cli.py", True),
        ("alice/pairs.jsonl", True),  # of the folder that the run was started in
        ("alice/Pairs.JSON.gz", True),
    ],
)
def test_a_path_is_told_from_a_name(name, local, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    assert is_local(name) == local


def test_a_file_name_with_a_line_break_stays_on_its_line():
    assert public_name("/x/a\n# b\x1b.jsonl") == "a\N{REPLACEMENT CHARACTER}# b" + (
        "\N{REPLACEMENT CHARACTER}.jsonl"
    )


@pytest.mark.parametrize(
    ("base", "key", "credit"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3", "Built with Meta Llama 3"),
        ("Meta-Llama-3-8B-Instruct", "llama3", "Built with Meta Llama 3"),
        ("unsloth/llama-3-8b-Instruct-bnb-4bit", "llama3", "Built with Meta Llama 3"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1", "Built with Llama"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", ""),
        ("mistralai/Mistral-7B", None, None),
    ],
)
def test_licences_and_their_duties(base, key, credit):
    licence = licence_of(base)
    assert (licence and licence.key, licence and licence.credit) == (key, credit)
    if credit:
        assert credit in licence.duties
        assert f"`{licence.model_name}`" in licence.duties
        assert licence.notice in licence.duties


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("Llama-3-demo", True),
        ("llama3_demo", True),
        ("Meta-Llama-3-demo", False),
        ("demo-Llama-3", False),
    ],
)
def test_what_is_made_with_llama_3_is_called_so(name, fits):
    assert has_licensed_name(name, licence_of("meta-llama/Meta-Llama-3-8B")) == fits
