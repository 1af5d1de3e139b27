"""Exact posteriors of two-dimensional latents, by quadrature on a grid that is laid around where they are."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

POINTS = 121
"""Points of the grid each way."""
REACH = 25.0
"""The second grid spans where the first is within so many nats of its top."""


class Posterior(NamedTuple):
    """p(z | x) of one image on its grid.

    Attributes:
        axes: the two coordinates of the grid, each ``(POINTS,)``.
        density: ``(POINTS, POINTS)``, summing to 1 over the grid.
        log_evidence: log p(x), in nats.
        kl_to_gaussian: KL(p(z | x) || the Gaussian of its mean and covariance), in nats: zero for a Gaussian only.
    """

    axes: tuple[Tensor, Tensor]
    density: Tensor
    log_evidence: float
    kl_to_gaussian: float


def posterior(decoder: nn.Module, image: Tensor, scale: float) -> Posterior:
    """The posterior under z ~ N(0, I), x | z ~ N(decoder(z), scale^2 I) for ``image`` ``(D,)``."""
    box = [(-5.0, 5.0), (-5.0, 5.0)]
    for _ in range(3):
        axes, log_joint = _log_joint(decoder, image, scale, box)
        inside = log_joint > log_joint.max() - REACH
        box = [_span(axis, inside.any(1 - d)) for d, axis in enumerate(axes)]
    axes, log_joint = _log_joint(decoder, image, scale, box)
    cell = float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
    log_sum = float(log_joint.flatten().logsumexp(0))
    log_p = log_joint - log_sum
    p = log_p.exp()
    points = torch.cartesian_prod(*axes)
    mean = (p.reshape(-1, 1) * points).sum(0)
    centred = points - mean
    covariance = centred.T @ (p.reshape(-1, 1) * centred)
    gaussian = torch.distributions.MultivariateNormal(mean, covariance).log_prob(points).reshape(p.shape)
    kl = float((p * (log_p - math.log(cell) - gaussian)).sum())
    return Posterior((axes[0], axes[1]), p, log_sum + math.log(cell), kl)


def _log_joint(
    decoder: nn.Module, image: Tensor, scale: float, box: list[tuple[float, float]]
) -> tuple[tuple[Tensor, ...], Tensor]:
    axes = tuple(torch.linspace(low, high, POINTS, dtype=torch.float64) for low, high in box)
    points = torch.cartesian_prod(*axes)
    with torch.no_grad():
        means = torch.cat([decoder(part.to(image)) for part in points.split(4096)])
    misfit = (means - image).double().square().sum(-1)
    size = len(image)
    log_joint = -misfit / (2 * scale**2) - size * math.log(scale) - points.square().sum(-1) / 2
    return axes, (log_joint - (size + 2) / 2 * math.log(2 * math.pi)).reshape(POINTS, POINTS)


def _span(axis: Tensor, inside: Tensor) -> tuple[float, float]:
    """Ends of what is inside, a cell to spare."""
    where, step = axis[inside], float(axis[1] - axis[0])
    return float(where.min()) - step, float(where.max()) + step
