from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from gapo_lite.errors import ConfigError
from gapo_lite.objectives import OBJECTIVES, gapo_loss
from gapo_lite.types import PairLogps


def test_gapo_loss_by_hand():
    # β = 2: rewards -2 and -6, Δr = 4; margin 1.5 → 3 reward units; loss = -log σ(1)
    out = gapo_loss(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([1.5]), beta=2.0)
    assert out.losses.item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (-2.0, -6.0)


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


def test_the_margin_carries_no_gradient():
    margin = torch.tensor([0.3], requires_grad=True)
    chosen = torch.tensor([-1.0], requires_grad=True)
    gapo_loss(chosen, torch.tensor([-2.0]), margin).losses.sum().backward()
    assert margin.grad is None
    assert chosen.grad is not None


def test_gradients_equal_finite_differences():
    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    margin = torch.rand(4, dtype=torch.float64)
    for scale in ("beta", "one"):
        assert torch.autograd.gradcheck(
            lambda w, l, scale=scale: gapo_loss(w, l, margin, beta=2.0, margin_scale=scale).losses,
            inputs,
        )


def test_objectives_divide_by_the_scored_tokens():
    # sums -4 over 2 tokens and -12 over 4 tokens: averages -2 and -3; β = 1: Δr = 1, margin 0.25
    pair = PairLogps(
        torch.tensor([-4.0]), torch.tensor([-12.0]), torch.tensor([2]), torch.tensor([4])
    )
    out = OBJECTIVES["gapo"].fn(pair, torch.tensor([0.25]), beta=1.0, margin_scale="beta")
    assert out.losses.item() == pytest.approx(math.log(1 + math.exp(-0.75)))


def test_extreme_rewards_stay_finite():
    out = gapo_loss(
        torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]), torch.tensor([0.3, 0.3]), beta=100.0
    )
    assert torch.isfinite(out.losses).all()
    assert out.losses[0] == 0.0
