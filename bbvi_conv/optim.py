"""Optimisers in functional form, step-size rules and iterate averages; all are pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

StepSize = Callable[[Tensor], Tensor]
"""Step number n = 1, 2, ... as a scalar tensor -> step size, a scalar tensor."""


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


@dataclass(frozen=True)
class Constant:
    """The same step size at every step."""

    size: float

    def __post_init__(self) -> None:
        _positive("step size", self.size)

    def __call__(self, n: Tensor) -> Tensor:
        """``size``."""
        return torch.full_like(n, self.size)


@dataclass(frozen=True)
class InverseSqrt:
    r""":math:`\gamma_n = C n^{-1/2}`, the step size of the convergence theorem for Adam.

    Reference: Surendran et al. (2025), theorem for Adam. Note that it is not square-summable.
    """

    size: float

    def __post_init__(self) -> None:
        _positive("step size", self.size)

    def __call__(self, n: Tensor) -> Tensor:
        """``size / sqrt(n)``."""
        return self.size * n.rsqrt()


@dataclass(frozen=True)
class ExponentialDecay:
    r""":math:`\gamma_n = C r^{n/T}`: multiplied by ``rate`` every ``steps`` steps, smoothly."""

    size: float
    rate: float
    steps: int

    def __post_init__(self) -> None:
        _positive("step size", self.size)
        _positive("decay rate", self.rate)
        _positive("decay steps", self.steps)

    def __call__(self, n: Tensor) -> Tensor:
        """``size * rate ** (n / steps)``."""
        return self.size * torch.exp(n * (math.log(self.rate) / self.steps))


@dataclass(frozen=True)
class CosineDecay:
    r""":math:`\gamma_n = \tfrac C2 (1 + \cos(\pi \min(n, T)/T))`, with a floor of ``final`` times C."""

    size: float
    steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        _positive("step size", self.size)
        _positive("decay steps", self.steps)
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must lie in [0, 1], got {self.final}")

    def __call__(self, n: Tensor) -> Tensor:
        """Half a cosine from ``size`` down to ``final * size``."""
        wave = 0.5 * (1 + torch.cos(math.pi * (n / self.steps).clamp(max=1.0)))
        return self.size * (self.final + (1 - self.final) * wave)


class Optimiser(Protocol):
    """``init`` makes the state, ``update`` maps (gradient, state, iterate, step number) to the next iterate, state."""

    def init(self, x: Tensor) -> tuple[Tensor, ...]:
        """State before the first step."""
        ...

    def update(
        self, grad: Tensor, state: tuple[Tensor, ...], x: Tensor, n: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]: ...


@dataclass(frozen=True)
class SGD:
    r"""Stochastic gradient descent :math:`x_n = x_{n-1} - \gamma_n G_n`."""

    step_size: StepSize = field(default_factory=lambda: InverseSqrt(0.01))

    def init(self, x: Tensor) -> tuple[Tensor, ...]:
        """No state."""
        return ()

    def update(
        self, grad: Tensor, state: tuple[Tensor, ...], x: Tensor, n: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step downhill."""
        return x - self.step_size(n) * grad, state


@dataclass(frozen=True)
class Adam:
    r"""Adam with bias correction.

    .. math:: m_n = \beta_1 m_{n-1} + (1-\beta_1) G_n, \quad v_n = \beta_2 v_{n-1} + (1-\beta_2) G_n^2, \quad
              x_n = x_{n-1} - \gamma_n \frac{m_n / (1-\beta_1^n)}{\sqrt{v_n / (1-\beta_2^n)} + \epsilon}

    Reference: Kingma and Ba (2015), https://arxiv.org/abs/1412.6980

    Raises:
        ValueError: if a beta lies outside [0, 1).
    """

    step_size: StepSize = field(default_factory=lambda: InverseSqrt(0.1))
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {beta}")
        _positive("eps", self.eps)

    def init(self, x: Tensor) -> tuple[Tensor, ...]:
        """First and second moment, zero."""
        return torch.zeros_like(x), torch.zeros_like(x)

    def update(
        self, grad: Tensor, state: tuple[Tensor, ...], x: Tensor, n: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step downhill."""
        m = self.beta1 * state[0] + (1 - self.beta1) * grad
        v = self.beta2 * state[1] + (1 - self.beta2) * grad * grad
        debiased = (v / (1 - torch.exp(n * math.log(self.beta2)))).sqrt() if self.beta2 > 0 else v.sqrt()
        mean = m / (1 - torch.exp(n * math.log(self.beta1))) if self.beta1 > 0 else m
        return x - self.step_size(n) * mean / (debiased + self.eps), (m, v)


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
