from __future__ import annotations

import pytest
import torch

from gapo_lite.generate import answer, stream_answer
from gapo_lite.model import add_adapter, load_base, load_tokenizer, why_not_packed

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smol():
    name = "embedded:smollm2-135m-instruct"
    model = add_adapter(load_base(name, quantization="none", dtype=torch.float32), rank=2)
    assert why_not_packed(model) == ""  # generation works with the training attention in place
    return model, load_tokenizer(name)


def test_the_embedded_model_answers_and_stops_at_the_end_of_its_turn(smol):
    text = answer(*smol, QUESTION, max_tokens=40)
    assert "Paris" in text
    assert "<|im_end|>" not in text


def test_a_stream_is_the_whole_answer_in_pieces_and_leaves_the_mode_alone(smol):
    model, tokenizer = smol
    model.train()
    pieces = list(stream_answer(model, tokenizer, QUESTION, max_tokens=12))
    assert len(pieces) > 3
    assert "".join(pieces) == answer(model, tokenizer, QUESTION, max_tokens=12)
    assert model.training


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(smol):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    texts = [answer(*smol, QUESTION, max_tokens=12, temperature=1.5, seed=s) for s in (1, 1, 2)]
    assert torch.rand(1) == expected
    assert texts[0] == texts[1] != texts[2]


def test_closing_the_stream_stops_the_model(smol):
    stream = stream_answer(*smol, QUESTION, max_tokens=500)
    next(stream)
    stream.close()  # waits for the worker; 500 tokens would take minutes
    assert answer(*smol, QUESTION, max_tokens=2)


def test_an_error_in_the_model_reaches_the_reader(smol):
    _, tokenizer = smol

    class Broken:
        training = False
        eval = train = staticmethod(lambda *mode: None)

        def __getattr__(self, name):
            raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        answer(Broken(), tokenizer, QUESTION)


def test_disabling_the_adapter_gives_the_base_s_answer(smol):
    model, tokenizer = smol
    base = answer(model, tokenizer, QUESTION, max_tokens=8)
    weights = [p for n, p in model.named_parameters() if "lora_B" in n]
    for weight in weights:
        weight.data.fill_(0.05)
    assert answer(model, tokenizer, QUESTION, max_tokens=8) != base
    with model.disable_adapter():
        assert answer(model, tokenizer, QUESTION, max_tokens=8) == base
    for weight in weights:
        weight.data.zero_()
