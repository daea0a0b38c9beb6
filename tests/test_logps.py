from __future__ import annotations

import pytest
import torch

from gapo_lite import logps
from gapo_lite.logps import selected_logps


def naive(rows, weight, target_ids):
    """The equivalent of the module's docstring."""
    return (rows.float() @ weight.float().T).log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]


@pytest.mark.parametrize("tile", [1, 3, 7, 100])
def test_tiles_equal_the_full_logits_in_value_and_gradient(tile, monkeypatch):
    monkeypatch.setattr(logps, "TILE_ROWS", tile)
    gen = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(7, 16, generator=gen), torch.randn(50, 16, generator=gen)
    targets = torch.randint(0, 50, (7,), generator=gen)
    upstream = torch.randn(7, generator=gen)
    results = []
    for function in (selected_logps, naive):
        leaf = rows.clone().requires_grad_()
        values = function(leaf, weight, targets)
        (grad,) = torch.autograd.grad(values, leaf, upstream)
        results.append((values.detach(), grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_bfloat16_rows_stay_within_their_rounding():
    gen = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(40, 64, generator=gen), torch.randn(500, 64, generator=gen) / 8
    targets = torch.randint(0, 500, (40,), generator=gen)
    ours = selected_logps(rows.bfloat16(), weight.bfloat16(), targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, naive(rows, weight, targets), rtol=0.02, atol=0.05)


def test_large_logits_do_not_overflow():
    rows, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    assert selected_logps(rows, weight, torch.tensor([1])).item() == -1000.0


def test_the_head_gets_no_gradient_and_none_is_prepared_without_grad():
    weight = torch.randn(5, 4, requires_grad=True)
    rows = torch.randn(3, 4, requires_grad=True)
    selected_logps(rows, weight, torch.tensor([0, 1, 2])).sum().backward()
    assert weight.grad is None
    with torch.no_grad():
        assert not selected_logps(rows, weight, torch.tensor([0, 1, 2])).requires_grad


def test_the_full_logits_never_exist(monkeypatch):
    monkeypatch.setattr(logps, "TILE_ROWS", 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    rows = torch.randn(64, 4, requires_grad=True)
    weight = torch.randn(1000, 4)
    with Watch():
        selected_logps(rows, weight, torch.zeros(64, dtype=torch.long)).sum().backward()
    assert largest == 8 * 1000
