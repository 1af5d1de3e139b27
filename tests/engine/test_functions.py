"""Elementary functions of float32 numbers in generated code."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bbvi_conv.engine.native import NativeLoop, functions
from bbvi_conv.program.aten_graph import to_graph

ROUNDING = torch.finfo(torch.float32).eps
"""From one float32 number near 1 to the next."""

X = torch.cat([torch.linspace(-30, 30, 200_001), torch.logspace(-30, 2, 10_001), -torch.logspace(-30, 2, 10_001)])


def sigmoid(x: Tensor) -> Tensor:
    """The derivative of softplus."""
    return functions.softplus_backward(torch.ones_like(x), x, 1.0, 20.0)


@pytest.mark.parametrize(
    ("ours", "exact", "roundings"),
    [
        (functions.tanh, torch.tanh, 6),
        (functions.softplus, lambda x: x.clamp(min=0) + torch.log1p((-x.abs()).exp()), 4),
        (sigmoid, torch.sigmoid, 4),
    ],
)
def test_relative_errors_are_a_few_roundings(
    ours: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], roundings: float
) -> None:
    """Of every number, however small; where the result is below the least number, that is all that is lost."""
    expected = exact(X.double())
    error = (ours(X).double() - expected).abs()
    assert (error <= roundings * ROUNDING * expected.abs() + torch.finfo(torch.float32).tiny).all()
    assert not (error <= 0.25 * ROUNDING * expected.abs()).all()  # power: float32 it is


def test_ends() -> None:
    ends = torch.tensor([-math.inf, -0.0, 0.0, math.inf, math.nan])
    torch.testing.assert_close(functions.tanh(ends), torch.tanh(ends), equal_nan=True, rtol=5 * ROUNDING, atol=0)
    torch.testing.assert_close(functions.softplus(ends), functional.softplus(ends), equal_nan=True)
    torch.testing.assert_close(sigmoid(ends), torch.sigmoid(ends), equal_nan=True)
    assert (functions.tanh(X).abs() <= 1).all()
    assert (sigmoid(X) <= 1).all()


@pytest.mark.parametrize("beta", [0.3, 4.0])
def test_sharper_softplus(beta: float) -> None:
    x, grad = torch.randn(1000), torch.randn(1000)
    torch.testing.assert_close(functions.softplus(x, beta), functional.softplus(x, beta, 40.0))
    expected = torch.ops.aten.softplus_backward(grad, x, beta, 40.0)
    torch.testing.assert_close(functions.softplus_backward(grad, x, beta, 40.0), expected)


def test_a_threshold_that_changes_the_function_is_obeyed(generated: Callable[[], str]) -> None:
    def function(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        soft = functional.softplus(x, 1.0, 0.5)
        return soft, torch.ops.aten.softplus_backward(g, x, 1.0, 0.5)

    given = [torch.linspace(-3, 3, 1000), torch.randn(1000)]
    loop = NativeLoop(to_graph(function, *given), given, 0, 2)
    loop.load()
    _, made = loop([], [t[None] for t in given], 1)
    for values, expected in zip(made, function(*given), strict=True):
        torch.testing.assert_close(values[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generated_code_has_them_for_float32(dtype: torch.dtype, generated: Callable[[], str]) -> None:
    """And torch's for float64; both are what torch gives."""

    def function(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return torch.tanh(x), functional.softplus(x), torch.ops.aten.softplus_backward(g, x, 1.0, 20.0)

    given = [torch.randn(1000, dtype=dtype) for _ in range(2)]
    loop = NativeLoop(to_graph(function, *given), given, 0, 2)
    loop.load()
    _, made = loop([], [t[None] for t in given], 1)
    for values, expected in zip(made, function(*given), strict=True):
        torch.testing.assert_close(values[0], expected)
    torchs = dtype is torch.float64
    assert ("tanh(" in generated()) == ("log1p(" in generated()) == torchs
