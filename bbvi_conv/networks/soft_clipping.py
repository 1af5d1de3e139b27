"""Generalized soft-clipping: a smooth map of the line into an interval, with known slope and curvature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

EXACT = 40.0
"""From here on softplus(x) is x to the last bit of float64; torch's own threshold of 20 is out by 2e-9."""


def soft_clip(x: Tensor, low: float, high: float, sharpness: float = 1.0) -> Tensor:
    r"""Clip smoothly to [s1, s2].

    .. math:: f(x) = \frac1s \log \frac{1 + e^{s(x-s_1)}}{1 + e^{s(x-s_2)}} + s_1

    Below the midpoint it is a difference of softplus functions added to s1, above it the mirrored difference taken from
    s2, each with its own distances to the bounds: nothing cancels, and float32 does not leave the interval.

    Args:
        x: any shape.
        low: s1.
        high: s2.
        sharpness: s; as it grows, f tends to ``clamp``.

    Raises:
        ValueError: if ``low`` is not below ``high``, either is not finite, or ``sharpness`` is not positive and finite.

    Reference: Surendran et al. (2025), generalized soft-clipping; Klimek and Perelstein (2020),
    https://arxiv.org/abs/1810.11509
    """
    _check(low, high, sharpness)
    below = x <= 0.5 * (low + high)
    near, far = torch.where(below, x - low, high - x), torch.where(below, x - high, low - x)
    rise = (softplus(sharpness * near, 1.0, EXACT) - softplus(sharpness * far, 1.0, EXACT)) / sharpness
    return torch.where(below, low + rise, high - rise)


def _check(low: float, high: float, sharpness: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"soft clipping needs finite bounds with low < high, got low={low}, high={high}")
    if not (sharpness > 0 and math.isfinite(sharpness)):
        raise ValueError(f"sharpness must be positive and finite, got {sharpness}")


class SoftClipping(nn.Module):
    """:func:`soft_clip` as a layer without parameters, with the constants that convergence theorems ask for.

    Args:
        low: s1.
        high: s2.
        sharpness: s.

    Raises:
        ValueError: as :func:`soft_clip`.

    Example:
        >>> SoftClipping(-1.0, 1.0, sharpness=2.0).curvature
        0.5
    """

    def __init__(self, low: float, high: float, sharpness: float = 1.0) -> None:
        super().__init__()
        _check(low, high, sharpness)
        self.low, self.high, self.sharpness = low, high, sharpness

    @property
    def slope(self) -> float:
        r"""Largest slope, :math:`\tanh(s (s_2 - s_1) / 4) < 1`, taken at the midpoint."""
        return math.tanh(self.sharpness * (self.high - self.low) / 4)

    @property
    def curvature(self) -> float:
        r"""Bound on :math:`|f''|`, :math:`s / 4`."""
        return self.sharpness / 4

    def forward(self, x: Tensor) -> Tensor:
        """Clip smoothly, any shape."""
        return soft_clip(x, self.low, self.high, self.sharpness)

    def extra_repr(self) -> str:
        """What torch prints of the layer."""
        return f"low={self.low:g}, high={self.high:g}, sharpness={self.sharpness:g}"
