"""Cards by any of their names or by their size, and what a plan takes as published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkout import ROOT
from typer.testing import CliRunner

from gapo_lite import cli
from gapo_lite import forecast as forecasts
from gapo_lite.config import LoraConfig, load_config, parse_config
from gapo_lite.devices import GPUS, UNKNOWN_FLOPS, VISIBLE, Device, device_named, known_card
from gapo_lite.errors import ConfigError, ModelError
from gapo_lite.forecast import forecast
from gapo_lite.memory import GIB
from gapo_lite.published import DATA_SETS, MODELS, published_config, published_lengths
from gapo_lite.shape import shape_of

CONFIGS = ROOT / "configs"
RECIPE = CONFIGS / "llama3-8b-gapo-rougel.yaml"
ULTRAFEEDBACK = "princeton-nlp/llama3-ultrafeedback-armorm"


# -- cards --


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("4090", "4090"),
        ("rtx 4090", "4090"),
        ("RTX4090", "4090"),
        ("RTX 4090", "4090"),
        ("rtx-4090", "4090"),
        ("4090 24GB", "4090"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "4070tisuper"),
        ("NVIDIA GeForce RTX 4060 Ti", "4060ti"),
        ("RTX 4060 Ti 8GB", "4060ti-8"),
        ("RTX 4060 Ti 16 GB", "4060ti"),
        ("3080", "3080"),
        ("3080 10GB", "3080"),
        ("GeForce RTX 3080 12 GiB", "3080-12"),
        ("GeForce RTX 2080 Ti", "2080ti"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "6000ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "pro6000"),
        ("Tesla T4", "t4"),
        ("T4 16GB", "t4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("a100-40", "a100-40"),
        ("a100-80", "a100"),
        ("A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("nvidia_b200", "b200"),
    ],
)
def test_a_card_is_found_by_any_of_its_names(name, key):
    assert device_named(name) is GPUS[key]


def test_every_card_is_found_by_its_key_and_by_the_name_that_is_shown():
    for key, card in GPUS.items():
        assert known_card(key) is known_card(card.name) is card


@pytest.mark.parametrize("size", ["24GB", "24 GB", "24gb", "24GiB", "24G", "24.0 g", " 24GB "])
def test_a_size_is_a_card_whose_speed_is_assumed_and_said_to_be(size):
    card = device_named(size)
    assert (card.memory, card.flops, card.is_cpu) == (24 * VISIBLE * GIB, UNKNOWN_FLOPS, False)
    assert card.name == "a 24 GB card (speed unknown: assumed 60 TFLOP/s and 500 GB/s)"


@pytest.mark.parametrize(
    "name",
    [
        *("banana", "", "24", "GB", "rtx", "0GB", "0.5GB", "-5GB", "nanGB", "infGB", "1e9GB"),
        *("2000GB", "24MB", "4090GB", "24GB 24GB", "RTX 4090\0", "4090; rm"),
        "NVIDIA GeForce RTX 4090 Laptop GPU",  # is slower than its namesake
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",  # a part of one
        "Quadro RTX 6000",  # of 2018
    ],
)
def test_what_is_no_card_is_refused_with_those_there_are_and_with_what_else_does(name):
    with pytest.raises(ConfigError, match=r"There are: 2060, .*a100-40.*such as 24GB \(1 to 1024"):
        device_named(name)


def test_facts_of_cards_are_sane():
    for key, card in GPUS.items():
        assert 5 * GIB < card.memory <= 180 * GIB, key
        assert 9e12 <= card.flops <= 2250e12, key
        assert 250e9 <= card.bandwidth <= 8000e9, key
        assert (6, 0) <= card.capability <= (12, 0), key
        assert card.flops / card.bandwidth > 20, key
        *_, gb, unit = card.name.split()
        assert unit == "GB", key
        assert 0.9 * float(gb) <= card.memory / GIB <= float(gb), key


@pytest.mark.parametrize(
    "slower_to_faster",
    [
        ("2060", "2070", "2080ti"),
        ("3060", "3060ti", "3070", "3070ti", "3080", "3080-12", "3080ti", "3090", "3090ti"),
        ("4060", "4060ti", "4070", "4070super", "4070ti", "4070tisuper", "4080", "4080super",
         "4090"),
        ("5060", "5060ti", "5070", "5070ti", "5080", "5090"),
        ("a4000", "a5000", "a6000", "6000ada", "pro6000"),
        ("t4", "a100", "h100-pcie", "h100", "b200"),
    ],
)  # fmt: skip
def test_a_dearer_card_of_a_series_is_not_slower(slower_to_faster):
    rates = [GPUS[key].flops for key in slower_to_faster]
    assert rates == sorted(rates)


def test_bfloat16_and_flash_attention_begin_with_ampere():
    without = {"2060", "2070", "2080ti", "t4"}
    assert {key for key, card in GPUS.items() if not card.has_bfloat16} == without
    assert {key for key, card in GPUS.items() if not card.has_flash_attention} == without
    assert Device("any", 1.0, 1.0, 1.0).has_bfloat16


@pytest.mark.parametrize(
    ("card", "precision", "dtype"),
    [
        ("t4", "auto", torch.float16),
        ("4090", "auto", torch.bfloat16),
        ("24GB", "auto", torch.bfloat16),
        ("t4", "float32", torch.float32),
        ("4090", "float32", torch.float32),
    ],
)
def test_a_plan_computes_in_what_the_card_does(card, precision, dtype):
    config = parse_config({"model": {"precision": precision}})
    assert forecasts._precision_on(device_named(card), config) == dtype


# -- this machine's card --


@pytest.mark.parametrize(
    ("name", "flops"), [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA Thing 1", UNKNOWN_FLOPS)]
)
def test_this_machine_s_card_keeps_its_own_memory_name_and_capability(monkeypatch, name, flops):
    monkeypatch.setattr(forecasts, "pick_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(forecasts, "total_memory_bytes", lambda place: 79 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (8, 9))
    found = forecasts.this_device(parse_config({}), measure=True)
    assert (found.name, found.memory, found.capability) == (name, 79 * GIB, (8, 9))
    assert (found.flops, found.is_cpu) == (flops, False)


# -- what is published --


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Meta-Llama-3-70B-Instruct", 70_553_706_496),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7_241_732_096),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen3-8B", 8_190_735_360),
    ],
)
def test_a_published_shape_has_the_parameters_that_the_hub_counts(name, params):
    shape = shape_of(published_config(name), LoraConfig(), torch.bfloat16)
    assert shape.linear_params + shape.other_params == params


def test_every_model_and_data_set_of_the_recipes_is_known():
    recipes = [load_config(path) for path in sorted(CONFIGS.glob("**/llama*.yaml"))]
    assert len(recipes) == 16
    assert {config.model.name for config in recipes} <= MODELS.keys()
    assert {config.data.source for config in recipes} <= DATA_SETS.keys()
    assert {config.data.heldout_source for config in recipes} <= DATA_SETS.keys()


def test_published_lengths_are_the_same_every_time_and_have_the_means_that_they_are_drawn_for():
    lengths = published_lengths(ULTRAFEEDBACK, "train")
    assert lengths.shape == (59_876, 3)
    assert lengths.min() >= 1
    assert lengths.mean(axis=0) == pytest.approx([170, 400, 400], rel=0.01)
    logs = np.log(lengths)
    assert np.corrcoef(logs[:, 1], logs[:, 2])[0, 1] == pytest.approx(0.8, abs=0.01)
    assert abs(np.corrcoef(logs[:, 0], logs[:, 1])[0, 1]) < 0.02
    assert np.array_equal(lengths, published_lengths(ULTRAFEEDBACK, "train"))
    assert published_lengths(ULTRAFEEDBACK, "test").shape == (1_961, 3)
    assert published_lengths(ULTRAFEEDBACK, "train_prefs") is None
    assert published_lengths("nobody/knows", "train") is None


def test_a_folder_of_the_name_is_not_taken_as_published(tmp_path, monkeypatch):
    name = "meta-llama/Meta-Llama-3-8B-Instruct"
    monkeypatch.chdir(tmp_path)
    assert published_config(name).name_or_path == name
    for folder in (name, ULTRAFEEDBACK):
        Path(folder).mkdir(parents=True)
    assert published_config(name) is None
    assert published_lengths(ULTRAFEEDBACK, "train") is None


def test_the_recipe_is_planned_without_network_and_model_and_says_what_was_assumed():
    shown = CliRunner().invoke(cli.app, ["plan", str(RECIPE), "--gpu", "4090"])
    assert shown.exit_code == 0, shown.output
    assert "The model's shape is the published one: it could not be loaded here (" in shown.output
    assert f"Lengths are not counted, but typical of {ULTRAFEEDBACK}" in shown.output
    assert "59,876" in shown.output
    assert "RTX 4090" in shown.output


def test_a_card_of_a_size_is_planned_for_and_an_unknown_one_refused():
    few = ["plan", str(RECIPE), "--set", "data.max_pairs=500", "--gpu"]
    shown = CliRunner().invoke(cli.app, [*few, "12GB"])
    assert shown.exit_code == 0, shown.output
    assert "speed unknown" in shown.output
    assert CliRunner().invoke(cli.app, [*few, "6GB"]).exit_code == 1
    refused = CliRunner().invoke(cli.app, [*few, "banana"])
    assert refused.exit_code == 2
    assert "such as 24GB" in refused.output


def test_max_pairs_and_a_held_out_fraction_hold_for_published_lengths():
    def numbers(*overrides):
        train, heldout = forecasts._published_lengths(load_config(RECIPE, list(overrides)).data)
        return len(train), len(heldout)

    assert numbers() == (59_876, 1_961)
    assert numbers("data.max_pairs=100") == (100, 1_961)
    split = ("data.heldout_source=null", "data.heldout_fraction=0.1")
    assert numbers(*split) == (53_888, 5_988)
    assert numbers(*split, "data.max_pairs=100") == (100, 5_988)
    assert numbers("data.heldout_source=null", "data.heldout_fraction=0") == (59_876, 0)


def test_published_lengths_are_cut_as_the_configuration_says():
    config = load_config(RECIPE, ["data.max_pairs=500", "data.max_length=512",
                                  "data.max_prompt_length=256"])  # fmt: skip
    prompt, chosen, rejected = forecast(config, gpu="h100").work.lengths.T
    assert np.maximum(prompt + chosen, prompt + rejected).max() == 512


def test_a_model_at_hand_is_counted_even_where_its_data_are_not(tiny_model):
    config = load_config(RECIPE, [f"model.name={tiny_model}", "data.max_pairs=500"])
    found = forecast(config, gpu="4090")
    assert found.shape.hidden == 64
    assert [note.split()[0] for note in found.notes] == ["Lengths"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.source=embedded:everyday", "data.heldout_source=null"],
        ["data.heldout_source=embedded:everyday-heldout"],
        ["model.name=nobody/knows-it"],
        ["data.split=train_prefs"],
    ],
)
def test_what_is_neither_at_hand_nor_published_is_an_error_as_ever(overrides):
    with pytest.raises(ModelError, match="could not be loaded: We couldn't connect"):
        forecast(load_config(RECIPE, overrides), gpu="4090")
