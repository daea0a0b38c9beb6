"""What the page says of a run: each rule on both sides of its threshold, and real runs."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from checkout import ROOT
from forging import forge_run

from app import verdict as verdict_module
from app.history import History
from app.verdict import judge, verdict
from gapo_lite.config import parse_config, setting_keys
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.repetition import repetition
from gapo_lite.runs import Run, now

LEVELS = ["bad", "watch", "good"]
SENTENCE = "The quick brown fox jumps over the lazy dog while the sun sets behind the hills. "
LOOP = "Say it again and again, my friend. " * 8
"""Its period is 35 characters of 279."""


def healthy(steps: int = 60, evaluations: int = 4, **changes) -> History:
    """A run of one pass that goes as it should: 55 → 82 %, margin 0.25 → 3.6. Changes are columns
    (`held_` before those of the evaluations, "/" written as "_"), None for a column that isn't
    there."""
    step = np.arange(1.0, steps + 1)
    training = {
        "step": step,
        "epoch": step / steps,
        "loss": np.linspace(3.5, 1.4, steps),
        "rewards/accuracies": np.linspace(0.55, 0.8, steps),
        "rewards/margins": np.linspace(0.25, 3.6, steps),
        "logps/chosen": np.linspace(-3.74, -3.6, steps),
        "logps/rejected": np.linspace(-3.77, -3.96, steps),
        "margin/mean": np.full(steps, 0.3),
        "grad_norm": np.full(steps, 6.0),
        "learning_rate": np.minimum(step / 6, np.cos(step / steps * 1.5)) * 2e-4,
    }
    evaluation = {
        "step": np.linspace(0, steps, evaluations).round(),
        "epoch": np.linspace(0, 1, evaluations),
        "loss": np.linspace(3.6, 1.4, evaluations),
        "rewards/accuracies": np.linspace(0.55, 0.82, evaluations),
        "rewards/margins": np.linspace(0.25, 3.6, evaluations),
        "logps/chosen": np.linspace(-3.74, -3.6, evaluations),
        "logps/rejected": np.linspace(-3.77, -3.96, evaluations),
        "margin/mean": np.full(evaluations, 0.3),
    }
    for name, values in changes.items():
        columns = evaluation if name.startswith("held_") else training
        names = [key for key in columns if key.replace("/", "_") == name.removeprefix("held_")]
        columns[names[0]] = np.asarray(values, dtype=float)
    return History(training, evaluation)


def judged(history: History, samples=(), *, state="finished", target=3.0, beta=10.0, **more):
    """`judge`, with what must hold of every finding."""
    findings = judge(history, samples, beta=beta, target_reward_margin=target, state=state, **more)
    again = judge(history, samples, beta=beta, target_reward_margin=target, state=state, **more)
    assert findings == again
    check(findings)
    return findings


def check(findings) -> None:
    assert 1 <= len(findings) <= 5
    levels = [LEVELS.index(finding.level) for finding in findings]
    assert levels == sorted(levels)
    sections = {key.partition(".")[0] for key in setting_keys()}
    for finding in findings:
        assert len(finding.title.split()) <= 8, finding.title
        assert finding.text[0].isupper() or finding.text[0].isdigit()
        assert finding.advice.endswith(".")
        assert "nan" not in f"{finding.title} {finding.text}".lower().split()
        named = re.findall(rf"\b(?:{'|'.join(sections)})\.[a-z_]+", finding.advice)
        assert set(named) <= set(setting_keys()), finding.advice


def titles(*args, **kwargs) -> list[str]:
    return [finding.title for finding in judged(*args, **kwargs)]


def level_of(title: str, *args, **kwargs) -> str | None:
    return next((f.level for f in judged(*args, **kwargs) if f.title == title), None)


def ramp(last: float, first: float = 0.55, count: int = 4) -> np.ndarray:
    return np.linspace(first, last, count)


def answers(**by_step: list[str]) -> list[dict]:
    """answers(s0=[…], s20=[…]): rows of samples.jsonl."""
    return [
        {"step": int(step[1:]), "prompt": f"Question {number}?", "answer": text}
        for step, texts in by_step.items()
        for number, text in enumerate(texts)
    ]


# -- healthy runs --


def test_a_healthy_run_is_good_and_nothing_else():
    (finding,) = judged(healthy())
    assert (finding.level, finding.title) == ("good", "Accuracy and margin are as they should be")
    assert "from 55% to 82%" in finding.text
    assert "from 0.25 to 3.60 (target 3.00)" in finding.text
    assert "held-out" in finding.text
    assert "+0.14 nats" in finding.text


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_healthy_run_that_is_not_over_is_on_course(state):
    assert [f.level for f in judged(healthy(), state=state)] == ["good"]
    assert titles(healthy(), state=state) == ["It is on course"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_three_measured_demo_runs_are_good(seed):
    runs = json.loads((ROOT / "benchmarks/results/demo_seeds.json").read_text())["runs"]
    measured = {
        f"held_{key.replace('/', '_')}": runs[seed][key]
        for key in ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    }
    found = judged(healthy(33, 2, **measured), target=2.98)
    assert [f.level for f in found] == ["good"]


# Real runs of configs/demo.yaml (seed 42, 2 CPU cores), as metrics.jsonl has them:
# step, loss, grad_norm, learning_rate, margins, accuracies, chosen, rejected, margin/mean, epoch
DEMO = [
    (3, 3.41, 5.886, 1.000e-4, 1.559, 0.6667, -3.556, -3.712, 0.2885, 0.0909),
    (6, 2.923, 6.204, 1.994e-4, 1.766, 0.6667, -3.661, -3.837, 0.3334, 0.1818),
    (9, 2.693, 3.227, 1.908e-4, 2.097, 0.625, -3.571, -3.781, 0.2974, 0.2727),
    (12, 3.177, 4.244, 1.726e-4, 1.83, 0.6667, -3.636, -3.819, 0.3624, 0.3636),
    (15, 1.848, 6.014, 1.468e-4, 3.378, 0.7917, -3.59, -3.928, 0.2807, 0.4545),
    (18, 2.561, 4.931, 1.162e-4, 2.953, 0.7083, -3.502, -3.797, 0.3036, 0.5455),
    (21, 2.752, 6.252, 8.382e-5, 1.572, 0.5833, -3.519, -3.676, 0.2423, 0.6364),
    (24, 1.394, 7.972, 5.316e-5, 4.232, 0.7917, -3.74, -4.163, 0.3075, 0.7273),
    (27, 2.444, 9.802, 2.740e-5, 3.392, 0.625, -3.433, -3.772, 0.3128, 0.8182),
    (30, 1.035, 4.444, 9.242e-6, 4.001, 0.8333, -3.61, -4.01, 0.2801, 0.9091),
    (33, 1.667, 4.731, 5.862e-7, 3.762, 0.7083, -3.486, -3.862, 0.2914, 1.0),
]
# step, loss, margins, accuracies, chosen, rejected, margin/mean, epoch
DEMO_HELD = [
    (0, 3.641, 0.2498, 0.5538, -3.743, -3.768, 0.2976, 0.0),
    (11, 2.799, 1.333, 0.6, -3.672, -3.805, 0.2976, 0.3333),
    (22, 1.638, 3.238, 0.8, -3.603, -3.927, 0.2976, 0.6667),
    (33, 1.41, 3.749, 0.8154, -3.607, -3.982, 0.2976, 1.0),
]
TWO_PASSES_HELD = [  # --set training.epochs=2
    *DEMO_HELD[:1],
    (22, 1.318, 3.932, 0.8462, -3.604, -3.997, 0.2976, 0.6667),
    (44, 0.2472, 10.45, 0.9692, -3.958, -5.003, 0.2976, 1.333),
    (66, 0.2113, 11.36, 0.9692, -4.044, -5.18, 0.2976, 2.0),
]
HOT_HELD = [  # --set training.learning_rate=5e-3; it answers "your your your your"
    *DEMO_HELD[:1],
    (11, 0.6052, 18.11, 0.8462, -14.05, -15.86, 0.2976, 0.3333),
    (22, 0.7924, 14.74, 0.8462, -20.46, -21.93, 0.2976, 0.6667),
]
NUMBERS = (
    *("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"),
    *("margin/mean", "epoch"),
)


def real(rows: list[tuple], held: list[tuple]) -> History:
    keys = (("step", "loss", "grad_norm", "learning_rate", *NUMBERS), ("step", "loss", *NUMBERS))
    columns = [
        {key: np.array([row[i] for row in part]) for i, key in enumerate(names)}
        for names, part in zip(keys, (rows, held), strict=True)
    ]
    return History(*columns)


@pytest.mark.parametrize("step", range(34))
def test_a_real_healthy_run_raises_no_alarm_at_any_step(step):
    rows = [row for row in DEMO if row[0] <= step]
    found = judged(
        real(rows, [row for row in DEMO_HELD if row[0] <= step]),
        state="running",
    )
    (finding,) = found
    expected = "Too early to say" if step < 11 else "Nothing looks wrong so far"
    assert finding.title == (expected if step < 22 else "It is on course")


def test_a_real_healthy_run_is_good_in_the_end():
    assert [f.level for f in judged(real(DEMO, DEMO_HELD))] == ["good"]


def test_a_real_run_of_two_passes_overshoots_and_loses_chosen_answers():
    found = judged(real(DEMO, TWO_PASSES_HELD))
    assert [(f.level, f.title) for f in found] == [
        ("watch", "Chosen answers become less likely"),
        ("watch", "The margin is far above its target"),
    ]
    assert "from -3.74 to -4.04 nats per token (held-out pairs" in found[0].text
    assert "0.74 times as likely" in found[0].text
    assert "rejected ones fell by 1.41" in found[0].text
    assert "distance of 0.30" in found[0].text  # 3 reward units / β
    assert "At step 22 it was 3.93" in found[1].text


def test_a_real_run_with_a_far_too_high_learning_rate_is_bad_although_its_accuracy_is_fine():
    samples = answers(s0=[SENTENCE] * 4, s22=["your " * 48] * 4)
    found = judged(real(DEMO[:7], HOT_HELD), samples, state="running")
    assert [(f.level, f.title) for f in found] == [
        ("bad", "Chosen answers become less likely"),
        ("bad", "Sample answers repeat themselves"),
        ("bad", "The margin is far above its target"),
    ]
    assert "less than a hundredth as likely" in found[0].text
    assert "training.learning_rate to a tenth" in found[0].advice
    assert "At step" not in found[2].text


@pytest.fixture(scope="module")
def short_run(tiny_settings, tmp_path_factory) -> Run:
    """8 real steps of the tiny model, with a sample prompt."""
    from gapo_lite.training import train

    overrides = (
        *("training.max_steps=8", "training.sample_prompts=['Héllo?']"),
        *("training.sample_max_tokens=8", "training.logging_steps=1"),
    )
    return train(
        parse_config(tiny_settings, overrides),
        runs_dir=tmp_path_factory.mktemp("runs"),
        name="short",
        show_progress=False,
    )


def test_a_real_short_run_is_too_short_to_say(short_run):
    found = verdict(short_run)
    check(found)
    assert "Too short to say" in [finding.title for finding in found]
    assert "good" not in [finding.level for finding in found]


def test_the_verdict_is_judged_again_only_when_the_run_has_changed(short_run, monkeypatch):
    first = verdict(short_run)
    monkeypatch.setattr(verdict_module, "judge", lambda *args, **kwargs: [])
    assert verdict(short_run) == first
    (short_run.path / "train.log").open("a").close()  # nothing written
    assert verdict(short_run) == first
    status = short_run.read("status.json")
    short_run.write("status.json", {**status, "heartbeat": now()})
    assert verdict(short_run) == []


def test_the_verdict_of_a_failed_run_quotes_its_message(tmp_path, tiny_settings):
    run = Run(tmp_path / "failed")
    run.path.mkdir()
    (run.path / "config.yaml").write_text(parse_config(tiny_settings).to_yaml())
    run.append("samples.jsonl", {"step": "x", "prompt": 1})
    run.write("status.json", {"state": "failed", "message": "no memory at step 3:\n lower <it>"})
    (finding,) = verdict(run)
    assert (finding.level, finding.title) == ("bad", "The run failed")
    assert "no memory at step 3: lower <it>" in finding.text


# -- too early --


@pytest.mark.parametrize(("steps", "is_early"), [(9, True), (10, False)])
def test_the_first_steps_say_nothing(steps, is_early):
    assert ("Too early to say" in titles(healthy(steps), state="running")) == is_early
    assert ("Too short to say" in titles(healthy(steps), state="finished")) == is_early


@pytest.mark.parametrize(("rows", "is_early"), [(7, True), (8, False)])
def test_without_evaluations_a_few_rows_say_nothing(rows, is_early):
    history = healthy(rows, 0, step=np.arange(1, rows + 1) * 10)
    assert ("Too early to say" in titles(history, state="running")) == is_early


def test_a_run_without_a_row_is_too_early():
    assert titles(healthy(0, 0), state="starting") == ["Too early to say"]
    (finding,) = judged(healthy(0, 0), state="stopped")
    assert finding.advice == "Resume it to see more."


@pytest.mark.parametrize(
    ("rates", "state", "is_warming"),
    [
        ((1e-5, 2e-5, 3e-5), "running", True),
        ((1e-5, 3e-5, 3e-5), "running", False),
        ((1e-5, 3e-5, 2.9e-5), "running", False),
        ((1e-5, 2e-5, 3e-5), "stopped", False),
    ],
)
def test_a_learning_rate_that_rises_asks_to_wait(rates, state, is_warming):
    history = healthy(12, learning_rate=[*[1e-5] * 9, *rates])
    title = "The learning rate is still warming up"
    assert (title in titles(history, state=state)) == is_warming


# -- runs that broke --


def test_a_failed_run_without_a_message_points_to_the_log():
    (finding,) = judged(healthy(), state="failed")
    assert finding.level == "bad"
    assert "log" in finding.advice


def test_a_long_message_is_cut():
    (finding,) = judged(healthy(), state="failed", message="x" * 10_000)
    assert len(finding.text) < 700


@pytest.mark.parametrize("steps", [0, 60])
def test_an_interrupted_run_says_how_to_go_on(steps):
    (finding,) = judged(healthy(steps, 4 if steps else 0), state="interrupted")
    assert (finding.level, finding.title) == ("bad", "The training process is gone")
    assert "Resume" in finding.advice


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("column", "title"),
    [
        ("loss", "The loss is not a number"),
        ("grad_norm", "The gradient norm is not a number"),
        ("held_loss", "The held-out loss is not a number"),
    ],
)
def test_a_loss_that_is_no_number_is_bad_from_its_first_step_on(column, title, value):
    rows = np.full(60 if column != "held_loss" else 4, 2.0)
    rows[-2:] = value
    found = judged(healthy(**{column: rows}))
    assert (found[0].level, found[0].title) == ("bad", title)
    assert f"from step {40 if column == 'held_loss' else 59} on" in found[0].text


# -- chosen log-probabilities --


@pytest.mark.parametrize(
    ("fall", "level"), [(0.24, None), (0.26, "watch"), (0.49, "watch"), (0.51, "bad")]
)
def test_chosen_answers_that_become_less_likely_while_the_margin_grows(fall, level):
    history = healthy(held_logps_chosen=ramp(-1 - fall, -1), held_logps_rejected=ramp(-1.8, -1.1))
    assert level_of("Chosen answers become less likely", history) == level
    assert ("good" in [f.level for f in judged(history)]) == (level != "bad")


@pytest.mark.parametrize(
    ("rejected", "title"),
    [
        (-0.27, "Chosen answers become less likely"),
        (-0.25, "Chosen answers fall faster than rejected"),
        (+0.10, "Chosen answers fall faster than rejected"),
    ],
)
def test_chosen_answers_that_fall_faster_than_rejected_ones_are_worse(rejected, title):
    found = judged(
        healthy(held_logps_chosen=ramp(-1.26, -1), held_logps_rejected=ramp(-1 + rejected, -1))
    )
    assert found[0].title == title
    assert found[0].level == ("bad" if "faster" in title else "watch")
    assert f"{'fell' if rejected < 0 else 'rose'} by {abs(rejected):.2f}" in found[0].text


@pytest.mark.parametrize(("fall", "share"), [(1.9, "a third"), (2.1, "a tenth")])
def test_a_collapse_asks_for_a_much_lower_learning_rate(fall, share):
    history = healthy(held_logps_chosen=ramp(-1 - fall, -1), held_logps_rejected=ramp(-5, -1))
    assert f"training.learning_rate to {share}" in judged(history)[0].advice


def test_without_held_out_pairs_the_training_pairs_speak():
    history = healthy(60, 0, logps_chosen=np.linspace(-1, -2, 60), logps_rejected=[-1.0] * 60)
    found = judged(history)
    assert found[0].title == "Chosen answers fall faster than rejected"
    assert "(training pairs)" in found[0].text
    assert "No pairs are held out" in [finding.title for finding in found]


# -- gradients --


@pytest.mark.parametrize(("times", "level"), [(4.9, None), (5.1, "bad")])
def test_gradients_that_stay_far_above_their_beginning_explode(times, level):
    norms = np.full(60, 2.0)
    norms[-3:] *= times  # the median of the last five
    assert level_of("The gradient norm explodes", healthy(grad_norm=norms)) == level
    norms[-3] = 2.0
    assert level_of("The gradient norm explodes", healthy(grad_norm=norms)) is None


@pytest.mark.parametrize(("rows", "is_known"), [(9, False), (10, True)])
def test_a_few_norms_have_no_usual_size(rows, is_known):
    norms = [*[1.0] * (rows - 5), *[9.0] * 5]
    if rows == 9:
        norms[4] = 1.0
    history = healthy(rows, grad_norm=norms)
    assert ("The gradient norm explodes" in titles(history)) == is_known


def test_norms_that_shrink_as_pairs_reach_their_margin_are_healthy():
    norms = np.geomspace(6, 0.01, 60)
    norms[[40, 45, 50, 55]] = 3.0  # a hard pair among pairs that are done
    assert titles(healthy(grad_norm=norms)) == ["Accuracy and margin are as they should be"]


@pytest.mark.parametrize(
    ("at", "height", "is_told"),
    [
        ((30, 40, 50), 10.1, True),
        ((30, 40, 50), 9.9, False),
        ((40, 50), 10.1, False),
        ((9, 40, 50), 10.1, False),  # the first is older than the last 50 rows
        ((10, 40, 50), 10.1, True),
    ],
)
def test_several_recent_spikes_of_the_gradient_norm_are_told(at, height, is_told):
    norms = np.full(60, 2.0)
    norms[list(at)] *= height
    level = level_of("The gradient norm has spikes", healthy(grad_norm=norms))
    assert level == ("watch" if is_told else None)


@pytest.mark.parametrize(("norm", "is_told"), [(0.5 * 19.9, False), (0.5 * 20.1, True)])
def test_gradients_that_are_always_clipped_hard_are_told(norm, is_told):
    history = healthy(grad_norm=np.full(60, norm))
    title = "Gradients are clipped hard all the time"
    assert level_of(title, history, max_grad_norm=0.5) == ("watch" if is_told else None)


# -- accuracy --


@pytest.mark.parametrize(
    ("first", "last", "is_stuck"),
    [
        (0.55, 0.59, True),
        (0.55, 0.61, False),
        (0.58, 0.61, False),
        (0.53, 0.59, False),
        (0.545, 0.59, True),
    ],
)
def test_an_accuracy_that_stays_near_a_half_is_stuck(first, last, is_stuck):
    history = healthy(held_rewards_accuracies=ramp(last, first))
    level = level_of("Accuracy is stuck at a half", history)
    assert level == ("bad" if is_stuck else None)
    if is_stuck:
        assert "Raise training.learning_rate" in judged(history)[0].advice


@pytest.mark.parametrize(("steps", "is_told"), [(55, False), (56, True)])
def test_a_running_one_is_given_50_steps_after_its_warm_up(steps, is_told):
    rates = [*np.linspace(1e-6, 1e-4, 6), *[9e-5] * (steps - 6)]  # its peak is step 6
    history = healthy(steps, held_rewards_accuracies=ramp(0.56), learning_rate=rates)
    level = level_of("Accuracy is stuck at a half", history, state="running")
    assert level == ("watch" if is_told else None)
    assert level_of("Accuracy is stuck at a half", history, state="finished") == "bad"


@pytest.mark.parametrize(("last", "is_told"), [(0.79, True), (0.81, False)])
def test_an_accuracy_that_falls_is_told(last, is_told):
    history = healthy(held_rewards_accuracies=ramp(last, 0.9))
    assert level_of("Accuracy has fallen", history) == ("bad" if is_told else None)


def test_a_stuck_run_that_has_moved_far_is_not_told_to_move_faster():
    found = judged(
        healthy(
            held_rewards_accuracies=ramp(0.55),
            held_logps_chosen=ramp(-2, -1),
            held_logps_rejected=ramp(-2.5, -1),
        )
    )
    assert [finding.level for finding in found] == ["bad", "bad"]
    assert not any("Raise training.learning_rate" in finding.advice for finding in found)


# -- the margin --


@pytest.mark.parametrize(
    ("target", "margin", "level"),
    [
        (3.0, 5.9, None),
        (3.0, 6.1, "watch"),
        (3.0, 11.9, "watch"),
        (3.0, 12.1, "bad"),
        (10.0, 19.9, None),
        (10.0, 20.1, "watch"),
        (0.3, 3.2, None),  # objective.margin_scale: one
        (0.3, 3.4, "watch"),
        (-1.0, 1.9, None),
        (-1.0, 2.1, "watch"),
        (None, 99.0, None),
    ],
)
def test_a_margin_far_above_its_target_is_told(target, margin, level):
    history = healthy(held_rewards_margins=ramp(margin, 0.25, 4))
    assert level_of("The margin is far above its target", history, target=target) == level


def test_held_out_pairs_are_measured_by_their_own_target():
    changes = {"held_rewards_margins": ramp(6.5, 0.25), "held_margin_mean": [0.4] * 4}
    assert titles(healthy(**changes)) == ["Accuracy and margin are as they should be"]
    assert "(target 4.00)" in judged(healthy(**changes))[0].text


@pytest.mark.parametrize(
    ("target", "margin", "is_low"),
    [(3.0, 1.4, True), (3.0, 1.6, False), (0.0, 0.1, False), (-1.0, 0.1, False)],
)
def test_a_margin_far_below_its_target_is_told_at_the_end(target, margin, is_low):
    history = healthy(held_rewards_margins=ramp(margin, 0.05))
    title = "The margin is far below its target"
    assert level_of(title, history, target=target) == ("watch" if is_low else None)
    assert level_of(title, history, target=target, state="running") is None
    assert ("good" in [f.level for f in judged(history, target=target)]) != is_low


@pytest.mark.parametrize(("last", "is_little"), [(0.64, True), (0.66, False)])
def test_a_low_accuracy_is_told_at_the_end(last, is_little):
    history = healthy(held_rewards_accuracies=ramp(last))
    assert titles(history) == [
        "It has learned a little" if is_little else "Accuracy and margin are as they should be"
    ]
    expected = "Nothing looks wrong so far" if is_little else "It is on course"
    assert titles(history, state="running") == [expected]


# -- memorising --


@pytest.mark.parametrize(
    ("train", "epoch", "level"),
    [
        (0.96, 2.0, None),
        (0.98, 2.0, "watch"),
        (0.98, 1.0, None),  # each pair was new when it was scored
        (0.98, 1.02, "watch"),
    ],
)
def test_training_accuracy_far_above_held_out_accuracy_is_memorising(train, epoch, level):
    history = healthy(
        rewards_accuracies=np.full(60, train),
        epoch=np.linspace(0, epoch, 60),
    )
    assert level_of("The training pairs are being memorised", history) == level


@pytest.mark.parametrize(("held", "level"), [(0.71, "watch"), (0.69, "bad")])
def test_much_memorising_is_bad_and_is_not_called_stuck(held, level):
    history = healthy(
        rewards_accuracies=np.ones(60),
        epoch=np.linspace(0, 3, 60),
        held_rewards_accuracies=ramp(held),
        held_loss=[3.6, 1.2, 1.5, 2.0],
    )
    (found, *_) = judged(history)
    assert (found.title, found.level) == ("The training pairs are being memorised", level)
    assert "100% on training pairs" in found.text
    assert "lowest at step 20" in found.text
    history = healthy(
        rewards_accuracies=np.ones(60),
        epoch=np.linspace(0, 3, 60),
        held_rewards_accuracies=ramp(0.55),
    )
    assert titles(history) == ["The training pairs are being memorised"]


def test_without_held_out_pairs_nobody_can_tell():
    found = judged(healthy(60, 0))
    assert [(f.level, f.title) for f in found] == [
        ("watch", "No pairs are held out"),
        ("good", "Accuracy and margin are as they should be"),
    ]
    assert "data.heldout_fraction" in found[0].advice
    assert "on training pairs" in found[1].text
    assert "No pairs are held out" not in titles(healthy(60, 1))


GUARDED = "At step 40 the log-probability was 0.73 nats a token below the base model's."


@pytest.mark.parametrize("state", ["stopped", "running", "finished"])
def test_what_the_drift_guard_says_stands_for_the_fall_that_it_saw(state):
    title = "Chosen answers fell beyond the limit"
    falling = healthy(logps_chosen=np.linspace(-1, -3, 60), held_logps_chosen=[-1, -2, -2.5, -3])
    assert "Chosen answers fall faster than rejected" in titles(falling, state=state)
    found = judged(falling, state=state, message=GUARDED)
    assert (found[0].level, found[0].title, found[0].text) == ("bad", title, GUARDED)
    assert ("stop it" in found[0].advice) == (state == "running")
    assert not any("fall faster" in finding.title for finding in found)
    told = titles(falling, state="failed", message=GUARDED)
    assert title not in told
    assert "The run failed" in told


# -- samples --


@pytest.mark.parametrize(
    ("loops", "of", "level"),
    [(0, 4, None), (1, 4, None), (1, 2, None), (2, 5, "watch"), (2, 4, "bad"), (1, 1, "watch")],
)
def test_sample_answers_that_loop_are_told(loops, of, level):
    tuned = [LOOP] * loops + [SENTENCE] * (of - loops)
    samples = answers(s0=[SENTENCE] * of, s20=[LOOP] * of, s60=tuned)
    assert level_of("Sample answers repeat themselves", healthy(), samples) == level


@pytest.mark.parametrize(("fresh", "is_told"), [(265, True), (275, False)])
def test_a_loop_is_two_fifths_of_an_answer(fresh, is_told):
    text = "".join(chr(0x4E00 + i) for i in range(fresh)) + "a" * 200
    assert (repetition(text) >= 0.4) == is_told
    samples = answers(s0=[SENTENCE] * 2, s60=[text] * 2)
    assert ("Sample answers repeat themselves" in titles(healthy(), samples)) == is_told


@pytest.mark.parametrize(("before", "is_told"), [(0.60, True), (0.70, False)])
def test_a_base_model_that_loops_as_much_is_not_the_trainings_fault(before, is_told):
    count = round(500 * (1 - before))
    base = "".join(chr(0x4E00 + i) for i in range(count)) + "a" * (500 - count)
    assert repetition(base) == pytest.approx(before, abs=0.05)
    samples = answers(s0=[base] * 2, s60=[LOOP] * 2)
    assert ("Sample answers repeat themselves" in titles(healthy(), samples)) == is_told


@pytest.mark.parametrize(
    ("base", "tuned", "level"),
    [
        (["a", "b", "c"], ["a", "b", " \n"], "watch"),
        (["a", "b", "c"], ["", " ", "c"], "bad"),
        (["", "b", "c"], ["", "b", "c"], None),
        ([], ["", "b", "c"], "watch"),
    ],
)
def test_answers_that_are_empty_now_are_told(base, tuned, level):
    samples = answers(s0=base, s60=tuned)
    assert level_of("Sample answers are empty", healthy(), samples) == level


@pytest.mark.parametrize(
    ("base", "tuned", "is_told"), [(100, 301, True), (100, 299, False), (10, 199, False)]
)
def test_answers_several_times_as_long_are_told(base, tuned, is_told):
    texts = ["".join(chr(0x4E00 + i) for i in range(length)) for length in (base, tuned)]
    samples = answers(s0=texts[:1], s60=texts[1:])
    level = level_of("Sample answers have become much longer", healthy(), samples)
    assert level == ("watch" if is_told else None)


def test_samples_of_the_base_model_alone_or_of_odd_shapes_say_nothing():
    odd = [{}, {"step": 60}, {"step": "60", "prompt": "a", "answer": LOOP}, 7, None, ["step"]]
    odd += [{"step": 60, "prompt": None, "answer": LOOP}, {"step": 60, "prompt": "a", "answer": 1}]
    for samples in (answers(s0=[LOOP] * 2), odd):
        assert titles(healthy(), samples) == ["Accuracy and margin are as they should be"]


# -- all together --


def test_everything_wrong_at_once_is_the_five_worst():
    norms = np.full(60, 100.0)
    norms[-5:] = 1e4
    history = healthy(
        loss=[math.nan] * 60,
        grad_norm=norms,
        held_rewards_accuracies=ramp(0.5),
        held_rewards_margins=ramp(30, 0),
        held_logps_chosen=ramp(-9, -1),
        held_logps_rejected=ramp(-8, -1),
    )
    samples = answers(s0=[SENTENCE] * 3, s60=["", "", LOOP])
    found = judged(history, samples, state="failed", message="x")
    assert [finding.title for finding in found] == [
        "The run failed",
        "The loss is not a number",
        "Chosen answers fall faster than rejected",
        "The gradient norm explodes",
        "Sample answers are empty",
    ]


def test_a_history_of_steps_alone_is_no_error():
    steps = {"step": np.arange(1.0, 30.0), "epoch": np.full(29, np.nan)}
    assert titles(History(steps, {"step": np.zeros(0), "epoch": np.zeros(0)}), target=None) == [
        "No pairs are held out",
        "Too short to say",
    ]


def test_a_failure_is_told_without_what_is_secret_in_it(short_run):
    message = "no way to https://me:geheim@proxy:1/ with hf_abcdefghij1234"
    short_run.write("status.json", {"state": "failed", "step": 3, "message": message})
    (failed,) = [finding for finding in verdict(short_run) if finding.title == "The run failed"]
    assert "no way to" in failed.text
    assert "geheim" not in failed.text
    assert "hf_abc" not in failed.text


# -- other objectives --


PLAIN = {"target": None, "beta": 0.01, "is_averaged": False}
"""Of a plain DPO run."""
WITHOUT_BETA = {"target": None, "beta": None, "is_averaged": True}
"""Of ORPO and RRHF; SLiC's rewards are no averages."""


@pytest.mark.parametrize("kind", [PLAIN, WITHOUT_BETA, {**WITHOUT_BETA, "is_averaged": False}])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_norm": np.full(60, 90.0)},
        {"loss": np.full(60, np.nan)},
        {"held_logps_chosen": [-3.7, -3.8, -4.0, -4.2]},
        {"held_rewards_margins": [0.25, 9, 30, 90]},
        {"held_rewards_margins": [0.25, 0.26, 0.27, 0.28], "held_rewards_accuracies": [0.5] * 4},
        {"held_rewards_accuracies": [0.55, 0.56, 0.58, 0.62]},
    ],
)
def test_without_a_target_or_a_beta_nothing_is_said_of_them(kind, changes):
    samples = [
        {"step": step, "prompt": prompt, "answer": answer}
        for prompt in ("a", "b", "c")
        for step, answer in ((0, "Short."), (60, LOOP))
    ]
    for answers in ((), samples):
        for finding in judged(healthy(**changes), answers, **kind):
            said = f"{finding.title} {finding.text} {finding.advice}"
            assert "None" not in said
            assert "target" not in said
            assert "margin.gamma" not in said
            assert kind["beta"] or "objective.beta" not in said


@pytest.mark.parametrize(("last", "is_stuck"), [(0.52, True), (0.8, False)])
def test_a_model_that_is_its_own_reference_begins_by_guessing(last, is_stuck):
    held = {
        "held_rewards_accuracies": [0, 0.5, 0.5, last],
        "held_rewards_margins": [0, 0.1, 0.1, 0.2],
    }
    (finding,) = judged(healthy(**held), **PLAIN)
    assert "from 50% to" in finding.text
    assert (finding.title == "Accuracy is stuck at a half") == is_stuck


def test_a_margin_however_large_is_no_overshoot_without_a_target():
    far = healthy(held_rewards_margins=[0.25, 9, 30, 90])
    assert "The margin is far above its target" in titles(far)
    assert titles(far, **PLAIN) == ["Accuracy and margin are as they should be"]


def test_the_distance_that_a_target_asks_for_is_told_only_per_token():
    fallen = healthy(held_logps_chosen=[-3.7, -3.8, -4.0, -4.2])
    assert any("a distance of 0.30 only" in finding.text for finding in judged(fallen))
    for kind in ({"beta": 0.01, "is_averaged": False}, {"beta": None, "is_averaged": False}):
        assert not any("a distance of" in finding.text for finding in judged(fallen, **kind))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_of_every_objective_is_judged(tmp_path, tiny_settings, objective):
    run = forge_run(tmp_path / "run", tiny_settings, f"objective.name={objective}", adapter=False)
    run.write("margins.json", {"mean_margin_in_reward_units": 0.0})
    check(verdict(run))
    for finding in verdict(run):
        assert "None" not in f"{finding.title} {finding.text} {finding.advice}"
