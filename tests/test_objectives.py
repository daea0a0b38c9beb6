"""The objectives: each by hand, against its paper's formula, against finite differences, with
margins, at extremes; and the certainties that one of them wants.

Against TRL's own code: test_trl_parity.py.
"""

from __future__ import annotations

import inspect
import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkout import ROOT
from forging import randomize_adapter
from torch.nn.functional import logsigmoid

from gapo_lite import logps as logps_module
from gapo_lite.batching import pack, pad
from gapo_lite.config import ObjectiveConfig
from gapo_lite.errors import ConfigError
from gapo_lite.model import (
    add_adapter,
    causal_model,
    forward_logps,
    load_base,
    why_not_packed,
)
from gapo_lite.objectives import NOT_IN_LOSS, OBJECTIVES, gapo_loss, loss_function
from gapo_lite.types import PairLogps, TokenizedPair

TAKES_MARGIN = [name for name, spec in OBJECTIVES.items() if spec.takes_margin]
HAS_MARGIN_SCALE = [name for name, spec in OBJECTIVES.items() if "margin_scale" in spec.parameters]

# Hyper-parameters at which every branch of every objective is taken by FOUR's pairs.
PARAMETERS = {
    "gapo": {"beta": 2.0},
    "simpo": {"beta": 2.0},
    "dpo": {"beta": 0.5},
    "ipo": {"beta": 0.25},
    "kto": {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0},
    "cpo": {"beta": 0.25, "nll_weight": 3.0},
    "orpo": {"odds_weight": 2.0},
    "rdpo": {"beta": 0.5, "length_weight": 0.25},
    "slic": {"delta": 2.0, "nll_weight": 0.5},
    "rrhf": {"nll_weight": 0.5},
    "dpop": {"beta": 0.5, "fall_weight": 2.0},
    "beta_dpo": {"beta": 0.5, "beta_gain": 0.5, "gap_momentum": 0.9},
    "wpo": {"beta": 0.5},
    "rso": {"beta": 0.5},
}


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# A pair to compute with on paper: a = -2 and -3; ρ = 1 and -2; a - certainty = -0.5 and -0.5.
ONE = PairLogps(
    tensor(-4), tensor(-12), tensor(2), tensor(4), tensor(-5), tensor(-10), tensor(-1.5),
    tensor(-2.5),
)  # fmt: skip
# Both sides of every hinge: a_w - a_l = 1, 4/3, -1.1, -3; ρ_w = 1, -6, 2, -6.
FOUR = PairLogps(
    chosen=tensor(-4, -20, -9, -30),
    rejected=tensor(-12, -10, -9.5, -18),
    chosen_lengths=tensor(2, 10, 3, 6),
    rejected_lengths=tensor(4, 3, 5, 9),
    ref_chosen=tensor(-5, -14, -11, -24),
    ref_rejected=tensor(-10, -13, -6, -25),
    chosen_certainty=tensor(-1.5, -2.5, -2.75, -4),
    rejected_certainty=tensor(-2.5, -3, -1.5, -2.25),
)


def loss_of(name, logps, margin, *, margin_scale="beta", known=None, **changed):
    """What the trainer computes, with PARAMETERS and, where there is one, a statistic of 1.5."""
    spec = OBJECTIVES[name]
    if known is None:
        known = {spec.statistic: tensor(1.5)[0]} if spec.statistic else {}
    given = {**PARAMETERS[name], "margin_scale": margin_scale, **changed}
    return loss_function(name, given)(logps, margin, **known)


def rows(logps):
    """Each pair by itself."""
    for i in range(len(logps.chosen)):
        yield PairLogps(*(getattr(logps, field)[i : i + 1] for field in logps.__dataclass_fields__))


def log1pexp(value):
    """−log σ(−value)."""
    return math.log(1 + math.exp(value))


# By hand, one pair at a time.


def check(output, loss, chosen_reward, rejected_reward):
    assert output.losses.shape == (1,)
    assert output.losses.item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert output.chosen_rewards.item() == pytest.approx(chosen_reward, rel=1e-12)
    assert output.rejected_rewards.item() == pytest.approx(rejected_reward, rel=1e-12)
    assert not output.chosen_rewards.requires_grad


def test_gapo_loss_by_hand():
    # β = 2: rewards -2 and -6, Δr = 4; margin 1.5 → 3 reward units; loss = -log σ(1)
    out = gapo_loss(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([1.5]), beta=2.0)
    assert out.losses.item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (-2.0, -6.0)


def test_gapo_by_hand():
    # β = 2: rewards 2·-4/2 = -4 and 2·-12/4 = -6; margin 0.25 → 0.5; loss = -log σ(2 - 0.5)
    check(loss_of("gapo", ONE, tensor(0.25)), log1pexp(-1.5), -4, -6)


def test_simpo_by_hand():
    # as above with γ = 0.5 → 1 reward unit: loss = -log σ(2 - 1)
    check(loss_of("simpo", ONE, tensor(0.5)), log1pexp(-1), -4, -6)


def test_dpo_by_hand():
    # β = 0.5: rewards 0.5·1 and 0.5·-2, Δr = 1.5; margin 1 → 0.5; loss = -log σ(1)
    check(loss_of("dpo", ONE, tensor(1)), log1pexp(-1), 0.5, -1)


def test_ipo_by_hand():
    # ρ per token 1/2 and -2/4, difference 1; 1/(2·0.25) = 2; loss = (1 - 2)²
    check(loss_of("ipo", ONE, tensor(9)), 1, 0.125, -0.125)


def test_kto_by_hand():
    # z = 1: chosen 1 - σ(0.5·(1 - 1)) = 1/2; rejected 1 - σ(0.5·(1 + 2)) = σ(-1.5)
    loss = 2 * 0.5 + 3 / (1 + math.exp(1.5))
    check(loss_of("kto", ONE, tensor(9), known={"kl": tensor(1)[0]}), loss, 0.5, -1)
    # a negative estimate counts as z = 0: 1 - σ(0.5) and 1 - σ(1)
    loss = 2 / (1 + math.exp(0.5)) + 3 / (1 + math.exp(1))
    check(loss_of("kto", ONE, tensor(9), known={"kl": tensor(-7)[0]}), loss, 0.5, -1)


def test_cpo_by_hand():
    # β = 0.25: rewards -1 and -3; margin 1 → 0.25; loss = -log σ(2 - 0.25) + 3·NLL, NLL = 4/2
    check(loss_of("cpo", ONE, tensor(1)), log1pexp(-1.75) + 6, -1, -3)


def test_orpo_by_hand():
    # a token's probability 1/2 and 1/4: odds 1 and 1/3, σ(log 3) = 3/4; NLL = log 2
    sums = tensor(2 * math.log(1 / 2)), tensor(4 * math.log(1 / 4))
    pair = PairLogps(*sums, tensor(2), tensor(4))
    loss = math.log(2) + 2 * math.log(4 / 3)
    check(loss_of("orpo", pair, tensor(9)), loss, 2 * math.log(1 / 2), 2 * math.log(1 / 4))


def test_rdpo_by_hand():
    # Δr = 1.5 as for DPO; 0.25·(2 - 4) = -0.5; margin 1 → 0.5; loss = -log σ(0.5)
    check(loss_of("rdpo", ONE, tensor(1)), log1pexp(-0.5), 0.5, -1)


def test_slic_by_hand():
    # δ 9 + margin 1 - (-4 + 12) = 2; 0.5·NLL = 1
    check(loss_of("slic", ONE, tensor(1), delta=9.0), 3, -4, -12)
    # δ = 2: the hinge is passed
    check(loss_of("slic", ONE, tensor(1)), 1, -4, -12)


def test_rrhf_by_hand():
    # a = -2 and -3 are in order: only 0.5·NLL = 1; the other way round 1 + 0.5·3
    check(loss_of("rrhf", ONE, tensor(9)), 1, -2, -3)
    other = PairLogps(ONE.rejected, ONE.chosen, ONE.rejected_lengths, ONE.chosen_lengths)
    check(loss_of("rrhf", other, tensor(9)), 2.5, -3, -2)


def test_dpop_by_hand():
    # ρ_w = 1 has not fallen: as DPO, -log σ(1.5 - 0.5)
    check(loss_of("dpop", ONE, tensor(1)), log1pexp(-1), 0.5, -1)
    # ρ_w = -3: rewards 0.5·(-3 - 2·3) = -4.5 and -1; -log σ(-3.5 - 0.5)
    fallen = replace(ONE, ref_chosen=tensor(-1))
    check(loss_of("dpop", fallen, tensor(1)), log1pexp(4), -4.5, -1)


def test_beta_dpo_by_hand():
    # β_t = 0.5·(1 + 0.5·2) = 1; ρ_w - ρ_l = 3; margin 1·β_t; -log σ(2); rewards are with β = 0.5
    out = loss_of("beta_dpo", ONE, tensor(1), known={"surplus": tensor(2)[0]})
    check(out, log1pexp(-2), 0.5, -1)
    # β_t = 0.5·(1 - 0.5·10) < 0 becomes 0.001: -log σ(0.001·3 - 0.001·1)
    out = loss_of("beta_dpo", ONE, tensor(1), known={"surplus": tensor(-10)[0]})
    check(out, log1pexp(-0.002), 0.5, -1)


def test_wpo_by_hand():
    # weights e^(-2 + 1.5) and e^(-3 + 2.5); DPO's loss -log σ(1.5 - 0.5)
    check(loss_of("wpo", ONE, tensor(1)), math.exp(-1) * log1pexp(-1), 0.5, -1)


def test_rso_by_hand():
    # 1 + margin 2·0.5 - 1.5 = 0.5; without a margin the hinge is passed
    check(loss_of("rso", ONE, tensor(2)), 0.5, 0.5, -1)
    check(loss_of("rso", ONE, tensor(0)), 0, 0.5, -1)


# Against the papers' formulas, in plain Python.


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def naive_simpo(w, l):
    # arXiv 2405.14734, eq. 6 with γ = 0
    return -math.log(sigmoid(2.0 / w["n"] * w["lp"] - 2.0 / l["n"] * l["lp"]))


def naive_dpo(w, l):
    # arXiv 2305.18290, eq. 7
    return -math.log(sigmoid(0.5 * (w["lp"] - w["ref"]) - 0.5 * (l["lp"] - l["ref"])))


def naive_ipo(w, l):
    # arXiv 2310.12036, eq. 17, τ = 0.25, with averages
    h = (w["lp"] - w["ref"]) / w["n"] - (l["lp"] - l["ref"]) / l["n"]
    return (h - 1 / (2 * 0.25)) ** 2


def naive_kto(w, l):
    # arXiv 2402.01306: λ_y - v(x, y), z₀ = 1.5
    value_w = 2.0 * sigmoid(0.5 * (w["lp"] - w["ref"] - 1.5))
    value_l = 3.0 * sigmoid(0.5 * (1.5 - (l["lp"] - l["ref"])))
    return (2.0 - value_w) + (3.0 - value_l)


def naive_cpo(w, l):
    # arXiv 2401.08417, eqs. 4 and 5
    prefer = -math.log(sigmoid(0.25 * w["lp"] - 0.25 * l["lp"]))
    return prefer + 3.0 * -w["lp"] / w["n"]


def naive_orpo(w, l):
    # arXiv 2403.07691, eqs. 3 to 7: P is the geometric mean of the tokens' probabilities
    p_w, p_l = math.exp(w["lp"] / w["n"]), math.exp(l["lp"] / l["n"])
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return -w["lp"] / w["n"] - 2.0 * math.log(sigmoid(math.log(odds_ratio)))


def naive_rdpo(w, l):
    # arXiv 2403.19159: β log-ratios and α|y_w| - α|y_l|
    ratios = 0.5 * (w["lp"] - w["ref"]) - 0.5 * (l["lp"] - l["ref"])
    return -math.log(sigmoid(ratios + (0.25 * w["n"] - 0.25 * l["n"])))


def naive_slic(w, l):
    # arXiv 2305.10425, eq. 3, δ = 2; the second term as NLL per token
    return max(0.0, 2.0 - w["lp"] + l["lp"]) - 0.5 * w["lp"] / w["n"]


def naive_rrhf(w, l):
    # arXiv 2304.05302: p_i (eq. 1), L_rank over all r_i < r_j (eq. 2), and the fine-tuning term
    p, r = [w["lp"] / w["n"], l["lp"] / l["n"]], [1, 0]
    rank = 0.0
    for i, j in itertools.product(range(2), repeat=2):
        if r[i] < r[j]:
            rank += max(0.0, p[i] - p[j])
    return rank + 0.5 * -p[0]


def naive_dpop(w, l):
    # arXiv 2402.13228, eq. 3: the last term is max(0, log π_ref(y_w)/π(y_w))
    inner = (w["lp"] - w["ref"]) - (l["lp"] - l["ref"]) - 2.0 * max(0.0, w["ref"] - w["lp"])
    return -math.log(sigmoid(0.5 * inner))


def naive_beta_dpo(w, l):
    # arXiv 2407.08639: β = [1 + α(mean(M) - M₀)]β₀, mean(M) - M₀ = 1.5
    beta = (1 + 0.5 * 1.5) * 0.5
    return -math.log(sigmoid(beta * (w["lp"] - w["ref"]) - beta * (l["lp"] - l["ref"])))


def naive_wpo(w, l):
    # arXiv 2406.11827, eqs. 2 and 4; log Σ_v p(v)² is averaged over the tokens, as log p is
    weight_w = math.exp(w["lp"] / w["n"] - w["certainty"])
    weight_l = math.exp(l["lp"] / l["n"] - l["certainty"])
    return weight_w * weight_l * naive_dpo(w, l)


def naive_rso(w, l):
    # arXiv 2309.06657, eq. 10: γ = 0.5
    return max(0.0, 1 - 0.5 * ((w["lp"] - w["ref"]) - (l["lp"] - l["ref"])))


NAIVE = {
    "gapo": naive_simpo,
    **{
        name.removeprefix("naive_"): function
        for name, function in list(globals().items())
        if name.startswith("naive_")
    },
}


def naive_losses(name, logps):
    losses = []
    for pair in rows(logps):
        w, l = (
            {
                "lp": getattr(pair, side).item(),
                "n": getattr(pair, f"{side}_lengths").item(),
                "ref": getattr(pair, f"ref_{side}").item(),
                "certainty": getattr(pair, f"{side}_certainty").item(),
            }
            for side in ("chosen", "rejected")
        )
        losses.append(NAIVE[name](w, l))
    return tensor(*losses)


def test_every_objective_has_its_tests():
    assert set(NAIVE) == set(PARAMETERS) == set(OBJECTIVES)
    assert len(OBJECTIVES) == 14
    assert all(f"test_{name}_by_hand" in globals() for name in OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_a_margin_it_is_the_formula_of_its_paper(name):
    ours = loss_of(name, FOUR, torch.zeros(4, dtype=torch.float64)).losses
    torch.testing.assert_close(ours, naive_losses(name, FOUR), rtol=1e-12, atol=1e-12)


def test_rrhf_sums_its_fine_tuning_term_in_the_paper_so_lambda_is_per_token_here():
    # eq. 3 is L_ft = -Σ_t log P(y_t), eq. 4 is L_rank + L_ft: here λ = |y_w| = 2
    rank, fine_tuning = 0.0, 4.0
    ours = loss_of("rrhf", ONE, tensor(0), nll_weight=2.0)
    assert ours.losses.item() == pytest.approx(rank + fine_tuning)


# With margins.


@pytest.mark.parametrize("scale", ["beta", "one"])
@pytest.mark.parametrize("name", TAKES_MARGIN)
def test_equal_margins_a_pair_equal_a_constant_margin(name, scale):
    constant = loss_of(name, FOUR, tensor(0.7)[0], margin_scale=scale).losses
    each = loss_of(name, FOUR, tensor(0.7, 0.7, 0.7, 0.7), margin_scale=scale).losses
    assert constant.shape == (4,)
    torch.testing.assert_close(each, constant, rtol=0, atol=0)


@pytest.mark.parametrize("name", TAKES_MARGIN)
def test_a_pair_has_its_own_margin_and_nobody_elses(name):
    margins = tensor(0.1, 2.0, 0.0, -0.6)
    together = loss_of(name, FOUR, margins).losses
    alone = [loss_of(name, p, m[None]).losses for p, m in zip(rows(FOUR), margins, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)
    assert not torch.equal(together, loss_of(name, FOUR, margins.flip(0)).losses)


@pytest.mark.parametrize("scale", ["beta", "one"])
@pytest.mark.parametrize("name", TAKES_MARGIN)
def test_a_larger_margin_never_lowers_the_loss(name, scale):
    steps = [-20.0, -2.0, -0.5, 0.0, 0.3, 1.0, 5.0, 40.0]
    losses = torch.stack(
        [
            loss_of(name, FOUR, torch.full((4,), m).double(), margin_scale=scale).losses
            for m in steps
        ]
    )
    assert (losses.diff(dim=0) >= 0).all()
    assert (losses[-1] > losses[0]).all()


@pytest.mark.parametrize("name", HAS_MARGIN_SCALE)
def test_margin_scale_beta_multiplies_the_margin_by_beta(name):
    margins = tensor(0.1, 2.0, 0.0, -0.6)
    beta = PARAMETERS[name]["beta"]
    if name == "beta_dpo":
        beta *= 1 + 0.5 * 1.5  # the β of the step
    by_beta = loss_of(name, FOUR, margins, margin_scale="beta").losses
    as_given = loss_of(name, FOUR, beta * margins, margin_scale="one").losses
    torch.testing.assert_close(by_beta, as_given, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(by_beta, loss_of(name, FOUR, margins, margin_scale="one").losses)
    with pytest.raises(ConfigError, match="margin_scale"):
        loss_of(name, FOUR, margins, margin_scale="two")


def test_a_margin_of_slic_is_added_to_delta():
    with_margin = loss_of("slic", FOUR, torch.full((4,), 0.7).double()).losses
    with_delta = loss_of("slic", FOUR, torch.zeros(4).double(), delta=2.0 + 0.7).losses
    torch.testing.assert_close(with_margin, with_delta, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", TAKES_MARGIN)
def test_the_margin_is_no_part_of_the_rewards(name):
    small, large = (loss_of(name, FOUR, torch.full((4,), m).double()) for m in (0.0, 3.0))
    torch.testing.assert_close(small.chosen_rewards, large.chosen_rewards, rtol=0, atol=0)
    torch.testing.assert_close(small.rejected_rewards, large.rejected_rewards, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in TAKES_MARGIN])
def test_a_margin_has_no_effect_where_none_is_taken(name):
    with_margin = loss_of(name, FOUR, tensor(1, 2, 3, 4)).losses
    torch.testing.assert_close(with_margin, loss_of(name, FOUR, tensor(0)).losses, rtol=0, atol=0)


def test_margin_scale_one_is_equation_9_to_the_letter():
    # Δr = 4 as above; margin 1.5 reward units; loss = -log σ(2.5)
    out = gapo_loss(
        torch.tensor([-1.0]),
        torch.tensor([-3.0]),
        torch.tensor([1.5]),
        beta=2.0,
        margin_scale="one",
    )
    assert out.losses.item() == pytest.approx(math.log(1 + math.exp(-2.5)))
    with pytest.raises(ConfigError, match="margin_scale"):
        gapo_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), margin_scale="two")


def test_gapo_equals_simpo_when_every_gap_is_equal():
    values = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 2
    results = []
    for name, margin in (
        ("gapo", torch.full((8,), 0.3, dtype=torch.float64)),
        ("simpo", torch.full((8,), 0.3, dtype=torch.float64)),
    ):
        leaf = values.clone().requires_grad_()
        pair = PairLogps(leaf[0] * 5, leaf[1] * 3, torch.full((8,), 5), torch.full((8,), 3))
        losses = OBJECTIVES[name].fn(pair, margin, beta=10.0, margin_scale="beta").losses
        (grad,) = torch.autograd.grad(losses.mean(), leaf)
        results.append((losses.detach(), grad))
    naive = -logsigmoid(10.0 * values[0] - 10.0 * values[1] - 10.0 * 0.3)  # SimPO written out
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0][0], naive, rtol=0, atol=1e-6)


def test_equation_6_equals_equation_7():
    # eq. 7 hides the margin in the rejected reward's denominator EF^|y_l|
    gen = torch.Generator().manual_seed(1)
    sums = -torch.rand(2, 16, generator=gen, dtype=torch.float64) * 50
    lengths = torch.randint(1, 40, (2, 16), generator=gen).double()
    ef = torch.rand(16, generator=gen, dtype=torch.float64) * 0.9 + 0.05
    beta = 10.0
    pair = PairLogps(sums[0], sums[1], lengths[0], lengths[1])
    ours = gapo_loss(pair.chosen_avg, pair.rejected_avg, -ef.log(), beta=beta).losses
    denominator = ef ** lengths[1]
    equation_7 = -logsigmoid(
        beta / lengths[0] * sums[0] - beta / lengths[1] * (sums[1].exp() / denominator).log()
    )
    torch.testing.assert_close(ours, equation_7, rtol=1e-9, atol=1e-9)


# Gradients.


@pytest.mark.parametrize("scale", ["beta", "one"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_equal_finite_differences(name, scale):
    weights = {"chosen": tensor(-0.5, 0.2, -1, 0), "rejected": tensor(0.1, -0.3, 0, -0.7)}

    def losses(chosen, rejected):
        logps = replace(
            FOUR,
            chosen=chosen,
            rejected=rejected,
            # WPO's weights are constants, so they must not move with the sums here either.
            chosen_certainty=(chosen / FOUR.chosen_lengths).detach() - weights["chosen"],
            rejected_certainty=(rejected / FOUR.rejected_lengths).detach() - weights["rejected"],
        )
        return loss_of(name, logps, tensor(0.1, 0.9, 0.0, -0.6), margin_scale=scale).losses

    leaves = FOUR.chosen.clone().requires_grad_(), FOUR.rejected.clone().requires_grad_()
    assert torch.autograd.gradcheck(losses, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_the_policys_own_sums_get_a_gradient(name):
    chosen, rejected = FOUR.chosen.clone().requires_grad_(), FOUR.rejected.clone().requires_grad_()
    margin = tensor(0.1, 0.9, 0.0, -0.6).requires_grad_()
    statistic = tensor(1.5).requires_grad_()
    certainties = tuple(
        value.clone().requires_grad_() for value in (FOUR.chosen_certainty, FOUR.rejected_certainty)
    )
    logps = replace(
        FOUR,
        chosen=chosen,
        rejected=rejected,
        chosen_certainty=certainties[0],
        rejected_certainty=certainties[1],
    )
    spec = OBJECTIVES[name]
    output = loss_of(
        name, logps, margin, known={spec.statistic: statistic[0]} if spec.statistic else {}
    )
    output.losses.sum().backward()
    assert all(leaf.grad is None for leaf in (margin, statistic, *certainties))
    assert chosen.grad is not None
    assert chosen.grad.abs().max() > 0.01
    assert not output.chosen_rewards.requires_grad
    assert not output.rejected_rewards.requires_grad


@pytest.mark.parametrize(("name", "key"), [("kto", "kl"), ("beta_dpo", "surplus")])
def test_a_statistic_made_of_the_same_sums_is_still_a_constant(name, key):
    gradients = []
    for attached in (True, False):
        leaf = FOUR.chosen.clone().requires_grad_()
        logps = replace(FOUR, chosen=leaf)
        statistic = (logps.chosen_ratio - logps.rejected_ratio).mean() + 5  # positive: 1.625
        known = {key: statistic if attached else statistic.detach()}
        losses = loss_of(name, logps, tensor(0), known=known).losses
        gradients += torch.autograd.grad(losses.sum(), leaf)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert statistic > 0


def test_the_weights_of_wpo_are_constants():
    leaf = FOUR.chosen.clone().requires_grad_()
    logps = replace(FOUR, chosen=leaf)
    (ours,) = torch.autograd.grad(loss_of("wpo", logps, tensor(0)).losses.sum(), leaf)
    (dpo,) = torch.autograd.grad(loss_of("dpo", logps, tensor(0)).losses.sum(), leaf)
    weights = FOUR.chosen_avg + FOUR.rejected_avg
    weights = (weights - FOUR.chosen_certainty - FOUR.rejected_certainty).exp()
    torch.testing.assert_close(ours, weights * dpo, rtol=1e-12, atol=1e-12)


def test_objectives_divide_by_the_scored_tokens():
    # sums -4 over 2 tokens and -12 over 4 tokens: averages -2 and -3; β = 1: Δr = 1, margin 0.25
    pair = PairLogps(
        torch.tensor([-4.0]), torch.tensor([-12.0]), torch.tensor([2]), torch.tensor([4])
    )
    out = OBJECTIVES["gapo"].fn(pair, torch.tensor([0.25]), beta=1.0, margin_scale="beta")
    assert out.losses.item() == pytest.approx(math.log(1 + math.exp(-0.75)))


# Extremes.


def test_extreme_rewards_stay_finite():
    out = gapo_loss(
        torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]), torch.tensor([0.3, 0.3]), beta=100.0
    )
    assert torch.isfinite(out.losses).all()
    assert out.losses[0] == 0.0


@pytest.mark.parametrize("parameters", ["defaults", "strong"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_values_stay_finite_in_loss_and_gradient(name, parameters):
    # every combination of a certain and a hopeless response, of one token and of many, under the
    # policy and under the reference; equal pairs are among them
    sums, lengths = (0.0, -1e-9, -1e4), (1, 1000)
    cases = list(itertools.product(sums, sums, lengths, lengths, sums, sums))
    columns = torch.tensor(cases, dtype=torch.float32).T.contiguous()
    leaves = columns[0].clone().requires_grad_(), columns[1].clone().requires_grad_()
    logps = PairLogps(
        *leaves,
        columns[2].long(),
        columns[3].long(),
        columns[4],
        columns[5],
        chosen_certainty=torch.zeros(len(cases)),
        rejected_certainty=torch.full((len(cases),), -math.log(128256)),
    )
    spec = OBJECTIVES[name]
    given = dict(spec.parameters)
    if parameters == "strong":
        given |= {key: 100.0 for key in given if key in ("beta", "odds_weight", "fall_weight")}
    for statistic in (-1e4, 0.0, 1e4):
        known = {spec.statistic: torch.tensor(statistic)} if spec.statistic else {}
        output = loss_function(name, given)(logps, torch.full((len(cases),), 0.3), **known)
        gradients = torch.autograd.grad(output.losses.mean(), leaves)
        for values in (*gradients, output.losses, output.chosen_rewards, output.rejected_rewards):
            assert torch.isfinite(values).all()


# What belongs to which objective.


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_function_passes_an_objective_exactly_its_own_parameters(name):
    spec = OBJECTIVES[name]
    everything = {key: object() for other in OBJECTIVES.values() for key in other.parameters}
    function = loss_function(name, {**everything, "reference": "cached", "name": name})
    own = set(spec.parameters) - set(NOT_IN_LOSS)
    assert function.func is spec.fn
    assert function.keywords == {key: everything[key] for key in own}
    wanted = {
        key
        for key, parameter in inspect.signature(spec.fn).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert wanted == own | ({spec.statistic} if spec.statistic else set())


def test_parameters_are_keys_of_the_configuration_and_all_of_its_keys_are_parameters():
    used = {key for spec in OBJECTIVES.values() for key in spec.parameters}
    assert used == set(ObjectiveConfig.model_fields) - {"name", "reference"}
    names = ObjectiveConfig.model_fields["name"].annotation.__args__
    assert set(names) == set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_defaults_of_an_objective_are_what_the_configuration_fills_in(name):
    config = ObjectiveConfig(name=name)
    spec = OBJECTIVES[name]
    filled = {key: value for key, value in config.model_dump().items() if value is not None}
    reference = {"reference": "cached"} if spec.uses_reference else {}
    assert filled == {"name": name, **spec.parameters, **reference}


def test_neither_the_objectives_nor_the_configuration_import_torch():
    code = "import gapo_lite.objectives, gapo_lite.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


# The certainties that WPO wants.


@pytest.fixture(scope="module")
def policy(tiny_model):
    model = add_adapter(
        load_base(str(tiny_model), quantization="none", dtype=torch.float32), rank=4
    )
    randomize_adapter(model, 0.1)
    assert why_not_packed(model) == ""
    return model


@pytest.fixture(scope="module")
def tokenized():
    gen = np.random.default_rng(0)
    return [
        TokenizedPair(
            *(gen.integers(0, 49152, size).astype(np.int32) for size in sizes), margin=0.0
        )
        for sizes in ((5, 7, 3), (1, 1, 9), (8, 4, 4))
    ]


def batch_of(pairs, layout):
    return pack(pairs) if layout == "packed" else pad(pairs, pad_id=0)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_certainties_equal_those_of_the_full_logits(policy, tokenized, layout, monkeypatch):
    monkeypatch.setattr(logps_module, "TILE_ROWS", 5)
    naive = {"chosen": [], "rejected": []}
    with torch.no_grad():
        ours = forward_logps(policy, batch_of(tokenized, layout), certainty=True)
        for side, values in naive.items():
            for pair in tokenized:
                ids = np.concatenate((pair.prompt_ids, getattr(pair, f"{side}_ids")))
                logits = causal_model(policy)(torch.from_numpy(ids).long()[None]).logits[0]
                p = logits[len(pair.prompt_ids) - 1 : -1].softmax(-1)
                values.append((p**2).sum(-1).log().mean())
    for side, values in naive.items():
        certainty = getattr(ours, f"{side}_certainty")
        assert certainty.dtype == torch.float32
        torch.testing.assert_close(certainty, torch.stack(values), rtol=1e-5, atol=1e-5)
        # somewhere between even odds over the vocabulary and one token for sure
        assert ((certainty > -math.log(49152)) & (certainty < 0)).all()


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_certainties_change_neither_logps_nor_gradients(policy, tokenized, layout, monkeypatch):
    monkeypatch.setattr(logps_module, "TILE_ROWS", 5)
    results = []
    for certainty in (True, False):
        batch = replace(batch_of(tokenized, layout), reference=torch.arange(6.0))
        logps = forward_logps(policy, batch, certainty=certainty)
        policy.zero_grad()
        (logps.chosen.sum() - 2 * logps.rejected.sum()).backward()
        gradients = [p.grad.clone() for p in policy.parameters() if p.requires_grad]
        results.append((logps.chosen.detach(), logps.rejected.detach(), *gradients))
        assert not logps.ref_chosen.requires_grad
        assert logps.ref_rejected.tolist() == [3, 4, 5]
        if certainty:
            assert not logps.chosen_certainty.requires_grad
            assert not logps.rejected_certainty.requires_grad
        else:
            assert logps.chosen_certainty is logps.rejected_certainty is None
    assert max(grad.abs().max() for grad in results[0][2:]) > 0.01
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
