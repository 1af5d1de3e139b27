"""Step-size rules: frozen values that map the step number to a step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

StepSize = Callable[[Tensor], Tensor]
"""Step number n = 1, 2, ... as a scalar tensor -> step size, a scalar tensor."""


def positive(name: str, value: float) -> None:
    """Refuse what is not positive and finite.

    Raises:
        ValueError: naming the argument.
    """
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def rule(step_size: StepSize | float) -> StepSize:
    """A rule as users give it: a number is a constant step size.

    Raises:
        ValueError: if it is neither a rule nor a positive number.

    Example:
        >>> rule(0.01)
        Constant(size=0.01)
    """
    if isinstance(step_size, Real | Tensor) and not isinstance(step_size, bool):
        return Constant(float(step_size))
    if not callable(step_size) or isinstance(step_size, type):
        raise ValueError(f"step_size must be a rule such as Constant(0.001), or a number, got {step_size!r}")
    return step_size


def number(value: float, like: Tensor) -> Tensor:
    """A scalar tensor beside another one. Compiled code takes such a number as an input, and serves for any other."""
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    return torch.full((), value, dtype=dtype, device=like.device)


@dataclass(frozen=True)
class Constant:
    """The same step size at every step."""

    size: float

    def __post_init__(self) -> None:
        positive("step size", self.size)

    def __call__(self, n: Tensor) -> Tensor:
        """``size``."""
        return number(self.size, n).expand_as(n)


@dataclass(frozen=True)
class InverseSqrt:
    r""":math:`\gamma_n = C n^{-1/2}`, the step size of the convergence theorem for Adam.

    Reference: Surendran et al. (2025), theorem for Adam. Note that it is not square-summable.
    """

    size: float

    def __post_init__(self) -> None:
        positive("step size", self.size)

    def __call__(self, n: Tensor) -> Tensor:
        """``size / sqrt(n)``."""
        return number(self.size, n) * n.rsqrt()


@dataclass(frozen=True)
class InverseLinear:
    r""":math:`\gamma_n = C / (n + n_0)`, for strongly convex objectives: :math:`C > 1/\mu` gives a rate of 1/n.

    Reference: Domke et al. (2023), https://arxiv.org/abs/2306.03638, strongly log-concave targets.
    """

    size: float
    delay: float = 0.0

    def __post_init__(self) -> None:
        positive("step size", self.size)
        if not 0 <= self.delay < math.inf:
            raise ValueError(f"delay must be a finite number of at least 0, got {self.delay}")

    def __call__(self, n: Tensor) -> Tensor:
        """``size / (n + delay)``."""
        return number(self.size, n) / (n + number(self.delay, n))


@dataclass(frozen=True)
class ExponentialDecay:
    r""":math:`\gamma_n = C r^{n/T}`: multiplied by ``rate`` every ``steps`` steps, smoothly."""

    size: float
    rate: float
    steps: int

    def __post_init__(self) -> None:
        positive("step size", self.size)
        positive("decay rate", self.rate)
        positive("decay steps", self.steps)

    def __call__(self, n: Tensor) -> Tensor:
        """``size * rate ** (n / steps)``."""
        return number(self.size, n) * torch.exp(n * number(math.log(self.rate) / self.steps, n))


@dataclass(frozen=True)
class CosineDecay:
    r""":math:`\gamma_n = \tfrac C2 (1 + \cos(\pi \min(n, T)/T))`, with a floor of ``final`` times C."""

    size: float
    steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        positive("step size", self.size)
        positive("decay steps", self.steps)
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must lie in [0, 1], got {self.final}")

    def __call__(self, n: Tensor) -> Tensor:
        """Half a cosine from ``size`` down to ``final * size``."""
        wave = 0.5 * (1 + torch.cos(math.pi * (n / number(self.steps, n)).clamp(max=1.0)))
        return number(self.size, n) * (number(self.final, n) + number(1 - self.final, n) * wave)
