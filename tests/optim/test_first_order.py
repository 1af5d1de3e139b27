"""Optimisers equal torch's to rounding; step sizes and averages equal their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bbvi_conv.optim import (
    SGD,
    Adam,
    Constant,
    CosineDecay,
    ExponentialDecay,
    InverseLinear,
    InverseSqrt,
    Optimiser,
    ProximalSGD,
    empty_average,
    include,
)


def gradients(steps: int = 50, size: int = 4) -> Tensor:
    """Noise around a trend, with one coordinate far larger than the others."""
    noise = torch.randn(steps, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise * torch.tensor([1.0, 1e3, 1e-3, 1.0], dtype=torch.float64) + 0.3


def ours(optimiser: Optimiser, grads: Tensor) -> Tensor:
    x = torch.ones(grads.shape[1], dtype=grads.dtype)
    state, path = optimiser.init(x), []
    for n, grad in enumerate(grads, start=1):
        x, state = optimiser.update(grad, state, x, torch.tensor(float(n), dtype=grads.dtype))
        path.append(x)
    return torch.stack(path)


def torchs(
    make: Callable[..., torch.optim.Optimizer],
    size: Callable[[int], float],
    grads: Tensor,
    max_norm: float = math.inf,
    **options: Any,
) -> Tensor:
    x = torch.nn.Parameter(torch.ones(grads.shape[1], dtype=grads.dtype))
    optimiser, path = make([x], lr=1.0, **options), []
    for n, grad in enumerate(grads, start=1):
        optimiser.param_groups[0]["lr"] = size(n)
        x.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_([x], max_norm)
        optimiser.step()
        path.append(x.detach().clone())
    return torch.stack(path)


RULES: list[tuple[Any, Callable[[int], float]]] = [
    (Constant(0.05), lambda n: 0.05),
    (InverseSqrt(0.3), lambda n: 0.3 / math.sqrt(n)),
    (InverseLinear(0.6, 20.0), lambda n: 0.6 / (n + 20)),
    (ExponentialDecay(0.2, 0.5, 10), lambda n: 0.2 * 0.5 ** (n / 10)),
    (CosineDecay(0.2, 30), lambda n: 0.1 * (1 + math.cos(math.pi * min(n, 30) / 30))),
    (CosineDecay(0.2, 30, final=0.1), lambda n: 0.02 + 0.09 * (1 + math.cos(math.pi * min(n, 30) / 30))),
]


@pytest.mark.parametrize(("rule", "formula"), RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99), (0.5, 0.0)])
def test_adam_is_torchs(rule: Any, formula: Callable[[int], float], betas: tuple[float, float]) -> None:
    grads = gradients()
    expected = torchs(torch.optim.Adam, formula, grads, betas=betas, eps=1e-8)
    torch.testing.assert_close(ours(Adam(rule, *betas), grads), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("rule", "formula"), RULES, ids=lambda rule: type(rule).__name__)
def test_sgd_is_torchs(rule: Any, formula: Callable[[int], float]) -> None:
    grads = gradients()
    torch.testing.assert_close(ours(SGD(rule), grads), torchs(torch.optim.SGD, formula, grads), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("make", "torch_makes"), [(SGD, torch.optim.SGD), (Adam, torch.optim.Adam)])
def test_long_gradients_are_cut_as_torch_cuts_them(make: Any, torch_makes: Any) -> None:
    rule, grads = Constant(0.05), gradients()
    lengths = grads.norm(dim=1)
    assert 0.1 < float((lengths > 500).double().mean()) < 0.9  # power: some are, some are not
    expected = torchs(torch_makes, lambda n: 0.05, grads, max_norm=500.0)
    torch.testing.assert_close(ours(make(rule, max_norm=500.0), grads), expected, rtol=1e-7, atol=1e-7)
    assert float((ours(make(rule), grads) - expected).abs().max()) > 1e-3


def test_each_seed_has_its_own_length() -> None:
    grads, one = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.ones(())
    moved, _ = SGD(Constant(1.0), max_norm=1.0).update(grads, (), torch.zeros(2, 2), one)
    torch.testing.assert_close(moved, torch.tensor([[-0.6, -0.8], [-0.3, -0.4]]))


@pytest.mark.parametrize(("rule", "formula"), RULES, ids=lambda rule: type(rule).__name__)
def test_step_sizes(rule: Any, formula: Callable[[int], float]) -> None:
    for n in (1, 2, 7, 30, 1000):
        assert float(rule(torch.tensor(float(n), dtype=torch.float64))) == pytest.approx(
            formula(n), rel=1e-12, abs=1e-15
        )
        assert rule(torch.tensor(float(n))).dtype == torch.float32
    steps = torch.arange(1, 40)  # whole numbers, as one draws a rule by
    assert rule(steps).tolist() == pytest.approx([formula(int(n)) for n in steps], rel=1e-5)


def test_average_is_the_mean_of_what_it_has_seen() -> None:
    xs = gradients(37)
    average = empty_average(xs[0])
    for x in xs:
        average = include(average, x)
    assert float(average.steps) == 37
    torch.testing.assert_close(average.mean, xs.mean(0), rtol=1e-12, atol=0)


def test_updates_are_pure() -> None:
    optimiser, x = Adam(), torch.ones(2)
    state, grad = optimiser.init(x), torch.tensor([1.0, -2.0])
    first = optimiser.update(grad, state, x, torch.tensor(1.0))
    again = optimiser.update(grad, state, x, torch.tensor(1.0))
    assert torch.equal(first[0], again[0])
    assert torch.equal(x, torch.ones(2))
    assert all((part == 0).all() for part in state)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Constant(0.0), "step size must be positive and finite, got 0.0"),
        (lambda: Constant(float("nan")), "step size must be positive and finite"),
        (lambda: InverseSqrt(-1.0), "step size must be positive and finite, got -1.0"),
        (lambda: InverseLinear(0.1, -1.0), "delay must be a finite number of at least 0, got -1.0"),
        (lambda: ExponentialDecay(0.1, 0.0, 10), "decay rate must be positive and finite, got 0.0"),
        (lambda: ExponentialDecay(0.1, 0.5, 0), "decay steps must be positive and finite, got 0"),
        (lambda: CosineDecay(float("inf"), 10), "step size must be positive and finite, got inf"),
        (lambda: CosineDecay(0.1, -3), "decay steps must be positive and finite, got -3"),
        (lambda: CosineDecay(0.1, 10, final=-0.5), r"final must lie in \[0, 1\], got -0.5"),
        (lambda: Adam(beta1=1.0), r"beta1 must lie in \[0, 1\), got 1.0"),
        (lambda: Adam(beta2=-0.1), r"beta2 must lie in \[0, 1\), got -0.1"),
        (lambda: Adam(eps=-1e-8), "eps must be positive and finite"),
        (lambda: Adam(max_norm=0.0), "max_norm must be positive and finite, got 0.0"),
        (lambda: SGD(max_norm=float("inf")), "max_norm must be positive and finite, got inf"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("make", [SGD, Adam, ProximalSGD])
def test_a_number_is_a_constant_step_size(make: Any) -> None:
    assert make(0.1) == make(Constant(0.1))
    assert make(1).step_size == Constant(1.0)
    assert make(torch.tensor(0.5)).step_size == make(np.float32(0.5)).step_size == Constant(0.5)
    for wrong in ("0.1", 0.0, -1.0, True, SGD):
        with pytest.raises(ValueError, match=r"step.size must be"):
            make(wrong)
