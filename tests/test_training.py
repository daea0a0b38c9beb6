"""Whole runs of a tiny model: what they leave behind, and what happens when they are disturbed."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkout import ROOT
from forging import numbers, run_of, settings_with
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from gapo_lite import loss as loss_module
from gapo_lite import training as train_module
from gapo_lite.checkpoints import list_checkpoints, verify_checkpoint
from gapo_lite.config import load_config, parse_config
from gapo_lite.errors import ConfigError, DataError, ModelError, RunError
from gapo_lite.run_callback import RunCallback
from gapo_lite.runs import Run, list_runs
from gapo_lite.trainer import GapoTrainer
from gapo_lite.training import check_launch, training_arguments

LAUNCH = ROOT / "configs" / "accelerate" / "data_parallel.yaml"


@pytest.fixture(scope="module")
def finished(tiny_settings, tmp_path_factory):
    return run_of(tiny_settings, tmp_path_factory.mktemp("runs"), name="whole")


def test_a_run_leaves_the_folder_that_others_read(finished):
    names = {path.name for path in finished.path.iterdir()}
    assert names >= {
        *("config.yaml", "environment.json", "margins.json", "status.json"),
        *("metrics.jsonl", "train.log", "checkpoints", "adapter"),
    }
    assert finished.state() == "finished"
    assert {finished.read("status.json")[key] for key in ("step", "total")} == {12}
    assert (finished.adapter / "adapter_model.safetensors").is_file()
    assert not list(finished.path.rglob("*.bin")) + list(finished.path.rglob("*.pt*"))
    assert parse_config({}) != finished.config() == parse_config(finished.config().model_dump())


def test_each_logged_step_has_the_metrics_that_others_rely_on(finished):
    rows = finished.metrics()
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [3, 6, 9, 12]
    assert all(
        row.keys()
        == {
            *("step", "epoch", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins"),
            *("rewards/accuracies", "logps/chosen", "logps/rejected", "margin/mean", "grad_norm"),
            *("learning_rate", "tokens_per_second", "pairs_per_second", "memory_gib", "elapsed_s"),
        }
        for row in steps
    )
    held = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in held] == [0, 4, 8, 12]
    for row in steps:
        assert row["rewards/margins"] == pytest.approx(
            row["rewards/chosen"] - row["rewards/rejected"], abs=1e-4
        )
        assert row["rewards/chosen"] == pytest.approx(10 * row["logps/chosen"], abs=1e-3)


def test_the_mean_margin_over_an_epoch_is_gamma(finished):
    record = finished.read("margins.json")
    assert record["mean_margin"] == pytest.approx(0.3, abs=1e-9)
    assert record["mean_margin_in_reward_units"] == pytest.approx(3.0, abs=1e-8)
    per_epoch = [row["margin/mean"] for row in finished.metrics() if "loss" in row][:2]
    assert sum(per_epoch) / 2 == pytest.approx(0.3, abs=1e-6)  # 6 steps, each pair once


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_a_plain_peft_script_gives_the_same_logps(finished, tiny_settings):
    folder = tiny_settings["model"]["name"]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=nf4
    )
    model = PeftModel.from_pretrained(base, str(finished.adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = Path(tiny_settings["data"]["heldout_source"]).read_text(encoding="utf-8").splitlines()
    averages = {"chosen": [], "rejected": []}
    for row in map(json.loads, lines):
        for side, found in averages.items():
            turn = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            text = f"{prompt}{row[side]}<|im_end|>"
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scored = logps[start - 1 :].gather(1, ids[0, start:, None])
            found.append(scored.mean().item())
    last = finished.metrics()[-1]  # bitsandbytes' own CPU kernel for inference rounds to bfloat16
    for side, found in averages.items():
        assert sum(found) / len(found) == pytest.approx(last[f"eval/logps/{side}"], abs=2e-3)


def test_loss_falls_on_a_memorised_set(tiny_settings, tmp_path):
    longer = settings_with(
        tiny_settings, training={"epochs": 6, "logging_steps": 6, "eval_steps": 100}
    )
    losses = [row["loss"] for row in run_of(longer, tmp_path).metrics() if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]


EVERY_LEVER = {
    "model": {"dequantized_cache": "always"},
    "training": {
        "layout": "packed",
        "micro_batch_size": None,
        "micro_batch_tokens": 150,
        "gradient_checkpointing": 0.5,
    },
}


@pytest.mark.parametrize("levers", [{}, EVERY_LEVER], ids=["plain", "every-lever"])
def test_a_run_stopped_and_resumed_equals_the_uninterrupted_one(
    finished, tiny_settings, tmp_path, monkeypatch, levers
):
    settings = settings_with(tiny_settings, **levers)
    if levers:
        finished = run_of(settings, tmp_path, name="whole")
    stop_after = iter([3, 7])

    def stopping(self, args, state, control, _limit=[0], **kwargs):  # noqa: B006
        _limit[0] = _limit[0] or next(stop_after, 99)
        if state.global_step == _limit[0]:
            os.kill(os.getpid(), signal.SIGTERM if _limit[0] == 3 else signal.SIGINT)
            _limit[0] = 0
        return on_step_end(self, args, state, control, **kwargs)

    on_step_end = RunCallback.on_step_end
    monkeypatch.setattr(RunCallback, "on_step_end", stopping)
    run = run_of(settings, tmp_path, name="cut")
    assert (run.state(), run.read("status.json")["step"]) == ("stopped", 3)
    assert "--resume" in (run.path / "train.log").read_text()
    assert (run.adapter / "adapter_model.safetensors").is_file()
    run_of(settings, tmp_path, resume="cut")
    assert run.read("status.json")["step"] == 7
    run_of(settings, tmp_path, resume="cut")
    assert run.state() == "finished"
    assert numbers(run) == numbers(finished)
    whole, cut = (r.adapter / "adapter_model.safetensors" for r in (finished, run))
    assert whole.read_bytes() == cut.read_bytes()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own
def test_tensorboard_gets_the_same_numbers(tiny_settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    short = settings_with(tiny_settings, training={"max_steps": 3, "report_to": ["tensorboard"]})
    run = run_of(short, tmp_path, name="board")
    (events,) = (run.path / "tensorboard").rglob("events*")
    board = EventAccumulator(str(events)).Reload()
    (logged,) = board.Scalars("train/rewards/margins")
    assert logged.value == pytest.approx(run.metrics()[1]["rewards/margins"], rel=1e-5)


def test_micro_batches_do_not_change_the_gradients(tiny_settings, tmp_path):
    plain = settings_with(
        tiny_settings, lora={"dropout": 0.0}, training={"max_steps": 3, "logging_steps": 1}
    )
    runs = [run_of(plain, tmp_path, f"training.micro_batch_size={size}") for size in (1, 2, 4)]
    for other in runs[1:]:
        for ours, theirs in zip(numbers(runs[0]), numbers(other), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_an_epoch_that_ends_in_a_smaller_step_averages_over_its_pairs(tiny_settings, tmp_path):
    """24 pairs in steps of 16: the second step has 8, and counts them as 8."""
    plain = settings_with(
        tiny_settings,
        lora={"dropout": 0.0},
        training={"batch_size": 16, "epochs": 1, "logging_steps": 1, "learning_rate": 1e-9},
    )
    rows = [row for row in run_of(plain, tmp_path).metrics() if "loss" in row]
    whole = run_of(
        plain, tmp_path, "training.batch_size=24", "training.micro_batch_size=8"
    ).metrics()
    (mean,) = [row["loss"] for row in whole if "loss" in row]
    assert (16 * rows[0]["loss"] + 8 * rows[1]["loss"]) / 24 == pytest.approx(mean, rel=1e-4)


def test_padded_and_packed_layouts_train_alike(tiny_settings, tmp_path):
    plain = settings_with(tiny_settings, lora={"dropout": 0.0}, training={"max_steps": 4})
    packed, padded = (
        run_of(plain, tmp_path, f"training.layout={name}") for name in ("packed", "padded")
    )
    for ours, theirs in zip(numbers(packed), numbers(padded), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)


# -- what goes wrong --


def test_a_nan_stops_before_the_weights_change(tiny_settings, tmp_path, monkeypatch):
    weights = {}
    real = loss_module.forward_logps

    def poisoned(model, batch, **wanted):
        logps = real(model, batch, **wanted)
        weights["model"] = model
        weights["before"] = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        if not torch.is_grad_enabled():
            return logps
        weights["calls"] = weights.get("calls", 0) + 1
        if weights["calls"] <= 8:
            return logps
        return dataclasses.replace(logps, chosen=logps.chosen * float("nan"))

    monkeypatch.setattr(loss_module, "forward_logps", poisoned)
    with pytest.raises(
        RunError, match="gradient norm is nan at step 5.*before the weights changed"
    ):
        run_of(tiny_settings, tmp_path, name="nan")
    after = [p for p in weights["model"].parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(weights["before"], after, strict=True))
    run = Run(tmp_path / "nan")
    assert run.state() == "failed"
    assert "learning_rate" in run.read("status.json")["message"]
    assert all(row["loss"] == row["loss"] for row in run.metrics() if "loss" in row)


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    tiny_settings, tmp_path, monkeypatch, caplog
):
    plain = settings_with(
        tiny_settings,
        lora={"dropout": 0.0},
        training={"batch_size": 8, "micro_batch_size": 4, "max_steps": 3, "logging_steps": 1},
    )
    expected = run_of(plain, tmp_path, name="roomy")
    real = loss_module.forward_logps
    sizes = []

    def crowded(model, batch, **wanted):
        if torch.is_grad_enabled():
            sizes.append(len(batch))
            if len(batch) > 2 and len(sizes) > 1:
                logps = real(model, batch)
                (logps.chosen.sum() * 7).backward()  # a backward pass that broke off half-way
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(model, batch, **wanted)

    monkeypatch.setattr(loss_module, "forward_logps", crowded)
    with caplog.at_level(logging.WARNING, "gapo_lite"):
        run = run_of(plain, tmp_path, name="crowded")
    assert sizes[:6] == [4, 4, 2, 2, 2, 2]
    assert "Out of memory with 4 pairs a forward pass" in caplog.text
    assert "set training.micro_batch_size to 2 next time" in caplog.text
    for ours, theirs in zip(numbers(run), numbers(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_out_of_memory_with_single_pairs_says_what_to_lower(tiny_settings, tmp_path, monkeypatch):
    def full(model, batch, **wanted):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loss_module, "forward_logps", full)
    with pytest.raises(RunError, match="data.max_length"):
        run_of(
            settings_with(tiny_settings, data={"heldout_source": None, "heldout_fraction": 0}),
            tmp_path,
        )


def test_a_full_disk_in_a_save_keeps_the_older_checkpoint(tiny_settings, tmp_path, monkeypatch):
    real = GapoTrainer._save_shared_state

    def full(self, stage, window):
        real(self, stage, window)
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(GapoTrainer, "_save_shared_state", full)
    with pytest.raises(RunError, match=r"No space left.*--resume"):
        run_of(tiny_settings, tmp_path, name="full")
    run = Run(tmp_path / "full")
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [2]
    assert run.state() == "failed"
    monkeypatch.undo()
    run_of(tiny_settings, tmp_path, resume="full")
    assert run.state() == "finished"


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    tiny_settings, finished, tmp_path, caplog
):
    run = run_of(tiny_settings, tmp_path, name="hurt")
    newest = run.checkpoints / "checkpoint-12" / "optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1  # one flipped bit
    newest.write_bytes(data)
    run.write("status.json", {**run.read("status.json"), "state": "running"})
    with caplog.at_level(logging.WARNING, "gapo_lite"):
        run_of(tiny_settings, tmp_path, resume="hurt")
    assert "checkpoint-12 cannot be used (optimizer.safetensors is damaged)" in caplog.text
    assert numbers(run) == numbers(finished)
    for _, path in list_checkpoints(run.checkpoints):
        (path / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="no checkpoint .* can be used"):
        run_of(tiny_settings, tmp_path, resume="hurt")


def test_a_run_killed_after_its_last_checkpoint_does_not_step_again(tiny_settings, tmp_path):
    short = settings_with(tiny_settings, training={"max_steps": 4, "schedule": "constant"})
    run = run_of(short, tmp_path, name="late")
    before, rows = (run.adapter / "adapter_model.safetensors").read_bytes(), numbers(run)
    run.write("status.json", {**run.read("status.json"), "state": "running"})
    run_of(short, tmp_path, resume="late")
    assert run.read("status.json")["step"] == 4
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [2, 4]
    assert ((run.adapter / "adapter_model.safetensors").read_bytes(), numbers(run)) == (
        before,
        rows,
    )


def test_a_resumed_run_never_offers_the_adapter_of_its_earlier_stop(
    tiny_settings, tmp_path, monkeypatch
):
    run = run_of(settings_with(tiny_settings, training={"max_steps": 4}), tmp_path, name="stale")
    run.write("status.json", {**run.read("status.json"), "state": "stopped"})

    def broken(*args, **kwargs):
        raise RunError("killed here")

    monkeypatch.setattr(GapoTrainer, "train", broken)
    with pytest.raises(RunError, match="killed here"):
        run_of(run.config().model_dump(), tmp_path, resume="stale")
    assert run.trained_adapter() == run.checkpoints / "checkpoint-4"


def test_a_failure_after_a_save_keeps_the_run_even_without_a_logged_step(
    tiny_settings, tmp_path, monkeypatch
):
    quiet = settings_with(
        tiny_settings,
        data={"heldout_source": None, "heldout_fraction": 0},
        training={"logging_steps": 100, "save_steps": 1},
    )
    real = GapoTrainer._clip_grad_norm

    def fails(self, model):
        if self.state.global_step == 3:
            raise RunError("a NaN, say")
        return real(self, model)

    monkeypatch.setattr(GapoTrainer, "_clip_grad_norm", fails)
    with pytest.raises(RunError, match="a NaN"):
        run_of(quiet, tmp_path, name="kept")
    assert [step for step, _ in list_checkpoints(tmp_path / "kept" / "checkpoints")] == [2, 3]
    assert Run(tmp_path / "kept").state() == "failed"


def test_damaged_checkpoints_do_not_count_as_the_newest(tiny_settings, tmp_path):
    one = settings_with(tiny_settings, training={"keep_checkpoints": 2})
    run = run_of(one, tmp_path, name="rot")
    (run.checkpoints / "checkpoint-12" / "manifest.json").write_text("{")
    run.write("status.json", {**run.read("status.json"), "state": "running"})
    run_of(one, tmp_path, resume="rot")
    assert all(not verify_checkpoint(path) for _, path in list_checkpoints(run.checkpoints))


def test_a_resume_with_other_settings_is_refused(tiny_settings, tmp_path):
    run = run_of(settings_with(tiny_settings, training={"max_steps": 2}), tmp_path, name="own")
    before = (run.path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"training\.max_steps: the run has 2, given is 3"):
        run_of(settings_with(tiny_settings, training={"max_steps": 3}), tmp_path, resume="own")
    assert (run.path / "config.yaml").read_text() == before


def test_several_gpus_are_not_used_unasked(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = training_arguments(
        parse_config(tiny_settings).training, Run(tmp_path), torch.device("cpu"), heldout=False
    )
    assert arguments.n_gpu <= 1
    assert arguments.train_batch_size == 4  # the batch size, not four times that


def test_a_disk_that_is_really_full_is_one_message_and_loses_nothing(tiny_settings, tmp_path):
    """A process may write no file larger than 64 KiB: the optimizer's state does not fit."""
    code = (
        "import resource, signal, sys, yaml\n"
        "from gapo_lite.config import parse_config\n"
        "from gapo_lite.training import train\n"
        "from gapo_lite.errors import RunError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    train(parse_config(yaml.safe_load(sys.stdin)), runs_dir=sys.argv[1], name='full')\n"
        "except RunError as error:\n"
        "    print('RunError', error)\n"
    )
    settings = yaml.safe_dump(parse_config(tiny_settings).model_dump(mode="json"))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        input=settings, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "RunError cannot write" in done.stdout, done.stderr[-2000:]
    assert Run(tmp_path / "full").state() == "failed"
    assert list_checkpoints(tmp_path / "full" / "checkpoints") == []


def test_running_out_of_memory_in_evaluation_scores_fewer_pairs_at_a_time(
    tiny_settings, finished, tmp_path, monkeypatch
):
    real = loss_module.forward_logps

    def crowded(model, batch, **wanted):
        if len(batch) > 1 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, batch, **wanted)

    monkeypatch.setattr(loss_module, "forward_logps", crowded)
    run = run_of(settings_with(tiny_settings, training={"max_steps": 1}), tmp_path)
    assert run.metrics()[0]["eval/loss"] == pytest.approx(
        finished.metrics()[0]["eval/loss"], abs=1e-5
    )


def test_the_log_says_what_is_to_be_known_of_margins_and_data(finished, tiny_settings, tmp_path):
    text = (finished.path / "train.log").read_text(encoding="utf-8")
    assert "γ = 0.3, β = 10: average target margin 0.3, in reward units 3" in text
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"问题{i}", "chosen": "好的" * (i + 1), "rejected": "不好"} for i in range(4)
    ]
    rows += [{"prompt": "x", "chosen": "one two", "rejected": "one"}, {"prompt": "y"}]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    short = settings_with(
        tiny_settings,
        data={"source": str(data), "heldout_source": None, "heldout_fraction": 0},
        training={"max_steps": 1, "batch_size": 2},
    )
    text = (run_of(short, tmp_path).path / "train.log").read_text(encoding="utf-8")
    # 20 + 8 Chinese letters beside the 9 of "one two" and "one"
    assert "sees no word at all in a text of 4 of 5 pairs, and 76 % of all letters" in text
    assert "use ef.tokenizer: unicode, or ef.metric: bertscore_f1 with a multilingual" in text
    assert "pairs.jsonl:6" in text
    seen = settings_with(short, ef={"tokenizer": "unicode"})
    run = run_of(seen, tmp_path)
    assert "sees no word" not in (run.path / "train.log").read_text(encoding="utf-8")


def test_changed_data_are_noticed_on_resume(tiny_settings, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_bytes(Path(tiny_settings["data"]["source"]).read_bytes())
    settings = settings_with(tiny_settings, data={"source": str(data)}, training={"max_steps": 2})
    run_of(settings, tmp_path, name="mine")
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match="have changed"):
        run_of(settings, tmp_path, resume="mine")


def test_the_same_folder_is_never_trained_twice_at_once(tiny_settings, tmp_path):
    short = settings_with(tiny_settings, training={"max_steps": 2})
    run = run_of(short, tmp_path, name="busy")
    with run.lock(), pytest.raises(RunError, match="another process"):
        run_of(short, tmp_path, resume="busy")


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["data.source=/no/such/file.jsonl"], DataError, "file.jsonl"),
        (["model.name=no/such-model"], ModelError, "no/such-model"),
        (["training.report_to=[wandb]"], ConfigError, "pip install wandb"),
        (["lora.target_modules=[nothing]"], ModelError, "all-linear"),
        (["training.fsdp=true"], ConfigError, "accelerate launch.*num_processes N"),
        (["data.max_length=8", "data.max_prompt_length=8"], DataError, "max_length"),
    ],
)
def test_bad_input_leaves_no_run_behind(tiny_settings, tmp_path, overrides, error, says):
    with pytest.raises(error, match=says):
        run_of(tiny_settings, tmp_path, *overrides)
    assert list_runs(tmp_path) == []
    assert not list(tmp_path.iterdir())


def launched(*arguments: object) -> None:
    """Two CPU processes with the launch file that ships."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={LAUNCH}"]
    done = subprocess.run(
        [*launch, "--num_processes=2", "-m", "gapo_lite", "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


SHARDED = {
    "objective": {"name": "dpo"},
    "training": {
        "fsdp": True,
        "gradient_checkpointing": 0.5,
        "micro_batch_size": None,
        "micro_batch_tokens": 150,  # the two processes fill theirs differently
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, SHARDED], ids=["data-parallel", "fsdp"])
def test_two_processes_under_accelerate_launch_train_as_one(tiny_settings, tmp_path, sections):
    plain = settings_with(tiny_settings, lora={"dropout": 0.0})
    config = tmp_path / "tiny.yaml"
    config.write_text(parse_config(settings_with(plain, **sections)).to_yaml())
    launched(config, "--name=two", f"--runs-dir={tmp_path}")
    assert (tmp_path / "two" / "checkpoints" / "checkpoint-12" / "random-1.json").is_file()
    alone = settings_with(plain, objective=sections.get("objective", {}))
    single, double = run_of(alone, tmp_path, name="one"), Run(tmp_path / "two")
    assert [row["step"] for row in double.metrics()] == [row["step"] for row in single.metrics()]
    for ours, theirs in zip(numbers(double), numbers(single), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-3)
    ours, theirs = (
        load_file(run.adapter / "adapter_model.safetensors") for run in (double, single)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)
    assert json.loads((double.path / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_sharded_run_resumed_equals_the_uninterrupted_one(tiny_settings, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(parse_config(settings_with(tiny_settings, **SHARDED)).to_yaml())
    launched(config, "--name=cut", f"--runs-dir={tmp_path}")
    run = Run(tmp_path / "cut")
    whole, rows = (run.adapter / "adapter_model.safetensors").read_bytes(), numbers(run)
    shutil.rmtree(run.checkpoints / "checkpoint-12")
    run.write("status.json", {**run.read("status.json"), "state": "running"})
    launched("--resume", run.path)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == whole
    assert numbers(run) == rows


def test_the_recipe_for_70b_fits_2_4_and_8_gpus():
    config = load_config(LAUNCH.with_name("llama3-70b-gapo-rougel.yaml"))
    assert config.training.fsdp
    for processes in (2, 4, 8):
        check_launch(config, processes)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["training.sample_prompts=[Why]"], "sample_prompts are answered by one process"),
        (["model.backend=unsloth"], "does not work with model.backend: unsloth"),
        (["model.dequantized_cache=always"], "cannot be kept dequantised"),
        (["training.batch_size=7"], "must be a multiple of the number of processes"),
    ],
)
def test_what_a_sharded_model_cannot_do_is_refused(tiny_settings, overrides, says):
    config = parse_config(tiny_settings, ["training.fsdp=true", *overrides])
    with pytest.raises(ConfigError, match=says):
        check_launch(config, 2)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_wrap_the_model_are_refused(tiny_settings, monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ConfigError, match=f"use {engine}.*training.fsdp to true"):
        check_launch(parse_config(tiny_settings), 2)


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize("place", ["_policy", "_layout"])
def test_a_card_that_is_full_before_the_first_step_is_one_message_and_leaves_no_run(
    tiny_settings, tmp_path, monkeypatch, place
):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(train_module, place, full)
    with pytest.raises(RunError, match=r"out of memory.*gapo-lite plan"):
        run_of(tiny_settings, tmp_path)
    assert not list_runs(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(FULL),
        RuntimeError("We encountered some issues during automatic conversion of the weights."),
    ],
)
def test_weights_that_do_not_fit_are_one_message(tiny_settings, tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ModelError, match="could not be loaded.*too little memory is free"):
        run_of(tiny_settings, tmp_path)
    assert not list_runs(tmp_path)
