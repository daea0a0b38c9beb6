"""These tests need a GPU: a real one, or the one that tests/hostcuda emulates (`make test-gpu`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import save_llama, short_settings

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    is_emulated = "hostcuda" in os.environ.get("PYTHONPATH", "")
    reason = os.environ.get("HOSTCUDA_UNAVAILABLE", "`make test-gpu` runs it on an emulated one")
    if is_emulated and "HOSTCUDA_UNAVAILABLE" not in os.environ:
        pytest.exit("the emulated GPU is broken: see the first lines of the output", returncode=1)
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.skip(reason=f"there is no NVIDIA GPU: {reason}"))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama (float32) with 1,024 tokens of its own: the output head
    of a larger vocabulary is most of what an emulated step takes."""
    return save_llama(
        tmp_path_factory.mktemp("models") / "small",
        _trained_tokenizer(1024),
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
    )


def _trained_tokenizer(size: int):
    """A byte-level BPE of `size` tokens, trained on the embedded pairs, that speaks ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from gapo_lite.embedded import EMBEDDED_DATA

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = EMBEDDED_DATA["embedded:everyday"].read_text(encoding="utf-8")
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def small_settings(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Settings of a 6-step run of the small model, in the precision that the card has."""
    return short_settings(small_model, tmp_path_factory.mktemp("pairs"), epochs=1, eval_steps=3)


@pytest.fixture
def emulation() -> Iterator[ModuleType]:
    """The module hostcuda, whose device is as it was once the test has ended; skips the test on a
    real GPU."""
    if "emulated" not in (torch.version.cuda or ""):
        pytest.skip("it sets what the GPU is, which only the emulated one lets it")
    import hostcuda

    from gapo_lite.attention import why_not_flash

    card = hostcuda.Card
    before = (card.major, card.minor), card.total_memory, card.held
    why_not_flash.cache_clear()
    yield hostcuda
    hostcuda.become(*before)
    why_not_flash.cache_clear()
