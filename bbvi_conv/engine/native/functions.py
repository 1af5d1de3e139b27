r"""Elementary functions of float32 numbers by fewer operations than torch's vector library takes, for generated code.

Each has a relative error of a few roundings wherever it is not zero. With :math:`e = \exp(-|x|)`, which a function and
its derivative share,

.. math:: \operatorname{softplus} x = \max(x, 0) + \log(1 + e), \qquad
   \sigma(x) = \begin{cases} 1 / (1 + e) & x \ge 0 \\ e / (1 + e) & x < 0, \end{cases}

:math:`\log(1 + e)` is e times a polynomial, and :math:`\tanh x` is x times a ratio of polynomials in :math:`x^2`. Their
coefficients have the least worst relative error that reweighted least squares found: 5 and 6 times :math:`10^{-9}`.

A single number is stored: computed where it is read, it would be computed for every number that depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bbvi_conv.engine.native.layout import settled

EXACT = 15.0
"""From here on softplus(x) is x in float32: a threshold that is no smaller changes nothing."""

FAR = 7.9
"""The hyperbolic tangent from here on differs from 1 by less than five roundings."""

_TANH = (
    (0.9999999943485781, 0.134506200708791, 0.0035789914277002894, 2.2023235142925766e-05, 1.542795866316617e-08),
    (1.0, 0.4678394807091689, 0.026192235677259906, 0.0003423649568869684, 8.598774380576446e-07),
)
_LOG1P = (
    *(0.9999999952859031, -0.4999990241758743, 0.3332996231537993, -0.24954132879829372, 0.19675936347799386),
    *(-0.15305586681619932, 0.10603648375748834, -0.0569594984289542, 0.01985145598091897, -0.0032440261443002485),
)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """By Horner's rule; the coefficient of 1 comes first."""
    *rest, last, top = coefficients
    value = top * x + last
    for coefficient in reversed(rest):
        value = value * x + coefficient
    return value


def _decay(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    z = x if beta == 1 else x * beta
    return z, z.abs().neg().exp()


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    x = x.clamp(-FAR, FAR)
    above, below = (_polynomial(x * x, coefficients) for coefficients in _TANH)
    return x * above / below


def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """``log(1 + exp(beta x)) / beta``."""
    if threshold < EXACT:
        return NotImplemented  # type: ignore[no-any-return]
    z, e = _decay(x, beta)
    value = z.clamp(min=0.0) + e * _polynomial(e, _LOG1P)
    return value if beta == 1 else value / beta


def softplus_backward(grad: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    """``grad`` times the sigmoid of ``beta x``."""
    if threshold < EXACT:
        return NotImplemented  # type: ignore[no-any-return]
    z, e = _decay(x, beta)
    return grad * torch.where(z < 0, e, 1.0) / (1 + e)


def decompositions(others: Mapping[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """These functions by the operations they are to stand for; numbers of other types go to ``others``."""
    aten = torch.ops.aten
    own: dict[Any, Callable[..., Tensor]] = {
        aten.tanh.default: tanh,
        aten.softplus.default: softplus,
        aten.softplus_backward.default: softplus_backward,
    }
    return {operation: partial(_of_float32, function, others.get(operation)) for operation, function in own.items()}


def _of_float32(function: Callable[..., Tensor], other: Callable[..., Any] | None, *args: Any) -> Any:
    value = function(*args) if all(a.dtype is torch.float32 for a in args if isinstance(a, Tensor)) else NotImplemented
    if value is not NotImplemented:
        return settled(value) if value.numel() == 1 else value
    return NotImplemented if other is None else other(*args)
