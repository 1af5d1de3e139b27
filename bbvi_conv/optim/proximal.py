r"""Proximal SGD: the entropy of a linear scale is not differentiated but solved for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bbvi_conv.optim.scales import Scales, unbound
from bbvi_conv.optim.step_sizes import InverseSqrt, StepSize, rule


def prox_minus_log(s: Tensor, weight: Tensor | float) -> Tensor:
    r""":math:`\arg\min_{t > 0} \; -w \log t + \tfrac12 (t - s)^2 = \tfrac12 \big(s + \sqrt{s^2 + 4 w}\big)`.

    Positive whatever s is; where s is negative the root is taken in the form that does not cancel.

    Reference: Domke (2020), https://arxiv.org/abs/1901.08431
    """
    root = (s * s + 4 * weight).sqrt()
    return torch.where(s >= 0, 0.5 * (s + root), 2 * weight / (root - s.clamp(max=0.0)))


@dataclass(frozen=True)
class ProximalSGD:
    r"""Proximal SGD for a linear scale,
    :math:`x_n = \mathrm{prox}_{\gamma_n h}(x_{n-1} - \gamma_n E_n)`, :math:`h = -c \sum_i \log C_{ii}`.

    :math:`E_n` is the energy gradient, the gradient of :math:`-E_q \log p` alone. It is had from the loss's gradient
    by adding the closed form :math:`c / C_{ii}` on the scales, which takes the entropy's own gradient back out: a
    pathwise gradient of a location-scale family holds exactly that. A sticking-the-landing gradient differs from the
    pathwise one by a zero-mean control variate, which stays: hence ``control_variate``.

    Args:
        step_size: :math:`\gamma_n`: a rule, or a number that stays.
        control_variate: whether the objective's estimator is sticking-the-landing.
        scales: where they lie and c; filled in by a fit.

    Reference: Domke et al. (2023), "Provable convergence guarantees for black-box variational inference",
    https://arxiv.org/abs/2306.03638
    """

    step_size: StepSize | float = field(default_factory=lambda: InverseSqrt(0.01))
    control_variate: bool = False
    scales: Scales | None = field(default=None, repr=False)

    needs_scales = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", rule(self.step_size))

    def bind(self, scales: Scales) -> ProximalSGD:
        """The same optimiser, told where the scales lie."""
        return replace(self, scales=scales)

    def init(self, x: Tensor) -> tuple[Tensor, ...]:
        """No state."""
        return ()

    def update(
        self, grad: Tensor, state: tuple[Tensor, ...], x: Tensor, n: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step along the energy gradient, then the proximal map of the entropy."""
        if self.scales is None:
            raise unbound("ProximalSGD")
        size, weight = self.step_size(n), self.scales.entropy  # type: ignore[operator]
        energy = self.scales.change(lambda g, s: g + weight / s, grad, x)
        return self.scales.change(lambda s: prox_minus_log(s, size * weight), x - size * energy), state
