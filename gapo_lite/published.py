"""What is published of models and data sets, for a plan where they cannot be had.

A gated model or a missing network hides a model's configuration and its tokenizer, and so the
lengths of the data. A plan needs no more than what is written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, PretrainedConfig

_LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
_MISTRAL_7B = _LLAMA_3_8B | {"model_type": "mistral", "sliding_window": None}

MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-70B-Instruct": _LLAMA_3_8B
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL_7B | {"vocab_size": 32000},
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_7B | {"vocab_size": 32768},
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}
"""By Hub id, what decides the size of a model in its config.json, as transformers' configuration
class takes it."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set of preference pairs.

    Attributes:
        rows: pairs of each split.
        prompt_tokens, response_tokens: mean lengths.
    """

    rows: dict[str, int]
    prompt_tokens: int
    response_tokens: int


DATA_SETS = {
    # Rows: its page on the Hub. Mean lengths: those that benchmarks/gpu_model.py assumes of it,
    # Llama-3-8B-Instruct's responses to UltraFeedback's prompts; its page gives none.
    "princeton-nlp/llama3-ultrafeedback-armorm": DataSet(
        rows={"train": 59_876, "test": 1_961}, prompt_tokens=170, response_tokens=400
    ),
}
"""By Hub id."""


def published_config(name: str) -> PretrainedConfig | None:
    """The configuration of a model as published; None where it is not known, or the name is a
    folder's here."""
    if name not in MODELS or Path(name).exists():
        return None
    config: PretrainedConfig = AutoConfig.for_model(**MODELS[name])
    config.name_or_path = name
    return config


def published_lengths(source: str, split: str) -> NDArray[np.int64] | None:
    """(N, 3) lengths as `draw_lengths` gives them for a split of N pairs, the same at every call;
    None where it is not known, or the source lies on the disk."""
    known = DATA_SETS.get(source)
    if known is None or split not in known.rows or Path(source).exists():
        return None
    rows = known.rows[split]
    draw = np.random.default_rng(rows)
    return draw_lengths(draw, rows, known.prompt_tokens, known.response_tokens)


def draw_lengths(
    draw: np.random.Generator, number: int, prompt_tokens: int, response_tokens: int
) -> NDArray[np.int64]:
    """Lengths of pairs before any cut, log-normal around given means.

    Chosen and rejected of a pair resemble each other in length (correlation 0.8 of the logarithms),
    since one model has written both.

    Args:
        draw: where the random numbers come from.
        number: of pairs, N.
        prompt_tokens, response_tokens: means.

    Returns:
        (N, 3): tokens of prompt, chosen and rejected response, each at least 1.
    """
    shared, own = draw.standard_normal((number, 1)), draw.standard_normal((number, 2))
    prompts = _log_normal(draw.standard_normal((number, 1)), prompt_tokens, 0.8)
    responses = _log_normal(0.8**0.5 * shared + 0.2**0.5 * own, response_tokens, 0.6)
    return np.hstack((prompts, responses))


def _log_normal(normal: NDArray[np.float64], mean: int, spread: float) -> NDArray[np.int64]:
    """Whole numbers, at least 1, from standard normal ones."""
    lengths = np.rint(mean * np.exp(spread * normal - spread**2 / 2))
    return np.maximum(lengths, 1).astype(np.int64)
