"""Scale maps: how an unconstrained number becomes the scale of a location-scale family.

A scale map is a frozen value that knows its constraint; the leaf that carries the constraint is the number itself, so
whoever holds the leaf (an optimiser, a check of assumptions) can see which coordinates are scales, and by which map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to, transform_to
from torch.distributions.transforms import Transform, identity_transform

from bbvi_conv.networks.soft_clipping import SoftClipping as Clip
from bbvi_conv.networks.soft_clipping import soft_clip


class ScaleMap(Protocol):
    """From an unconstrained leaf to a scale."""

    @property
    def constraint(self) -> Any:
        """The constraint that the leaf carries; ``transform_to`` knows its map."""
        ...

    def check(self, scale: float) -> None:
        """Refuse a start outside the range."""
        ...


class LinearScale(constraints.Constraint):  # type: ignore[misc]
    """The leaf is the scale: any real number, whose absolute value is the standard deviation."""

    def check(self, value: Tensor) -> Tensor:
        """Not NaN."""
        return ~torch.isnan(value)


linear_scale = LinearScale()
"""Constraint of the leaves that a linear scale map makes; an optimiser finds the scales by it."""


class SoftClippedScale(constraints.Constraint):  # type: ignore[misc]
    """The open interval (low, high), reached by soft-clipping."""

    def __init__(self, low: float, high: float, sharpness: float) -> None:
        self.low, self.high, self.sharpness = low, high, sharpness
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Inside, or at an end by rounding."""
        return (value >= self.low) & (value <= self.high)


class SoftClipTransform(Transform):
    """Generalized soft-clipping with its inverse."""

    bijective = True
    sign = +1
    domain = constraints.real

    def __init__(self, constraint: SoftClippedScale) -> None:
        super().__init__()
        self._range = constraint

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        """The interval."""
        return self._range

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SoftClipTransform) and vars(self._range) == vars(other._range)

    def _call(self, x: Tensor) -> Tensor:
        return soft_clip(x, self._range.low, self._range.high, self._range.sharpness)

    def _inverse(self, y: Tensor) -> Tensor:
        r""":math:`x = s_1 + (\log(e^{s(y-s_1)} - 1) - \log(1 - e^{s(y-s_2)})) / s`."""
        low, high, s = self._range.low, self._range.high, self._range.sharpness
        rise = s * (y - low)
        return y + ((-torch.expm1(-rise)).log() - (-torch.expm1(s * (y - high))).log()) / s

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r""":math:`\log f'(x)`, from the difference of two sigmoids."""
        low, high, s = self._range.low, self._range.high, self._range.sharpness
        rise, fall = s * (x - low), s * (high - x)
        both = torch.nn.functional.logsigmoid(rise) + torch.nn.functional.logsigmoid(fall)
        return both + math.log(-math.expm1(-s * (high - low)))


for registry in (transform_to, biject_to):
    registry.register(LinearScale, lambda _: identity_transform)  # type: ignore[no-untyped-call]
    registry.register(SoftClippedScale, SoftClipTransform)  # type: ignore[no-untyped-call]


def _positive(scale: float) -> None:
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"init_scale must be positive and finite, got {scale}")


@dataclass(frozen=True)
class Linear:
    r""":math:`\phi(s) = s`: the scale itself is the parameter, as the theorems for convex problems have it.

    Nothing keeps it positive but the optimiser (a projection or a proximal step); at a negative value the standard
    deviation is :math:`|s|` and :math:`\log q` holds :math:`\log |s|`.

    Reference: Domke (2020), https://arxiv.org/abs/1901.08431; Domke et al. (2023), https://arxiv.org/abs/2306.03638
    """

    @property
    def constraint(self) -> LinearScale:
        """The real line, marked as a scale."""
        return linear_scale

    def check(self, scale: float) -> None:
        """Positive at the start."""
        _positive(scale)


@dataclass(frozen=True)
class Exp:
    r""":math:`\phi(s) = e^s`."""

    @property
    def constraint(self) -> Any:
        """Positive, by the exponential."""
        return constraints.positive

    def check(self, scale: float) -> None:
        """Positive."""
        _positive(scale)


@dataclass(frozen=True)
class Softplus:
    r""":math:`\phi(s) = \log(1 + e^s)`: linear where large.

    Reference: Kim et al. (2023), https://arxiv.org/abs/2305.15349
    """

    @property
    def constraint(self) -> Any:
        """Positive, by softplus."""
        return constraints.softplus_positive

    def check(self, scale: float) -> None:
        """Positive."""
        _positive(scale)


@dataclass(frozen=True)
class SoftClip:
    r"""Generalized soft-clipping to :math:`[s_1, s_2]`: bounded above and away from zero, with known slope.

    Args:
        low: s1, positive.
        high: s2.
        sharpness: s.

    Raises:
        ValueError: if not 0 < low < high, or the sharpness is not positive.

    Reference: Surendran et al. (2025)
    """

    low: float = 1e-3
    high: float = 10.0
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        Clip(self.low, self.high, self.sharpness)
        if not self.low > 0:
            raise ValueError(f"a scale needs low above 0, got {self.low}")

    @property
    def constraint(self) -> SoftClippedScale:
        """The interval."""
        return SoftClippedScale(self.low, self.high, self.sharpness)

    def check(self, scale: float) -> None:
        """Strictly inside."""
        _positive(scale)
        if not self.low < scale < self.high:
            raise ValueError(f"init_scale must lie between {self.low:g} and {self.high:g}, got {scale}")


SCALE_MAPS = {"linear": Linear, "exp": Exp, "softplus": Softplus, "soft-clip": SoftClip}
"""Name -> constructor."""
