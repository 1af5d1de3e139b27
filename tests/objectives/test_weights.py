"""Dust: draws whose weight no sum can see weigh exactly nothing, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bbvi_conv.objectives.weights import DUST, renyi, tempered, without_dust

LOG_W: dict[str, Callable[[], Tensor]] = {
    "wide": lambda: torch.linspace(-400, 400, 60, dtype=torch.float64).reshape(20, 3),
    "wide and shuffled": lambda: 400 * (2 * torch.rand(50, 7, generator=torch.Generator().manual_seed(0)).double() - 1),
    "around the edge": lambda: torch.tensor([[0.0, -DUST + 1, -DUST - 1]], dtype=torch.float64).mT.expand(3, 2).clone(),
    "one draw": lambda: torch.tensor([[-400.0, 0.0, 400.0]], dtype=torch.float64),
    "all equal": lambda: torch.full((8, 3), -712.5, dtype=torch.float64),
    "one impossible draw": lambda: torch.tensor([[0.3], [-math.inf], [0.1]], dtype=torch.float64),
}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", LOG_W)
def test_bounds_weights_and_gradients_are_those_of_the_formula(name: str, alpha: float) -> None:
    log_w = LOG_W[name]().requires_grad_()
    count = len(log_w)
    bound = renyi(log_w, alpha)
    expected = (torch.logsumexp((1 - alpha) * log_w, 0) - math.log(count)) / (1 - alpha)
    lost = count * math.exp(-DUST) / (1 - alpha)
    torch.testing.assert_close(bound, expected, rtol=1e-15, atol=lost + 1e-15)
    v, right = tempered(log_w, alpha), torch.softmax((1 - alpha) * log_w, 0)
    torch.testing.assert_close(v, right, rtol=1e-14, atol=lost)
    grads = [torch.autograd.grad(b.sum(), log_w, create_graph=True)[0] for b in (bound, expected)]
    assert torch.isfinite(grads[0]).all()
    torch.testing.assert_close(*grads, rtol=1e-14, atol=lost)
    finite = log_w.isfinite()
    curvature, right = (torch.autograd.grad(g[finite].square().sum(), log_w, retain_graph=True)[0] for g in grads)
    assert torch.isfinite(curvature).all()
    torch.testing.assert_close(curvature, right, rtol=1e-13, atol=lost + 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_weight_is_subnormal(dtype: torch.dtype) -> None:
    """Power: without the cut float32 has such weights, and products with them are what slows a step down."""
    log_w = torch.linspace(-100, 0, 101, dtype=dtype).unsqueeze(1)
    smallest = torch.finfo(dtype).tiny

    def subnormal(x: Tensor) -> bool:
        return bool(((x > 0) & (x < smallest)).any())

    v = tempered(log_w, 0.0)
    assert not subnormal(v)
    assert not subnormal(v * v)  # of the doubly reparameterised estimator
    assert int((v == 0).sum()) == 101 - 41
    if dtype == torch.float32:
        assert subnormal(torch.softmax(log_w, 0))


def test_what_is_not_finite_stays_visible() -> None:
    """A run stops at a bound that is not finite; the cut must not heal it."""
    for bad in (math.nan, math.inf):
        log_w = torch.tensor([[0.0], [bad], [-50.0]], dtype=torch.float64)
        assert not torch.isfinite(renyi(log_w, 0.0)).any()
    nothing = torch.full((3, 1), -math.inf)
    assert torch.equal(without_dust(nothing), nothing)
    assert torch.equal(renyi(nothing, 0.0), nothing[0])
