"""A run → its model card: what it is, how it was made and measured, how to load and repeat it.

    card = model_card(run, merged=False, folder="demo-adapter")

Nothing in it comes from the training texts, and the samples of a run stay where they are: what
people ask a model may be private.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from gapo_lite.card_figures import margin_histogram, training_curves
from gapo_lite.compare import adapter_step
from gapo_lite.config import RunConfig, setting_keys, used_settings
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.public import (
    PUBLIC_NAMES,
    is_local,
    left_out,
    licence_of,
    printable,
    public_name,
)
from gapo_lite.runs import Run

CONFIG_FILE = "gapo_config.yaml"
"""In an export's folder: the configuration that repeats the run."""

CURVES_FILE, MARGINS_FILE = "training_curves.svg", "target_margins.svg"

_TITLES = {
    "gapo": "GaPO", "simpo": "SimPO", "dpo": "DPO", "ipo": "IPO", "kto": "KTO", "cpo": "CPO",
    "orpo": "ORPO", "rdpo": "R-DPO", "slic": "SLiC-HF", "rrhf": "RRHF", "dpop": "DPO-Positive",
    "beta_dpo": "β-DPO", "wpo": "WPO", "rso": "RSO",
}  # fmt: skip
"""Key of OBJECTIVES → as its paper calls it."""


def model_card(
    run: Run, *, merged: bool, folder: str, dtype: str = "bfloat16", extras: Sequence[str] = ()
) -> str:
    """README.md of an export.

    Args:
        run: what was exported.
        merged: whether the folder holds the merged model, else the adapter alone.
        folder: name of the export's folder, for the code that loads it.
        dtype: of the merged weights.
        extras: further sections, such as how to use it in Ollama.
    """
    config, base = run.config(), public_name(run.config().model.name)
    parts = [
        _front_matter(config, base, merged),
        f"# {_plain(run.name)}\n\n{_what_it_is(config, base, merged, dtype)}",
        f"## Load it\n\n```python\n{_loading_code(folder, base, merged)}\n```",
        *extras,
        f"## Training\n\n{_markdown_table(('setting', 'value'), _settings(run))}",
        *_figures(run),
        *_results(run),
        f"## Method\n\n{_method(config)}",
        f"## Repeat it\n\n{_repeating(config)}",
        f"## Licence\n\n{_licence(base)}",
        f"## Versions\n\n{_versions(run)}",
    ]
    return "\n\n".join(parts) + "\n"


def card_figures(run: Run) -> dict[str, str]:
    """The SVG files that the card shows, by name; those that there is nothing to draw for are left
    out."""
    margins = run.read("margins.json")
    has_margin = run.config().margin.source is not None
    step = adapter_step(run, run.trained_adapter())
    target = margins.get("mean_margin_in_reward_units") if has_margin else None
    histogram = margins.get("margin_histogram") if has_margin else None
    figures = {
        CURVES_FILE: training_curves(run.metrics(), target, last_step=step),
        MARGINS_FILE: histogram and margin_histogram(histogram, margins.get("mean_margin")),
    }
    return {name: svg for name, svg in figures.items() if svg}


def _front_matter(config: RunConfig, base: str, merged: bool) -> str:
    licence = licence_of(base)
    source, objective = config.data.source, config.objective.name
    on_hub = source.count("/") == 1 and not is_local(source)
    tags = ["preference-optimization", "lora", "gapo-lite", objective]
    lines = [
        *([f"license: {licence.key}"] if licence else []),
        f"base_model: {json.dumps(base)}",
        f"base_model_relation: {'finetune' if merged else 'adapter'}",
        f"library_name: {'transformers' if merged else 'peft'}",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(tags)}]",
        *([f"datasets: [{json.dumps(source)}]"] if on_hub else []),
    ]
    return "\n".join(["---", *lines, "---"])


def _what_it_is(config: RunConfig, base: str, merged: bool, dtype: str) -> str:
    what = (
        f"`{base}` with its LoRA adapter merged in, in {dtype}"
        if merged
        else f"A LoRA adapter for `{base}`"
    )
    is_nf4 = config.model.quantization == "nf4"
    bits = "on the base model in 4-bit NF4 (QLoRA)" if is_nf4 else "on the base model"
    sentences = [
        f"{what}, trained with {_objective(config)} {bits} on pairs of "
        f"`{_plain(public_name(config.data.source))}`."
    ]
    if merged and dtype == "bfloat16":
        sentences.append(
            "Rounding the merged weights to bfloat16 moves numbers a little, so that a long greedy "
            "answer can part from that of base and adapter; an export in float32 does not round."
        )
    if merged and is_nf4:
        sentences.append(
            "The weights that it is merged into are the unquantised ones, so numbers differ a "
            "little from training."
        )
    if config.model.name in PUBLIC_NAMES:
        sentences.append(
            "The base model was taken from its 4-bit GGUF file, whose weights differ a little "
            "from the original's."
        )
    licence = licence_of(base)
    credit = f"**{licence.credit}.**\n\n" if licence and licence.credit else ""
    return credit + " ".join(sentences)


def _objective(config: RunConfig) -> str:
    """What the run was trained with, in words."""
    title = _TITLES[config.objective.name]
    source = config.margin.source
    if config.objective.name == "gapo" or source not in ("ef", "rating"):
        return title
    origin = "its evaluation factor" if source == "ef" else "its ratings"
    return f"{title} with a target margin for each pair, from {origin} (GaPO's idea)"


_LOAD_MERGED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder})
"""
_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {folder})
"""
_ASK = """\
tokenizer = AutoTokenizer.from_pretrained({folder})
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "What is a leap year?"}}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
answer = model.generate(**inputs, max_new_tokens=128)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def _loading_code(folder: str, base: str, merged: bool) -> str:
    code = (_LOAD_MERGED if merged else _LOAD_ADAPTER) + _ASK
    return code.format(folder=json.dumps(folder), base=json.dumps(base))


# -- how it was made --


def _settings(run: Run) -> list[tuple[str, str]]:
    config, margins = run.config(), run.read("margins.json")
    training, lora, objective = config.training, config.lora, config.objective
    layers = lora.target_modules
    targets = layers if isinstance(layers, str) else ", ".join(layers)
    step, total = adapter_step(run, run.trained_adapter()), run.read("status.json").get("total", 0)
    revision = f" @ {config.model.revision}" if config.model.revision else ""
    rows = [
        ("base model", public_name(config.model.name) + revision),
        ("base weights in training", config.model.quantization),
        ("data", f"{public_name(config.data.source)}, {_count(margins, 'train')} training pairs"),
        *_fingerprint(run),
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


def _fingerprint(run: Run) -> list[tuple[str, str]]:
    known = run.read("environment.json").get("data_fingerprint")
    return [("data fingerprint", str(known))] if known else []


def _target_margin(config: RunConfig, margins: dict[str, Any]) -> list[tuple[str, str]]:
    if config.margin.source is None:
        return []
    mean = margins.get("mean_margin_in_reward_units")
    rows = []
    if mean is not None:
        rows.append(("average target margin in reward units", f"{mean:.4g}"))
    if "num_floored" in margins and config.margin.source == "ef":
        counts = (margins[f"num_{what}"] for what in ("floored", "equal", "negative"))
        text = "{:,} raised to the EF floor, {:,} with EF = 1, {:,} with a negative margin"
        rows.append(("pairs of note", text.format(*counts)))
    return rows


_NAMES = {
    "ef.metric": "evaluation factor",
    "margin.source": "target margin from",
    "margin.mapping": "mapping",
    "margin.normalization": "normalisation",
    "margin.ef_floor": "EF floor",
    "margin.gamma": "γ",
    "objective.beta": "β",
}
_TOLD = ("objective.name", "objective.margin_scale")


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
        if key == "ef.bertscore_model":
            text = public_name(text)
        with_scale = f" (margin scale: {scale})" if key == "objective.beta" and scale else ""
        rows.append((_NAMES.get(key, key), text + with_scale))
    return rows


def _count(margins: dict[str, Any], split: str) -> str:
    number = margins.get(split, {}).get("num_pairs")
    return "an unknown number of" if number is None else f"{number:,}"


_FIGURE_WORDS = {
    CURVES_FILE: "Loss, reward margin with its target, and reward accuracy over the steps",
    MARGINS_FILE: "How the training pairs' target margins are distributed",
}


def _figures(run: Run) -> list[str]:
    lines = [f'<img src="{name}" alt="{_FIGURE_WORDS[name]}">' for name in card_figures(run)]
    return ["\n\n".join(lines)] if lines else []


# -- how it did --


def _results(run: Run) -> list[str]:
    """The first and the last held-out metrics up to the exported step, where there are any."""
    step = adapter_step(run, run.trained_adapter())
    rows = [row for row in run.metrics() if "eval/loss" in row and row["step"] <= step]
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    names = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "loss")
    cells = [(name, *(_metric(row, name) for row in (first, last))) for name in names]
    count = _count(run.read("margins.json"), "heldout")
    table = _markdown_table(("metric", f"step {first['step']}", f"step {last['step']}"), cells)
    base = " Step 0 is the base model." if first["step"] == 0 else ""
    return [
        f"## Held-out pairs\n\nMeans over {count} pairs that were not trained on.{base}\n\n{table}"
    ]


def _metric(row: dict[str, Any], name: str) -> str:
    value = row.get(f"eval/{name}")
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.4f}" if known else "–"


# -- method, repetition, licence, versions --

_GAPO = (
    "Gap-Aware Preference Optimization (GaPO) is preference optimisation in which each pair has a "
    "target margin of its own: the less alike the preferred and the dispreferred response are, by "
    "an evaluation factor (EF) in [0, 1], the further apart their rewards are asked to be. Its "
    "loss is −log σ(β(a_w − a_l) − margin), where a is a response's average log-probability per "
    "token. The paper is *Gap-Aware Preference Optimization: Enhancing Model Alignment with "
    "Perception Margin*. SimPO is the same with one margin for all pairs."
)


def _method(config: RunConfig) -> str:
    name = config.objective.name
    if name == "gapo":
        return f"{_GAPO} Made with GaPO-Lite."
    spec = OBJECTIVES[name]
    own = f"{_TITLES[name]} ([arXiv {spec.source}](https://arxiv.org/abs/{spec.source}))"
    text = f"{own}; the loss of a pair is `{spec.formula}`."
    borrowed = config.margin.source in ("ef", "rating")
    margin = f" Its margin is each pair's own, as in GaPO. {_GAPO}" if borrowed else ""
    return f"{text}{margin} Made with GaPO-Lite."


def _repeating(config: RunConfig) -> str:
    lines = [
        f"`{CONFIG_FILE}` beside this card is the run's whole configuration:",
        f"```sh\ngapo-lite train {CONFIG_FILE}\n```",
    ]
    if missing := left_out(config):
        lines.append(
            "Some of it lay on the machine it was made on and is not part of this repository; say "
            "where yours is first, with `--set KEY=VALUE`: " + "; ".join(missing) + "."
        )
    if config.training.sample_prompts or config.training.report_to:
        lines.append("Its sample prompts and its reports to accounts are left out.")
    return "\n\n".join(lines)


def _licence(base: str) -> str:
    licence = licence_of(base)
    what = (
        f"The base model is under the {licence.words}."
        if licence
        else "The base model's licence is named on its page."
    )
    text = (
        f"{what} It covers what is derived from the model, so these weights too; the training data "
        "may add terms."
    )
    return f"{text}\n\n{licence.duties}" if licence and licence.duties else text


def _versions(run: Run) -> str:
    versions = run.read("environment.json").get("versions", {})
    return (
        ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        or "not recorded"
    )


def _markdown_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """A line that Markdown shows as it is, whoever chose the name in it."""
    return html.escape(printable(text), quote=False)
