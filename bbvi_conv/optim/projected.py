"""Steps followed by a projection onto a convex set, and the gradient mapping that takes the gradient's place there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bbvi_conv.optim.first_order import SGD, Adam, Optimiser
from bbvi_conv.optim.scales import Scales, unbound
from bbvi_conv.optim.step_sizes import InverseSqrt, StepSize, positive

_EDGE = 1e-6
"""Relative distance from the edge of a set that is rounding, in either float type."""


class ConvexSet(Protocol):
    """A set with a projection in the Euclidean norm."""

    def project(self, x: Tensor) -> Tensor:
        """The point of the set nearest to ``x`` ``(P,)``."""
        ...

    def on_boundary(self, x: Tensor) -> bool:
        """Whether a point of the set ``(P,)`` lies at its edge: the constraint is active, and some steps are cut."""
        ...


@dataclass(frozen=True)
class Ball:
    r"""Parameters with :math:`\|x\| \le a`, for the theorem for Adam.

    Args:
        radius: a.

    Raises:
        ValueError: if ``radius`` is not positive and finite.
    """

    radius: float

    def __post_init__(self) -> None:
        positive("radius", self.radius)

    def project(self, x: Tensor) -> Tensor:
        r""":math:`x \min(1, a / \|x\|)`."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.where(norm > self.radius, x * (self.radius / norm), x)

    def on_boundary(self, x: Tensor) -> bool:
        """To rounding."""
        return bool(torch.linalg.vector_norm(x) >= self.radius * (1 - _EDGE))


@dataclass(frozen=True)
class ScaleFloor:
    r"""Scales of a linear parameterisation at least :math:`\delta`: there :math:`-\log` is smooth.

    Args:
        floor: :math:`\delta`; the optimum lies inside if it is at most :math:`1 / \sqrt{L}`, L the smoothness constant
            of :math:`-\log p`.
        scales: where they lie; filled in by a fit.

    Raises:
        ValueError: if ``floor`` is not positive and finite.

    Reference: Domke et al. (2023), https://arxiv.org/abs/2306.03638; Kim et al. (2024),
    https://arxiv.org/abs/2307.14642
    """

    floor: float
    scales: Scales | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        positive("floor", self.floor)

    def bind(self, scales: Scales) -> ScaleFloor:
        """The same set, told where the scales lie."""
        return replace(self, scales=scales)

    def project(self, x: Tensor) -> Tensor:
        """Every scale raised to the floor; one that is not finite does not become so."""
        if self.scales is None:
            raise unbound("ScaleFloor")
        return self.scales.change(lambda s: s.clamp(min=self.floor) + 0 * s, x)

    def on_boundary(self, x: Tensor) -> bool:
        """To rounding, for any scale."""
        if self.scales is None:
            raise unbound("ScaleFloor")
        return bool((self.scales.of(x) <= self.floor * (1 + _EDGE)).any())


@dataclass(frozen=True)
class Projected:
    r"""An optimiser each of whose steps ends in a projection, :math:`x_n = \Pi(\mathrm{step}(x_{n-1}))`.

    Args:
        optimiser: makes the step.
        onto: the set.
    """

    optimiser: Optimiser
    onto: ConvexSet

    @property
    def step_size(self) -> StepSize:
        """Of the optimiser inside."""
        rule: StepSize = self.optimiser.step_size  # type: ignore[attr-defined]
        return rule

    @property
    def needs_scales(self) -> bool:
        """Whether the set is about scales."""
        return isinstance(self.onto, ScaleFloor)

    def bind(self, scales: Scales) -> Projected:
        """The same optimiser, told where the scales lie."""
        onto: Any = self.onto
        return replace(self, onto=onto.bind(scales)) if hasattr(onto, "bind") else self

    def init(self, x: Tensor) -> tuple[Tensor, ...]:
        """State of the optimiser inside."""
        return self.optimiser.init(x)

    def update(
        self, grad: Tensor, state: tuple[Tensor, ...], x: Tensor, n: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step, then the projection."""
        x, state = self.optimiser.update(grad, state, x, n)
        return self.onto.project(x), state


def ProjectedSGD(step_size: StepSize | None = None, floor: float = 1e-3) -> Projected:
    r"""Projected SGD on the set of scales at least ``floor``; goes with pathwise and sticking-the-landing gradients.

    Args:
        step_size: rule; None: :class:`SGD`'s own.
        floor: :math:`\delta`, below the scales sought.

    Raises:
        ValueError: if ``floor`` is not positive.

    Reference: Kim et al. (2024), "Linear convergence of black-box variational inference",
    https://arxiv.org/abs/2307.14642
    """
    return Projected(SGD(step_size) if step_size else SGD(), ScaleFloor(floor))


def TheoremAdam(size: float, radius: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Projected:
    r"""Adam as its convergence theorem asks: :math:`\gamma_n = C n^{-1/2}`, :math:`\beta_1 < \sqrt{\beta_2} < 1`,
    parameters in a ball.

    Args:
        size: C.
        radius: a.
        beta1, beta2, eps: of :class:`Adam`.

    Raises:
        ValueError: if the betas do not fulfil the condition.

    Reference: Surendran et al. (2025), theorem for Adam.
    """
    root = math.sqrt(max(beta2, 0.0))
    if not beta1 < root:
        raise ValueError(
            f"the theorem for Adam asks for beta1 < sqrt(beta2), got beta1={beta1} and sqrt(beta2)={root:.4g}; "
            "lower beta1 or raise beta2"
        )
    return Projected(Adam(InverseSqrt(size), beta1, beta2, eps), Ball(radius))


def gradient_mapping(optimiser: Optimiser, grad: Tensor, x: Tensor, n: Tensor) -> Tensor:
    r""":math:`(x - \Pi(x - \gamma_n G)) / \gamma_n` ``(P,)``: the gradient wherever no constraint is active.

    Args:
        optimiser: bound; without state, such as :func:`ProjectedSGD` or ``ProximalSGD``.
        grad: gradient ``(P,)``, as the optimiser takes it.
        x: where.
        n: step number, for the step size.

    Raises:
        TypeError: an optimiser with state, whose step is no function of the gradient at hand.
    """
    if optimiser.init(x):
        raise TypeError(f"{type(optimiser).__name__} has a state, so its step defines no gradient mapping; use SGD")
    rule: StepSize = optimiser.step_size  # type: ignore[attr-defined]
    return (x - optimiser.update(grad, (), x, n)[0]) / rule(n)
