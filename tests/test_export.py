"""What leaves the house: whole folders that others can load, and nothing of this machine."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from forging import forge_run, settings_with
from modelfiles import read_modelfile, stub_converter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gapo_lite import cli
from gapo_lite import export as export_module
from gapo_lite.config import load_config
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.export import export_run, model_card, public_name
from gapo_lite.model import load_base

TEXT_FILES = {".json", ".md", ".jinja", ".yaml", ".svg"}

BF16_ROUNDING = 0.02
"""Mean difference of log-probabilities that rounding the weights makes; quantising makes 0.13."""

MARGINS = {
    "mean_margin": 0.3,
    "mean_margin_in_reward_units": 3.0,
    "margin_histogram": {"counts": [8, 12, 4], "edges": [0.0, 0.2, 0.4, 0.6]},
    "train": {"num_pairs": 24},
}

plain_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
"""peft 0.21 reads what transformers 5.23 has renamed."""


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory):
    run = forge_run(tmp_path_factory.mktemp("runs") / "kind", tiny_settings)
    run.write("margins.json", MARGINS)
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


@torch.no_grad()
def greedy_answers(model, tokenizer, num_tokens):
    """Token ids that each of a few prompts is answered with."""
    answers = []
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            **{"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True},
        )
        ids = model.eval().generate(
            **inputs, do_sample=False, max_new_tokens=num_tokens, eos_token_id=None
        )
        answers.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


QUESTIONS = ("What is a leap year?", "Name three fruits.", "1 + 1 =", "Привет!", "🌱")


@plain_peft
@pytest.mark.parametrize(
    ("name", "num_tokens"),
    [("tiny", 32), pytest.param("embedded:smollm2-135m-instruct", 12, marks=pytest.mark.slow)],
)
def test_the_merged_model_answers_token_for_token_as_base_and_adapter(
    name, num_tokens, tiny_settings, tiny_model, tmp_path
):
    name = str(tiny_model) if name == "tiny" else name
    settings = settings_with(tiny_settings, model={"name": name})
    run = forge_run(tmp_path / "run", settings)
    folder = export_run(run, merged=True, out=tmp_path / "out", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.float32
    base = load_base(name, quantization="none", dtype=torch.float32)
    base.generation_config = merged.generation_config
    before = greedy_answers(base, tokenizer, num_tokens)
    policy = PeftModel.from_pretrained(base, run.adapter)
    together = greedy_answers(policy, tokenizer, num_tokens)
    assert all(one != other for one, other in zip(before, together, strict=True))
    assert greedy_answers(merged, tokenizer, num_tokens) == together


@plain_peft
def test_merged_weights_in_bfloat16_are_the_exact_sum_rounded_once(merged, run, tiny_model):
    base = load_base(str(tiny_model), quantization="none", dtype=torch.float32)
    exact = PeftModel.from_pretrained(base.bfloat16().float(), run.adapter).merge_and_unload()
    found = load_file(merged / "model.safetensors")
    for name, weight in exact.state_dict().items():
        if name in found:
            assert torch.equal(found[name], weight.bfloat16()), name


def test_an_adapter_that_is_not_finite_is_refused(tiny_settings, tmp_path):
    run = forge_run(tmp_path / "run", tiny_settings)
    path = run.adapter / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, path)
    with pytest.raises(RunError, match=r"is broken: .*lora_A.* is not finite"):
        export_run(run, merged=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    assert not any(re.match(r"/\w", part) for part in settings.split('"'))


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
    assert "\n**Built with Meta Llama 3.**\n" in card
    assert "a name that begins with `Llama 3`" in card


def test_an_export_of_llama_3_has_its_notice(tiny_settings, tiny_model, tmp_path):
    llama = shutil.copytree(tiny_model, tmp_path / "Meta-Llama-3-8B-Instruct")
    settings = settings_with(tiny_settings, model={"name": str(llama)})
    folder = export_run(forge_run(tmp_path / "run", settings), merged=False, out=tmp_path / "out")
    notice = (folder / "NOTICE").read_text(encoding="utf-8")
    assert notice.startswith("Meta Llama 3 is licensed under the Meta Llama 3 Community License, C")


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


# -- for Ollama and llama.cpp --


def test_an_adapter_goes_to_ollama_as_gguf_beside_its_modelfile(run, tmp_path):
    folder = export_run(
        run, merged=False, out=tmp_path / "out", ollama=True, base_in_ollama="smollm2:135m"
    )
    told = read_modelfile((folder / "Modelfile").read_text(encoding="utf-8"))
    assert told[:2] == [("from", "smollm2:135m"), ("adapter", "./adapter.gguf")]
    assert [name for name, _ in told[2:]] == ["template", "system", "stop"]
    assert told[4] == ("stop", "<|im_end|>")
    assert (folder / "adapter.gguf").read_bytes()[:4] == b"GGUF"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "ollama create out -f Modelfile" in card
    assert "--lora adapter.gguf" in card


def test_a_merged_model_goes_to_ollama_as_it_is_or_as_gguf(run, tmp_path):
    plain = export_run(run, merged=True, out=tmp_path / "plain", ollama=True)
    assert read_modelfile((plain / "Modelfile").read_text())[0] == ("from", ".")
    llama_cpp = stub_converter(tmp_path / "llama.cpp")
    options = {"ollama": True, "gguf": True, "llama_cpp": llama_cpp}
    whole = export_run(run, merged=True, out=tmp_path / "whole", **options)
    assert read_modelfile((whole / "Modelfile").read_text())[0] == ("from", "./kind.gguf")
    assert {"kind.gguf", "model.safetensors"} <= {path.name for path in whole.iterdir()}
    reader = gguf.GGUFReader(whole / "kind.gguf")
    assert reader.get_field("general.name").contents() == "kind"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merged": False, "ollama": True}, "its name for tiny is not known here"),
        ({"merged": True, "ollama": True, "base_in_ollama": "x"}, "a merged model is its own base"),
        ({"merged": True, "gguf": True, "llama_cpp": Path("/nowhere")}, "there is no convert_hf"),
        ({"merged": True, "dtype": "float16"}, "unknown dtype 'float16'"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_written(
    run, tmp_path, options, message
):
    with pytest.raises(ConfigError, match=message):
        export_run(run, out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_converter_that_fails_leaves_nothing_behind(run, tmp_path):
    llama_cpp = stub_converter(tmp_path / "llama.cpp", before="sys.exit('no')")
    with pytest.raises(RunError, match="converter failed"):
        export_run(run, merged=True, out=tmp_path / "out", gguf=True, llama_cpp=llama_cpp)
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_the_configuration_beside_the_card_can_be_trained(kind, request, run):
    folder = request.getfixturevalue(kind)
    shipped = load_config(folder / "gapo_config.yaml")
    assert shipped.training == run.config().training
    assert shipped.data.source == "everyday.jsonl"


# -- the command --


def call(*arguments):
    return CliRunner().invoke(cli.app, ["export", *map(str, arguments)])


def test_for_ollama_the_command_exports_the_adapter_unless_told_otherwise(
    run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done = call(run.path, "--ollama", "--ollama-base", "smollm2:135m")
    assert done.exit_code == 0, done.output
    assert "ollama create NAME -f exports/kind-adapter/Modelfile" in done.stdout
    assert (tmp_path / "exports" / "kind-adapter" / "adapter_model.safetensors").is_file()
    done = call(run.path, "--ollama", "--merged", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    merged = load_file(tmp_path / "exports" / "kind-merged" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "--dtype", "float32"], "--dtype is for merged weights"),
        (["--merged", "--ollama-base", "x"], "--ollama-base is for a Modelfile"),
        (["--adapter", "--llama-cpp", "."], "--llama-cpp is for --merged --gguf"),
        (["--gguf", "--llama-cpp", "."], "there is no convert_hf_to_gguf.py in ."),
        (["--merged", "--dtype", "int4"], "unknown dtype 'int4'"),
        (["--ollama"], "give --ollama-base"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    run, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    done = call(run.path, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


# -- what goes wrong --


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
