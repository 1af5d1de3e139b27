"""Soft-clipping in float32: never outside the interval, exact values and gradients, slope and curvature bounded."""

from __future__ import annotations

import math

import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor
from torch.func import grad, vmap

from bbvi_conv.networks import SoftClipping, soft_clip
from bbvi_conv.program.aten_graph import to_graph

CASES = [(-1.0, 1.0, 1.0), (-5.0, 5.0, 1.0), (0.1, 2.0, 4.0), (-10.0, 10.0, 0.5), (-3.0, 7.0, 20.0), (0.0, 1e-3, 1.0)]
EXTREME = torch.tensor([3e38, -3e38, math.inf, -math.inf])
EPS = torch.finfo(torch.float32).eps


def grid(low: float, high: float, sharpness: float, size: int = 100_001) -> Tensor:
    """The line to +-1e4, and densely where the function bends, in float32."""
    bend = torch.linspace(low - 40 / sharpness, high + 40 / sharpness, size, dtype=torch.float64)
    return torch.cat([torch.linspace(-1e4, 1e4, size, dtype=torch.float64), bend]).float()


def exact(x: float, low: float, high: float, sharpness: float) -> tuple[float, float]:
    """The formula as written, and its derivative, in 60 digits."""
    with mp.workdps(60):
        s, s1, s2, at = mpf(sharpness), mpf(low), mpf(high), mpf(x)
        up, down = mp.exp(s * (at - s1)), mp.exp(s * (at - s2))
        return float(mp.log((1 + up) / (1 + down)) / s + s1), float(up / (1 + up) - down / (1 + down))


def slopes(x: Tensor, *case: float) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(soft_clip(x, *case).sum(), x)
    return found


@pytest.mark.parametrize("case", CASES)
def test_float32_never_leaves_the_interval(case: tuple[float, float, float]) -> None:
    y = soft_clip(torch.cat([grid(*case), EXTREME]), *case)
    low, high = torch.tensor(case[:2], dtype=torch.float32)
    assert bool(((y >= low) & (y <= high)).all())
    assert y[-4:].tolist() == [float(high), float(low), float(high), float(low)]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_exact(case: tuple[float, float, float]) -> None:
    x = torch.cat([grid(*case, size=1_001), torch.tensor([0.5 * (case[0] + case[1])])])
    value, slope = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*(exact(float(v), *case) for v in x), strict=True)
    )
    assert float((soft_clip(x, *case) - value).abs().max()) < 2e-6
    assert float((slopes(x, *case) - slope).abs().max()) < 10 * EPS
    x64 = x.double()
    torch.testing.assert_close(soft_clip(x64, *case), value, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(slopes(x64, *case), slope, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_slope_and_curvature_stay_under_their_bounds(case: tuple[float, float, float]) -> None:
    layer, x = SoftClipping(*case), grid(*case).double()
    slope = slopes(x, *case)
    curvature = vmap(grad(grad(lambda point: layer(point))))(x)
    assert float(slope.min()) >= 0
    assert 0.999 * layer.slope < float(slope.max()) <= layer.slope * (1 + 1e-12)
    assert float(curvature.abs().max()) <= layer.curvature * (1 + 1e-12)
    assert float(slopes(x.float(), *case).max()) <= layer.slope + 4 * EPS


@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_finite_however_far_out(case: tuple[float, float, float]) -> None:
    x = EXTREME.clone().requires_grad_()
    (first,) = torch.autograd.grad(soft_clip(x, *case).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert first.tolist() == second.tolist() == [0.0] * 4


def test_curvature_bound_is_met_by_a_wide_interval() -> None:
    layer = SoftClipping(-30.0, 30.0, 2.0)
    x = torch.linspace(-32, -28, 4_001, dtype=torch.float64)
    curvature = vmap(grad(grad(lambda point: layer(point))))(x)
    # |sigma''| is largest at the ends: s sigma'(0) = s / 4
    assert float(curvature.abs().max()) == pytest.approx(layer.curvature, rel=1e-6)


def test_layer_is_the_function_in_a_graph_too() -> None:
    layer, x = SoftClipping(-2.0, 3.0, 1.5), torch.linspace(-9, 9, 37, dtype=torch.float64)
    torch.testing.assert_close(to_graph(layer, x)(x), soft_clip(x, -2.0, 3.0, 1.5), rtol=0, atol=0)
    assert repr(layer) == "SoftClipping(low=-2, high=3, sharpness=1.5)"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((1.0, 1.0), "needs finite bounds with low < high, got low=1.0, high=1.0"),
        ((0.0, math.inf), "needs finite bounds with low < high"),
        ((0.0, 1.0, 0.0), "sharpness must be positive and finite, got 0.0"),
        ((0.0, 1.0, math.nan), "sharpness must be positive and finite, got nan"),
    ],
)
def test_bad_arguments(arguments: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SoftClipping(*arguments)
    with pytest.raises(ValueError, match=sentence):
        soft_clip(torch.zeros(1), *arguments)
