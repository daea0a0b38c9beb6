"""What leaves the house: whole folders that others can load, and nothing of this machine."""

from __future__ import annotations

import getpass
import json
import os
from pathlib import Path

import pytest
import torch
from forging import forge_run
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gapo_lite import export as export_module
from gapo_lite.errors import RunError
from gapo_lite.export import export_run, model_card, public_name
from gapo_lite.model import load_base

TEXT_FILES = {".json", ".md", ".jinja"}

BF16_ROUNDING = 0.02
"""Mean difference of log-probabilities that rounding the weights makes; quantising makes 0.13."""

plain_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
"""peft 0.21 reads what transformers 5.23 has renamed."""


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory):
    run = forge_run(tmp_path_factory.mktemp("runs") / "kind", tiny_settings)
    run.write("margins.json", {"mean_margin_in_reward_units": 3.0, "train": {"num_pairs": 24}})
    run.write("environment.json", {"versions": {"torch": "2.13.0"}, "command": [str(run.path)]})
    return run


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    return export_run(run, merged=True, out=tmp_path_factory.mktemp("exports") / "kind-merged")


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory):
    return export_run(run, merged=False, out=tmp_path_factory.mktemp("exports") / "kind-adapter")


@torch.no_grad()
def log_probabilities(model, tokenizer):
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt").input_ids
    return model.eval()(ids).logits.float().log_softmax(-1)


@plain_peft
def test_the_merged_model_says_what_base_and_adapter_say_together(merged, run, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert model.dtype == torch.bfloat16
    base = load_base(str(tiny_model), quantization="none", dtype=torch.float32)
    before = log_probabilities(base, tokenizer)
    together = log_probabilities(PeftModel.from_pretrained(base, run.adapter), tokenizer)
    found = log_probabilities(model.float(), tokenizer)  # bf16 weights, float32 arithmetic
    assert (together - before).abs().mean() > 0.5
    assert (found - together).abs().mean() < BF16_ROUNDING


@plain_peft
def test_the_exported_adapter_loads_in_a_plain_script(adapter, run, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ours, theirs = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
        for folder in (run.adapter, adapter)
    )
    expected = log_probabilities(ours, tokenizer)
    assert torch.equal(log_probabilities(theirs, tokenizer), expected)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_an_export_has_weights_without_pickles_and_a_tokenizer_that_chats(kind, request):
    folder = request.getfixturevalue(kind)
    names = {path.name for path in folder.iterdir()}
    weights = {"merged": "model.safetensors", "adapter": "adapter_model.safetensors"}
    assert weights[kind] in names
    assert "README.md" in names
    assert ("generation_config.json" in names) == (kind == "merged")
    assert {path.suffix for path in folder.iterdir()} <= {*TEXT_FILES, ".safetensors"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in text


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_an_export_names_no_place_and_no_person_of_this_machine(kind, request, run, monkeypatch):
    folder = request.getfixturevalue(kind)
    texts = [path.read_text() for path in folder.iterdir() if path.suffix in TEXT_FILES]
    settings = "\n".join(text for text in texts if len(text) < 100_000)  # not the vocabulary
    assert settings.count("gapo") > 1
    for secret in (str(run.path), str(Path.home()), "/tmp", os.sep + getpass.getuser()):
        assert secret not in settings
    assert not any(len(part) > 1 and part.startswith("/") for part in settings.split('"'))


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_others_may_read_every_file(kind, request):
    folder = request.getfixturevalue(kind)
    mode = (folder / "README.md").stat().st_mode
    assert {path.stat().st_mode for path in folder.iterdir()} == {mode}


def test_the_card_says_how_it_was_made_and_measured(merged):
    card = (merged / "README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nbase_model: "tiny"\nbase_model_relation: finetune\n')
    for row in (
        "| base model | tiny |",
        "| data | everyday.jsonl, 24 training pairs |",
        "| objective | gapo |",
        "| evaluation factor | rougeL |",
        "| mapping | log |",
        "| normalisation | scale |",
        "| γ | 0.3 |",
        "| β | 10 (margin scale: beta) |",
        "| loss of a pair | −log σ(β(a_w − a_l) − s·margin) |",
        "| target margin from | ef |",
        "| average target margin in reward units | 3 |",
        "| LoRA | rank 4, alpha 32, dropout 0.1, on all-linear |",
        "| learning rate | 0.01, cosine, warm-up 0.1 |",
        "| pairs a step | 4 |",
        "| steps | 4 of 4 |",
        "| metric | step 0 | step 4 |",
        "| rewards/accuracies | 0.5000 | 0.7500 |",
        "| rewards/margins | 0.1000 | 1.2500 |",
    ):
        assert row + "\n" in card
    title = "Gap-Aware Preference Optimization: Enhancing Model Alignment with Perception Margin"
    assert title in card
    assert "torch 2.13.0" in card
    assert 'from_pretrained("kind-merged")' in card
    assert "The base model's licence is named on its page." in card


def test_the_code_on_the_card_runs(merged, monkeypatch, capsys):
    card = (merged / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(merged.parent)
    exec(compile(code.replace("max_new_tokens=128", "max_new_tokens=4"), "card", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_card_for_simpo_has_no_evaluation_factor(tiny_settings, tmp_path):
    run = forge_run(tmp_path / "plain", tiny_settings, "objective.name=simpo")
    card = model_card(run, merged=False, folder="plain-adapter")
    assert "trained with SimPO" in card
    assert "evaluation factor |" not in card
    assert 'PeftModel.from_pretrained(base, "plain-adapter")' in card


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("embedded:smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("embedded:everyday", "embedded:everyday"),
        ("/home/ada/models/llama", "llama"),
        ("../secret/pairs.jsonl", "pairs.jsonl"),
        ("~/pairs.jsonl", "pairs.jsonl"),
        ("a/b/c.jsonl", "c.jsonl"),
    ],
)
def test_local_paths_lose_all_but_their_last_part(name, public):
    assert public_name(name) == public


def test_a_llama_card_names_its_licence(tiny_settings, tmp_path):
    run = forge_run(tmp_path / "llama", tiny_settings)
    text = (run.path / "config.yaml").read_text()
    name = tiny_settings["model"]["name"]
    (run.path / "config.yaml").write_text(text.replace(name, "meta-llama/Meta-Llama-3-8B-Instruct"))
    card = model_card(run, merged=True, folder="x")
    assert card.startswith("---\nlicense: llama3\n")
    assert "Meta Llama 3 Community License" in card


@plain_peft
def test_a_base_that_is_quantised_already_is_dequantised_and_merged(
    tiny_settings, tiny_model, tmp_path
):
    base = load_base(str(tiny_model), quantization="nf4", dtype=torch.float32)
    base.save_pretrained(tmp_path / "tiny-4bit")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path / "tiny-4bit")
    run = forge_run(tmp_path / "run", tiny_settings)
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(
        text.replace(str(tiny_model), str(tmp_path / "tiny-4bit"))
    )
    folder = export_run(run, merged=True, out=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    together = log_probabilities(PeftModel.from_pretrained(base, run.adapter), tokenizer)
    found = log_probabilities(model.float(), tokenizer)
    assert (found - together).abs().mean() < BF16_ROUNDING


def test_a_folder_in_use_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match=r"not empty.*--out"):
        export_run(run, merged=False, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        Exception("No space left on device (os error 28)"),  # as tokenizers says it
    ],
    ids=["python", "rust"],
)
def test_a_full_disk_leaves_nothing_behind(run, tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(export_module, "model_card", full)
    with pytest.raises(RunError, match="No space left on device. Nothing was left there"):
        export_run(run, merged=False, out=tmp_path / "exports" / "kind")
    assert list(tmp_path.iterdir()) == []


def test_a_bug_while_exporting_stays_a_bug_and_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "model_card", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(run, merged=False, out=tmp_path / "kind")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("merged", [True, False])
def test_a_damaged_adapter_is_named(tiny_settings, tmp_path, merged):
    run = forge_run(tmp_path / "run", tiny_settings)
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"the adapter in .*adapter is damaged"):
        export_run(run, merged=merged, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
