"""What a run's numbers mean, in plain words, and what to do about it.

Pure: numbers in, sentences out, the same ones for the same numbers. Each rule below looks for one
thing among the facts (`verdict_facts`) and says nothing where it doesn't find it; the thresholds
stand on top, each with its reason. No rule asks another: the table of rules says which of them are
silent beside which. The text may quote the run's own error message: whoever puts it into HTML
escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from app.children import cleaned
from app.curves import Ends, summary
from app.history import History, config_of, read_history, version
from app.verdict_facts import Facts, Samples
from gapo_lite.disk import read_jsonl
from gapo_lite.objectives import OBJECTIVES
from gapo_lite.repetition import repetition
from gapo_lite.runs import Run

Level = Literal["good", "watch", "bad"]

MOST_FINDINGS = 5

STUCK_STEPS = 50
"""Steps since the warm-up. The demo is past 80 % after 22; larger models take smaller steps."""
STUCK_ACCURACY, STUCK_GAIN = 0.6, 0.05
"""With 65 held-out pairs, guessing has a standard deviation of 0.06."""
FALLEN_ACCURACY = 0.1
"""More than that noise."""
FINE_ACCURACY = 0.65
"""Preference data disagree with themselves: 0.65 to 0.85 is what a good run reaches."""

CHOSEN_FALL_WATCH, CHOSEN_FALL_BAD = 0.25, 0.5
"""Nats per token. At 0.25 a token of a chosen answer is 0.78 times as likely as before, at 0.5 it
is 0.61 times; the demo's rises by 0.14, two passes of it fall by 0.30."""
COLLAPSE = 2.0
"""Nats per token: nothing is left of the base model."""

LOW_SHARE = 0.5
"""Of the target margin: most pairs are still short of theirs."""
OVERSHOOT_UNITS = 3.0
"""Reward units beyond the target at which a pair weighs σ(−3) = 5 % of its first weight."""
OVERSHOOT_BAD = 3.0
"""So many times the overshoot that is watched; two passes of the demo come to two times."""

GRADIENT_ROWS = 10
"""Fewer norms have no usual size."""
EXPLODING_RATIO, EXPLODING_ROWS = 5.0, 5
"""Norms of a healthy run shrink as pairs reach their margin, and vary by two or three."""
SPIKE_RATIO, SPIKE_ROWS, SPIKES = 10.0, 50, 3
"""A single spike is clipped and does no harm; the data have hard pairs."""
CLIPPED_RATIO = 20.0
"""AdamW doesn't mind a steady clip (the demo's norm is 6 times the limit); far beyond that, one
batch outweighs others at random."""

MEMORISED_GAP, MEMORISED_GAP_BAD = 0.15, 0.3
"""Training accuracy above held-out accuracy, after pairs were seen twice."""

LOOPING, LOOPING_RISE, LOOPS = 0.4, 0.2, 2
"""Share of an answer that was there before: of 810 real answers, one has 0.4. One answer
that loops is chance: small models do so now and then, also in a healthy run of the demo."""
LONGER_RATIO, LONGER_CHARACTERS = 3.0, 200
"""Times the base model's length, and mean length; short answers vary more."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the numbers say.

    Attributes:
        level: "good", "watch" or "bad".
        title: at most 8 words.
        text: what was found, with the numbers.
        advice: what to do, with the settings' keys.
    """

    level: Level
    title: str
    text: str
    advice: str


def judge(
    history: History,
    samples: Samples,
    *,
    beta: float | None,
    is_averaged: bool = True,
    target_reward_margin: float | None,
    state: str,
    max_grad_norm: float = 1.0,
    message: str = "",
) -> list[Finding]:
    """At most 5 findings, the worst first; always at least one.

    Args:
        history: of the run.
        samples: rows of samples.jsonl.
        beta: β, None for an objective without.
        is_averaged: whether rewards are averages per token, and not sums.
        target_reward_margin: average target margin of the training pairs, None if not known or if
            none is asked for.
        state: of `Run.state()`.
        max_grad_norm: what gradients are clipped to.
        message: of status.json: why the run failed, or what its drift guard says.
    """
    facts = Facts(
        history, samples, beta, is_averaged, target_reward_margin, state, max_grad_norm, message
    )
    found = {rule: finding for rule in _RULES if (finding := rule(facts))}
    told = [finding for rule, finding in found.items() if found.keys().isdisjoint(_RULES[rule])]
    if any(finding.level == "bad" for finding in told):
        told = [finding for finding in told if finding.level != "good"]
    told.sort(key=lambda finding: ("bad", "watch", "good").index(finding.level))  # stable
    return told[:MOST_FINDINGS] or [_nothing_wrong(facts)]


def verdict(run: Run) -> list[Finding]:
    """`judge` for a run's folder; judged again only when its files or its state have changed.

    Raises:
        GapoError: a file of the run is damaged.
    """
    return list(_judged(run.path, version(run), run.state()))


@lru_cache(maxsize=64)
def _judged(path: Path, seen: str, state: str) -> tuple[Finding, ...]:
    run = Run(path)
    training, objective = config_of(run).training, config_of(run).objective
    findings = judge(
        read_history(run),
        read_jsonl(path / "samples.jsonl"),
        beta=objective.beta,
        is_averaged=OBJECTIVES[objective.name].length_normalized,
        target_reward_margin=summary(run).target_reward_margin,
        state=state,
        max_grad_norm=training.max_grad_norm,
        message=cleaned(str(run.read("status.json").get("message", ""))),
    )
    return tuple(findings)


# -- the rules --

_Rule = Callable[[Facts], Finding | None]


def _failed(facts: Facts) -> Finding | None:
    if facts.state != "failed":
        return None
    reason = " ".join(facts.message.split())[:600] or "it left no message."
    return Finding(
        "bad",
        "The run failed",
        f"It ended with an error after step {facts.step}: {reason}",
        "The end of the log says more. Mend what it names; where a checkpoint was saved, Resume "
        "goes on from it.",
    )


def _not_a_number(facts: Facts) -> Finding | None:
    train, held = facts.history.training, facts.history.evaluation
    for name, rows, key in (
        ("loss", train, "loss"),
        ("gradient norm", train, "grad_norm"),
        ("held-out loss", held, "loss"),
    ):
        bad = np.flatnonzero(~np.isfinite(rows.get(key, np.zeros(0))))
        if len(bad):
            return Finding(
                "bad",
                f"The {name} is not a number",
                f"It is infinite or not a number from step {rows['step'][bad[0]]:.0f} on: the "
                "steps were too large, or the precision too low.",
                f"Lower training.learning_rate to a tenth{_if_beta(facts, ', or objective.beta')}; "
                "if that does not help, use model.precision: float32.",
            )
    return None


def _interrupted(facts: Facts) -> Finding | None:
    if facts.state != "interrupted":
        return None
    return Finding(
        "bad",
        "The training process is gone",
        f"It ended after step {facts.step} without a word: it was killed, the machine went down, "
        "or the system ran out of memory.",
        "Resume goes on from the last checkpoint. If it happens again, lower "
        "training.micro_batch_size or data.max_length.",
    )


def _drift_guard(facts: Facts) -> Finding | None:
    if facts.state == "failed" or not facts.message:
        return None
    return Finding(
        "bad",
        "Chosen answers fell beyond the limit",
        " ".join(facts.message.split())[:600],
        "Read the answers to training.sample_prompts before and after"
        f"{', and stop it if they have become worse' if facts.is_active else ''}.",
    )


def _chosen_falls(facts: Facts) -> Finding | None:
    moved, logps = facts.drift, facts.chosen
    if moved is None or logps is None or moved.chosen > -CHOSEN_FALL_WATCH:
        return None
    is_worse = moved.chosen <= moved.rejected
    if is_worse:
        title = "Chosen answers fall faster than rejected"
        how = "so the model unlearns good answers more than bad ones."
    else:
        title = "Chosen answers become less likely"
        how = (
            "so the margin grows although good answers become less likely: the failure that "
            "GaPO's paper is about."
        )
    verb = "fell" if moved.rejected < 0 else "rose"
    asked = ""
    if facts.target and facts.beta and facts.is_averaged:
        asked = f" The target asks for a distance of {facts.target / facts.beta:.2f} only."
    return Finding(
        "bad" if is_worse or moved.chosen <= -CHOSEN_FALL_BAD else "watch",
        title,
        f"The average log-probability of chosen answers went from {logps.first:.2f} to "
        f"{logps.last:.2f} nats per token ({_which(logps)}): each token is {_times(moved.chosen)} "
        f"as likely as at the start. The rejected ones {verb} by {abs(moved.rejected):.2f}, "
        f"{how}{asked}",
        f"Lower training.learning_rate to {'a tenth' if moved.chosen <= -COLLAPSE else 'a third'}, "
        "or train fewer training.epochs"
        f"{_if_target(facts, '; if it falls again, lower margin.gamma')}.",
    )


def _gradient_explodes(facts: Facts) -> Finding | None:
    norms = facts.norms
    if len(norms) < GRADIENT_ROWS:
        return None
    usual, recent = _usual_norm(norms), float(np.median(norms[-EXPLODING_ROWS:]))
    if recent <= EXPLODING_RATIO * usual:
        return None
    return Finding(
        "bad",
        "The gradient norm explodes",
        f"The median of the last {EXPLODING_ROWS} logged norms is {recent:.3g}, "
        f"{recent / usual:.0f} times the {usual:.3g} of the beginning.",
        "Lower training.learning_rate to a third, or raise training.warmup_ratio; resume from "
        "before it began, or start again.",
    )


def _answers_empty(facts: Facts) -> Finding | None:
    empty = [
        prompt
        for prompt, answer in facts.tuned.items()
        if not answer.strip() and facts.base.get(prompt, "?").strip()
    ]
    if not empty:
        return None
    return Finding(
        _by_share(empty, facts),
        "Sample answers are empty",
        f"{len(empty)} of {len(facts.tuned)} sample prompts get no answer any more; before "
        "training they did.",
        "Look for empty or very short chosen answers in the data, and lower "
        "training.learning_rate or training.epochs.",
    )


def _answers_loop(facts: Facts) -> Finding | None:
    rates = {prompt: repetition(answer) for prompt, answer in facts.tuned.items()}
    before = {prompt: repetition(facts.base.get(prompt, "")) for prompt in rates}
    loops = [p for p in rates if rates[p] >= LOOPING and rates[p] - before[p] >= LOOPING_RISE]
    if not loops or len(loops) < min(LOOPS, len(rates)):
        return None
    now, then = (float(np.mean([each[p] for p in loops])) for each in (rates, before))
    return Finding(
        _by_share(loops, facts) if len(loops) >= LOOPS else "watch",
        "Sample answers repeat themselves",
        f"{len(loops)} of {len(facts.tuned)} sample answers say the same again and again: {now:.0%}"
        f" of their text was there before, {then:.0%} in the same answers before training.",
        "Use an earlier checkpoint or fewer training.epochs; lower training.learning_rate"
        f"{_if_target(facts, ', then margin.gamma')}.",
    )


def _accuracy_stuck(facts: Facts) -> Finding | None:
    accuracy = facts.accuracy
    if facts.is_early or facts.is_warming or accuracy is None:
        return None
    has_fallen = accuracy.change <= -FALLEN_ACCURACY
    is_stuck = accuracy.last < STUCK_ACCURACY and accuracy.change < STUCK_GAIN
    is_time = facts.steps_since_peak >= STUCK_STEPS or facts.state == "finished"
    if not is_time or not (has_fallen or is_stuck):
        return None
    advice = (
        "Raise training.learning_rate to three times as much. If that does not help, look at the "
        "pairs: chosen and rejected may be swapped, or too alike."
    )
    if has_fallen or (facts.drift and facts.drift.chosen <= -CHOSEN_FALL_WATCH):
        advice = "The model moves, but not to better answers: lower training.learning_rate to a "
        advice += "tenth, and look whether chosen and rejected are swapped."
    return Finding(
        "watch" if facts.is_active else "bad",
        "Accuracy has fallen" if has_fallen else "Accuracy is stuck at a half",
        f"After {facts.step} steps {_standing(facts)} Guessing is right for 50 %.",
        advice,
    )


def _margin_too_far(facts: Facts) -> Finding | None:
    if facts.is_early or facts.margin is None or facts.target is None:
        return None
    allowed = max(OVERSHOOT_UNITS, facts.target)
    excess = facts.margin.last - facts.target
    if excess <= allowed:
        return None
    return Finding(
        "bad" if excess > OVERSHOOT_BAD * allowed else "watch",
        "The margin is far above its target",
        f"On {facts.pairs} pairs it is {facts.margin.last:.2f}, and the target is "
        f"{facts.target:.2f}. So far beyond, a pair teaches little that is new, and the model "
        f"drifts from its base.{_nearest_evaluation(facts, allowed)}",
        "Train less: fewer training.epochs, training.max_steps, or a lower "
        "training.learning_rate. An earlier checkpoint may be the better model.",
    )


def _memorised(facts: Facts) -> Finding | None:
    accuracy, epochs = facts.accuracy, facts.history.training["epoch"][-1:]
    if accuracy is None or not accuracy.heldout or not (epochs > 1).any():
        return None
    gap = facts.train_accuracy - accuracy.last
    if not gap >= MEMORISED_GAP:
        return None
    return Finding(
        "bad" if gap >= MEMORISED_GAP_BAD else "watch",
        "The training pairs are being memorised",
        f"Accuracy is {facts.train_accuracy:.0%} on training pairs and {accuracy.last:.0%} on "
        f"held-out pairs, after {epochs[0]:.1f} passes.{_lowest_loss(facts)}",
        "Train fewer training.epochs, bring more pairs, or use a smaller lora.rank or some "
        "lora.dropout.",
    )


def _gradient_spikes(facts: Facts) -> Finding | None:
    norms = facts.norms
    if len(norms) < GRADIENT_ROWS:
        return None
    usual, newest = _usual_norm(norms), norms[-SPIKE_ROWS:]
    spikes = newest[newest > SPIKE_RATIO * usual]
    if len(spikes) < SPIKES:
        return None
    return Finding(
        "watch",
        "The gradient norm has spikes",
        f"{len(spikes)} of the last {len(newest)} logged norms are more than {SPIKE_RATIO:.0f} "
        f"times the usual {usual:.3g}, up to {spikes.max():.3g}.",
        "Look for odd pairs (very long, cut, or in another script); a larger training.batch_size "
        "or a lower training.learning_rate calms it.",
    )


def _always_clipped(facts: Facts) -> Finding | None:
    norms = facts.norms
    if len(norms) < GRADIENT_ROWS:
        return None
    median = float(np.median(norms))
    if median <= CLIPPED_RATIO * facts.max_grad_norm:
        return None
    return Finding(
        "watch",
        "Gradients are clipped hard all the time",
        f"The median norm is {median:.3g}; training.max_grad_norm cuts it to "
        f"{facts.max_grad_norm:g}, so that every batch counts alike, odd ones too.",
        f"Raise training.max_grad_norm to about {median:.2g}"
        f"{_if_beta(facts, ', or lower objective.beta, which gradients grow with')}.",
    )


def _learned_little(facts: Facts) -> Finding | None:
    accuracy, margin = facts.accuracy, facts.margin
    if facts.is_early or facts.state != "finished" or accuracy is None or margin is None:
        return None  # before the end, the last evaluation may be an old one
    is_low = _is_low(margin.last, facts.target)
    if not is_low and accuracy.last >= FINE_ACCURACY:
        return None
    behind = "; if the margin stays behind, margin.gamma asks for more than these pairs give"
    return Finding(
        "watch",
        "The margin is far below its target" if is_low else "It has learned a little",
        _sentence(_standing(facts)),
        "Train longer (training.epochs) or raise training.learning_rate"
        f"{_if_target(facts, behind)}.",
    )


def _answers_longer(facts: Facts) -> Finding | None:
    shared = [prompt for prompt in facts.tuned if facts.base.get(prompt, "").strip()]
    if not shared:
        return None
    now, then = (
        float(np.mean([len(answers[prompt]) for prompt in shared]))
        for answers in (facts.tuned, facts.base)
    )
    if now < LONGER_RATIO * then or now < LONGER_CHARACTERS:
        return None
    return Finding(
        "watch",
        "Sample answers have become much longer",
        f"They have {now:.0f} characters on average, and had {then:.0f} before training. Longer "
        "answers often win comparisons without being better.",
        "Compare the lengths of chosen and rejected in the data: if chosen ones are much longer, "
        f"that is what was learned.{_if_target(facts, ' A smaller margin.gamma weakens it.')}",
    )


def _nothing_held_out(facts: Facts) -> Finding | None:
    if len(facts.history.evaluation["step"]) or not len(facts.history.training["step"]):
        return None
    return Finding(
        "watch",
        "No pairs are held out",
        "All numbers are of pairs that the model is trained on, so they cannot tell learning from "
        "memorising.",
        "Set data.heldout_fraction to 0.05, or data.heldout_source, in the next run.",
    )


def _too_early(facts: Facts) -> Finding | None:
    if facts.state in ("failed", "interrupted"):
        return None
    if facts.is_early:
        advice = "Wait for more steps."
        if facts.state == "finished":
            advice = "Train longer: more training.epochs or training.max_steps, or more pairs."
        elif not facts.is_active:
            advice = "Resume it to see more."
        title = "Too early to say" if facts.state != "finished" else "Too short to say"
        return Finding(
            "watch", title, f"After step {facts.step} the numbers are mostly noise.", advice
        )
    if facts.is_warming and facts.is_active:
        return Finding(
            "watch",
            "The learning rate is still warming up",
            f"At step {facts.step} it is {facts.rates[-1]:.2g} and "
            "rising. Not much can have changed yet.",
            "Wait until it has reached its peak (training.warmup_ratio says when).",
        )
    return None


def _all_well(facts: Facts) -> Finding | None:
    accuracy, margin = facts.accuracy, facts.margin
    if facts.is_early or accuracy is None or margin is None:
        return None
    is_fine = accuracy.last >= FINE_ACCURACY and accuracy.change > -STUCK_GAIN
    if not is_fine or _is_low(margin.last, facts.target):
        return None
    is_over = facts.state == "finished"
    return Finding(
        "good",
        "Accuracy and margin are as they should be" if is_over else "It is on course",
        _sentence(_standing(facts)) + _about_chosen(facts),
        "Chat with it and compare its answers with the base model's." if is_over else "Let it run.",
    )


def _nothing_wrong(facts: Facts) -> Finding:
    return Finding(
        "good",
        "Nothing looks wrong so far",
        _sentence(_standing(facts)),
        "Let it run." if facts.is_active else "Resume it, or chat with it.",
    )


_RULES: dict[_Rule, tuple[_Rule, ...]] = {
    _failed: (),
    _not_a_number: (),
    _interrupted: (),
    _drift_guard: (),
    _chosen_falls: (_drift_guard,),
    _gradient_explodes: (),
    _answers_empty: (),
    _answers_loop: (),
    _accuracy_stuck: (_memorised,),
    _margin_too_far: (),
    _memorised: (),
    _gradient_spikes: (_gradient_explodes,),
    _always_clipped: (),
    _learned_little: (_accuracy_stuck, _memorised, _margin_too_far),
    _answers_longer: (),
    _nothing_held_out: (),
    _too_early: (),
    _all_well: (_margin_too_far,),
}
"""Rule → the rules beside whose findings it is silent. Among findings of one level, the earlier
rule's comes first."""


# -- words --


def _standing(facts: Facts) -> str:
    """Accuracy and margin in the middle of a sentence."""
    if facts.accuracy is None or facts.margin is None:
        return "nothing was measured."
    target = "" if facts.target is None else f" (target {facts.target:.2f})"
    return (
        f"accuracy on {facts.pairs} pairs went from {facts.accuracy.first:.0%} to "
        f"{facts.accuracy.last:.0%}, the reward margin from {facts.margin.first:.2f} to "
        f"{facts.margin.last:.2f}{target}."
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _which(numbers: Ends) -> str:
    return "held-out pairs, against the base model" if numbers.heldout else "training pairs"


def _times(nats: float) -> str:
    factor = math.exp(nats)
    return f"{factor:.2f} times" if factor >= 0.01 else "less than a hundredth"


def _if_beta(facts: Facts, words: str) -> str:
    return words if facts.beta else ""


def _if_target(facts: Facts, words: str) -> str:
    """Words about γ, which a plain method has not."""
    return words if facts.target else ""


def _about_chosen(facts: Facts) -> str:
    if facts.drift is None:
        return ""
    return f" Chosen answers moved by {facts.drift.chosen:+.2f} nats per token."


def _nearest_evaluation(facts: Facts, allowed: float) -> str:
    """The evaluation after the first at which the margin was nearest its target, if near."""
    held, target = facts.history.evaluation, facts.target or 0.0
    margins = held.get("rewards/margins", np.zeros(0))[1:]
    if not np.isfinite(margins).all() or not (margins <= target + allowed).any():
        return ""
    nearest = int(np.abs(margins - target).argmin())
    return f" At step {held['step'][1:][nearest]:.0f} it was {margins[nearest]:.2f}."


def _lowest_loss(facts: Facts) -> str:
    held = facts.history.evaluation
    losses = held.get("loss", np.zeros(0))
    if not len(losses) or not np.isfinite(losses).all() or losses.argmin() == len(losses) - 1:
        return ""
    return f" The held-out loss was lowest at step {held['step'][losses.argmin()]:.0f}."


def _is_low(margin: float, target: float | None) -> bool:
    return target is not None and target > 0 and margin < LOW_SHARE * target


def _usual_norm(norms: np.ndarray) -> float:
    """Median of the first quarter: in a healthy run norms only shrink later."""
    return float(np.median(norms[: max(EXPLODING_ROWS, len(norms) // 4)]))


def _by_share(prompts: list[str], facts: Facts) -> Level:
    return "bad" if 2 * len(prompts) >= len(facts.tuned) else "watch"
