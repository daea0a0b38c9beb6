"""What several test files share. Nothing here needs a network."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub: no test may reach out
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tests run side by side; tiny models gain nothing from threads

import pytest
from checkout import REAL_DATA, ROOT

pytest.register_assert_rewrite("browsing", "commands", "forging", "liger_parity", "sweeping")


def read_real_rows(name: str) -> list[dict]:
    """Rows of one of the real files beside the checkout; skips the test where they are not."""
    path = REAL_DATA / name
    if not path.is_file():
        pytest.skip(f"real preference pairs are not on this machine: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def real_rows() -> list[dict]:
    """All 3,101 real pairs (CC BY-NC: never copied into the project)."""
    return read_real_rows("alpaca_pairs_train.jsonl.gz") + read_real_rows(
        "alpaca_pairs_test.jsonl.gz"
    )


# Tests unpack the embedded model into a cache of the checkout's own, never into the user's.
os.environ.setdefault("GAPO_LITE_CACHE", str(ROOT / ".pytest_cache" / "gapo-lite"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama (float32) with the embedded model's tokenizer and chat
    template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gapo_lite.model import load_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = load_tokenizer("embedded:smollm2-135m-instruct")
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Settings of a 12-step run of the tiny model on 24 real-looking pairs, with dropout and
    accumulation."""
    from gapo_lite.embedded import EMBEDDED_DATA

    folder = tmp_path_factory.mktemp("pairs")
    for name, count in (("everyday", 24), ("everyday-heldout", 6)):
        lines = (
            EMBEDDED_DATA[f"embedded:{name}"].read_text(encoding="utf-8").splitlines(keepends=True)
        )
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return {
        "model": {"name": str(tiny_model), "precision": "float32"},
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
        },
    }
