r"""Stochastic gradient descent and Adam in functional form; all are pure functions of tensors.

Each may shorten long gradients first, which keeps a few draws with huge ones from throwing the iterate far off:

.. math:: G \leftarrow G \min(1, c / \|G\|).

Such steps follow the mean of shortened gradients, which is another direction where gradients are skewed; what is judged
and reported are gradients as they are. Reference: Pascanu et al. (2013), https://arxiv.org/abs/1211.5063
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bbvi_conv.optim.step_sizes import InverseSqrt, StepSize, number, positive, rule


class Optimiser(Protocol):
    """``init`` makes the state, ``update`` maps (gradient, state, iterate, step number) to the next iterate, state."""

    def init(self, x: Tensor) -> tuple[Tensor, ...]:
        """State before the first step."""
        ...

    def update(
        self, grad: Tensor, state: tuple[Tensor, ...], x: Tensor, n: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]: ...


def shortened(grad: Tensor, max_norm: float | None) -> Tensor:
    """The gradient ``(P,)``, no longer than ``max_norm`` in the Euclidean norm; None: as it is.

    Example:
        >>> shortened(torch.tensor([3.0, 4.0]), 1.0).tolist()
        [0.6000000238418579, 0.800000011920929]
    """
    if max_norm is None:
        return grad
    norm: Tensor = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
    return grad * (number(max_norm, norm) / norm).clamp(max=1.0)


@dataclass(frozen=True)
class SGD:
    r"""Stochastic gradient descent :math:`x_n = x_{n-1} - \gamma_n G_n`.

    Args:
        step_size: :math:`\gamma_n`: a rule, or a number that stays.
        max_norm: length to which longer gradients are cut first; None: none is.

    Raises:
        ValueError: if ``step_size`` is neither a rule nor a positive number, or ``max_norm`` not positive and finite.
    """

    step_size: StepSize | float = field(default_factory=lambda: InverseSqrt(0.01))
    max_norm: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", rule(self.step_size))
        if self.max_norm is not None:
            positive("max_norm", self.max_norm)

    def init(self, x: Tensor) -> tuple[Tensor, ...]:
        """No state."""
        return ()

    def update(
        self, grad: Tensor, state: tuple[Tensor, ...], x: Tensor, n: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step downhill."""
        return x - self.step_size(n) * shortened(grad, self.max_norm), state  # type: ignore[operator]


@dataclass(frozen=True)
class Adam:
    r"""Adam with bias correction.

    .. math:: m_n = \beta_1 m_{n-1} + (1-\beta_1) G_n, \quad v_n = \beta_2 v_{n-1} + (1-\beta_2) G_n^2, \quad
              x_n = x_{n-1} - \gamma_n \frac{m_n / (1-\beta_1^n)}{\sqrt{v_n / (1-\beta_2^n)} + \epsilon}

    Args:
        step_size: :math:`\gamma_n`: a rule, or a number that stays.
        beta1, beta2: :math:`\beta_1, \beta_2`.
        eps: :math:`\epsilon`.
        max_norm: length to which longer gradients are cut first; None: none is.

    Reference: Kingma and Ba (2015), https://arxiv.org/abs/1412.6980

    Raises:
        ValueError: if ``step_size`` is neither a rule nor a positive number, a beta lies outside [0, 1), or ``eps`` or
            ``max_norm`` is not positive and finite.
    """

    step_size: StepSize | float = field(default_factory=lambda: InverseSqrt(0.1))
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_norm: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", rule(self.step_size))
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {beta}")
        positive("eps", self.eps)
        if self.max_norm is not None:
            positive("max_norm", self.max_norm)

    def init(self, x: Tensor) -> tuple[Tensor, ...]:
        """First and second moment, zero."""
        return torch.zeros_like(x), torch.zeros_like(x)

    def update(
        self, grad: Tensor, state: tuple[Tensor, ...], x: Tensor, n: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step downhill."""
        grad = shortened(grad, self.max_norm)
        m = self.beta1 * state[0] + (1 - self.beta1) * grad
        v = self.beta2 * state[1] + (1 - self.beta2) * grad * grad
        debiased = (v / (1 - torch.exp(n * math.log(self.beta2)))).sqrt() if self.beta2 > 0 else v.sqrt()
        mean = m / (1 - torch.exp(n * math.log(self.beta1))) if self.beta1 > 0 else m
        return x - self.step_size(n) * mean / (debiased + self.eps), (m, v)  # type: ignore[operator]
