from __future__ import annotations

import pytest
import torch

from gapo_lite.errors import ModelError
from gapo_lite.generate import _Drawing, answer, answer_batch, stream_answer
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


# -- batches --


def _asked(*questions: str) -> list[list[dict]]:
    return [[{"role": "user", "content": question}] for question in questions]


QUESTIONS = _asked(
    "What is the capital of France?",
    "Hi",
    "Write one line about the sea, and then explain why salt water is heavier than fresh water.",
    "早上好 — ¿cómo estás?",
)


@pytest.fixture(scope="module")
def tiny(tiny_model):
    model = add_adapter(load_base(str(tiny_model), quantization="none", dtype=torch.float32))
    return model, load_tokenizer(str(tiny_model))


def test_greedy_answers_of_a_batch_equal_those_of_one_at_a_time(tiny):
    batch = answer_batch(*tiny, QUESTIONS, max_tokens=24)
    assert [a.text for a in batch] == [answer(*tiny, q, max_tokens=24) for q in QUESTIONS]
    assert len({a.text for a in batch}) == len(QUESTIONS)


def test_greedy_answers_of_the_embedded_model_equal_those_of_one_at_a_time(smol):
    batch = answer_batch(*smol, QUESTIONS, max_tokens=40)
    assert [a.text for a in batch] == [answer(*smol, q, max_tokens=40) for q in QUESTIONS]
    paris = batch[0]
    tokens = smol[1](paris.text, add_special_tokens=False)["input_ids"]
    assert not paris.cut_short
    assert paris.num_tokens == len(tokens)  # the end of the turn is not counted


def test_an_answer_that_max_tokens_ends_is_cut_short(smol):
    (said,) = answer_batch(*smol, QUESTIONS[:1], max_tokens=2)
    assert said.cut_short
    assert said.num_tokens == 2


def test_a_drawn_answer_depends_on_its_own_seed_alone(tiny):
    options = {"max_tokens": 16, "temperature": 1.0, "top_p": 0.9}
    together = answer_batch(*tiny, QUESTIONS, seeds=[3, 4, 5, 6], **options)
    for question, seed, said in zip(QUESTIONS, [3, 4, 5, 6], together, strict=True):
        assert answer_batch(*tiny, [question], seeds=seed, **options) == [said]
    turned = answer_batch(*tiny, QUESTIONS[::-1], seeds=[6, 5, 4, 3], **options)
    assert turned[::-1] == together
    others = answer_batch(*tiny, QUESTIONS, seeds=7, **options)
    assert all(a != b for a, b in zip(together, others, strict=True))


def test_a_drawn_answer_of_fewer_tokens_is_the_beginning_of_a_longer_one(tiny):
    short, long = (
        answer_batch(*tiny, QUESTIONS[:1], max_tokens=n, temperature=1.0, seeds=1)[0].text
        for n in (6, 20)
    )
    assert long.startswith(short)


def test_draws_follow_the_probabilities_within_top_p():
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log()
    counts = torch.zeros(2, 3)
    for row, top_p in enumerate((1.0, 0.79)):  # 0.5 + 0.3 reach 0.79, so 0.2 is left out
        drawing = _Drawing(1.0, top_p, [0])
        for _ in range(4000):
            counts[row, drawing(torch.zeros(1, 0), logits).argmax()] += 1
    expected = torch.tensor([[0.5, 0.2, 0.3], [0.625, 0, 0.375]])
    assert torch.allclose(counts / 4000, expected, atol=0.03)
    assert counts[1, 1] == 0


def test_a_temperature_close_to_zero_is_greedy(tiny):
    greedy = answer_batch(*tiny, QUESTIONS, max_tokens=8)
    assert answer_batch(*tiny, QUESTIONS, max_tokens=8, temperature=1e-30) == greedy


def test_a_batch_leaves_mode_and_global_generator_alone(tiny):
    model, tokenizer = tiny
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    answer_batch(model, tokenizer, QUESTIONS[:2], max_tokens=2, temperature=1.0)
    assert torch.rand(1) == expected
    assert model.training
    with pytest.raises(TypeError):
        answer_batch(model, tokenizer, QUESTIONS[:1], max_tokens=2, temperature="hot")
    assert model.training


def test_no_conversations_have_no_answers(tiny):
    assert answer_batch(*tiny, []) == []


def test_logits_that_are_not_numbers_are_an_error_when_drawing(tiny_model):
    model = load_base(str(tiny_model), quantization="none", dtype=torch.float32)
    model.get_output_embeddings().weight.data.fill_(torch.nan)
    tokenizer = load_tokenizer(str(tiny_model))
    with pytest.raises(ModelError, match="diverged"):
        answer_batch(model, tokenizer, QUESTIONS[:1], temperature=1.0)


def test_gradients_of_a_4_bit_policy_are_the_same_after_a_batch(tiny_model):
    model = add_adapter(load_base(str(tiny_model), quantization="nf4", dtype=torch.float32))
    tokenizer = load_tokenizer(str(tiny_model))
    ids = torch.arange(3, 40)[None]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    answer_batch(model, tokenizer, QUESTIONS, max_tokens=4)
    assert any(gradient.any() for gradient in before)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
