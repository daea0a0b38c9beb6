"""The one schema of a run: what a YAML under configs/ may say, with bounds, defaults and a line of
explanation each.

    config = load_config("configs/demo.yaml", ["margin.gamma=0.5"])

All problems of a file are reported at once, each with its key and, for an unknown key, the nearest
right one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gapo_lite.errors import ConfigError
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.settings import apply_override, describe_invalid, read_yaml


class Section(BaseModel):
    """Frozen settings of which every one is known: anything else is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        if isinstance(value, bool) and cls.model_fields[name].annotation is not bool:
            raise ValueError("expects a number or text, not true or false")
        return value


class ModelConfig(Section):
    """The base model."""

    name: str = Field(
        "embedded:smollm2-135m-instruct",
        min_length=1,
        description="Hub id (owner/name), local folder, or embedded:smollm2-135m-instruct.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub repository.")
    quantization: Literal["nf4", "none"] = Field(
        "nf4", description="4-bit NF4 (QLoRA), or none (LoRA)."
    )
    precision: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Arithmetic: auto is bfloat16 where the hardware has it, else float16 on a GPU "
        "(with loss scaling) and float32 on a CPU.",
    )
    dequantized_cache: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Keep the 4-bit weights dequantised while training: same numbers, less time "
        "on a GPU, three to four times the weights' memory. auto: where a GPU has room.",
    )
    backend: Literal["transformers", "liger", "unsloth"] = Field(
        "transformers",
        description="Whose layers train: liger's and unsloth's are fused GPU kernels, from "
        "requirements-liger.txt and -unsloth.txt. What reads a finished run takes transformers.",
    )


class LoraConfig(Section):
    """The adapter."""

    rank: int = Field(16, ge=1, le=1024, description="Rank r of the update matrices.")
    alpha: int = Field(
        32, ge=1, le=4096, description="Scale: the update is multiplied by alpha / rank."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Layers that get an adapter: all-linear (never the head), or their names.",
    )

    @field_validator("target_modules")
    @classmethod
    def _not_the_head(cls, value: str | list[str]) -> str | list[str]:
        if value == [] or any(str(name).endswith("lm_head") for name in value):
            raise ValueError(
                "needs at least one layer and never lm_head: its adapter would be ignored"
            )
        return value


class DataConfig(Section):
    """Preference pairs."""

    source: str = Field(
        "embedded:everyday",
        min_length=1,
        description="File (.jsonl .json .csv .parquet, also .gz), "
        "datasets folder, Hub id, or embedded:everyday.",
    )
    split: str = Field("train", min_length=1, description="Split of a Hub id or datasets folder.")
    heldout_source: str | None = Field(
        None, description="Where held-out pairs come from; none splits `source`."
    )
    heldout_split: str = Field("test", min_length=1, description="Split of `heldout_source`.")
    heldout_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of pairs held out of `source`, by whole prompts, "
        "where there is no heldout_source.",
    )
    split_seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of that split, apart from training.seed."
    )
    rating_columns: list[str] = Field(
        default_factory=list,
        max_length=2,
        description="Columns for margin.source: rating. One: the gap itself; two: scores of chosen "
        "and rejected; none: the data's own.",
    )
    max_pairs: int | None = Field(
        None, ge=1, description="Use at most so many training pairs (the first)."
    )
    max_length: int = Field(
        2048, ge=8, le=1_048_576, description="Tokens of prompt and response together."
    )
    max_prompt_length: int = Field(
        1800,
        ge=1,
        le=1_048_576,
        description="Tokens that a long prompt is cut to, from the left, if need be.",
    )


class EfConfig(Section):
    """The evaluation factor: how alike chosen and rejected are."""

    metric: Literal[
        "jaccard", "rouge1", "rouge2", "rougeL", "bertscore_p", "bertscore_r", "bertscore_f1"
    ] = Field("rougeL", description="Text similarity in [0, 1]; ROUGE-L is best in the paper.")
    use_stemmer: bool = Field(False, description="Porter stemmer for jaccard and ROUGE.")
    tokenizer: Literal["rouge", "unicode"] = Field(
        "rouge",
        description="Words of jaccard and ROUGE: rouge sees a–z and 0–9 only, unicode any script.",
    )
    bertscore_model: str = Field(
        "roberta-large",
        min_length=1,
        description="Encoder for BERTScore: Hub id, local folder, or embedded:all-minilm-l6-v2.",
    )
    bertscore_layer: int | None = Field(
        None,
        ge=1,
        le=200,
        description="Layer of the encoder; none takes the usual one for known encoders.",
    )
    bertscore_batch_size: int = Field(
        64, ge=1, le=4096, description="Texts the encoder reads at once."
    )

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `score_pairs`, only those that the metric knows."""
        if self.metric.startswith("bertscore"):
            return {
                "model": self.bertscore_model,
                "layer": self.bertscore_layer,
                "batch_size": self.bertscore_batch_size,
            }
        return {"use_stemmer": self.use_stemmer, "tokenizer": self.tokenizer}


def _filled_margin(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The margin's settings with what the objective takes where they say nothing."""
    spec = OBJECTIVES[name]
    given = {key: value for key, value in given.items() if value is not None}
    if not spec.takes_margin:
        unused = [key for key in given if key in MarginConfig.model_fields]
        _refuse_unused([f"margin.{key}" for key in unused], name)
        return given
    source = given.get("source", spec.margins[0])
    if source in ("ef", "constant", "rating") and source not in spec.margins:
        raise ValueError(
            f"margin.source is {source}, but {name} takes its margin from "
            f"{' or '.join(spec.margins)}; with a constant margin it is simpo"
        )
    is_plain = source == "constant" and name != "simpo"
    defaults = {
        "source": source,
        "mapping": "log",
        "normalization": "scale",
        "gamma": 0.0 if is_plain else spec.gamma,
        "ef_floor": 0.01,
    }
    return {**defaults, **given}


def _refuse_unused(keys: list[str], objective: str) -> None:
    if keys:
        raise ValueError(
            f"{objective} has no {' and no '.join(keys)}: remove "
            f"{'it' if len(keys) == 1 else 'them'}, or choose another objective.name"
        )


class MarginConfig(Section):
    """The target margin, and how it comes from evaluation factors. Which of these settings there
    are depends on the objective: RunConfig fills in what is left out."""

    source: Literal["ef", "constant", "rating"] | None = Field(
        None,
        description="ef: from the pair's texts; rating: from the data's own scores; constant: γ "
        "for all (the plain method, where γ is 0).",
    )
    mapping: Literal["log", "linear", "square", "sqrt"] | None = Field(
        None, description="gap of EF: log(1/EF), 1 − EF, 1 − EF², 1 − √EF."
    )
    normalization: Literal["scale", "shift", "none"] | None = Field(
        None, description="scale: γ·gap/mean(gap); shift: gap − mean(gap) + γ; none: gap."
    )
    gamma: float | None = Field(
        None, ge=0, le=1000, description="γ: average target margin, before β (SimPO's γ/β)."
    )
    ef_floor: float | None = Field(
        None, gt=0, le=1, description="Smaller EFs are raised to it; log(1/0) is infinite."
    )


class ObjectiveConfig(Section):
    """The loss. Which of these settings there are depends on its name: those that are left out take
    the objective's own values (see docs/objectives.md), and those that it has not are refused."""

    name: Literal[
        "gapo", "simpo", "dpo", "ipo", "kto", "cpo", "orpo", "rdpo", "slic", "rrhf", "dpop",
        "beta_dpo", "wpo", "rso",
    ] = Field(
        "gapo", description="gapo is SimPO with a margin a pair; see docs/objectives.md."
    )  # fmt: skip
    beta: float | None = Field(None, gt=0, le=1000, description="β: scale of the reward.")
    margin_scale: Literal["beta", "one"] | None = Field(
        None, description="beta: the margin is multiplied by β (eq. 5); one: it is not (eq. 9)."
    )
    nll_weight: float | None = Field(
        None, ge=0, le=1000, description="λ: weight of the chosen response's likelihood."
    )
    odds_weight: float | None = Field(
        None, ge=0, le=1000, description="λ: weight of ORPO's odds ratio."
    )
    length_weight: float | None = Field(
        None, ge=0, le=100, description="α: R-DPO's reward units a token of greater length."
    )
    delta: float | None = Field(None, ge=0, le=1000, description="δ: SLiC's margin, in nats.")
    fall_weight: float | None = Field(
        None, ge=0, le=10_000, description="λ: what DPOP adds for a chosen response that falls."
    )
    desirable_weight: float | None = Field(
        None, ge=0, le=1000, description="λ_w: KTO's weight of chosen responses."
    )
    undesirable_weight: float | None = Field(
        None, ge=0, le=1000, description="λ_l: KTO's weight of rejected responses."
    )
    beta_gain: float | None = Field(
        None, ge=0, le=10, description="α: how far β-DPO's β follows the step's mean gap."
    )
    gap_momentum: float | None = Field(
        None, ge=0, lt=1, description="Momentum of the running mean gap in β-DPO."
    )
    reference: Literal["cached", "on_the_fly"] | None = Field(
        None,
        description="Log-probabilities of the model without adapter: cached computes them once "
        "before training; on_the_fly in every step.",
    )

    @model_validator(mode="before")
    @classmethod
    def _own_parameters(cls, given: Any) -> Any:
        name = given.get("name", "gapo") if isinstance(given, dict) else None
        if not isinstance(name, str) or name not in OBJECTIVES:
            return given
        spec = OBJECTIVES[name]
        known = dict(spec.parameters)
        if spec.uses_reference:
            known["reference"] = "cached"
        given = {key: value for key, value in given.items() if value is not None}
        _refuse_unused(
            [key for key in given if key in cls.model_fields and key not in ("name", *known)], name
        )
        return {**known, **given}

    @property
    def reward_scale(self) -> float:
        """What a margin is multiplied by to be in reward units; see the README on β."""
        return self.beta if self.beta is not None and self.margin_scale == "beta" else 1.0


class TrainingConfig(Section):
    """The optimisation and what is recorded of it."""

    learning_rate: float = Field(2e-5, gt=0, le=1, description="Peak learning rate of AdamW.")
    epochs: float = Field(1.0, gt=0, le=1000, description="Passes over the training pairs.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after so many optimizer steps; overrides epochs."
    )
    batch_size: int = Field(
        128, ge=1, le=65536, description="Pairs an optimizer step, over all GPUs."
    )
    micro_batch_size: int | None = Field(
        None, ge=1, le=65536, description="Pairs a forward pass, at most."
    )
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        le=10**7,
        description="Tokens a forward pass, at most. With neither this nor micro_batch_size: what "
        "fits the memory.",
    )
    eval_batch_size: int = Field(
        4, ge=1, le=4096, description="Pairs a forward pass in evaluation."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning rate after warm-up."
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps that warm up.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(
        1.0, gt=0, le=1e6, description="Gradients are clipped to this norm."
    )
    gradient_checkpointing: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the layers that compute their activations again in the backward "
        "pass: 1 takes the least memory, 0 the least time. Empty: what fits the memory.",
    )
    offload: Literal["auto", "always", "never"] = Field(
        "auto",
        description="The inputs of layers that compute their activations again wait in the host's "
        "memory: same numbers, less GPU memory. auto: where it would not fit otherwise.",
    )
    fsdp: bool = Field(
        False,
        description="Each GPU holds a share of the base model's layers (FSDP2), for models that "
        "one cannot hold; under `accelerate launch` only. See docs/scaling.md.",
    )
    layout: Literal["auto", "packed", "padded"] = Field(
        "auto",
        description="packed: no padding, shared prompts; padded: "
        "for models whose attention is fixed.",
    )
    logging_steps: int = Field(1, ge=1, description="Record metrics every so many steps.")
    eval_steps: int = Field(50, ge=1, description="Evaluate on held-out pairs every so many steps.")
    save_steps: int = Field(50, ge=1, description="Write a checkpoint every so many steps.")
    keep_checkpoints: int = Field(
        2,
        ge=1,
        le=1000,
        description="Checkpoints kept: the newest, and the last from before max_chosen_fall.",
    )
    max_chosen_fall: float | None = Field(
        0.5,
        gt=0,
        le=1000,
        description="Drift guard: nats a token by which held-out chosen answers may become less "
        "likely than under the base model. 0.5: each token 0.61 times as likely. Empty: no guard.",
    )
    on_drift: Literal["warn", "stop"] = Field(
        "warn",
        description="Beyond that, warn and go on; or stop, with the adapter of the last checkpoint "
        "from before it, which is kept.",
    )
    sample_prompts: list[str] = Field(
        default_factory=list,
        max_length=32,
        description="Prompts answered at every evaluation, to samples.jsonl.",
    )
    sample_max_tokens: int = Field(96, ge=1, le=4096, description="Longest such answer, in tokens.")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of adapter, order and dropout.")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="Also log to tensorboard, wandb or trackio."
    )

    @model_validator(mode="before")
    @classmethod
    def _all_or_none_of_the_layers(cls, given: Any) -> Any:
        """true and false mean all and none, as in all other trainers."""
        if isinstance(given, dict) and isinstance(given.get("gradient_checkpointing"), bool):
            return {**given, "gradient_checkpointing": float(given["gradient_checkpointing"])}
        return given

    @field_validator("offload")
    @classmethod
    def _something_to_offload(cls, given: str, info: ValidationInfo) -> str:
        if given == "always" and info.data.get("gradient_checkpointing") == 0:
            raise ValueError(
                "always needs layers that compute their activations again: set "
                "training.gradient_checkpointing above 0, or offload to auto"
            )
        return given


class RunConfig(Section):
    """Everything that decides a run."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    ef: EfConfig = EfConfig()
    margin: MarginConfig = Field(MarginConfig(), validate_default=True)
    training: TrainingConfig = TrainingConfig()

    @field_validator("training")
    @classmethod
    def _something_to_stop_by(cls, given: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        data = info.data.get("data")
        nothing_held_out = data and data.heldout_source is None and data.heldout_fraction == 0
        if given.on_drift == "stop" and (nothing_held_out or given.max_chosen_fall is None):
            raise ValueError(
                "on_drift: stop looks at held-out pairs and needs a limit: set data.heldout_source "
                "or data.heldout_fraction, and training.max_chosen_fall"
            )
        return given

    @field_validator("margin", mode="before")
    @classmethod
    def _margin_of_the_objective(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, MarginConfig):
            given = given.model_dump()
        if not isinstance(given, dict) or "objective" not in info.data:
            return given  # which is said elsewhere
        return _filled_margin(info.data["objective"].name, given)

    def to_yaml(self) -> str:
        """The resolved configuration, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def used_settings(config: RunConfig) -> set[str]:
    """Dotted keys of the settings that have an effect on this configuration's training."""
    objective, metric = OBJECTIVES[config.objective.name], config.ef.metric
    is_semantic = metric.startswith("bertscore_")
    ef = {
        f"ef.{key}"
        for key in EfConfig.model_fields
        if key == "metric" or key.startswith("bertscore_") == is_semantic
    }
    by_source = {
        "ef": {f"margin.{key}" for key in MarginConfig.model_fields} | ef,
        "rating": {"margin.source", "margin.normalization", "margin.gamma", "data.rating_columns"},
        "constant": {"margin.source", "margin.gamma"},
        None: set(),
    }
    others = {
        key for key in setting_keys() if key.split(".")[0] not in ("objective", "margin", "ef")
    } - {"data.rating_columns"}
    own = {f"objective.{key}" for key in ("name", *objective.parameters)}
    reference = {"objective.reference"} if objective.uses_reference else set()
    return others | own | reference | by_source[config.margin.source]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, applies `key=value` overrides (dotted keys, YAML values) and checks the
    whole.

    Raises:
        ConfigError: the file is missing, empty, not YAML or a sweep's, or any setting is unknown or
            out of range.
    """
    settings = read_yaml(Path(path))
    if "base" in settings:
        raise ConfigError(f"{path} is a sweep, not a run's configuration: gapo-lite sweep {path}")
    return parse_config(settings, overrides, source=str(path))


def parse_config(
    settings: dict[str, Any], overrides: Sequence[str] = (), source: str = "settings"
) -> RunConfig:
    """Checks settings that are already a dictionary; see `load_config`.

    Raises:
        ConfigError: naming every unknown or bad setting at once.
    """
    settings = copy.deepcopy(settings)
    for override in overrides:
        apply_override(settings, override)
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe_invalid(error, setting_keys())}") from None


def settings_difference(own: RunConfig, other: RunConfig) -> list[str]:
    """One line for each setting that differs: its key and both values."""
    return [
        f"{key}: the run has {mine!r}, given is {theirs!r}"
        for key, (mine, theirs) in differing_settings(own, other).items()
    ]


def differing_settings(own: RunConfig, other: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings that differ: key → both values, as plain data."""
    mine, theirs = (config.model_dump(mode="json") for config in (own, other))
    pairs = {
        f"{section}.{name}": (value, theirs[section][name])
        for section, values in mine.items()
        for name, value in values.items()
    }
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def setting_keys() -> list[str]:
    """All dotted keys, `model.name` to `training.report_to`."""
    sections = RunConfig().model_dump()
    return [f"{name}.{key}" for name, section in sections.items() for key in section]
