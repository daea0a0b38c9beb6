"""A run → a folder to share: the adapter, or the merged model, with a model card; where one wants,
a Modelfile for Ollama and a GGUF file beside it.

    export_run(open_run("demo", Path("runs")), merged=True, out=Path("exports/demo-merged"))

The folder appears whole or not at all. Weights are safetensors and GGUF only, and nothing of the
machine that it was made on is in it: no paths, no user, no `training_args.bin`.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from gapo_lite.batching import turn_ending
from gapo_lite.chat_templates import ChatTemplate, read_chat_template
from gapo_lite.config import RunConfig
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.gguf_files import convert_model, find_converter, write_adapter_gguf
from gapo_lite.model import (
    _quiet_transformers,
    damaged_adapter,
    load_adapter,
    load_base,
    load_model_config,
    load_tokenizer,
)
from gapo_lite.model_card import CONFIG_FILE, card_figures, model_card
from gapo_lite.ollama import MODELFILE, modelfile, ollama_base
from gapo_lite.outputs import whole_folder
from gapo_lite.public import licence_of, public_config, public_name
from gapo_lite.runs import Run

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""What merged weights can be written in: bfloat16 rounds them, float32 does not."""

ADAPTER_GGUF = "adapter.gguf"


def export_run(
    run: Run,
    *,
    merged: bool,
    out: Path,
    dtype: str = "bfloat16",
    ollama: bool = False,
    base_in_ollama: str | None = None,
    gguf: bool = False,
    llama_cpp: Path | None = None,
    repository: str | None = None,
) -> Path:
    """Writes the folder `out` and returns it.

    Args:
        run: a run that has saved an adapter.
        merged: the base model with the adapter merged in, rather than the adapter alone.
        out: a folder that is not there yet, or empty.
        dtype: of the merged weights: "bfloat16", or "float32", which answers as base and adapter
            do at twice the size.
        ollama: whether to add a Modelfile (with the adapter as GGUF, where it is not merged).
        base_in_ollama: what the Modelfile of an adapter builds on; None knows some by their name.
        gguf: whether to add the adapter, or the merged model, as a GGUF file.
        llama_cpp: folder of llama.cpp, whose converter makes a merged model's; None looks for it.
        repository: owner/name on the Hub, for the card's code; None loads it by the folder's name.

    Raises:
        RunError: nothing is saved, `out` is in use, the disk is full, or the converter failed.
        ModelError: the base model cannot be loaded, the adapter was made for another one, or
            Ollama or GGUF cannot hold it.
        ConfigError: llama.cpp's converter or the base model's name in Ollama is not known.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    config, adapter = run.config(), run.trained_adapter()
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.path.resolve().name).strip("-.") or "model"
    extra = _Extra(
        template=read_chat_template(tokenizer) if ollama else None,
        source=_source(config, merged, f"{name}.gguf" if gguf else "", base_in_ollama)
        if ollama
        else "",
        converter=find_converter(llama_cpp) if gguf and merged else None,
        gguf=_gguf_name(name, merged, ollama, gguf),
    )
    with whole_folder(out) as stage:
        if merged:
            _write_merged(config, adapter, stage, DTYPES[dtype])
        else:
            _write_adapter(config, adapter, stage)
        tokenizer.save_pretrained(stage)
        if extra.template:
            text = _modelfile(config, tokenizer, extra.template, extra.source, merged)
            (stage / MODELFILE).write_text(text, encoding="utf-8")
        uses = _more_uses(extra, repository or out.name)
        _write_card(run, stage, repository or out.name, merged=merged, dtype=dtype, uses=uses)
        if extra.converter:  # which reads the card
            convert_model(stage, stage / extra.gguf, extra.converter, name=name, dtype=dtype)
        elif extra.gguf:
            shape = load_model_config(config.model.name, config.model.revision)
            write_adapter_gguf(adapter, shape, stage / extra.gguf, name=name)
    return out


@dataclass(frozen=True, slots=True)
class _Extra:
    """What is found out before anything is written: the chat template and FROM of a Modelfile,
    llama.cpp's converter, and the name of the GGUF file, "" for none."""

    template: ChatTemplate | None
    source: str
    converter: list[str] | None
    gguf: str


def _gguf_name(name: str, merged: bool, ollama: bool, gguf: bool) -> str:
    """Of the file to write; Ollama takes an adapter as GGUF only."""
    if merged:
        return f"{name}.gguf" if gguf else ""
    return ADAPTER_GGUF if gguf or ollama else ""


def _source(config: RunConfig, merged: bool, gguf: str, given: str | None) -> str:
    """What the Modelfile builds on."""
    if not merged:
        return ollama_base(public_name(config.model.name), given)
    if given is not None:
        raise ConfigError(
            "--ollama-base is for an adapter; a merged model is its own base: leave one of "
            "--merged and --ollama-base out."
        )
    return f"./{gguf}" if gguf else "."


def _write_merged(config: RunConfig, adapter: Path, folder: Path, dtype: torch.dtype) -> None:
    base = load_base(
        config.model.name,
        revision=config.model.revision,
        quantization="none",
        dtype=dtype,
        device="cpu",
    )
    prequantized = "quantization_config" in base.config.to_dict()
    if (
        prequantized
    ):  # a folder that bitsandbytes quantised: there are no other weights to merge into
        with _quiet_transformers():
            base = base.dequantize()
    policy = load_adapter(base, adapter)
    _refuse_broken(policy, adapter)
    # Peft's safe merge rounds the adapter's share before it adds it, and the sum again.
    model = policy.merge_and_unload(safe_merge=False)
    with _quiet_transformers():
        # How a dequantised checkpoint was read cannot be undone, and need not be.
        model.save_pretrained(folder, save_original_format=not prequantized)


def _refuse_broken(policy: PeftModel, adapter: Path) -> None:
    lora = ((name, weight) for name, weight in policy.named_parameters() if "lora_" in name)
    broken = next((name for name, weight in lora if not weight.isfinite().all()), None)
    if broken:
        raise RunError(
            f"the adapter in {adapter} is broken: {broken} is not finite. Export an earlier "
            "checkpoint's run, or train it again."
        )


def _write_adapter(config: RunConfig, adapter: Path, folder: Path) -> None:
    try:
        load_file(adapter / "adapter_model.safetensors")
    except (SafetensorError, FileNotFoundError) as error:
        raise damaged_adapter(adapter, error) from None
    shutil.copyfile(adapter / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = public_name(config.model.name)
    settings["revision"] = config.model.revision
    settings["target_modules"] = sorted(settings["target_modules"])  # peft writes a set
    (folder / "adapter_config.json").write_text(
        json.dumps(settings, indent=2, sort_keys=True) + "\n"
    )


def _modelfile(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    source: str,
    merged: bool,
) -> str:
    base = public_name(config.model.name)
    ending = tokenizer.convert_ids_to_tokens(turn_ending(tokenizer).token_id)
    stops = dict.fromkeys(str(token) for token in (ending, tokenizer.eos_token) if token)
    licence = licence_of(base)
    about = f"{base} with its adapter merged in" if merged else f"An adapter for {base}"
    return modelfile(
        template,
        source=source,
        adapter=None if merged else f"./{ADAPTER_GGUF}",
        stops=list(stops),
        licence=(licence.notice or licence.words) if licence else "",
        notes=[f"{about}, made with GaPO-Lite.", "ollama create NAME -f Modelfile"],
    )


def _write_card(
    run: Run, folder: Path, name: str, *, merged: bool, dtype: str, uses: list[str]
) -> None:
    """The model card, its figures, the configuration to repeat the run by, and the notice that the
    base's licence asks for."""
    config = run.config()
    card = model_card(run, merged=merged, folder=name, dtype=dtype, extras=uses)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for file, svg in card_figures(run).items():
        (folder / file).write_text(svg, encoding="utf-8")
    (folder / CONFIG_FILE).write_text(public_config(config).to_yaml(), encoding="utf-8")
    licence = licence_of(public_name(config.model.name))
    if licence and licence.notice:
        (folder / "NOTICE").write_text(f"{licence.notice}\n", encoding="utf-8")


def _more_uses(extra: _Extra, name: str) -> list[str]:
    """A section of the card on what lies in the folder for other programs."""
    own = re.sub(r"[^a-z0-9._-]+", "-", name.rpartition("/")[2].lower())
    lines = [f"```sh\nollama create {own} -f {MODELFILE}\n```"] if extra.template else []
    if extra.gguf == ADAPTER_GGUF:
        lines.append(f"`{extra.gguf}` is the adapter for llama.cpp: `--lora {extra.gguf}`.")
    elif extra.gguf:
        lines.append(f"`{extra.gguf}` is the whole model for llama.cpp: `-m {extra.gguf}`.")
    return ["## In Ollama and llama.cpp\n\n" + "\n\n".join(lines)] if lines else []
