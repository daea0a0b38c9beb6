"""`gapo-lite generate`: batches, formats, and going on after a kill."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from forging import forge_run, read_jsonl
from typer.testing import CliRunner

from gapo_lite import answering
from gapo_lite.answers import (
    FASTCHAT_TEMPERATURES,
    Answered,
    Turn,
    check_prompts,
    num_left_out,
    temperature_of,
)
from gapo_lite.cli import app
from gapo_lite.cli_answers import _check_some
from gapo_lite.errors import DataError
from gapo_lite.generate import answer
from gapo_lite.journal import Journal, open_journal
from gapo_lite.model import load_base, load_tokenizer
from gapo_lite.pairing import read_answer_file
from gapo_lite.prompts import load_prompts

EVAL_SET = [
    {"instruction": "Name a fruit.", "output": "x", "generator": "y", "dataset": "helpful_base"},
    {"instruction": "Say “hi” — 你好\nin two lines.", "dataset": "koala"},
    {"instruction": "Why?", "input": "Because.", "dataset": "vicuna"},
]
MT_QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now shorter."]},
    {"question_id": 101, "category": "reasoning", "turns": ["1+1?", "Why?"], "reference": ["2"]},
]

CONSTANT_JUDGE = {  # the package's own decoder for tests: the second answer always wins
    "constant": {
        "fn_completions": "test_completions",
        "completions_kwargs": {"value": "Output (b)"},
        "completion_parser_kwargs": {"outputs_to_match": {1: r"Output \(a\)", 2: r"Output \(b\)"}},
        "is_randomize_output_order": False,
        "batch_size": 1,
    }
}


def generate(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments), "--max-tokens", "6"])


def ok(result):
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory):
    return forge_run(tmp_path_factory.mktemp("runs") / "kind", tiny_settings)


@pytest.fixture
def eval_set(tmp_path):
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(EVAL_SET), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path):
    return write_jsonl(tmp_path / "question.jsonl", MT_QUESTIONS)


# -- formats --


def test_alpaca_eval_s_file_has_its_columns_in_the_order_of_its_prompts(run, eval_set, tmp_path):
    out = tmp_path / "model_outputs.json"
    ok(generate(run.path, "--prompts", eval_set, "--out", out, "--format", "alpaca_eval"))
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in EVAL_SET]
    assert [row["dataset"] for row in rows] == ["helpful_base", "koala", "vicuna"]
    assert {row["generator"] for row in rows} == {"kind"}
    assert rows[2]["input"] == "Because."
    assert all(isinstance(row["output"], str) and row["num_tokens"] <= 6 for row in rows)


def test_alpaca_eval_s_own_code_reads_our_file(run, eval_set, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports pkg_resources
        alpaca_eval = pytest.importorskip("alpaca_eval")
        from alpaca_eval import metrics, utils
        from alpaca_eval.annotators import PairwiseAnnotator

    ours, theirs = tmp_path / "model_outputs.json", tmp_path / "reference.json"
    ok(generate(run.path, "--prompts", eval_set, "--out", ours, "--format", "alpaca_eval"))
    arguments = ("--prompts", eval_set, "--out", theirs, "--format", "alpaca_eval", "--base")
    ok(generate(run.path, *arguments, "--model-id", "reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = utils.load_or_convert_to_dataframe(ours)
        assert utils.get_generator_name(None, frame) == "kind"
        configs = Path(alpaca_eval.__file__).parent / "evaluators_configs"
        CONSTANT_JUDGE["constant"]["prompt_template"] = str(
            configs / "text_davinci_003" / "basic_prompt.txt"
        )
        (tmp_path / "judge.yaml").write_text(yaml.safe_dump(CONSTANT_JUDGE))
        annotator = PairwiseAnnotator(
            annotators_config=str(tmp_path / "judge.yaml"), caching_path=None
        )
        judged = annotator.annotate_head2head(
            outputs_1=utils.load_or_convert_to_dataframe(theirs), outputs_2=frame
        )
        found = metrics.get_winrate(judged)
    assert [row["instruction"] for row in judged] == [row["instruction"] for row in EVAL_SET]
    assert {row["generator_2"] for row in judged} == {"kind"}
    assert {row["generator_1"] for row in judged} == {"reference"}
    outputs = [row["output"] for row in json.loads(ours.read_text(encoding="utf-8"))]
    assert [row["output_2"] for row in judged] == outputs
    assert (found["win_rate"], found["n_total"]) == (100, 3)


def test_mt_bench_s_second_turn_sees_the_first_answer(tiny_model, questions, tmp_path):
    out = tmp_path / "my-model.jsonl"
    options = ("--out", out, "--format", "mt_bench", "--temperature", "0")
    ok(generate(tiny_model, "--prompts", questions, *options))
    rows = read_jsonl(out)
    assert [row["question_id"] for row in rows] == [81, 101]
    for row in rows:  # the fields that FastChat's gen_model_answer.py writes, and their types
        assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["model_id"] == "my-model"
        assert isinstance(row["answer_id"], str)
        assert len(row["answer_id"]) == 22
        assert abs(row["tstamp"] - time.time()) < 600
        (choice,) = row["choices"]
        assert choice.keys() == {"index", "turns"}
        assert choice["index"] == 0
    tokenizer = load_tokenizer(str(tiny_model))
    model = load_base(str(tiny_model), quantization="none", dtype=voice_dtype())
    for question, row in zip(MT_QUESTIONS, rows, strict=True):
        first, second = row["choices"][0]["turns"]
        talk = [{"role": "user", "content": question["turns"][0]}]
        assert first == answer(model, tokenizer, talk, max_tokens=6)
        talk += [
            {"role": "assistant", "content": first},
            {"role": "user", "content": question["turns"][1]},
        ]
        assert second == answer(model, tokenizer, talk, max_tokens=6)


def voice_dtype():
    from gapo_lite.model import pick_device, pick_precision

    return pick_precision("auto", pick_device())


def test_mt_bench_s_temperatures_are_fastchat_s_unless_one_is_given(questions):
    writing, reasoning = load_prompts(str(questions))
    assert temperature_of("mt_bench", writing) == 0.7
    assert temperature_of("mt_bench", reasoning) == 0.0
    assert temperature_of("answers", writing) == 0.0
    assert FASTCHAT_TEMPERATURES["stem"] == 0.1
    writing.row["category"] = "my own"
    assert temperature_of("mt_bench", writing) == 0.7


@pytest.mark.parametrize("version", ["2.0", "0.1"])
def test_arena_hard_s_files_have_its_fields(tiny_model, tmp_path, version):
    rows = {
        "2.0": [{"uid": "a1", "category": "hard_prompt", "prompt": "Hi **there**"}],
        "0.1": [{"question_id": "a1", "cluster": "c", "turns": [{"content": "Hi **there**"}]}],
    }[version]
    questions, out = write_jsonl(tmp_path / "question.jsonl", rows), tmp_path / "mine.jsonl"
    ok(generate(tiny_model, "--prompts", questions, "--out", out, "--format", "arena_hard"))
    (row,) = read_jsonl(out)
    style = {"token_len", "header_count", "list_count", "bold_count"}
    if version == "2.0":
        assert row.keys() == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
        assert row["messages"][0] == {"role": "user", "content": "Hi **there**"}
        said = row["messages"][-1]
        assert said["role"] == "assistant"
        assert isinstance(said["content"]["answer"], str)
        assert row["metadata"].keys() == style
        assert row["metadata"]["header_count"].keys() == {f"h{n}" for n in range(1, 7)}
        return
    fields = {"question_id", "answer_id", "model_id", "choices", "tstamp", "conv_metadata"}
    assert row.keys() == fields
    ((turn,),) = (choice["turns"] for choice in row["choices"])
    assert turn.keys() == {"content", "token_len"}
    assert turn["token_len"] == row["conv_metadata"]["token_len"] <= 6


def test_a_run_s_base_answers_alone_where_it_is_asked_for(run, tmp_path):
    both, base = tmp_path / "both.jsonl", tmp_path / "base.jsonl"
    ok(generate(run.path, "--prompt", "Hello", "--out", both))
    ok(generate(run.path, "--prompt", "Hello", "--out", base, "--base"))
    ((two,), (one,)) = read_jsonl(both), read_jsonl(base)
    assert one == {"prompt": "Hello", "answer": two["base"]}
    assert two["base"] != two["tuned"]


# -- prompts --


def test_prompts_are_read_from_any_kind_of_file(tmp_path):
    import datasets

    rows = [{"instruction": "A", "question_id": "q1"}, {"instruction": "B", "question_id": "q2"}]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "folder")
    data.to_parquet(tmp_path / "p.parquet")
    data.to_csv(tmp_path / "p.csv")
    write_jsonl(tmp_path / "p.jsonl", rows)
    (tmp_path / "p.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write((tmp_path / "p.jsonl").read_text())
    (tmp_path / "lines.md").write_text("\ufeffA\r\n\nB\n", encoding="utf-8")
    names = ["folder", "p.parquet", "p.csv", "p.jsonl", "p.json", "p.jsonl.gz", "lines.md"]
    for name in names:
        prompts = load_prompts(str(tmp_path / name))
        assert [prompt.text for prompt in prompts] == ["A", "B"], name
        if name != "lines.md":
            assert [prompt.row["question_id"] for prompt in prompts] == ["q1", "q2"], name


def test_a_prompt_may_be_a_conversation_or_several_turns(tmp_path):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": talk}, {"prompt": ["One?", "Two?"]}])
    first, second = load_prompts(str(path))
    assert (first.messages, first.followups) == (talk, [])
    assert (second.text, second.followups) == ("One?", ["Two?"])
    with pytest.raises(DataError, match="several turns"):
        check_prompts("alpaca_eval", [second])


def test_the_file_says_what_was_asked_whatever_column_it_stood_in(tiny_model, tmp_path):
    rows = [
        {"prompt": None, "instruction": "One?"},
        {"prompt": ["Two?"], "instruction": "Not this"},
        {"turns": ["Three?"], "prompt": "Not this", "dataset": "half \ud83d"},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "4?"}]},
    ]
    path, out = write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "out.json"
    ok(generate(tiny_model, "--prompts", path, "--out", out))
    asked = [row["prompt"] for row in read_jsonl(out)]
    assert asked == ["One?", "Two?", "Three?", rows[3]["prompt"]]
    assert [e.questions for e in read_answer_file(str(out.rename(tmp_path / "o.jsonl"))).entries]
    told = ok(generate(tiny_model, "--prompts", path, "--format", "alpaca_eval", "--out", out))
    assert "1 of 4 prompts have a system prompt or earlier turns" in " ".join(told.stderr.split())
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [row["instruction"] for row in found] == ["One?", "Two?", "Three?", "4?"]
    assert found[2]["dataset"] == "half \ud83d"


@pytest.mark.parametrize(
    ("kind", "num"), [("answers", 0), ("alpaca_eval", 2), ("mt_bench", 2), ("arena_hard", 1)]
)
def test_what_a_format_leaves_out_of_the_prompts_is_counted(tmp_path, kind, num):
    talk = [
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "Hi"},
    ]
    rows = [
        {"question_id": 1, "turns": ["a"]},
        {"question_id": 2, "prompt": talk},
        {"uid": "u", "prompt": talk},  # of Arena-Hard 2.0, whose answers are whole conversations
    ]
    prompts = load_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows)))
    assert num_left_out(kind, prompts) == num


@pytest.mark.parametrize("text", ["", " ", "half \udc80"])
def test_a_prompt_on_the_command_line_is_one_that_can_be_asked(tiny_model, tmp_path, text):
    result = generate(tiny_model, "--prompt", text, "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 2
    assert "--prompt: the prompt" in result.stderr


def test_a_command_that_did_nothing_leaves_no_journal(tmp_path):
    result = generate("no-such-run", "--prompt", "Hi", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"turns": []}, "an empty list"),
        ({"turns": ["a", 3]}, "turns: is a number, not text"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "does not end with the user"),
        ({"question": "a"}, "none of turns, prompt, instruction"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path, row, says):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, row])
    with pytest.raises(DataError, match=r"p\.jsonl:2: expected an object such as") as caught:
        load_prompts(str(path))
    assert says in str(caught.value)


@pytest.mark.parametrize("source", ["json", "http://x/y.jsonl", "a/b/c", "../x", "x.txt", "\0"])
def test_what_is_no_file_and_no_hub_id_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        load_prompts(source)


@pytest.mark.parametrize(
    "source", ["tatsu-lab/alpaca_eval/alpaca_eval.json", "tatsu-lab/none-such"]
)
def test_without_a_network_the_hub_is_told_apart_from_a_mistyped_file(source):
    with pytest.raises(DataError, match="Hub"):
        load_prompts(source)


def test_a_benchmark_s_questions_need_their_ids(tmp_path):
    prompts = load_prompts(str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])))
    with pytest.raises(DataError, match="has no question_id"):
        check_prompts("mt_bench", prompts)
    rows = [{"question_id": 1, "turns": ["a"]}] * 2
    with pytest.raises(DataError, match="1 is used for 2 prompts"):
        check_prompts("mt_bench", load_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows))))


# -- batches, kills, memory --


def test_a_prompt_that_is_too_long_is_told_of_and_the_rest_go_on(tiny_model, tmp_path):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a " * 3000}, {"prompt": "Hi"}])
    out = tmp_path / "out.jsonl"
    result = ok(generate(tiny_model, "--prompts", prompts, "--out", out))
    assert "prompt 1 is not answered: it has" in result.stderr
    assert "1 of 2 prompts have no answer" in result.stderr
    long, short = read_jsonl(out)
    assert (long["answer"], "2048 tokens at once" in long["problem"]) == ("", True)
    assert short.keys() == {"prompt", "answer"}
    write_jsonl(prompts, [{"prompt": "a " * 3000}])
    assert generate(tiny_model, "--prompts", prompts, "--out", out).exit_code == 2


def test_answers_that_were_cut_short_are_counted_by_turn_and_of_each_side(capsys):
    whole, cut = Turn("x", 6, False, 0.0), Turn("x", 6, True, 0.0)
    _check_some({"answer": [Answered([cut, cut]), Answered([whole, cut]), Answered([cut], "no")]})
    assert "3 of 4 answers were ended by --max-tokens" in " ".join(capsys.readouterr().err.split())
    _check_some({"base": [Answered([whole])], "tuned": [Answered([cut])]})
    assert capsys.readouterr().err.startswith("tuned: 1 of 1 answers were ended")


def test_the_batch_size_does_not_change_the_answers(run, tmp_path):
    texts = [f"Tell me {'more ' * n}about {n}" for n in range(7)] + ["Same", "Same"]
    (tmp_path / "p.txt").write_text("\n".join(texts), encoding="utf-8")
    seen = []
    for size in (1, 3, 16):
        out = tmp_path / f"{size}.jsonl"
        options = ("--temperature", "1", "--seed", "5", "--batch-size", size)
        ok(generate(run.path, "--prompts", tmp_path / "p.txt", "--out", out, *options))
        seen.append(read_jsonl(out))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][-1]["tuned"] != seen[0][-2]["tuned"]  # asked twice, drawn twice


def test_running_out_of_memory_halves_the_batch(run, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("\n".join(f"Number {n}" for n in range(6)))
    whole = tmp_path / "whole.jsonl"
    ok(generate(run.path, "--prompts", tmp_path / "p.txt", "--out", whole))
    sizes = []

    def small(model, tokenizer, conversations, **options):
        sizes.append(len(conversations))
        if len(conversations) > 2:
            raise torch.OutOfMemoryError("no room")
        return answer_batch(model, tokenizer, conversations, **options)

    answer_batch = answering.answer_batch
    monkeypatch.setattr(answering, "answer_batch", small)
    out = tmp_path / "out.jsonl"
    result = ok(generate(run.path, "--prompts", tmp_path / "p.txt", "--out", out))
    assert read_jsonl(out) == read_jsonl(whole)
    assert sizes[:5] == [6, 3, 1, 1, 1]
    assert "Out of memory: answering 1 prompt(s) at a time" in result.stderr


@pytest.mark.slow
def test_after_kill_9_the_same_command_ends_with_the_same_file(run, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"Tell me about {n}" for n in range(30)))
    options = ["generate", str(run.path), "--prompts", str(tmp_path / "p.txt"), "--base"]
    options += ["--temperature", "0.9", "--batch-size", "2", "--max-tokens", "40", "--out"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.journal.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "gapo_lite", *options, str(out)], stderr=subprocess.DEVNULL
    )
    while not journal.exists() or len(read_jsonl(journal)) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    with journal.open("a") as file:
        file.write('{"key": "torn')  # what a lost machine may leave
    for path in (out, whole):
        ok(CliRunner().invoke(app, [*options, str(path)]))
    assert out.read_bytes() == whole.read_bytes()
    assert not journal.exists()


def test_answers_of_other_settings_are_not_taken_from_the_journal(run, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    arguments = (run.path, "--prompt", "Hello", "--out", out, "--base")
    monkeypatch.setattr("gapo_lite.cli_answers.whole_file", None)  # fails when all is answered
    assert generate(*arguments, "--temperature", "1").exit_code == 1
    monkeypatch.undo()
    keys = Journal(tmp_path / "out.jsonl.journal.jsonl")._rows.keys()
    asked = []
    answer_batch = answering.answer_batch
    monkeypatch.setattr(
        answering, "answer_batch", lambda *a, **o: asked.append(o) or answer_batch(*a, **o)
    )
    ok(generate(*arguments, "--temperature", "1", "--seed", "1"))
    assert len(asked) == len(keys) == 1


def test_two_processes_do_not_make_the_same_file(run, tmp_path):
    out = tmp_path / "out.jsonl"
    with open_journal(out):
        result = generate(run.path, "--prompt", "Hello", "--out", out)
    assert result.exit_code == 2
    assert "another process is making" in result.stderr


def test_a_full_disk_keeps_what_is_answered(tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    with open_journal(out) as journal:
        journal.add("a", {"text": "kept"})
        size = journal.path.stat().st_size
        monkeypatch.setattr(os, "write", lambda descriptor, data: REAL_WRITE(descriptor, data[:5]))
        with pytest.raises(Exception, match="is kept: make room"):
            journal.add("b", {"text": "lost"})
        monkeypatch.undo()
        assert journal.path.stat().st_size == size
        assert Journal(journal.path).get("a")["text"] == "kept"


REAL_WRITE = os.write
