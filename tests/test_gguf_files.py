"""GGUF: an adapter that is written here, and a whole model that llama.cpp's converter writes."""

from __future__ import annotations

import json
import sys

import gguf
import numpy as np
import pytest
from forging import forge_run
from modelfiles import stub_converter
from safetensors.numpy import load_file

from gapo_lite.errors import ConfigError, ModelError, RunError
from gapo_lite.gguf_files import (
    _rows_of_gguf,
    convert_model,
    find_converter,
    read_gguf,
    write_adapter_gguf,
)
from gapo_lite.model import load_model_config


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory):
    return forge_run(tmp_path_factory.mktemp("runs") / "kind", tiny_settings)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No llama.cpp on this machine."""
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))


# -- an adapter --


def test_an_adapter_keeps_its_numbers_and_gets_the_names_of_gguf(run, tiny_model, tmp_path):
    out = tmp_path / "adapter.gguf"
    write_adapter_gguf(run.adapter, load_model_config(str(tiny_model)), out, name="kind")
    reader = gguf.GGUFReader(out)
    told = {key: reader.get_field(key).contents() for key in reader.fields if "GGUF" not in key}
    assert told["general.architecture"] == "llama"
    assert told["general.type"] == "adapter"
    assert told["adapter.type"] == "lora"
    assert told["adapter.lora.alpha"] == 32.0
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    own = load_file(run.adapter / "adapter_model.safetensors")
    assert len(found) == len(own) == 2 * 2 * 7  # A and B, layers, projections
    start = "base_model.model.model.layers.1"
    for ours, theirs in (
        (f"{start}.mlp.down_proj.lora_A.weight", "blk.1.ffn_down.weight.lora_a"),
        (f"{start}.self_attn.v_proj.lora_B.weight", "blk.1.attn_v.weight.lora_b"),
        (f"{start}.self_attn.q_proj.lora_A.weight", "blk.1.attn_q.weight.lora_a"),
    ):
        np.testing.assert_array_equal(found[theirs], own[ours])
    for letter, heads in (("q", 4), ("k", 2)):
        rows = own[f"{start}.self_attn.{letter}_proj.lora_B.weight"].reshape(heads, 2, 8, -1)
        moved = found[f"blk.1.attn_{letter}.weight.lora_b"].reshape(heads, 8, 2, -1)
        np.testing.assert_array_equal(moved[:, :, 0], rows[:, 0])
        np.testing.assert_array_equal(moved[:, :, 1], rows[:, 1])


def test_within_each_head_the_two_halves_alternate():
    column = np.arange(8).reshape(8, 1)  # two heads of four
    assert _rows_of_gguf(column, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_base_that_is_not_known_here_is_refused(run, tiny_model, tmp_path):
    base = load_model_config(str(tiny_model))
    base.model_type = "gemma2"
    with pytest.raises(ModelError, match=r"an adapter for a gemma2 model cannot.*--merged"):
        write_adapter_gguf(run.adapter, base, tmp_path / "x.gguf", name="x")


# -- a whole model --


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_converter_works_on_the_folder_and_its_work_is_read_back(
    tiny_model, tmp_path, dtype, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    converter = find_converter(stub_converter(tmp_path / "llama.cpp"))
    assert converter == [sys.executable, str(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py")]
    found = convert_model(tiny_model, tmp_path / "x.gguf", converter, name="x", dtype=dtype)
    assert (found.architecture, found.num_tensors, found.num_tokens) == ("llama", 3, 2)


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        ({"before": "raise SystemExit('Model Fancy is not supported')"}, "Model Fancy is not"),
        ({"before": "import no_such_module"}, r"No module named 'no_such_module'\. Is all instal"),
        ({"before": "os.kill(os.getpid(), 9)"}, r"exit code -9"),
        ({"before": "open(out, 'wb').write(b'GGUF'); sys.exit()"}, "cannot be read as GGUF"),
        ({"before": "sys.exit()"}, "cannot be read as GGUF"),
        ({"tokens": False}, "it has no tokenizer"),
        ({"missing": 1}, "it has 1 of 2 layers"),
    ],
)
def test_a_converter_that_fails_is_told_in_its_own_words(tiny_model, tmp_path, stub, message):
    converter = find_converter(stub_converter(tmp_path / "llama.cpp", **stub))
    with pytest.raises(RunError, match=message):
        convert_model(tiny_model, tmp_path / "x.gguf", converter, name="x", dtype="bfloat16")


def test_a_converter_that_cannot_be_started_is_told(tiny_model, tmp_path):
    with pytest.raises(RunError, match="cannot be started: No such file"):
        convert_model(tiny_model, tmp_path / "x", [str(tmp_path / "no")], name="x", dtype="float32")


def test_without_a_converter_it_is_said_where_it_comes_from(nowhere):
    with pytest.raises(ConfigError, match=r"comes with llama\.cpp .*--llama-cpp or in \$LLAMA_CPP"):
        find_converter(None)


def test_the_converter_is_found_by_variable_on_the_path_and_beside_python(
    nowhere, tmp_path, monkeypatch
):
    beside = tmp_path / "bin" / "convert-hf-to-gguf"
    beside.parent.mkdir()
    beside.write_text("#!/bin/sh\n")
    beside.chmod(0o755)
    assert find_converter(None) == [str(beside)]
    on_path = stub_converter(tmp_path / "on-path") / "convert_hf_to_gguf.py"
    on_path.chmod(0o755)
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_converter(None) == [sys.executable, str(on_path)]
    by_variable = stub_converter(tmp_path / "by-variable")
    monkeypatch.setenv("LLAMA_CPP", str(by_variable))
    assert find_converter(None) == [sys.executable, str(by_variable / "convert_hf_to_gguf.py")]
    with pytest.raises(ConfigError, match=r"there is no convert_hf_to_gguf\.py in"):
        find_converter(tmp_path)


def test_llama_cpps_own_converter_makes_the_tiny_model(tiny_model, tmp_path):
    try:
        converter = find_converter(None)
    except ConfigError:
        pytest.skip("llama.cpp's converter is not on this machine")
    found = convert_model(tiny_model, tmp_path / "x.gguf", converter, name="x", dtype="float32")
    settings = json.loads((tiny_model / "config.json").read_text())
    assert found.architecture == "llama"
    assert found.num_tokens == settings["vocab_size"]
    assert read_gguf(tmp_path / "x.gguf", tiny_model) == found
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    told = [str(reader.get_field(key).contents()) for key in reader.fields if "general" in key]
    assert not any(tiny_model.name in words for words in told)
