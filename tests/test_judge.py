"""`gapo-lite judge`: a server that fails, stalls and answers nonsense; kills; a reward model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkout import ROOT
from typer.testing import CliRunner

from gapo_lite import endpoint as endpoint_module
from gapo_lite.cli import app
from gapo_lite.disk import read_jsonl
from gapo_lite.endpoint import Endpoint, RefusedError
from gapo_lite.errors import ConfigError, DataError
from gapo_lite.judge import Verdict, _questions, cost, judge_pairs, read_place, settled
from gapo_lite.judgement import summarize
from gapo_lite.pairing import AnswerFile, AnswerPair, Entry, pair_answers, read_answer_file
from gapo_lite.prompts import load_prompts

KEY = "sk-secret-0123456789"


class Server:
    """A chat-completions server; `reply` is told (number of the request, its content) and returns a
    text, (status, body) or (status, body, headers)."""

    def __init__(self, reply):
        self.seen, self.lock = [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.seen.append((self.path, dict(self.headers), body))
                    number = len(outer.seen)
                said = reply(number, body["messages"][-1]["content"])
                if said is None:  # hangs up
                    return self.connection.close()
                if isinstance(said, str):
                    message = {"role": "assistant", "content": said}
                    usage = {"prompt_tokens": 9, "completion_tokens": 3}
                    said = 200, json.dumps({"choices": [{"message": message}], "usage": usage})
                status, text, *headers = said
                self.send_response(status)
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *arguments: None  # clients that gave up
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@contextmanager
def serving(reply):
    server = Server(reply)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def longer_wins(number, content):
    """A judge that reads: the longer answer."""
    first, second = re.findall(r"<answer \d>\n(.*?)\n</answer", content, re.DOTALL)
    return "[[0]]" if len(first) == len(second) else f"[[{1 if len(first) > len(second) else 2}]]"


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint_module, "_backoff", lambda number: 0.01)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    """Six prompts: A is longer in four of them, B in one, and one is equal."""
    a, b = ["xx", "xxx", "xx", "xxxx", "x", "same"], ["x", "x", "x", "x", "xx", "same"]
    return [
        str(
            write_jsonl(
                tmp_path / f"{name}.jsonl",
                [{"prompt": f"Q{n}", "answer": text} for n, text in enumerate(texts)],
            )
        )
        for name, texts in (("a", a), ("b", b))
    ]


@pytest.fixture
def judge(files, tmp_path, monkeypatch):
    def run(server, *options, model=True):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url if server else "")
        who = ["--model", "m"] if model else []
        out = ["--out", str(tmp_path / "out.json")]
        result = CliRunner().invoke(app, ["judge", *files, *out, *who, *map(str, options)])
        assert KEY not in result.output + result.stderr + str(result.exception)
        return result

    return run


def summary(tmp_path):
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert KEY not in text
    return json.loads(text)["summary"]


# -- a judge that works --


def test_each_pair_is_asked_in_both_orders_and_win_rate_and_length_stand_together(judge, tmp_path):
    with serving(longer_wins) as server:
        result = judge(server, "--yes", "--price-in", 2, "--price-out", 8)
    assert result.exit_code == 0, (result.stderr, result.exception)
    found = summary(tmp_path)
    assert (found["wins"], found["ties"], found["losses"]) == (4, 1, 1)
    assert found["win_rate"]["value"] == pytest.approx(4.5 / 6)
    assert found["characters"] == [pytest.approx(16 / 6), pytest.approx(10 / 6)]
    assert found["tokens"] == [None, None]
    assert found["num_equal"] == 1
    assert len(server.seen) == 10  # five pairs, twice
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"]) == ("m", 0)
    assert "10 requests for 6 pairs" in result.stderr
    assert "With 6 pairs all of this may be chance" in " ".join(result.stderr.split())
    assert re.search(r"At most 0\.\d+ at the given prices", result.stderr)
    took = "It took 10 requests; the server counted 90 tokens in and 30 out."
    assert took in " ".join(result.stderr.split())
    shown = result.output
    assert "win rate of A" in shown
    assert "75.0%" in shown
    assert "mean length in characters" in shown
    assert "at equal lengths" in shown


def test_a_rerun_costs_nothing_and_ends_with_the_same_file(judge, tmp_path):
    with serving(longer_wins) as server:
        judge(server, "--yes")
        before = (tmp_path / "out.json").read_bytes()
        result = judge(server)  # nothing to agree to
        assert result.exit_code == 0
        assert len(server.seen) == 10
    assert (tmp_path / "out.json").read_bytes() == before
    assert "0 requests for 6 pairs" in result.stderr
    assert "It took" not in result.stderr


def test_a_judge_that_prefers_a_place_makes_ties_and_is_told_of(judge, tmp_path):
    with serving(lambda number, content: "Clearly the first. [[1]]") as server:
        result = judge(server, "--yes")
    found = summary(tmp_path)
    assert found["win_rate"]["value"] == 0.5
    assert found["position_bias"] == {"first": 5, "second": 0, "mixed": 0}
    assert "the first answer is preferred in 5" in result.stderr


def test_a_win_and_a_tie_are_a_tie():
    assert Verdict(0.5, "judged", ["a", "tie"]).bias == "mixed"
    assert Verdict(0.5, "judged", ["b", "a"]).bias == "second"
    assert Verdict(1.0, "judged", ["a", "a"]).bias == ""


def test_it_costs_nothing_without_consent(judge, tmp_path):
    with serving(longer_wins) as server:
        result = judge(server)
        assert result.exit_code == 2
        assert "agree to the cost with --yes" in result.stderr
        assert not server.seen
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        ("Because. [[1]]", 1),
        ("[[ 2 ]]", 2),
        ("[[0]]", 0),
        ("2", 2),
        ("Answer 1.", 1),
        ("[[1]] or [[2]]", None),
        ("I like both.", None),
        ("", None),
        ("[[3]]", None),
        ("12", None),
    ],
)
def test_a_reply_is_read_by_its_one_mark(reply, place):
    assert read_place(reply) == place


# -- a server that misbehaves --


def first_time(bad):
    """Each question is answered badly once, and well when it is asked again."""
    asked, lock = set(), threading.Lock()

    def reply(number, content):
        with lock:
            new = content not in asked
            asked.add(content)
        return bad(content) if new else longer_wins(number, content)

    return reply


BAD = {
    "500": lambda content: (500, "<html>oops</html>"),
    "503": lambda content: (503, ""),
    "429": lambda content: (429, '{"error": {"message": "slow down"}}', {"Retry-After": "0.05"}),
    "hangs up": lambda content: None,
    "stalls": lambda content: time.sleep(6) or "[[1]]",
    "html": lambda content: (200, "<html>welcome</html>"),
    "truncated": lambda content: (200, '{"choices": [{"message": {"content": "[[1'),
    "cut off": lambda content: (200, '{"choices": []', {"Content-Length": "999"}),
    "empty": lambda content: "",
    "null": lambda content: (200, '{"choices": [{"message": {"content": null}}]}'),
    "thought": lambda content: (
        200,
        '{"choices": [{"message": {"content": ""}, "finish_reason": "length"}]}',
    ),
    "nonsense": lambda content: "I am a teapot.",
    "a list": lambda content: (200, "[1]"),
    "binary": lambda content: (200, "\x00\ufffd"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_goes_wrong_once_does_not_change_the_result(judge, tmp_path, bad):
    with serving(first_time(BAD[bad])) as server:
        timeout = 2 if bad == "stalls" else 60
        result = judge(server, "--yes", "--timeout", timeout, "--workers", 10)
        assert result.exit_code == 0, (result.stderr, result.exception)
        assert len(server.seen) >= 20
    found = summary(tmp_path)
    assert (found["wins"], found["ties"], found["losses"]) == (4, 1, 1)
    assert found["num_unusable"] == 0


def test_nonsense_is_asked_for_once_more_and_then_counts_for_nobody(judge, tmp_path):
    def reply(number, content):
        return "no idea" if "Q0\n" in content else longer_wins(number, content)

    with serving(reply) as server:
        result = judge(server, "--yes")
        assert len(server.seen) == 8 + 4
        judge(server, "--yes")
        assert len(server.seen) == 12  # nonsense is paid for once too
    found = summary(tmp_path)
    assert (found["wins"], found["num_unusable"], found["num_usable"]) == (3, 1, 5)
    stderr = " ".join(result.stderr.split())
    assert "1 pairs have no usable verdict, and count for nobody; the first: the reply" in stderr


def completion(text, finish_reason="stop"):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return 200, json.dumps({"choices": [choice]})


SILENT = {
    "cut before a word": (completion("", "length"), "used up its --max-tokens before a word"),
    "cut in a word": (completion("Answer 1 is", "length"), "--max-tokens before its mark"),
    "empty": (completion(" "), "the reply is empty"),
    "no mark": (completion("Both are nice."), "the reply names neither answer"),
    "error": ((200, f'{{"error": {{"message": "{KEY} owes 3 $"}}}}'), "… owes 3 $"),
    "error text": ((200, '{"error": "no credits", "choices": null}'), "no credits"),
    "no error": ((200, '{"error": null}'), "the reply is no chat completion"),
}


@pytest.mark.parametrize("silent", SILENT)
def test_why_a_judge_gives_no_verdict_is_told_and_stored(judge, tmp_path, silent):
    answer, reason = SILENT[silent]
    with serving(lambda number, content: answer) as server:
        result = judge(server, "--yes")
        assert result.exit_code == 0, result.stderr  # one pair is equal
        assert len(server.seen) == 5 * 2 * 2
        assert "It took 20 requests." in result.stderr  # and of tokens the server says nothing
        judge(server, "--yes")
        # what a model said is kept, though it names no answer; what a server says instead may pass
        assert len(server.seen) == (40 if "error" in silent or silent == "empty" else 20)
    assert reason in " ".join(result.stderr.split())
    verdicts = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["verdicts"]
    assert all(reason in verdict["reason"] for verdict in verdicts[:5])
    assert summary(tmp_path)["num_unusable"] == 5


def entry(question, *answers, **fields):
    """The answer, or the answers of several turns."""
    talk = []
    for answer in answers:
        talk += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Entry("", talk, None, **fields)


@pytest.mark.parametrize(("good", "asked"), [(0, 10), (1, 30)])
def test_a_judge_that_says_nothing_at_first_is_asked_no_further(tmp_path, good, asked):
    def reply(number, content):
        return "[[1]]" if number <= 2 * good else completion("", "length")

    pairs = [AnswerPair(entry(f"Q{n}", "a"), entry(f"Q{n}", "b")) for n in range(30)]
    with serving(reply) as server:
        endpoint = Endpoint(server.url, "m", kept_in=tmp_path / "kept")
        if good:
            verdicts = judge_pairs(endpoint, pairs, workers=1)
            assert Counter(one.how for one in verdicts) == {"judged": 1, "unusable": 29}
        else:
            with pytest.raises(DataError, match=r"no verdict on any of 10 pairs.*--max-tokens"):
                judge_pairs(endpoint, pairs, workers=1)
        assert 4 * asked - 2 * good <= len(server.seen) <= 4 * asked + 4  # one may be on its way
        assert endpoint.spent.requests == len(server.seen)


def test_a_judge_that_was_mended_is_asked_again_and_one_that_was_not_about_other_pairs(tmp_path):
    replies = ["I cannot say"]
    pairs = [AnswerPair(entry(f"Q{n}", "a"), entry(f"Q{n}", "b")) for n in range(25)]
    with serving(lambda number, content: replies[0]) as server:
        endpoint = Endpoint(server.url, "m", kept_in=tmp_path / "kept")

        def judged():
            endpoint.stopped.clear()
            return judge_pairs(endpoint, pairs, workers=1)

        for _ in range(2):  # what it said of the first 10 is kept, and not held against it again
            with pytest.raises(DataError, match="no verdict on any of 10 pairs"):
                judged()
        verdicts = judged()
        assert {verdict.how for verdict in verdicts} == {"unusable"}
        assert len(server.seen) == 4 * 25
        replies[0] = completion("")
        pairs = pairs[:20] + [AnswerPair(entry(f"R{n}", "a"), entry(f"R{n}", "b")) for n in "0123"]
        judged()
        replies[0] = "[[0]]"
        assert [verdict.how for verdict in judged()[20:]] == 4 * ["judged"]


def test_pairs_without_a_verdict_at_the_head_of_the_files_do_not_end_it(tmp_path):
    def reply(number, content):
        return "I cannot say" if "poem" in content else "[[0]]"

    questions = [f"A poem, {n}" for n in range(14)] + [f"Q{n}" for n in range(16)]
    pairs = [AnswerPair(entry(question, "a"), entry(question, "b")) for question in questions]
    with serving(reply) as server:
        endpoint = Endpoint(server.url, "m", kept_in=tmp_path / "kept")
        verdicts = judge_pairs(endpoint, pairs, workers=1)
    assert [verdict.how for verdict in verdicts] == 14 * ["unusable"] + 16 * ["judged"]


def test_an_error_is_told_without_the_key_wherever_it_stands(tmp_path):
    for start in (0, 280, 299, 300):
        error = json.dumps({"error": {"message": "x" * start + KEY}})
        with serving(lambda number, content, error=error: (400, error)) as server:
            endpoint = Endpoint(server.url, "m", KEY, kept_in=tmp_path)
            with pytest.raises(RefusedError) as caught:
                endpoint.ask([{"role": "user", "content": "Q"}])
        assert "sk-" not in str(caught.value)
        assert not re.search(r"\bxs|xs$", str(caught.value))


def test_a_server_that_fails_once_and_is_asked_no_more_is_told_of_so(judge):
    with serving(lambda number, content: (500, "down")) as server:
        result = judge(server, "--yes", "--retries", 0, "--workers", 1)
    assert "failed once: m at" in " ".join(result.stderr.split())


def test_a_server_that_stays_broken_ends_it_and_keeps_what_was_answered(judge, tmp_path):
    def reply(number, content):
        return longer_wins(number, content) if number <= 4 else (500, "down")

    with serving(reply) as server:
        result = judge(server, "--yes", "--workers", 1, "--retries", 2)
        assert result.exit_code == 2
        assert "failed 3 times in a row" in result.stderr
        assert not (tmp_path / "out.json").exists()
        assert len(server.seen) == 4 + 3
    with serving(longer_wins) as server:  # at another address, so nothing of the other is kept
        judge(server, "--yes")
        assert len(server.seen) == 10


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((401, f'{{"error": {{"message": "bad key {KEY}"}}}}'), "refuses the key (401)"),
        ((403, ""), "refuses the key (403)"),
        ((404, '{"error": {"message": "no model m"}}'), "answers 404 no model m"),
        ((302, "", {"Location": "http://127.0.0.1:9/steal"}), "answers 302"),
        ((429, "wait", {"Retry-After": "86400"}), "asks to wait for 1440 minutes"),
        ((400, f'{{"error": {{"message": "unknown parameter of {KEY}"}}}}'), "unknown parameter"),
    ],
)
def test_what_will_not_pass_ends_it_at_once(judge, answer, says):
    with serving(lambda number, content: answer) as server:
        result = judge(server, "--yes", "--workers", 1)
        assert result.exit_code == 2, result.stderr
        assert says in result.stderr
        assert len(server.seen) == 1 or (answer[0] == 400 and len(server.seen) < 10)


def test_one_pair_that_is_refused_does_not_stop_the_others(judge, tmp_path):
    def reply(number, content):
        too_long = (400, '{"error": {"message": "too long"}}')
        return too_long if "Q3\n" in content else longer_wins(number, content)

    with serving(reply) as server:
        assert judge(server, "--yes", "--workers", 1).exit_code == 0
    assert summary(tmp_path)["num_unusable"] == 1


def test_a_model_without_temperature_and_max_tokens_judges_too(judge, tmp_path):
    def refusing(number, content):
        _, _, body = server.seen[number - 1]
        for name, why in (("max_tokens", "parameter"), ("temperature", "value")):
            if name in body:  # as OpenAI's reasoning models answer
                error = {"message": f"Unsupported {why}: '{name}'", "param": name}
                return 400, json.dumps({"error": {**error, "code": f"unsupported_{why}"}})
        return longer_wins(number, content)

    with serving(refusing) as server:
        judge(server, "--yes", "--max-tokens", 77, "--workers", 1)
    assert summary(tmp_path)["win_rate"]["value"] == pytest.approx(4.5 / 6)
    again = server.seen[2:]  # refused once for each, then never again
    assert len(again) == 10
    assert all(body["max_completion_tokens"] == 77 for _, _, body in again)


def test_a_model_that_refuses_a_field_which_was_not_sent_is_not_asked_for_ever(judge):
    error = {"message": "no", "param": "max_tokens", "code": "unsupported_parameter"}
    with serving(lambda number, content: (400, json.dumps({"error": error}))) as server:
        result = judge(server, "--yes", "--workers", 1)
    assert "answers none of the requests" in " ".join(result.stderr.split())
    assert len(server.seen) < 20


def test_the_key_goes_nowhere_but_into_its_header(judge, tmp_path):
    assert KEY not in repr(Endpoint("http://x/v1", "m", KEY))
    with serving(longer_wins) as server:
        judge(server, "--yes")
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"OPENAI_BASE_URL": "ftp://x/v1"}, "is no address"),
        ({"OPENAI_BASE_URL": "http://me:secret@x/v1"}, "is no address"),
        ({"OPENAI_BASE_URL": "http://:secret@x/v1"}, "is no address"),
        ({"OPENAI_BASE_URL": "http://x/v1?key=secret"}, "is no address"),
        ({"OPENAI_BASE_URL": "http://[::1/v1"}, "is no address"),
        ({"OPENAI_BASE_URL": "http://x:port/v1"}, "is no address"),
        ({"OPENAI_BASE_URL": "http://x/a b"}, "is no address"),
        ({"OPENAI_BASE_URL": "http://x/é"}, "is no address"),
        ({"OPENAI_BASE_URL": f"http://{'x' * 70}.example/v1"}, "is no address"),
        ({"OPENAI_API_KEY": ""}, "OPENAI_API_KEY is not set"),
        ({"OPENAI_API_KEY": "a\nHost: b"}, "holds characters that no key has"),
    ],
)
def test_variables_that_cannot_be_used_are_refused_without_being_shown(
    monkeypatch, variables, says
):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=says) as caught:
        Endpoint.from_environment("m")
    assert "secret" not in str(caught.value)


def test_half_a_character_in_a_reply_does_not_lose_what_was_paid_for(judge, tmp_path):
    with serving(lambda number, content: "\ud83d " + longer_wins(number, content)) as server:
        result = judge(server, "--yes")
    assert result.exit_code == 0, (result.stderr, result.exception)
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["verdicts"]
    assert rows[0]["replies"][0].startswith("\ud83d ")


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("2", 2.0),
        ("0", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("soon", None),
        ("Mon, 01 Jan 2001 00:00:00 +9999999999999999999", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, wait):
    assert endpoint_module._retry_after(value) == wait


def test_a_date_that_is_past_here_is_not_asked_again_at_once(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(endpoint_module, "_backoff", lambda n: waited.append(n) or 0.01)
    past = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
    with serving(lambda number, content: (429, "", past) if number < 3 else "[[1]]") as server:
        Endpoint(server.url, "m", kept_in=tmp_path).ask([{"role": "user", "content": "Q"}])
    assert waited == [0, 1]


def test_after_kill_9_no_reply_is_paid_twice(files, tmp_path):
    def reply(number, content):
        time.sleep(0.15)
        return longer_wins(number, content)

    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "gapo_lite", "judge", *files, "--out", str(out), "--yes"]
    command += ["--model", "m", "--workers", "1"]
    with serving(reply) as server:
        variables = {**os.environ, "OPENAI_BASE_URL": server.url}
        process = subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL)
        cache = tmp_path / "cache" / "judge"
        while not cache.is_dir() or len(list(cache.glob("*.json"))) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept = len(list(cache.glob("*.json")))
        assert not out.exists()
        assert kept < 10
        time.sleep(0.3)
        asked = len(server.seen)
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        assert KEY not in done.stdout + done.stderr
        # The one that was on its way when the process was killed could not be kept.
        assert asked - kept <= 1
        assert len(server.seen) - asked == 10 - kept
    text = json.loads(out.read_text())
    assert text["summary"]["wins"] == 4


# -- files of answers --


def test_answers_of_all_formats_are_paired_by_prompt_or_id(tmp_path):
    run = write_jsonl(tmp_path / "run.jsonl", [{"prompt": "P", "base": "b", "tuned": "t"}])
    alpaca = tmp_path / "alpaca.json"
    row = {"instruction": "P", "output": "o", "generator": "g", "num_tokens": 7}
    alpaca.write_text(json.dumps([row]))
    tuned, base = read_answer_file(str(run)), read_answer_file(f"{run}:base")
    theirs = read_answer_file(str(alpaca))
    assert (theirs.name, theirs.entries[0].num_tokens) == ("g", 7)
    for one, other, said in ((tuned, base, ("t", "b")), (tuned, theirs, ("t", "o"))):
        ((a, b),), left = pair_answers(one, other)
        assert (a.answer, b.answer, left) == (*said, 0)


def prompted(system, question="hi", answer="x", **fields):
    """An entry to a question below a system prompt, where there is one."""
    given = [{"role": "system", "content": system}] if system else []
    given += [{"role": "user", "content": question}]
    said = [*given, {"role": "assistant", "content": answer}]
    return Entry("", said, None, len(given), **fields)


def paired(a, b):
    pairs, left = pair_answers(AnswerFile("a", a), AnswerFile("b", b))
    return [(pair.a.answer, pair.b.answer) for pair in pairs], left


def test_only_answers_to_the_same_system_prompt_and_history_are_paired():
    a = [prompted("French", answer="1"), prompted("German", answer="2"), prompted("", answer="3")]
    b = [prompted("", answer="c"), prompted("German", answer="b")]
    assert paired(a, b) == ([("2", "b"), ("3", "c")], 1)
    with pytest.raises(DataError, match="no prompt in common"):
        paired(a[:1], b)


def test_one_question_below_two_system_prompts_is_two_prompts():
    pairs = [AnswerPair(*(prompted(f"Be {n}") for _ in "ab")) for n in range(10)]
    found = summarize("a", "b", "m", pairs, [Verdict(1.0, "judged")] * 10)
    assert found["win_rate"]["low"] == pytest.approx(10 / (10 + 1.96**2), abs=1e-4)  # not 1 / …


def test_questions_alone_decide_where_a_format_holds_nothing_else():
    a = [prompted("French", answer="1"), prompted("", answer="2")]
    bare = [prompted("", answer="b", is_bare=True)]
    assert paired(a, bare) == ([("2", "b")], 1)  # what is the same goes first
    assert paired(a[:1], bare) == ([("1", "b")], 0)
    assert paired(bare, a[:1]) == ([("b", "1")], 0)
    ((pair,), _) = pair_answers(AnswerFile("b", bare), AnswerFile("a", a[:1]))
    for question in _questions(pair):  # both orders show what one of them lacks
        assert question[1]["content"].startswith("<system>\nFrench\n</system>")


def test_arena_hard_s_answers_are_told_from_what_was_given(tmp_path):
    given = [*HISTORY[:3], {"role": "user", "content": "And now?"}]
    for content in ({"answer": "good"}, "good"):
        messages = [*given, {"role": "assistant", "content": content}]
        row = {"uid": "u", "model": "m", "messages": messages}
        (found,) = read_answer_file(str(write_jsonl(tmp_path / "a.jsonl", [row]))).entries
        # where texts are all there is, they are all the model's
        assert found.answers[-1] == "good"
        assert found.num_given == (4 if isinstance(content, dict) else 2)


def test_ids_that_are_missing_or_twice_pair_nothing_by_chance(tmp_path):
    def questions(*rows):
        return load_prompts(str(write_jsonl(tmp_path / "question.jsonl", rows)))

    answer = {"model_id": "m", "choices": [{"index": 0, "turns": ["Paris"]}]}
    path = str(write_jsonl(tmp_path / "m.jsonl", [answer]))
    with pytest.raises(DataError, match=r"m\.jsonl:1: it has no question_id"):
        read_answer_file(path, questions({"turns": ["2+2?"]}, {"question_id": 7, "turns": ["7"]}))
    twice = [{"question_id": 7, "turns": ["a"]}, {"question_id": 7, "turns": ["b"]}]
    path = str(write_jsonl(tmp_path / "m.jsonl", [{"question_id": 7, **answer}]))
    with pytest.raises(DataError, match=r"m\.jsonl:1: the id '7' is used for two questions"):
        read_answer_file(path, questions(*twice))
    path = str(write_jsonl(tmp_path / "m.jsonl", [{"instruction": "a", "output": "Paris"}]))
    assert len(read_answer_file(path, questions(*twice)).entries) == 1  # it needs none of them


def test_a_field_is_for_formats_that_have_several(tmp_path):
    row = {"instruction": "2+2?", "output": "4"}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match="1: its format holds one answer a row: leave out :output"):
        read_answer_file(f"{path}:output")


def test_answers_below_a_system_prompt_pair_with_those_of_formats_that_leave_it_out(tmp_path):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    own = write_jsonl(tmp_path / "own.jsonl", [{"prompt": said, "answer": "4"}])
    choices = [{"index": 0, "turns": ["four"]}]
    other = write_jsonl(tmp_path / "m.jsonl", [{"question_id": 1, "choices": choices}])
    asked = load_prompts(
        str(write_jsonl(tmp_path / "question.jsonl", [{"question_id": 1, "turns": ["2+2?"]}]))
    )
    pairs, num_unpaired = pair_answers(
        read_answer_file(str(own)), read_answer_file(str(other), asked)
    )
    assert [(pair.a.answer, pair.b.answer) for pair in pairs] == [("4", "four")]
    assert num_unpaired == 0


def test_a_mistyped_field_is_told_with_those_that_there_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "tuned": "t", "base": "b"}])
    with pytest.raises(DataError, match="1: it has no field 'bse'; it has base, prompt, tuned"):
        read_answer_file(f"{path}:bse")
    with pytest.raises(DataError, match=r"there is no file .*none\.jsonl"):
        read_answer_file(f"{tmp_path / 'none.jsonl'}:base")


@pytest.mark.parametrize("fields", [("", ""), (":base", ":base"), ("", ":tuned")])
def test_answers_are_not_compared_with_themselves(tmp_path, fields):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "tuned": "t", "base": "b"}])
    arguments = ["judge", *(f"{path}{field}" for field in fields), "--model", "m", "--yes"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 2
    assert "add :tuned and :base" in " ".join(result.stderr.split())


def test_a_run_s_sides_may_be_equal_and_be_compared(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "tuned": "t", "base": "t"}])
    arguments = ["judge", f"{path}:tuned", f"{path}:base", "--model", "m"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.stderr
    assert summary(tmp_path)["num_equal"] == 1


def test_answers_that_have_ids_alone_need_the_benchmark_s_questions(tmp_path):
    questions = [{"question_id": 81, "category": "writing", "turns": ["One?", "Two?"]}]
    prompts = load_prompts(str(write_jsonl(tmp_path / "question.jsonl", questions)))
    choices = [{"index": 0, "turns": ["1", "2"]}]
    mt = {"question_id": 81, "model_id": "m", "choices": choices}
    path = str(write_jsonl(tmp_path / "m.jsonl", [mt]))
    with pytest.raises(DataError, match=r"m\.jsonl:1: it answers question 81, which is not known"):
        read_answer_file(path)
    (entry,) = read_answer_file(path, prompts).entries
    assert entry.questions == ("One?", "Two?")
    assert entry.answer == "1\n\n2"
    arena = {
        "uid": "u",
        "model": "m",
        "messages": [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": {"answer": "1"}},
        ],
        "metadata": {"token_len": 5},
    }
    (entry,) = read_answer_file(str(write_jsonl(tmp_path / "a.jsonl", [arena]))).entries
    assert (entry.key, entry.answer, entry.num_tokens) == ("u", "1", 5)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"x": 1}, "it is no answer"),
        ({"prompt": "a", "answer": 3}, "its answer is no text"),
        ({"instruction": "a"}, "its output is no text"),
        ({"uid": 1, "messages": [{"role": "user", "content": "x"}]}, "its messages do not end"),
        (
            {"prompt": [{"role": "tool", "content": "x"}], "answer": "a"},
            "one of its messages is of",
        ),
        ({"prompt": "a", "answer": "half \ud83d"}, "its answer holds half of"),
    ],
)
def test_rows_that_are_no_answers_are_named(tmp_path, row, says):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "x"}, row])
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {says}"):
        read_answer_file(str(path))


def test_files_without_a_common_prompt_and_prompts_that_only_one_has(tmp_path):
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": p, "answer": p} for p in prompts])
        for name, prompts in (("a", "123"), ("b", "345"), ("c", "9"))
    ]
    a, b, c = (read_answer_file(str(path)) for path in paths)
    assert [pair.a.answer for pair in pair_answers(a, b)[0]] == ["3"]
    assert pair_answers(a, b)[1] == 4
    with pytest.raises(DataError, match="no prompt in common"):
        pair_answers(a, c)


def test_a_prompt_that_is_there_twice_pairs_with_its_like(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "p", "answer": "1"}, {"prompt": "p", "answer": "2"}]
    )
    file = read_answer_file(str(path))
    assert [(a.answer, b.answer) for a, b in pair_answers(file, file)[0]] == [
        ("1", "1"),
        ("2", "2"),
    ]


def test_the_cost_is_known_before_it_is_due(files, tmp_path):
    pairs, _ = pair_answers(*map(read_answer_file, files))
    with serving(lambda number, content: "no idea") as server:
        endpoint = Endpoint(server.url, "m", max_tokens=100, kept_in=tmp_path / "kept")
        due = cost(endpoint, pairs)
        assert (due.requests, due.most_requests, due.kept) == (10, 20, 0)
        assert due.tokens_out == 20 * 100
        assert 2400 < due.tokens_in < 5000
        assert due.price(1, 2) == pytest.approx((due.tokens_in + 2 * 2000) / 1e6)
        judge_pairs(endpoint, pairs)
        assert len(server.seen) == due.most_requests
        due = cost(endpoint, pairs)
        assert (due.requests, due.most_requests, due.kept, due.tokens_out) == (0, 0, 20, 0)


def test_a_kept_reply_without_a_mark_will_cost_its_second_one(judge, files, tmp_path):
    pairs, _ = pair_answers(*map(read_answer_file, files))
    with serving(lambda number, content: "no idea") as server:
        endpoint = Endpoint(server.url, "m", KEY)
        for question in _questions(pairs[0]):
            endpoint.ask(question)  # and then it was killed
        due = cost(endpoint, pairs[:1])
        assert (due.requests, due.most_requests, due.kept) == (2, 2, 2)
        result = judge(server)
        assert "agree to the cost with --yes" in result.stderr
        assert len(server.seen) == 2


# -- what is not asked, and what is asked of a history --

HISTORY = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "x" * 500},
    {"role": "user", "content": "And now?"},
]


def with_history(tmp_path, name, answer):
    row = {"prompt": HISTORY, "answer": answer}
    return read_answer_file(str(write_jsonl(tmp_path / f"{name}.jsonl", [row])))


def test_what_was_given_as_said_before_is_not_the_answer(tmp_path):
    files = [with_history(tmp_path, name, text) for name, text in (("a", ""), ("b", "good"))]
    (pair,), _ = pair_answers(*files)
    verdict = settled(pair)
    assert (verdict.score, verdict.how) == (0.0, "empty")
    assert summarize("a", "b", "m", [pair], [verdict])["characters"] == [0, 4]


def test_a_history_is_shown_once_and_the_answers_alone_are_compared(tmp_path):
    files = [with_history(tmp_path, name, text) for name, text in (("a", "yes"), ("b", "no"))]
    (pair,), _ = pair_answers(*files)
    there, back = (question[1]["content"] for question in _questions(pair))
    before = (
        "<system>\nBe kind.\n</system>\n\n<question>\nHi\n</question>\n\n"
        f"<reply>\n{'x' * 500}\n</reply>\n\n<question>\nAnd now?\n</question>\n\n"
    )
    for text, first, second in ((there, "yes", "no"), (back, "no", "yes")):
        assert text == (
            f"{before}<answer 1>\n{first}\n</answer 1>\n\n<answer 2>\n{second}\n</answer 2>\n\n"
            "Which answer is better?"
        )


def test_of_several_turns_each_stands_within_both_answers():
    pair = AnswerPair(entry("Q", "a1", "a2"), entry("Q", "b1", "b2"))
    text = next(_questions(pair))[1]["content"]
    assert text.startswith("<answer 1>\n<question>\nQ\n</question>\n\n<reply>\na1\n</reply>\n\n")
    assert text.count("<question>") == text.count("<reply>") == 4


def test_prompts_that_nobody_answered_are_left_out_and_told_of(tmp_path):
    rows = [{"prompt": f"Q{n}", "answer": "yes" if n < 3 else ""} for n in range(9)]
    files = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", [row | more for row in rows]))
        for name, more in (("a", {}), ("b", {"problem": "too long"}))
    ]
    arguments = ["judge", *files, "--out", str(tmp_path / "out.json"), "--model", "m"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    found = summary(tmp_path)
    assert (found["num_usable"], found["ties"], found["num_unanswered"]) == (3, 3, 6)
    assert found["characters"] == [3, 3]
    stderr = " ".join(result.stderr.split())
    assert "6 prompts have no answer in either file: left out" in stderr
    for path in files:
        write_jsonl(Path(path), rows[3:])
    result = CliRunner().invoke(app, arguments)
    assert "no prompt has an answer in either file" in " ".join(result.stderr.split())


# -- a reward model --


@pytest.fixture(scope="module")
def reward_model(tiny_model, tmp_path_factory):
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(tiny_model, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_a_reward_model_s_higher_score_wins(judge, reward_model, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result = judge(None, "--reward-model", reward_model, model=False)
    assert result.exit_code == 0, (result.stderr, result.exception)
    rows = json.loads((tmp_path / "out.json").read_text())["verdicts"]
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    for number, row in enumerate(rows[:5]):
        for name, score in zip("ab", row["scores"], strict=True):
            answer = read_jsonl(tmp_path / f"{name}.jsonl")[number]["answer"]
            talk = [{"role": "user", "content": f"Q{number}"}]
            talk += [{"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(talk, tokenize=False)
            inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
            with torch.no_grad():
                assert score == pytest.approx(float(model(**inputs).logits), abs=1e-4)
        assert row["score"] == float(row["scores"][0] > row["scores"][1])
    assert rows[5]["how"] == "equal"


def test_scores_are_kept_until_the_file_is_written(judge, reward_model, tmp_path, monkeypatch):
    journal = tmp_path / "out.json.journal.jsonl"
    options = ("--reward-model", reward_model)
    monkeypatch.setattr("gapo_lite.cli_answers.whole_file", None)  # fails when all is scored
    assert judge(None, *options, model=False).exit_code == 1
    assert len(read_jsonl(journal)) == 10
    monkeypatch.undo()
    monkeypatch.setattr("gapo_lite.reward_model._score", None)  # nothing is scored again
    assert judge(None, *options, model=False).exit_code == 0
    assert not journal.exists()


@pytest.mark.parametrize("name", ["embedded:smollm2-135m-instruct", "no/such-model", "reward"])
def test_what_is_no_reward_model_is_refused(judge, tiny_model, name):
    options = ["--reward-model", tiny_model if name == "reward" else name]
    assert judge(None, *options, model=False).exit_code == 2


def test_the_files_that_are_read_are_not_overwritten(files):
    for spec in (files[1], f"{files[1]}:answer"):
        arguments = ["judge", files[0], spec, "--out", files[1], "--model", "m", "--yes"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "would be overwritten" in result.stderr


def test_one_judge_is_needed_and_no_more(judge):
    for options in ((), ("--model", "m", "--reward-model", "r")):
        result = judge(None, *options, model=False)
        assert result.exit_code == 2
        assert "say who judges" in result.stderr


# -- a real server --


@pytest.mark.slow
def test_transformers_own_server_judges_with_the_embedded_model(judge, tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="`transformers serve` needs its types")
    pytest.importorskip("uvicorn")
    monkeypatch.setenv("GAPO_LITE_CACHE", str(MODELS))  # the unpacked model is kept
    folder = resolve("embedded:smollm2-135m-instruct")
    monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path / "cache"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for_health(process, f"http://127.0.0.1:{port}/health", tmp_path / "server.log")
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
        options = ["--model", folder, "--max-tokens", "24", "--workers", "1", "--yes"]
        files = []
        for name, text in (("a", "Paris."), ("b", "I do not know.")):
            rows = [{"prompt": "What is the capital of France?", "answer": text}]
            rows += [{"prompt": "Say hi.", "answer": "Hi"}]
            files.append(str(write_jsonl(tmp_path / f"{name}.jsonl", rows)))
        out = tmp_path / "out.json"
        arguments = ["judge", *files, "--out", str(out), "--timeout", "300", *options]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (result.stderr, result.exception)
        asked, same = json.loads(out.read_text(encoding="utf-8"))["verdicts"]
        assert same["how"] == "equal"
        assert asked["how"] in ("judged", "unusable")  # a model this small may name neither
        assert len(asked["replies"]) == 2
        assert all(reply.strip() for reply in asked["replies"])
        kept = [json.loads(p.read_text()) for p in (tmp_path / "cache" / "judge").iterdir()]
        assert all(row["tokens_in"] > 100 and row["tokens_out"] <= 24 for row in kept)
    finally:
        process.terminate()
        process.wait(60)
    result = CliRunner().invoke(app, arguments)  # the server is gone: all is kept
    assert result.exit_code == 0, result.stderr


MODELS = ROOT / ".pytest_cache" / "gapo-lite"


def resolve(name):
    from gapo_lite.model import resolve_model

    return resolve_model(name)


def wait_for_health(process, url, log):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text())
