"""Increasing maps of single coordinates whose parameters a network supplies: affine, and rational-quadratic splines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus


class Elementwise(Protocol):
    """A family of increasing maps of the line; all parameters zero: the identity."""

    @property
    def size(self) -> int:
        """Parameters of one coordinate."""
        ...

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Image of ``x`` ``(..., D)`` under ``parameters`` ``(..., D, size)``, and the log slopes ``(..., D)``."""
        ...

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """What maps to ``y``, and the log slopes of the map there."""
        ...


@dataclass(frozen=True)
class Affine:
    r""":math:`y = e^{a} x + b` with :math:`a = c \tanh(a' / c)`, so that no network can blow up the scale.

    Args:
        limit: c, the largest :math:`|a|`.
    """

    limit: float

    @property
    def size(self) -> int:
        """a' and b."""
        return 2

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = parameters.unbind(-1)
        return self.limit * torch.tanh(raw / self.limit), shift

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift."""
        log_scale, shift = self._parts(parameters)
        return log_scale.exp() * x + shift, log_scale

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale back."""
        log_scale, shift = self._parts(parameters)
        return (y - shift) * (-log_scale).exp(), log_scale


LEAST = 1e-3
"""Least width and height of a bin, relative to the interval, and least slope at a knot."""
UNIT = math.log(math.expm1(1 - LEAST))
"""What softplus maps to a slope of one."""


@dataclass(frozen=True)
class Spline:
    r"""Monotone rational-quadratic spline on :math:`[-B, B]`, the identity outside.

    In the bin :math:`[x_k, x_{k+1}]` of width w and height h, with :math:`\theta = (x - x_k) / w`, mean slope
    :math:`s = h / w` and slopes :math:`d_k` at the knots,

    .. math:: y = y_k + h \frac{s \theta^2 + d_k \theta (1 - \theta)}{s + (d_{k+1} + d_k - 2 s) \theta (1 - \theta)}

    A bin is picked by ``gather`` and what lies outside by ``where``: no shape depends on values, so the spline traces
    and maps over draws.

    Args:
        bins: K.
        bound: B.

    Reference: Durkan et al. (2019), "Neural spline flows", section 3.1, https://arxiv.org/abs/1906.04032
    """

    bins: int = 8
    bound: float = 5.0

    @property
    def size(self) -> int:
        """K widths, K heights, K - 1 inner slopes."""
        return 3 * self.bins - 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Along the spline."""
        inside, within = self._within(x)
        widths, heights, slopes = self._knots(parameters)
        x0, w, y0, h, d0, d1 = self._bin(within, widths, widths, heights, slopes)
        theta, s = (within - x0) / w, h / w
        mixed = theta * (1 - theta)
        below = s + (d0 + d1 - 2 * s) * mixed
        y = y0 + h * (s * theta * theta + d0 * mixed) / below
        return torch.where(inside, y, x), torch.where(inside, self._log_slope(theta, s, d0, d1, below), 0.0)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The root of a quadratic that lies in the bin, in the form that does not cancel."""
        inside, within = self._within(y)
        widths, heights, slopes = self._knots(parameters)
        x0, w, y0, h, d0, d1 = self._bin(within, heights, widths, heights, slopes)
        s, rise = h / w, within - y0
        bend = d0 + d1 - 2 * s
        a, b, c = rise * bend + h * (s - d0), h * d0 - rise * bend, -s * rise
        theta = 2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())
        below = s + bend * theta * (1 - theta)
        return torch.where(inside, x0 + w * theta, y), torch.where(
            inside, self._log_slope(theta, s, d0, d1, below), 0.0
        )

    def _within(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.abs() < self.bound, x.clamp(-self.bound, self.bound)

    @staticmethod
    def _log_slope(theta: Tensor, s: Tensor, d0: Tensor, d1: Tensor, below: Tensor) -> Tensor:
        rest = 1 - theta
        above = d1 * theta * theta + 2 * s * theta * rest + d0 * rest * rest
        return 2 * s.log() + above.log() - 2 * below.log()

    def _knots(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Knots in x and in y and slopes at them, each ``(..., K + 1)``."""
        widths, heights, slopes = parameters.tensor_split((self.bins, 2 * self.bins), -1)
        inner = LEAST + softplus(slopes + UNIT)
        return self._ends(widths), self._ends(heights), pad(inner, (1, 1), value=1.0)

    def _ends(self, raw: Tensor) -> Tensor:
        shares = LEAST + (1 - LEAST * self.bins) * torch.softmax(raw, -1)
        inner = 2 * self.bound * shares.cumsum(-1)[..., :-1] - self.bound
        return pad(pad(inner, (1, 0), value=-self.bound), (0, 1), value=self.bound)

    def _bin(self, x: Tensor, searched: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        """Left knot and width, lower knot and height, and the two slopes of the bin that holds x."""
        left = (x.unsqueeze(-1) >= searched[..., 1:-1]).sum(-1, keepdim=True)
        shape = (*left.shape[:-1], searched.shape[-1])
        tables = [table.expand(shape) for table in (widths, heights, slopes)]
        x0, y0, d0 = (table.gather(-1, left).squeeze(-1) for table in tables)
        x1, y1, d1 = (table.gather(-1, left + 1).squeeze(-1) for table in tables)
        return x0, x1 - x0, y0, y1 - y0, d0, d1
