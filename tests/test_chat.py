"""Conversations, driven as a pipe drives them, and once through a real terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
import time
from dataclasses import replace

import pytest
from forging import forge_run, read_jsonl
from typer.testing import CliRunner

from gapo_lite import chat
from gapo_lite.chat import Conversation, load_voice
from gapo_lite.cli import app
from gapo_lite.errors import DataError
from gapo_lite.generate import answer
from gapo_lite.model import load_adapter, load_base, load_tokenizer

USER = "user"


def turn(content, role=USER):
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory):
    return forge_run(tmp_path_factory.mktemp("runs") / "kind", tiny_settings)


@pytest.fixture(scope="module")
def voice(run):
    return load_voice(str(run.path), run.path.parent)


@pytest.fixture(scope="module")
def expected(run, tiny_model):
    """What base and tuned model answer to a conversation, by another way: two models."""
    tokenizer = load_tokenizer(str(tiny_model))
    base = load_base(str(tiny_model), quantization="none", dtype=voice_dtype()).eval()
    other = load_base(str(tiny_model), quantization="none", dtype=voice_dtype())
    tuned = load_adapter(other, run.adapter)
    return {
        "base": lambda turns: answer(base, tokenizer, turns, max_tokens=8),
        "tuned": lambda turns: answer(tuned, tokenizer, turns, max_tokens=8),
    }


def voice_dtype():
    import torch

    return torch.float32  # as the settings of the tiny runs say


@pytest.fixture
def talk(run):
    """Pipes lines into `gapo-lite chat` and returns what came out."""

    def call(*lines, name=str(run.path), options=("--max-tokens", "8")):
        result = CliRunner().invoke(app, ["chat", name, *options], input="\n".join(lines) + "\n")
        return result

    return call


def test_a_pipe_gets_the_answers_alone(talk, expected):
    result = talk("Hello", "/base", "/base Bye", "/quit", "Not read")
    answers = [
        expected["tuned"]([turn("Hello")]),
        expected["base"]([turn("Hello")]),
        expected["base"](
            [turn("Hello"), turn(expected["tuned"]([turn("Hello")]), "assistant"), turn("Bye")]
        ),
    ]
    assert len({*answers}) == 3
    assert result.stdout == "".join(chat.visible(text) + "\n" for text in answers)
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_conversation_remembers_its_turns_and_base_answers_stay_outside(voice, expected):
    conversation = Conversation(voice, max_tokens=8)
    first = "".join(conversation.ask("Hello"))
    "".join(conversation.ask_base())
    "".join(conversation.ask_base("Something else"))
    second = "".join(conversation.ask("And now?"))
    asked = [turn("Hello"), turn(first, "assistant"), turn("And now?")]
    assert second == expected["tuned"](asked)
    assert conversation.turns == [*asked, turn(second, "assistant")]
    assert "".join(conversation.ask_base()) == expected["base"](asked)


def test_reset_forgets_and_system_stays(voice, expected):
    conversation = Conversation(voice, system="Be brief.", max_tokens=8)
    "".join(conversation.ask("Hello"))
    conversation.reset()
    found = "".join(conversation.ask("Hi"))
    assert found == expected["tuned"]([turn("Be brief.", "system"), turn("Hi")])


def test_the_same_seed_samples_the_same_answer(voice):
    answers = [
        "".join(Conversation(voice, temperature=1.5, max_tokens=8, seed=seed).ask("Hello"))
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_the_oldest_turns_are_dropped_when_the_context_is_full(voice):
    told = []
    small = replace(voice, context=96)
    conversation = Conversation(small, system="Be brief.", max_tokens=16, tell=told.append)
    for number in range(5):
        "".join(conversation.ask(f"Question {number} about the weather in the mountains?"))
    assert conversation.turns[-2]["content"].startswith("Question 4")
    assert 2 <= len(conversation.turns) < 10
    assert conversation.turns[0]["role"] == USER
    assert "no longer fits into 96 tokens: the oldest 2 turns are forgotten" in told[0]


def test_forgotten_turns_leave_the_draws_as_they_are(voice, monkeypatch):
    seeds = []

    def answer(*args, seed, **kwargs):
        seeds.append(seed)
        yield "word " * 30

    monkeypatch.setattr(chat, "stream_answer", answer)
    conversation = Conversation(replace(voice, context=96), max_tokens=16, seed=7)
    for number in range(5):
        "".join(conversation.ask(f"Question {number} about the weather in the mountains?"))
        "".join(conversation.ask_base())
    assert len(conversation.turns) < 10
    assert seeds == [7, 7, 8, 8, 9, 9, 10, 10, 11, 11]


def test_a_question_longer_than_the_context_is_refused_and_the_talk_goes_on(voice):
    conversation = Conversation(replace(voice, context=64), max_tokens=16)
    with pytest.raises(DataError, match=r"reads 64 tokens at once\. Shorten"):
        "".join(conversation.ask("long " * 100))
    assert conversation.turns == []
    "".join(conversation.ask("Hi"))
    assert len(conversation.turns) == 2


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(voice):
    conversation = Conversation(voice, max_tokens=200)
    pieces = conversation.ask("Hello")
    first = next(piece for piece in pieces if piece)
    pieces.close()
    assert conversation.turns == [turn("Hello"), turn(first, "assistant")]


def test_control_characters_of_a_model_are_shown_and_markup_is_not_obeyed(talk, monkeypatch):
    said = "\x1b[31m[bold]red[/bold]\x1b]0;title\x07\r\x9b2J\tend\nline"
    monkeypatch.setattr(chat, "stream_answer", lambda *args, **kwargs: iter([said]))
    assert talk("Hello").stdout == "␛[31m[bold]red[/bold]␛]0;title␇␍�2J\tend\nline\n"


def test_ctrl_c_stops_an_answer_and_not_the_talk(talk, monkeypatch):
    def interrupted(*args, **kwargs):
        yield "one "
        os.kill(os.getpid(), signal.SIGINT)
        yield "two "
        yield "three "

    monkeypatch.setattr(chat, "stream_answer", interrupted)
    result = talk("Hello", "Again")
    assert result.stdout == "one two \n" * 2
    assert result.stderr == "(stopped)\n" * 2
    assert result.exit_code == 0


def test_commands_answer_on_stderr_and_unknown_ones_are_listed(talk):
    result = talk("/system Be brief.", "/system", "/reset", "", "/base", "/nonsense", "/help")
    assert result.stdout == chat.HELP + "\n"
    assert "(the system message is set)\n(there is no system message now)\n" in result.stderr
    assert "(the conversation is forgotten)" in result.stderr
    assert "error: nothing has been asked yet" in result.stderr
    assert "There is no command /nonsense." in result.stderr
    assert result.exit_code == 0


def test_input_that_is_not_utf8_does_not_end_the_talk(run, talk):
    result = CliRunner().invoke(
        app, ["chat", str(run.path), "--max-tokens", "4"], input=b"\xff\xfe hi\n/help\n"
    )
    assert result.exception is None
    assert chat.HELP in result.stdout


def test_a_model_talks_too_and_has_no_base(talk, tiny_model, expected):
    result = talk("Hello", "/base", name=str(tiny_model), options=["--max-tokens", "8"])
    assert len(result.stdout.splitlines()) >= 1
    assert "is a base model itself: it has no adapter to leave out" in result.stderr
    assert result.exit_code == 0


def test_a_chat_template_that_refuses_a_turn_is_an_error_and_not_the_end(
    talk, run, tiny_model, voice, monkeypatch
):
    refusing = "{{ raise_exception('no system here') if messages[0].role == 'system' }}"
    template = voice.tokenizer.chat_template
    monkeypatch.setattr(voice.tokenizer, "chat_template", refusing + template)
    conversation = Conversation(voice, system="Be brief.", max_tokens=8)
    with pytest.raises(DataError, match="no system here"):
        "".join(conversation.ask("Hello"))
    conversation.system = ""
    assert "".join(conversation.ask("Hello"))


# -- what cannot be talked with --


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing", "there is no run 'nothing'"),
        ("owner/absent", "the model owner/absent could not be loaded"),
        ("embedded:nothing", "There is no embedded model 'embedded:nothing'"),
    ],
)
def test_what_is_not_there_is_said(tmp_path, name, says):
    result = CliRunner().invoke(app, ["chat", name, "--runs-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.startswith("error: ")


def test_a_mistyped_run_folder_is_not_taken_for_a_hub_id(run, monkeypatch):
    monkeypatch.chdir(run.path.parent.parent)
    result = CliRunner().invoke(app, ["chat", f"{run.path.parent.name}/knid"])
    assert "there is no run" in result.stderr
    assert result.exit_code == 2


def test_a_run_that_has_saved_nothing_cannot_talk(tiny_settings, tmp_path):
    forge_run(tmp_path / "none", tiny_settings, adapter=False)
    result = CliRunner().invoke(app, ["chat", "none", "--runs-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "has saved no adapter yet (state: failed)" in result.stderr


# -- generate --


def test_generate_answers_by_base_and_tuned(run, expected, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello"}\n\n{"prompt": "B\\u00fccher?"}\n')
    out = tmp_path / "out.jsonl"
    options = ["--prompts", str(tmp_path / "p.jsonl"), "--prompt", "Hi", "--max-tokens", "8"]
    result = CliRunner().invoke(app, ["generate", str(run.path), "--out", str(out), *options])
    assert result.exit_code == 0, result.stderr
    assert read_jsonl(out) == [
        {
            "prompt": prompt,
            "base": expected["base"]([turn(prompt)]),
            "tuned": expected["tuned"]([turn(prompt)]),
        }
        for prompt in ("Hi", "Hello", "Bücher?")
    ]


def test_generate_answers_a_text_file_by_a_model(tiny_model, expected, tmp_path):
    (tmp_path / "p.txt").write_text("Hello\n\n  Hi  \n", encoding="utf-8")
    out = tmp_path / "out.jsonl"
    options = ["--prompts", str(tmp_path / "p.txt"), "--max-tokens", "8"]
    result = CliRunner().invoke(app, ["generate", str(tiny_model), "--out", str(out), *options])
    assert result.exit_code == 0, result.stderr
    rows = read_jsonl(out)
    assert [row["prompt"] for row in rows] == ["Hello", "Hi"]
    assert all(row.keys() == {"prompt", "answer"} for row in rows)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("", "there is nothing to answer"),
        ('{"prompt": "a"}\n{"prompt": 1}\n', "p.jsonl:2: expected an object"),
        ('{"question": "a"}\n', "p.jsonl:1: expected an object"),
        ("hello\n", "p.jsonl:1: expected an object"),
    ],
)
def test_prompts_that_are_none_are_named_with_their_line(run, tmp_path, content, says):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(
        app, ["generate", str(run.path), "--out", str(out), "--prompts", str(path)]
    )
    assert result.exit_code == 2
    assert says in result.stderr
    assert not out.exists()


# -- a real terminal --


class Terminal:
    """`gapo-lite chat` on a pseudo-terminal."""

    def __init__(self, *arguments):
        self.seen, self.read_up_to = "", 0
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "gapo_lite", "chat", *arguments])

    def wait_for(self, text, seconds=90):
        """Reads until `text` has come after what was waited for before."""
        end = time.monotonic() + seconds
        while (found := self.seen.find(text, self.read_up_to)) < 0:
            assert time.monotonic() < end, f"{text!r} did not come: {self.seen!r}"
            if select.select([self.descriptor], [], [], 0.2)[0]:
                self.seen += os.read(self.descriptor, 65536).decode(errors="replace")
        self.read_up_to = found + len(text)

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def rest(self):
        """Reads until the other side is closed."""
        with contextlib.suppress(OSError):
            while data := os.read(self.descriptor, 65536):
                self.seen += data.decode(errors="replace")

    def exit_code(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(run):
    terminal = Terminal(str(run.path), "--max-tokens", "1500")
    terminal.wait_for("you> ")
    terminal.type("Hello\n")
    terminal.wait_for("kind> ")
    time.sleep(0.3)
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("you> ")
    terminal.type("/base\n")
    terminal.wait_for("base> ")
    terminal.type("\x03")
    terminal.wait_for("you> ")
    terminal.type("\x04")
    terminal.rest()
    assert terminal.exit_code() == 0, terminal.seen
    assert "Traceback" not in terminal.seen
