"""The objectives: pure functions from log-probabilities and target margins to losses.

    spec = OBJECTIVES["dpo"]
    output = spec.fn(logps, margin, beta=0.01, margin_scale="beta")     # LossOutput

Symbols: lp = summed log-probability of a response, a = its average per scored token, |y| = its
scored tokens, ρ = lp − the reference's lp, NLL = −a; w and l = chosen and rejected. Each function
makes rewards r of them and compares Δr = r_w − r_l with the target margin m in reward units
(docs/objectives.md): −log σ(Δr − m), or max(0, δ + m − Δr).

Nothing here imports torch when it is imported, so that the configuration and the page know what an
objective needs without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gapo_lite.errors import ConfigError
from gapo_lite.types import LossOutput, PairLogps

if TYPE_CHECKING:
    import torch

MarginScale = Literal["beta", "one"]

LEAST_BETA = 1e-3
"""β-DPO's β never falls below it, as in its authors' code."""


def gapo_loss(
    chosen_logps_avg: torch.Tensor,
    rejected_logps_avg: torch.Tensor,
    margin: torch.Tensor,
    *,
    beta: float = 10.0,
    margin_scale: MarginScale = "beta",
) -> LossOutput:
    """Gap-Aware Preference Optimization on SimPO's length-normalised reward.

    Paper: *Gap-Aware Preference Optimization*, eqs. 5 and 9; with a constant margin it is SimPO
        (arXiv 2405.14734).
    Formula: −log σ(β·a_w − β·a_l − s·margin), with s = β for `margin_scale="beta"` (eq. 5: γ = 0.3
        and β = 10 are an average target margin of 3 reward units, as in SimPO's recipe) and s = 1
        for `"one"` (eq. 9 to the letter).
    Usual ranges: β 2 to 10; γ (the mean margin) 0.1 to 0.5.

    Args:
        chosen_logps_avg: (B,) average log-probability per scored token of the chosen responses.
        rejected_logps_avg: (B,) the same of the rejected responses.
        margin: (B,) target margins in the units of `logps_avg`; it carries no gradient.
        beta: β, the reward's scale.
        margin_scale: which equation, see above.

    Raises:
        ConfigError: an unknown `margin_scale`.
    """
    return _logistic(
        beta * chosen_logps_avg,
        beta * rejected_logps_avg,
        _in_reward_units(margin, beta, margin_scale),
    )


def simpo_loss(
    logps: PairLogps, margin: torch.Tensor, *, beta: float, margin_scale: MarginScale
) -> LossOutput:
    """SimPO, and with the pair's own margin GaPO; see `gapo_loss`.

    Args:
        logps: of B pairs.
        margin: (B,) target margins in the units of `logps_avg`.
        beta: β.
        margin_scale: "beta" or "one".
    """
    return gapo_loss(
        logps.chosen_avg, logps.rejected_avg, margin, beta=beta, margin_scale=margin_scale
    )


def dpo_loss(
    logps: PairLogps, margin: torch.Tensor, *, beta: float, margin_scale: MarginScale
) -> LossOutput:
    """Direct Preference Optimization; with a margin, as DPO with an offset (arXiv 2402.10571).

    Paper: arXiv 2305.18290, eq. 7; TRL's `loss_type="sigmoid"`.
    Formula: −log σ(β(ρ_w − ρ_l) − s·margin), s = β or 1 by `margin_scale`.
    Usual ranges: β 0.01 to 0.1 (SimPO's for Llama-3-8B-Instruct: 0.01).

    Args:
        logps: of B pairs, with the reference's.
        margin: (B,) target margins; 0 for plain DPO. With s = β in nats of a whole response.
        beta: β.
        margin_scale: "beta" or "one".
    """
    return _logistic(
        beta * logps.chosen_ratio,
        beta * logps.rejected_ratio,
        _in_reward_units(margin, beta, margin_scale),
    )


def ipo_loss(logps: PairLogps, margin: torch.Tensor, *, beta: float) -> LossOutput:
    """Identity Preference Optimization; takes no margin, since 1/(2β) is one already.

    Paper: arXiv 2310.12036, eq. 17 (β is its τ), with log-ratios averaged per token as TRL's
        `loss_type="ipo"` does on its authors' advice.
    Formula: (ρ_w/|y_w| − ρ_l/|y_l| − 1/(2β))².
    Usual ranges: β 0.01 to 1.

    Args:
        logps: of B pairs, with the reference's.
        margin: (B,), of no effect.
        beta: τ of the paper.
    """
    chosen = logps.chosen_ratio / logps.chosen_lengths
    rejected = logps.rejected_ratio / logps.rejected_lengths
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return LossOutput(losses, (beta * chosen).detach(), (beta * rejected).detach())


def kto_loss(
    logps: PairLogps,
    margin: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    kl: torch.Tensor,
) -> LossOutput:
    """Kahneman-Tversky Optimization, both responses of a pair being examples of their own.

    Paper: arXiv 2402.01306, eq. 8; TRL's KTOTrainer, whose loss is the mean over responses where
        this one is the sum over a pair's two.
    Formula: λ_w(1 − σ(β(ρ_w − z))) + λ_l(1 − σ(β(z − ρ_l))), z = max(0, KL), without gradient.
    Usual ranges: β 0.01 to 0.1; λ_w = λ_l = 1 where there are as many of each.

    Args:
        logps: of B pairs, with the reference's.
        margin: (B,), of no effect.
        beta: β.
        desirable_weight: λ_w.
        undesirable_weight: λ_l.
        kl: mean of ρ over mismatched prompts and responses, a scalar (TRL takes a micro-batch's;
            the trainer here takes the whole optimizer step's).
    """
    z = kl.detach().clamp(min=0)
    chosen, rejected = logps.chosen_ratio, logps.rejected_ratio
    losses = desirable_weight * (1 - (beta * (chosen - z)).sigmoid()) + undesirable_weight * (
        1 - (beta * (z - rejected)).sigmoid()
    )
    return LossOutput(losses, (beta * chosen).detach(), (beta * rejected).detach())


def cpo_loss(
    logps: PairLogps,
    margin: torch.Tensor,
    *,
    beta: float,
    margin_scale: MarginScale,
    nll_weight: float,
) -> LossOutput:
    """Contrastive Preference Optimization.

    Paper: arXiv 2401.08417, eq. 5; TRL's CPOTrainer with `loss_type="sigmoid"`, whose NLL is the
        mean over the micro-batch's tokens where this one is each response's own.
    Formula: −log σ(β(lp_w − lp_l) − s·margin) + λ·NLL_w, s = β or 1 by `margin_scale`.
    Usual ranges: β 0.01 to 0.1; λ = 1.

    Args:
        logps: of B pairs.
        margin: (B,) target margins; 0 for plain CPO. With s = β in nats of a whole response.
        beta: β.
        margin_scale: "beta" or "one".
        nll_weight: λ.
    """
    target = _in_reward_units(margin, beta, margin_scale)
    output = _logistic(beta * logps.chosen, beta * logps.rejected, target)
    return _with_nll(output, logps, nll_weight)


def orpo_loss(logps: PairLogps, margin: torch.Tensor, *, odds_weight: float) -> LossOutput:
    """Odds Ratio Preference Optimization.

    Paper: arXiv 2403.07691, eqs. 6 and 7; TRL's ORPOTrainer (λ is its `beta`), whose NLL also
        counts the prompt's tokens where this one counts the response's.
    Formula: NLL_w − λ log σ(log odds_w − log odds_l), log odds = a − log(1 − exp(a)).
    Usual ranges: λ 0.1 to 2.

    Args:
        logps: of B pairs.
        margin: (B,), of no effect.
        odds_weight: λ.
    """
    chosen, rejected = logps.chosen_avg, logps.rejected_avg
    log_odds = chosen - rejected - _log1mexp(chosen) + _log1mexp(rejected)
    losses = -odds_weight * _log_sigmoid(log_odds)
    output = LossOutput(losses, (odds_weight * chosen).detach(), (odds_weight * rejected).detach())
    return _with_nll(output, logps, 1.0)


def rdpo_loss(
    logps: PairLogps,
    margin: torch.Tensor,
    *,
    beta: float,
    margin_scale: MarginScale,
    length_weight: float,
) -> LossOutput:
    """Regularised DPO: a longer chosen response counts less.

    Paper: arXiv 2403.19159, in the form of the SimPO paper's table of objectives.
    Formula: −log σ(β(ρ_w − ρ_l) + α(|y_w| − |y_l|) − s·margin), s = β or 1 by `margin_scale`.
    Usual ranges: β 0.01 to 0.1; α 0.05 to 1.

    Args:
        logps: of B pairs, with the reference's.
        margin: (B,) target margins; 0 for plain R-DPO.
        beta: β.
        margin_scale: "beta" or "one".
        length_weight: α, in reward units a token.
    """
    longer = length_weight * (logps.chosen_lengths - logps.rejected_lengths)
    return _logistic(
        beta * logps.chosen_ratio,
        beta * logps.rejected_ratio,
        _in_reward_units(margin, beta, margin_scale) - longer,
    )


def slic_loss(
    logps: PairLogps, margin: torch.Tensor, *, delta: float, nll_weight: float
) -> LossOutput:
    """Sequence Likelihood Calibration with human feedback.

    Paper: arXiv 2305.10425; δ times TRL's CPOTrainer with `loss_type="hinge"` and β = 1/δ,
        whose NLL is a mean over tokens as here.
    Formula: max(0, δ + margin − lp_w + lp_l) + λ·NLL_w.
    Usual ranges: δ 0.1 to 2 in the SimPO paper's comparison; λ 0.1 to 10.

    Args:
        logps: of B pairs.
        margin: (B,) target margins in nats of a whole response, added to δ; 0 for plain SLiC.
        delta: δ.
        nll_weight: λ.
    """
    output = _hinge(logps.chosen, logps.rejected, delta + margin.detach())
    return _with_nll(output, logps, nll_weight)


def rrhf_loss(logps: PairLogps, margin: torch.Tensor, *, nll_weight: float) -> LossOutput:
    """Rank Responses to align with Human Feedback, of two responses.

    Paper: arXiv 2304.05302, whose NLL is a sum over tokens where its authors' code and this one
        take the mean.
    Formula: max(0, −a_w + a_l) + λ·NLL_w.
    Usual ranges: λ 0.1 to 10.

    Args:
        logps: of B pairs.
        margin: (B,), of no effect.
        nll_weight: λ.
    """
    output = _hinge(logps.chosen_avg, logps.rejected_avg, 0.0)
    return _with_nll(output, logps, nll_weight)


def dpop_loss(
    logps: PairLogps,
    margin: torch.Tensor,
    *,
    beta: float,
    margin_scale: MarginScale,
    fall_weight: float,
) -> LossOutput:
    """DPO-Positive: a chosen response that falls below its reference is penalised.

    Paper: arXiv 2402.13228, eq. 3.
    Formula: −log σ(β(ρ_w − ρ_l − λ max(0, −ρ_w)) − s·margin), s = β or 1 by `margin_scale`.
    Usual ranges: β 0.1 to 0.3; λ 5 to 500.

    Args:
        logps: of B pairs, with the reference's.
        margin: (B,) target margins; 0 for plain DPOP.
        beta: β.
        margin_scale: "beta" or "one".
        fall_weight: λ.
    """
    chosen = logps.chosen_ratio
    return _logistic(
        beta * (chosen - fall_weight * (-chosen).clamp(min=0)),
        beta * logps.rejected_ratio,
        _in_reward_units(margin, beta, margin_scale),
    )


def beta_dpo_loss(
    logps: PairLogps,
    margin: torch.Tensor,
    *,
    beta: float,
    margin_scale: MarginScale,
    beta_gain: float,
    surplus: torch.Tensor,
) -> LossOutput:
    """β-DPO: β follows how far apart a step's pairs are; without the paper's data filter.

    Paper: arXiv 2407.08639; M is a reward margin as there (its authors' code leaves β out of M,
        so that its α acts 1/β times as strongly), and mean and M₀ are of whole optimizer steps
        (that code takes micro-batches).
    Formula: −log σ(β_t(ρ_w − ρ_l) − s·margin), β_t = β(1 + α(mean(M) − M₀)), M = β(ρ_w − ρ_l),
        s = β_t or 1 by `margin_scale`. Rewards are with β, so that steps can be compared.
    Usual ranges: β 0.1; α 0.2 to 0.8 (0.6 in the paper).

    Args:
        logps: of B pairs, with the reference's.
        margin: (B,) target margins; 0 for plain β-DPO.
        beta: β.
        margin_scale: "beta" or "one".
        beta_gain: α.
        surplus: mean(M) − M₀, a scalar without gradient; M₀ is a running mean over steps.
    """
    now = (beta * (1 + beta_gain * surplus.detach())).clamp(min=LEAST_BETA)
    ratios = logps.chosen_ratio, logps.rejected_ratio
    output = _logistic(
        now * ratios[0], now * ratios[1], _in_reward_units(margin, now, margin_scale)
    )
    return LossOutput(output.losses, (beta * ratios[0]).detach(), (beta * ratios[1]).detach())


def wpo_loss(
    logps: PairLogps, margin: torch.Tensor, *, beta: float, margin_scale: MarginScale
) -> LossOutput:
    """Weighted Preference Optimization: DPO in which what the policy would say itself counts more.

    Paper: arXiv 2406.11827, eqs. 2 and 4 (sampled alignment); TRL's DPOTrainer with
        `use_weighting`.
    Formula: w_w·w_l·(−log σ(β(ρ_w − ρ_l) − s·margin)), w = exp(mean over tokens of
        log p(y_t) − log Σ_v p(v)²), without gradient.
    Usual ranges: β 0.01 to 0.1.

    Args:
        logps: of B pairs, with the reference's and the certainties.
        margin: (B,) target margins; 0 for plain WPO.
        beta: β.
        margin_scale: "beta" or "one".
    """
    output = dpo_loss(logps, margin, beta=beta, margin_scale=margin_scale)
    assert logps.chosen_certainty is not None
    assert logps.rejected_certainty is not None
    weights = (
        logps.chosen_avg + logps.rejected_avg - logps.chosen_certainty - logps.rejected_certainty
    )
    losses = weights.detach().exp() * output.losses
    return LossOutput(losses, output.chosen_rewards, output.rejected_rewards)


def rso_loss(
    logps: PairLogps, margin: torch.Tensor, *, beta: float, margin_scale: MarginScale
) -> LossOutput:
    """The normalised hinge of statistical Rejection Sampling Optimization, on the pairs as given.

    Paper: arXiv 2309.06657, eq. 10; TRL's DPOTrainer with `loss_type="hinge"`.
    Formula: max(0, 1 + s·margin − β(ρ_w − ρ_l)), s = β or 1 by `margin_scale`.
    Usual ranges: β 0.01 to 0.1.

    Args:
        logps: of B pairs, with the reference's.
        margin: (B,) target margins, added to the hinge's 1; 0 for plain RSO.
        beta: β.
        margin_scale: "beta" or "one".
    """
    target = _in_reward_units(margin, beta, margin_scale)
    return _hinge(beta * logps.chosen_ratio, beta * logps.rejected_ratio, 1.0 + target)


def _logistic(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, target: torch.Tensor
) -> LossOutput:
    losses = -_log_sigmoid(chosen_rewards - rejected_rewards - target)
    return LossOutput(losses, chosen_rewards.detach(), rejected_rewards.detach())


def _hinge(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, target: torch.Tensor | float
) -> LossOutput:
    losses = (target - (chosen_rewards - rejected_rewards)).clamp(min=0)
    return LossOutput(losses, chosen_rewards.detach(), rejected_rewards.detach())


def _with_nll(output: LossOutput, logps: PairLogps, weight: float) -> LossOutput:
    losses = output.losses - weight * logps.chosen_avg
    return LossOutput(losses, output.chosen_rewards, output.rejected_rewards)


def _in_reward_units(
    margin: torch.Tensor, beta: float | torch.Tensor, margin_scale: MarginScale
) -> torch.Tensor:
    if margin_scale not in ("beta", "one"):
        raise ConfigError(
            f"unknown margin_scale {margin_scale!r}: choose `beta` (eq. 5) or `one` (eq. 9)."
        )
    return margin.detach() * (beta if margin_scale == "beta" else 1.0)


def _log_sigmoid(values: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


def _log1mexp(values: torch.Tensor) -> torch.Tensor:
    """log(1 − exp(values)) for values below 0; those that are 0, a certain response, a little."""
    return (-values.clamp(max=-1e-6).expm1()).log()


@dataclass(frozen=True, slots=True)
class ObjectiveSpec:
    """One objective.

    Attributes:
        fn: (logps: PairLogps, margin (B,), and what `parameters` and `statistic` name) →
            LossOutput.
        formula: the loss of one pair, in a line.
        source: arXiv number of its paper.
        parameters: its own hyper-parameters, keys of `objective:`, with their defaults.
        margins: where its target margin can come from, the default first: "ef" (the pair's
            evaluation factor), "constant" (γ for all) and "rating" (the data's own scores); none
            where it takes none.
        gamma: default γ where the margin is the pair's own; with a constant one it is 0, the plain
            method, but for SimPO.
        uses_reference: whether it compares with the model without its adapter.
        length_normalized: whether its rewards are averages per token.
        statistic: what it wants to know of a whole optimizer step: "kl" or "surplus", a keyword of
            `fn`; "" for nothing.
        uses_certainty: whether it wants `PairLogps.chosen_certainty`.
    """

    fn: Callable[..., LossOutput]
    formula: str
    source: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    margins: tuple[str, ...] = ()
    gamma: float = 3.0
    uses_reference: bool = False
    length_normalized: bool = False
    statistic: str = ""
    uses_certainty: bool = False

    @property
    def takes_margin(self) -> bool:
        """Whether a target margin enters the loss."""
        return bool(self.margins)


_PLAIN_FIRST = ("constant", "ef", "rating")
_REF: dict[str, Any] = {"uses_reference": True}
_AVG: dict[str, Any] = {"length_normalized": True}
_S: dict[str, Any] = {"margin_scale": "beta"}

OBJECTIVES = {
    "gapo": ObjectiveSpec(
        simpo_loss, "−log σ(β(a_w − a_l) − s·margin)", "N2sN3LESoW", {"beta": 10.0, **_S},
        ("ef", "rating"), 0.3, **_AVG),
    "simpo": ObjectiveSpec(
        simpo_loss, "−log σ(β(a_w − a_l) − s·γ)", "2405.14734", {"beta": 10.0, **_S},
        _PLAIN_FIRST, 0.3, **_AVG),
    "dpo": ObjectiveSpec(
        dpo_loss, "−log σ(β(ρ_w − ρ_l) − s·margin)", "2305.18290", {"beta": 0.01, **_S},
        _PLAIN_FIRST, **_REF),
    "ipo": ObjectiveSpec(
        ipo_loss, "(ρ_w/|y_w| − ρ_l/|y_l| − 1/(2β))²", "2310.12036", {"beta": 0.5}, **_REF, **_AVG),
    "kto": ObjectiveSpec(
        kto_loss, "λ_w(1 − σ(β(ρ_w − z))) + λ_l(1 − σ(β(z − ρ_l)))", "2402.01306",
        {"beta": 0.01, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        statistic="kl", **_REF),
    "cpo": ObjectiveSpec(
        cpo_loss, "−log σ(β(lp_w − lp_l) − s·margin) + λ·NLL_w", "2401.08417",
        {"beta": 0.01, **_S, "nll_weight": 1.0}, _PLAIN_FIRST),
    "orpo": ObjectiveSpec(
        orpo_loss, "NLL_w − λ log σ(log odds_w − log odds_l)", "2403.07691", {"odds_weight": 0.5},
        **_AVG),
    "rdpo": ObjectiveSpec(
        rdpo_loss, "−log σ(β(ρ_w − ρ_l) + α(|y_w| − |y_l|) − s·margin)", "2403.19159",
        {"beta": 0.01, **_S, "length_weight": 0.05}, _PLAIN_FIRST, **_REF),
    "slic": ObjectiveSpec(
        slic_loss, "max(0, δ + margin − lp_w + lp_l) + λ·NLL_w", "2305.10425",
        {"delta": 1.0, "nll_weight": 1.0}, _PLAIN_FIRST),
    "rrhf": ObjectiveSpec(
        rrhf_loss, "max(0, −a_w + a_l) + λ·NLL_w", "2304.05302", {"nll_weight": 1.0}, **_AVG),
    "dpop": ObjectiveSpec(
        dpop_loss, "−log σ(β(ρ_w − ρ_l − λ max(0, −ρ_w)) − s·margin)", "2402.13228",
        {"beta": 0.1, **_S, "fall_weight": 5.0}, _PLAIN_FIRST, **_REF),
    "beta_dpo": ObjectiveSpec(
        beta_dpo_loss, "−log σ(β_t(ρ_w − ρ_l) − s·margin), β_t = β(1 + α(mean(M) − M₀))",
        "2407.08639", {"beta": 0.1, **_S, "beta_gain": 0.6, "gap_momentum": 0.9},
        _PLAIN_FIRST, statistic="surplus", **_REF),
    "wpo": ObjectiveSpec(
        wpo_loss, "−w_w·w_l·log σ(β(ρ_w − ρ_l) − s·margin)", "2406.11827", {"beta": 0.01, **_S},
        _PLAIN_FIRST, uses_certainty=True, **_REF),
    "rso": ObjectiveSpec(
        rso_loss, "max(0, 1 + s·margin − β(ρ_w − ρ_l))", "2309.06657", {"beta": 0.1, **_S},
        _PLAIN_FIRST, **_REF),
}  # fmt: skip
"""Name → objective. GaPO is SimPO with the pair's own margin: they share the function, not only the
idea; s is β or 1 by `margin_scale`."""

NOT_IN_LOSS = ("gap_momentum",)
"""Parameters that decide a statistic and not the loss itself."""


def loss_function(name: str, parameters: Mapping[str, Any]) -> Callable[..., LossOutput]:
    """(logps, margin, and the statistic) → LossOutput, with the hyper-parameters given.

    Args:
        name: a key of OBJECTIVES.
        parameters: values of the objective's own hyper-parameters; others are left out.
    """
    from functools import partial

    spec = OBJECTIVES[name]
    given = {k: parameters[k] for k in spec.parameters if k not in NOT_IN_LOSS}
    return partial(spec.fn, **given)
