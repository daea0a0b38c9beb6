"""Unsloth as the loader of base model and adapter: its fused kernels, on an NVIDIA GPU, in its own
environment.

Unsloth patches transformers when it is imported and wants to come first, so nothing imports this
module unless a configuration says `model.backend: unsloth`, and then only in the training process
(see `cli.train`). Its attention does not go through transformers' interface, so its runs use the
padded layout.
"""

from __future__ import annotations

import torch
from peft import PeftModel

from gapo_lite.errors import ModelError
from gapo_lite.model import prepare_base, resolve_model

_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_unsloth_policy(
    name: str,
    *,
    revision: str | None,
    quantization: str,
    dtype: torch.dtype,
    max_length: int,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: str | list[str],
    gradient_checkpointing: bool,
    seed: int,
) -> PeftModel:
    """Base model and fresh adapter through Unsloth; the arguments are those of `load_base` and
    `add_adapter`.

    Raises:
        ModelError: Unsloth is not installed, there is no NVIDIA GPU, or the model cannot be loaded.
    """
    try:
        from unsloth import FastLanguageModel
    except (ImportError, NotImplementedError) as error:  # the latter where it finds no GPU
        raise ModelError(
            f"model.backend: unsloth cannot be used here ({error}). It needs an NVIDIA GPU and "
            "`pip install -r requirements-unsloth.txt` in an environment of its own; or use "
            "backend: transformers."
        ) from None
    try:
        base, _ = FastLanguageModel.from_pretrained(
            resolve_model(name),
            revision=revision,
            max_seq_length=max_length,
            dtype=dtype,
            load_in_4bit=quantization == "nf4",
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"Unsloth could not load {name}: {' '.join(str(error).split())[:300]}"
        ) from None
    prepare_base(name, base)
    return FastLanguageModel.get_peft_model(
        base,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_LINEAR if target_modules == "all-linear" else target_modules,
        use_gradient_checkpointing="unsloth" if gradient_checkpointing else False,
        random_state=seed,
    )
