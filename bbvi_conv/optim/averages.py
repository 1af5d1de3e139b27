"""Averages of the iterates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Average(NamedTuple):
    """Running mean of the iterates of the current window: ``mean`` ``(P,)``, over ``steps`` of them, a scalar."""

    mean: Tensor
    steps: Tensor


def include(average: Average, x: Tensor) -> Average:
    r""":math:`\bar x_k = \bar x_{k-1} + (x - \bar x_{k-1}) / k`."""
    steps = average.steps + 1
    return Average(average.mean + (x - average.mean) / steps, steps)


def empty_average(x: Tensor) -> Average:
    """No iterates yet."""
    return Average(torch.zeros_like(x), torch.zeros((), dtype=x.dtype, device=x.device))
