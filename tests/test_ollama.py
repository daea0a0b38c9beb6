"""Modelfiles: read by the rules of Ollama's parser, and templates that say what Jinja's say."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelfiles import read_modelfile, render_go

from gapo_lite.chat_templates import ChatTemplate, read_chat_template
from gapo_lite.errors import ConfigError, ModelError
from gapo_lite.model import load_tokenizer
from gapo_lite.ollama import modelfile, ollama_base

LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + "
    "('model' if message['role'] == 'assistant' else message['role']) + '\n' "
    "+ message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}<<SYS>>\n"
    "{{ messages[0]['content'] }}\n<</SYS>>\n\n{% endif %}{{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }} {% endif %}{% endfor %}"
)
COUNTING = "{% for message in messages %}{{ loop.index }}: {{ message['content'] }}\n{% endfor %}> "
PLAIN = ChatTemplate(("S:", "\n"), "", "", ("Q:", "\n"), ("A:", "\n"), "A:")

TALK = [
    {"role": "user", "content": "One?\nTwo?"},
    {"role": "assistant", "content": 'He said "1"; <b>{x}</b> 日本 🌱'},
    {"role": "user", "content": "Three?"},
]


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer("embedded:smollm2-135m-instruct")


@pytest.fixture
def tokenizer(smollm2):
    return copy.deepcopy(smollm2)


def told_by_ollama(text: str, messages: list[dict]) -> str:
    """The prompt that Ollama makes: SYSTEM stands in for a system message that is not there."""
    fields = dict(read_modelfile(text))
    if messages[0]["role"] != "system" and fields.get("system"):
        messages = [{"role": "system", "content": fields["system"]}, *messages]
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    return render_go(fields["template"], system, messages)


@pytest.mark.parametrize("chat", [None, LLAMA3, GEMMA, THINKING], ids=str)
@pytest.mark.parametrize("system", ["", "Be brief.\nBe kind."])
def test_ollama_renders_a_conversation_as_the_tokenizer_does(tokenizer, chat, system):
    if chat:
        tokenizer.chat_template = chat
    text = modelfile(read_chat_template(tokenizer), source=".", stops=["<|im_end|>"])
    if system and chat == GEMMA:
        return
    messages = [*([{"role": "system", "content": system}] if system else []), *TALK]
    for conversation in (messages, messages[: len(messages) - 2]):
        expected = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        assert told_by_ollama(text, conversation) == expected


def test_the_first_token_is_left_to_a_tokenizer_that_adds_it(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.chat_template = LLAMA3
    bos = tokenizer.bos_token
    assert bos in read_chat_template(tokenizer).go()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    assert bos not in read_chat_template(tokenizer).go()


@pytest.mark.parametrize("chat", [LLAMA2, COUNTING, GEMMA.replace("model\n", "model {{'{{'}}\n")])
def test_a_template_that_ollama_cannot_say_is_refused(tokenizer, chat):
    tokenizer.chat_template = chat
    with pytest.raises(ModelError, match=r"cannot be written as one of Ollama's: .*--ollama"):
        read_chat_template(tokenizer)


def test_a_template_with_todays_date_in_it_is_refused_tomorrow_or_today(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + LLAMA3
    with pytest.raises(ModelError, match="date"):
        read_chat_template(tokenizer)


def test_a_tokenizer_without_chat_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        read_chat_template(tokenizer)


def test_every_field_of_a_modelfile_comes_back(smollm2):
    template = read_chat_template(smollm2)
    text = modelfile(
        template,
        source="smollm2:135m-instruct-fp16",
        adapter="./adapter.gguf",
        stops=["<|im_end|>", "</s> "],
        licence='Apache License 2.0, "as is"',
        notes=["An adapter\nFROM nowhere", "another"],
    )
    assert text.startswith("# An adapter FROM nowhere\n# another\n")
    assert read_modelfile(text) == [
        ("from", "smollm2:135m-instruct-fp16"),
        ("adapter", "./adapter.gguf"),
        ("template", template.go()),
        ("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ("stop", "<|im_end|>"),
        ("stop", "</s> "),
        ("license", 'Apache License 2.0, "as is"'),
    ]


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from('a" \n\t#{}é🌱\x00\x1b\u200b\u3000'), max_size=12))
def test_a_stop_comes_back_as_it_was_or_is_refused(stop):
    try:
        text = modelfile(PLAIN, source=".", stops=[stop])
    except ModelError:
        assert '"""' in stop or any(not (c.isprintable() or c in "\n\t") for c in stop)
    else:
        assert read_modelfile(text)[-1] == ("stop", stop)


def test_an_adapter_builds_on_what_ollama_calls_its_base():
    assert ollama_base("HuggingFaceTB/SmolLM2-135M-Instruct", None) == "smollm2:135m-instruct-fp16"
    assert ollama_base("meta-llama/Meta-Llama-3-8B-Instruct", None) == "llama3:8b-instruct-fp16"
    assert ollama_base("Meta-Llama-3-8B-Instruct", None) == "llama3:8b-instruct-fp16"
    assert ollama_base("ada/x", "hf.co/ada/x-GGUF:F16") == "hf.co/ada/x-GGUF:F16"
    assert ollama_base("ada/x", "./base.gguf") == "./base.gguf"
    with pytest.raises(ConfigError, match=r"ada/x is not known here: give --ollama-base"):
        ollama_base("ada/x", None)


@pytest.mark.parametrize(
    "given", ["/home/ada/base.gguf", "~/base", "../base", "./../base", "a b", "", "./x\nFROM y"]
)
def test_a_base_that_others_would_not_have_is_refused(given):
    with pytest.raises(ConfigError, match="--ollama-base"):
        ollama_base("ada/x", given)
