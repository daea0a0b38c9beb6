"""A GPU that is full: real out-of-memory errors of the emulated one, whose memory a test sets."""

from __future__ import annotations

import gc

import pytest
from forging import run_of, settings_with

from gapo_lite import answering
from gapo_lite.answering import Sampling, answer_prompts, speaker
from gapo_lite.chat import base_voice
from gapo_lite.config import parse_config
from gapo_lite.errors import RunError
from gapo_lite.journal import open_journal
from gapo_lite.prompts import text_prompt
from gapo_lite.trainer import GapoTrainer

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.fixture
def settings(small_settings):
    """Whole batches of four in float32, without dropout, whose draws depend on the cut."""
    return settings_with(
        small_settings,
        model={"precision": "float32"},
        lora={"dropout": 0.0},
        training={"micro_batch_size": 4, "max_steps": 3, "logging_steps": 1, "eval_steps": 3},
    )


def losses(run):
    return [row["loss"] for row in run.metrics() if "loss" in row]


def log_of(run):
    return (run.path / "train.log").read_text(encoding="utf-8")


def measured(emulation, work):
    """What `work` gives, and the bytes that it needs beside what is on the GPU already."""
    gc.collect()
    before = emulation.live()
    emulation.reset_peak()
    found = work()
    gc.collect()
    return found, emulation.peak() - before


def leave(emulation, num_bytes):
    """Lets so many bytes more be taken."""
    gc.collect()
    emulation.limit(emulation.live() + int(num_bytes))


def test_passes_that_do_not_fit_are_halved_and_the_losses_are_those_of_a_roomy_card(
    settings, tmp_path, emulation
):
    roomy, needed = measured(emulation, lambda: run_of(settings, tmp_path, name="roomy"))
    leave(emulation, 0.45 * needed)
    crowded = run_of(settings, tmp_path, name="crowded")
    assert "Out of memory" not in log_of(roomy)
    assert "Out of memory with 4 pairs a forward pass: going on with smaller ones" in log_of(
        crowded
    )
    assert crowded.state() == "finished"
    assert losses(crowded) == pytest.approx(losses(roomy), rel=1e-5)
    assert [row["step"] for row in crowded.metrics()] == [row["step"] for row in roomy.metrics()]
    peaks = [max(r.get("memory_gib", 0) for r in run.metrics()) for run in (roomy, crowded)]
    assert peaks[1] < 0.5 * peaks[0]


def test_a_pair_that_does_not_fit_alone_is_an_error_that_says_what_helps(
    settings, tmp_path, emulation
):
    short = settings_with(
        settings,
        data={"heldout_source": None, "heldout_fraction": 0},
        training={"max_steps": 1},
    )
    _, needed = measured(emulation, lambda: run_of(short, tmp_path, name="roomy"))
    leave(emulation, 0.12 * needed)
    with pytest.raises(RunError, match=r"out of memory at step 1 with 1 pair.*max_length"):
        run_of(short, tmp_path, name="hopeless")
    assert not (tmp_path / "hopeless").exists()


def test_an_evaluation_that_does_not_fit_scores_fewer_pairs_at_a_time(
    settings, tmp_path, emulation, monkeypatch
):
    """Nor does what the base model says of the held-out pairs, before the first step."""
    settings = settings_with(
        settings,
        data={"heldout_source": None, "heldout_fraction": 0.5},
        training={
            **{"micro_batch_size": 1, "gradient_checkpointing": 1, "eval_batch_size": 12},
            **{"max_steps": 1, "warmup_ratio": 0.0},
        },
    )

    def run(name):
        monkeypatch.setenv("GAPO_LITE_CACHE", str(tmp_path / f"cache-of-{name}"))
        return run_of(settings, tmp_path, name=name)

    roomy, needed = measured(emulation, lambda: run("roomy"))
    leave(emulation, 0.7 * needed)
    crowded = run("crowded")
    said = log_of(crowded)
    assert said.count("Out of memory: scoring 6 pair(s) at a time from here on") == 2
    assert "forward pass: going on" not in said
    assert len(heldout(crowded)) == 2
    for ours, theirs in zip(heldout(crowded), heldout(roomy), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_full_card_in_the_words_of_cublas_halves_a_training_s_passes(
    settings, tmp_path, monkeypatch
):
    """And in the driver's: only PyTorch's allocator raises torch.OutOfMemoryError."""
    expected = losses(run_of(settings, tmp_path, name="roomy"))
    forward_backward = GapoTrainer._forward_backward

    def full(self, pairs, num_pairs):
        if len(pairs) > 2:
            raise RuntimeError(CUBLAS)
        return forward_backward(self, pairs, num_pairs)

    monkeypatch.setattr(GapoTrainer, "_forward_backward", full)
    crowded = run_of(settings, tmp_path, name="crowded")
    assert "set training.micro_batch_size to 2 next time" in log_of(crowded)
    assert losses(crowded) == pytest.approx(expected, rel=1e-5)


def test_another_error_of_the_gpu_is_not_taken_for_a_full_card(settings, tmp_path, monkeypatch):
    def broken(self, pairs, num_pairs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(GapoTrainer, "_forward_backward", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_of(settings, tmp_path)


@pytest.mark.parametrize("words", ["the allocator's", "cuBLAS'"])
def test_answers_that_do_not_fit_together_are_given_fewer_at_a_time(
    small_settings, tmp_path, emulation, monkeypatch, caplog, words
):
    voice = base_voice(parse_config(small_settings).model)
    prompts = [text_prompt("What is rain? " * 40) for _ in range(4)]

    def answers(name):
        who = speaker(voice, batch_size=4)
        with open_journal(tmp_path / f"{name}.json") as journal:
            said = answer_prompts(who, prompts, Sampling([0.0] * 4, max_tokens=4), journal)
        return [turn.text for answered in said for turn in answered.turns], who.batch_size

    (expected, size), needed = measured(emulation, lambda: answers("roomy"))
    assert size == 4
    if words == "cuBLAS'":
        plain = answering.answer_batch

        def full(model, tokenizer, conversations, **options):
            if len(conversations) > 2:
                raise RuntimeError(CUBLAS)
            return plain(model, tokenizer, conversations, **options)

        monkeypatch.setattr(answering, "answer_batch", full)
    else:
        leave(emulation, 0.7 * needed)
    found, size = answers("crowded")
    assert size == 2
    assert "Out of memory: answering 2 prompt(s) at a time" in caplog.text
    assert found == expected


def test_the_memory_that_a_run_records_is_its_own(settings, tmp_path, emulation):
    """Not that of a larger one before it in the same process, as a sweep has them."""
    large, small = (
        run_of(settings, tmp_path, f"training.micro_batch_size={size}", name=f"of-{size}")
        for size in (4, 1)
    )
    peaks = [max(row.get("memory_gib", 0) for row in run.metrics()) for run in (large, small)]
    assert 0 < peaks[1] < 0.5 * peaks[0]


def heldout(run):
    """Held-out metrics of each evaluation."""
    return [row for row in run.metrics() if "eval/loss" in row]
