"""A run → a folder to share: the adapter, or the merged model, and a model card.

    export_run(open_run("demo", Path("runs")), merged=True, out=Path("exports/demo-merged"))

The folder appears whole or not at all. It holds safetensors only, and nothing of the machine that
it was made on: no paths, no user, no `training_args.bin`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gapo_lite.compare import adapter_step
from gapo_lite.config import RunConfig, setting_keys, used_settings
from gapo_lite.model import (
    _quiet_transformers,
    damaged_adapter,
    load_adapter,
    load_base,
    load_tokenizer,
)
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.outputs import whole_folder
from gapo_lite.runs import Run

PUBLIC_NAMES = {"embedded:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Where the embedded models come from."""

LICENCES = {
    "HuggingFaceTB/SmolLM2": ("apache-2.0", "Apache License 2.0"),
    "meta-llama/Meta-Llama-3-": (
        "llama3",
        "Meta Llama 3 Community License: what is built with it must say so and have a name that "
        "begins with `Llama 3`",
    ),
}
"""Start of a base model's public name → (key of the Hub, in words)."""


def export_run(run: Run, *, merged: bool, out: Path) -> Path:
    """Writes the folder `out` and returns it.

    Args:
        run: a run that has saved an adapter.
        merged: the base model in bfloat16 with the adapter merged in, rather than the adapter
            alone.
        out: a folder that is not there yet, or empty.

    Raises:
        RunError: nothing is saved, `out` is in use, or the disk is full.
        ModelError: the base model cannot be loaded, or the adapter was made for another one.
    """
    config, adapter = run.config(), run.trained_adapter()
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    with whole_folder(out) as stage:
        if merged:
            _write_merged(config, adapter, stage)
        else:
            _write_adapter(config, adapter, stage)
        tokenizer.save_pretrained(stage)
        (stage / "README.md").write_text(
            model_card(run, merged=merged, folder=out.name), encoding="utf-8"
        )
    return out


def public_name(name: str) -> str:
    """A model's or data set's name as others know it; of a local path the last part alone."""
    if name in PUBLIC_NAMES:
        return PUBLIC_NAMES[name]
    is_local = (
        Path(name).is_absolute()
        or name.startswith(("~", "."))
        or name.count("/") > 1
        or Path(name).exists()
    )
    return Path(name).expanduser().resolve().name if is_local else name


def _write_merged(config: RunConfig, adapter: Path, folder: Path) -> None:
    base = load_base(
        config.model.name,
        revision=config.model.revision,
        quantization="none",
        dtype=torch.bfloat16,
        device="cpu",
    )
    prequantized = "quantization_config" in base.config.to_dict()
    if (
        prequantized
    ):  # a folder that bitsandbytes quantised: there are no other weights to merge into
        with _quiet_transformers():
            base = base.dequantize()
    model = load_adapter(base, adapter).merge_and_unload(safe_merge=True)
    with _quiet_transformers():
        # How a dequantised checkpoint was read cannot be undone, and need not be.
        model.save_pretrained(folder, save_original_format=not prequantized)


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


# -- the model card --


def model_card(run: Run, *, merged: bool, folder: str) -> str:
    """README.md of an export: what it is, how it was made and measured, and how to load it.

    Args:
        run: what was exported.
        merged: see `export_run`.
        folder: name of the export's folder, for the code that loads it.
    """
    config, base = run.config(), public_name(run.config().model.name)
    parts = [
        _front_matter(base, merged),
        f"# {run.name}\n\n{_what_it_is(config, base, merged)}",
        f"## Load it\n\n```python\n{_loading_code(folder, base, merged)}\n```",
        f"## Training\n\n{_markdown_table(('setting', 'value'), _settings(run))}",
        *_results(run),
        f"## Method\n\n{_METHOD}",
        f"## Licence\n\n{_licence(base)}",
        f"## Versions\n\n{_versions(run)}",
    ]
    return "\n\n".join(parts) + "\n"


_METHOD = (
    "Gap-Aware Preference Optimization (GaPO) is preference optimisation in which each pair has a "
    "target margin of its own: the less alike the preferred and the dispreferred response are, by "
    "an evaluation factor (EF) in [0, 1], the further apart their rewards are asked to be. Its "
    "loss is −log σ(β(a_w − a_l) − margin), where a is a response's average log-probability per "
    "token. The paper is *Gap-Aware Preference Optimization: Enhancing Model Alignment with "
    "Perception Margin*. SimPO is the same with one margin for all pairs. Made with GaPO-Lite."
)


def _front_matter(base: str, merged: bool) -> str:
    licence = [f"license: {key}" for start, (key, _) in LICENCES.items() if base.startswith(start)]
    lines = [
        f"base_model: {json.dumps(base)}",
        f"base_model_relation: {'finetune' if merged else 'adapter'}",
        f"library_name: {'transformers' if merged else 'peft'}",
        "pipeline_tag: text-generation",
        "tags: [gapo, preference-optimization, lora]",
    ]
    return "\n".join(["---", *licence, *lines, "---"])


def _what_it_is(config: RunConfig, base: str, merged: bool) -> str:
    objective = "GaPO" if config.objective.name == "gapo" else "SimPO"
    what = (
        "`" + base + "` with its LoRA adapter merged in, in bfloat16"
        if merged
        else f"A LoRA adapter for `{base}`"
    )
    bits = (
        "on the base model in 4-bit NF4 (QLoRA)"
        if config.model.quantization == "nf4"
        else "on the base model"
    )
    text = (
        f"{what}, trained with {objective} {bits} on pairs of `{public_name(config.data.source)}`."
    )
    if merged and config.model.quantization == "nf4":
        text += (
            " The weights that it is merged into are the unquantised ones, so numbers differ a "
            "little from training."
        )
    if config.model.name in PUBLIC_NAMES:
        text += (
            " The base model was taken from its 4-bit GGUF file, whose weights differ a little "
            "from the original's."
        )
    return text


_LOAD_MERGED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
"""
_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{folder}")
"""
_ASK = """\
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "What is a leap year?"}}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
answer = model.generate(**inputs, max_new_tokens=128)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def _loading_code(folder: str, base: str, merged: bool) -> str:
    return ((_LOAD_MERGED if merged else _LOAD_ADAPTER) + _ASK).format(folder=folder, base=base)


def _settings(run: Run) -> list[tuple[str, str]]:
    config, margins = run.config(), run.read("margins.json")
    training, lora, objective = config.training, config.lora, config.objective
    targets = (
        lora.target_modules
        if isinstance(lora.target_modules, str)
        else ", ".join(lora.target_modules)
    )
    step, total = adapter_step(run, run.trained_adapter()), run.read("status.json").get("total", 0)
    rows = [
        (
            "base model",
            public_name(config.model.name)
            + (f" @ {config.model.revision}" if config.model.revision else ""),
        ),
        ("base weights in training", config.model.quantization),
        ("data", f"{public_name(config.data.source)}, {_count(margins, 'train')} training pairs"),
        ("objective", objective.name),
        ("loss of a pair", OBJECTIVES[objective.name].formula),
        *_own_settings(config),
        *_target_margin(config, margins),
        ("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, on {targets}"),
        (
            "learning rate",
            f"{training.learning_rate:g}, {training.schedule}, warm-up {training.warmup_ratio:g}",
        ),
        ("pairs a step", str(training.batch_size)),
        ("steps", f"{step} of {total}"),
        (
            "longest pair",
            f"{config.data.max_length} tokens (prompt {config.data.max_prompt_length})",
        ),
        ("seed", str(training.seed)),
    ]
    return rows


def _target_margin(config: RunConfig, margins: dict[str, Any]) -> list[tuple[str, str]]:
    if config.margin.source is None:
        return []
    mean = margins.get("mean_margin_in_reward_units", float("nan"))
    return [("average target margin in reward units", f"{mean:.4g}")]


_NAMES = {
    "ef.metric": "evaluation factor",
    "margin.source": "target margin from",
    "margin.mapping": "mapping",
    "margin.normalization": "normalisation",
    "margin.ef_floor": "EF floor",
    "margin.gamma": "γ",
    "objective.beta": "β",
}


def _own_settings(config: RunConfig) -> list[tuple[str, str]]:
    """What the objective and its margin have."""
    scale = config.objective.margin_scale
    rows = []
    for key in sorted(used_settings(config), key=setting_keys().index):
        section, _, name = key.partition(".")
        if section not in ("objective", "ef", "margin") or key in _TOLD:
            continue
        value = getattr(getattr(config, section), name)
        text = f"{value:g}" if isinstance(value, float) else str(value)
        with_scale = f" (margin scale: {scale})" if key == "objective.beta" and scale else ""
        rows.append((_NAMES.get(key, key), text + with_scale))
    return rows


_TOLD = ("objective.name", "objective.margin_scale")


def _count(margins: dict[str, Any], split: str) -> str:
    number = margins.get(split, {}).get("num_pairs")
    return "an unknown number of" if number is None else f"{number:,}"


def _results(run: Run) -> list[str]:
    """The first and the last held-out metrics up to the exported step, where there are any."""
    step = adapter_step(run, run.trained_adapter())
    rows = [row for row in run.metrics() if "eval/loss" in row and row["step"] <= step]
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    names = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "loss")
    cells = [(name, *(f"{row[f'eval/{name}']:.4f}" for row in (first, last))) for name in names]
    count = _count(run.read("margins.json"), "heldout")
    table = _markdown_table(("metric", f"step {first['step']}", f"step {last['step']}"), cells)
    return [f"## Held-out pairs\n\nMeans over {count} pairs that were not trained on.\n\n{table}"]


def _markdown_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _licence(base: str) -> str:
    known = [words for start, (_, words) in LICENCES.items() if base.startswith(start)]
    what = (
        f"The base model is under the {known[0]}."
        if known
        else "The base model's licence is named on its page."
    )
    return (
        f"{what} It covers what is derived from the model, so these weights too; the training data "
        "may add terms."
    )


def _versions(run: Run) -> str:
    versions = run.read("environment.json").get("versions", {})
    return (
        ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        or "not recorded"
    )
