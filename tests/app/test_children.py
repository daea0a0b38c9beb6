"""What a child process gets to know, and what of its words is shown."""

from __future__ import annotations

import os

import pytest
from checkout import ROOT

from app.children import cleaned, environment


def test_a_child_gets_what_models_need_and_nothing_of_the_page(monkeypatch):
    monkeypatch.setenv("GRADIO_SHARE", "true")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x" * 20)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    found = environment()
    assert found["HF_HOME"] == "/somewhere"
    assert found["PATH"] == os.environ["PATH"]
    assert not found.keys() & {"GRADIO_SHARE", "AWS_SECRET_ACCESS_KEY", "RANK"}
    assert found["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/mine"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("10%\r50%\r100%", "100%"),
        ("\x1b]0;title\x07text", "text"),
        ("token hf_abcdefghijklmnop1234 end", "token *** end"),
        ("https://me:secret@proxy/x", "https://***@proxy/x"),
        ('api_key="abcdef"', 'api_key="***"'),
        ("no secret: the tokenizer has 49152 tokens", "no secret: the tokenizer has 49152 tokens"),
    ],
)
def test_words_are_shown_without_escapes_and_secrets(text, shown):
    assert cleaned(text) == shown


def test_a_secret_of_the_environment_is_never_shown(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "correct horse")
    assert cleaned("it is correct horse.") == "it is ***."
