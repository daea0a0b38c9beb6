"""Random Llamas that tests train in seconds, and settings of a run of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gapo_lite.embedded import EMBEDDED_DATA


def save_llama(folder: Path, tokenizer: Any = None, **shape: Any) -> Path:
    """Writes a random Llama (float32, two layers of 64 features), always the same one.

    Args:
        folder: for model and tokenizer.
        tokenizer: what it speaks with; None writes none, and `shape` says the `vocab_size`.
        shape: of LlamaConfig, where it shall be other than here.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if tokenizer is not None:
        special = {k: getattr(tokenizer, k) for k in ("eos_token_id", "pad_token_id")}
        shape = {"vocab_size": len(tokenizer), **special, **shape}
        tokenizer.save_pretrained(folder)
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**small, **shape})).save_pretrained(folder)
    return folder


def short_settings(model: Path, folder: Path, **training: Any) -> dict[str, Any]:
    """Settings of a run of a tiny model on 24 real-looking pairs, with dropout and accumulation.

    Args:
        model: its folder.
        folder: for the pairs.
        training: what shall be other than here in the section `training`.
    """
    for name, count in (("everyday", 24), ("everyday-heldout", 6)):
        text = EMBEDDED_DATA[f"embedded:{name}"].read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)[:count]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {
        "model": {"name": str(model)},
        "lora": {"rank": 4, "dropout": 0.1},
        "data": {
            "source": str(folder / "everyday.jsonl"),
            "heldout_source": str(folder / "everyday-heldout.jsonl"),
        },
        "training": {
            "learning_rate": 1e-2,
            "epochs": 2,
            "batch_size": 4,
            "micro_batch_size": 2,
            "eval_steps": 4,
            "save_steps": 2,
            "logging_steps": 3,  # out of step with saving, so that a resume must keep open sums
            "gradient_checkpointing": False,
            **training,
        },
    }
