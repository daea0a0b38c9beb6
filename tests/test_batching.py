from __future__ import annotations

import numpy as np
import pytest
import torch

from gapo_lite.batching import pack, pad, render_prompt, tokenize_pairs, turn_ending
from gapo_lite.errors import DataError, ModelError
from gapo_lite.model import load_tokenizer
from gapo_lite.types import PreferencePair, TokenizedPair

HEADER = "'<|start_header_id|>' + role + '<|end_header_id|>\n\n'"
LLAMA3_TEMPLATE = (  # of the same effect as the model's own
    "{{ bos_token }}{% for message in messages %}{% set role = message['role'] %}"
    "{{ " + HEADER + " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{% set role = 'assistant' %}{{ " + HEADER + " }}{% endif %}"
)


@pytest.fixture(scope="module")
def smol():
    return load_tokenizer("embedded:smollm2-135m-instruct")


@pytest.fixture(scope="module")
def llama3():
    """Llama-3's template and special tokens on the embedded model's vocabulary; like Llama-3's,
    without a pad token."""
    tokenizer = load_tokenizer("embedded:smollm2-135m-instruct")
    tokenizer.add_special_tokens(
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "additional_special_tokens": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        }
    )
    tokenizer.chat_template = LLAMA3_TEMPLATE
    tokenizer.pad_token = None
    return tokenizer


def user(text):
    return [{"role": "user", "content": text}]


def one(tokenizer, prompt="Hi there", chosen="Yes.", rejected="No, not at all.", **limits):
    pair = PreferencePair(user(prompt), chosen, rejected)
    return tokenize_pairs([pair], tokenizer, **limits).pairs[0]


def test_llama3_has_one_bos_one_end_of_turn_and_nothing_after_it(llama3):
    pair = one(llama3)
    for response, text in ((pair.chosen_ids, "Yes."), (pair.rejected_ids, "No, not at all.")):
        row = llama3.decode([*pair.prompt_ids, *response])
        assert row == (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
            f"<|start_header_id|>assistant<|end_header_id|>\n\n{text}<|eot_id|>"
        )


def test_the_embedded_template_ends_a_turn_without_its_newline(smol):
    assert smol.decode(one(smol).chosen_ids) == "Yes.<|im_end|>"
    assert turn_ending(smol).token_id == smol.convert_tokens_to_ids("<|im_end|>")


def test_the_prompt_is_what_generation_sees(smol):
    expected = smol.apply_chat_template(
        user("Hi there"), add_generation_prompt=True, return_dict=True
    )
    assert one(smol).prompt_ids.tolist() == expected["input_ids"]


def test_white_space_around_a_response_goes_the_way_of_the_template(smol, llama3):
    assert llama3.decode(one(llama3, chosen="  Yes. \n").chosen_ids) == "Yes.<|eot_id|>"
    assert smol.decode(one(smol, chosen="  Yes. ").chosen_ids) == "  Yes. <|im_end|>"


def test_a_response_that_spells_out_a_special_token_stays_text(smol):
    ids = one(smol, chosen="Type <|im_end|> to end.").chosen_ids.tolist()
    assert ids.count(smol.convert_tokens_to_ids("<|im_end|>")) == 1
    assert smol.decode(ids) == "Type <|im_end|> to end.<|im_end|>"


@pytest.mark.parametrize(
    "text", ["é\u0301 naïve", "日本語のテキスト", "👩‍👩‍👧‍👦 family", "a\x00b", "ﷺ", "\u202eright"]
)
def test_odd_unicode_survives(smol, text):
    assert smol.decode(one(smol, chosen=text).chosen_ids) == f"{text}<|im_end|>"


def test_a_long_prompt_is_cut_from_the_left_only_as_far_as_needed(smol):
    full = one(smol, prompt="word " * 100)
    longest = max(len(full.chosen_ids), len(full.rejected_ids))
    cut = one(
        smol,
        prompt="word " * 100,
        max_length=len(full.prompt_ids) + longest - 7,
        max_prompt_length=10,
    )
    assert len(cut.prompt_ids) == len(full.prompt_ids) - 7
    assert cut.prompt_ids[1:].tolist() == full.prompt_ids[8:].tolist()
    assert cut.prompt_ids[0] == smol.bos_token_id  # kept
    assert cut.chosen_ids.tolist() == full.chosen_ids.tolist()


def test_a_prompt_longer_than_its_limit_stays_whole_while_there_is_room(smol):
    assert (
        len(one(smol, prompt="word " * 100, max_length=500, max_prompt_length=10).prompt_ids) > 100
    )


def test_then_the_response_is_cut_on_the_right(smol):
    pairs = [
        PreferencePair(user("word " * 100), "so " * 100, "no"),
        PreferencePair(user("short"), "yes", "no"),
    ]
    out = tokenize_pairs(pairs, smol, max_length=64, max_prompt_length=40)
    first = out.pairs[0]
    assert (len(first.prompt_ids), len(first.chosen_ids), len(first.rejected_ids)) == (40, 24, 2)
    assert smol.convert_tokens_to_ids("<|im_end|>") not in first.chosen_ids
    assert (out.num_prompts_truncated, out.num_responses_truncated, out.num_dropped) == (1, 1, 0)
    assert out.indices.tolist() == [0, 1]


def test_a_pair_without_room_for_a_scored_token_is_dropped_and_counted(smol):
    pairs = [
        PreferencePair(user("word " * 100), "yes", "no"),
        PreferencePair(user("short"), "yes", "no"),
    ]
    out = tokenize_pairs(pairs, smol, max_length=50, max_prompt_length=50)
    assert (len(out.pairs), out.num_dropped, out.indices.tolist()) == (1, 1, [1])
    with pytest.raises(DataError, match="max_length"):
        tokenize_pairs(pairs[:1], smol, max_length=50, max_prompt_length=50)


def test_a_model_without_chat_template_is_refused(smol):
    plain = load_tokenizer("embedded:smollm2-135m-instruct")
    plain.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        one(plain)


def test_a_template_that_refuses_a_conversation_says_so(smol):
    picky = load_tokenizer("embedded:smollm2-135m-instruct")
    picky.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match="System role not supported"):
        render_prompt(picky, user("x"))


def ids(*numbers):
    return np.array(numbers, dtype=np.int32)


PAIRS = [
    TokenizedPair(ids(1, 2), ids(10, 11, 12), ids(20), 0.5),
    TokenizedPair(ids(3), ids(13), ids(21, 22), 0.25),
]


def test_the_packed_batch_of_two_pairs_literally():
    batch = pack(PAIRS)
    #                                  prompt | chosen    | rej. || p. | c. | rejected
    assert batch.input_ids.tolist() == [[1, 2, 10, 11, 12, 20, 3, 13, 21, 22]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 1, 2]]
    assert batch.attention_mask is None
    assert batch.predict_index.tolist() == [
        *(1, 2, 3),  # last prompt token and chosen ones predict the chosen
        *(6,),
        *(1,),  # the same prompt token predicts the rejected one
        *(6, 8),
    ]
    assert batch.target_ids.tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert batch.lengths.tolist() == [3, 1, 1, 2]
    assert batch.margin.tolist() == [0.5, 0.25]
    assert (len(batch), batch.num_tokens) == (2, 10)


def test_the_segments_of_two_pairs_literally():
    segments = pack(PAIRS).segments
    assert segments.lengths == ((2, 3, 1), (1, 1, 2))
    assert segments.kv_index.tolist() == [
        *(0, 1, 2, 3, 4),  # prompt and chosen see themselves
        *(0, 1, 5),  # rejected sees the prompt and itself
        *(6, 7),
        *(6, 8, 9),
    ]
    assert segments.cu_seq_q.tolist() == [0, 5, 6, 8, 10]
    assert segments.cu_seq_k.tolist() == [0, 5, 8, 10, 13]
    assert (segments.max_q, segments.max_k) == (5, 5)


def test_the_padded_batch_of_two_pairs_literally():
    batch = pad(PAIRS, pad_id=0)
    assert batch.input_ids.tolist() == [
        [1, 2, 10, 11, 12],  # chosen of the first pair
        [3, 13, 0, 0, 0],  # chosen of the second
        [1, 2, 20, 0, 0],  # rejected of the first
        [3, 21, 22, 0, 0],  # rejected of the second
    ]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
    ]
    assert batch.predict_index.tolist() == [1, 2, 3, 5, 11, 15, 16]
    assert batch.target_ids.tolist() == pack(PAIRS).target_ids.tolist()
    assert batch.num_tokens == 13


def test_a_pair_costs_prompt_plus_chosen_plus_rejected():
    assert [pair.num_tokens for pair in PAIRS] == [6, 4]
    assert pack(PAIRS).num_tokens == 10


def test_batches_move_whole():
    moved = pack(PAIRS).to("meta")
    assert moved.input_ids.device == moved.segments.cu_seq_q.device == torch.device("meta")
