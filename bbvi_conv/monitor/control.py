r"""Control variates from the noise itself: what of a gradient is linear or quadratic in it is known to have mean zero.

For a Gaussian q with location m and scale s near a smooth log density the gradient at :math:`\epsilon` is, to first
order, :math:`g + A\epsilon + \epsilon^\top B \epsilon - \mathrm{tr} B`: on a correlated posterior the noise
:math:`A\epsilon` of a factorised q is hundreds of times the gradient, and nearly all of it can be taken off.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bbvi_conv.program.noise import Noise

MOST_FEATURES = 256
"""Features beyond which the quadratic ones, and then all, are left out."""
PER_FEATURE = 8
"""Pilot draws for each feature: the fitted coefficients add at most about 1/8 of the remaining variance."""


def features(noise: Noise) -> Tensor | None:
    r"""Functions of the base noise with mean exactly zero, ``(J, F)``; None where there would be too many.

    Normals :math:`\epsilon_i`, uniforms :math:`u_i - \tfrac12`, and where they fit
    :math:`\epsilon_i \epsilon_j - \delta_{ij}`.

    Args:
        noise: ``normal`` ``(J, M, n)`` and ``uniform`` ``(J, M, m)``.
    """
    normal, uniform = noise.normal.flatten(1), noise.uniform.flatten(1)
    count = normal.shape[1]
    parts = [normal, uniform - 0.5]
    if count * (count + 3) // 2 + uniform.shape[1] <= MOST_FEATURES:
        row, column = torch.triu_indices(count, count, device=normal.device)
        parts.append(normal[:, row] * normal[:, column] - (row == column).to(normal.dtype))
    found = torch.cat(parts, 1)
    return found if 0 < found.shape[1] <= MOST_FEATURES else None


class Control(NamedTuple):
    """Coefficients ``(F, P)`` of the features in the gradient."""

    coefficients: Tensor

    def quiet(self, gradients: Tensor, noise: Noise) -> Tensor:
        """Gradients ``(J, P)`` less their controls: the same mean, whatever the coefficients, if those are independent."""
        found = features(noise)
        return gradients if found is None else gradients - found @ self.coefficients


def fit_control(gradients: Tensor, noise: Noise) -> Control | None:
    """Least squares of pilot gradients ``(J, P)`` on the features; None where that would not lessen the variance."""
    found = features(noise)
    if found is None or len(found) < 2 * found.shape[1] + 2:
        return None
    count, size = found.shape
    centred, found = gradients - gradients.mean(0), found - found.mean(0)
    factor, info = torch.linalg.cholesky_ex(found.T @ found)  # lstsq does not give the same bits twice
    if int(info) != 0:
        return None
    coefficients = torch.cholesky_solve(found.T @ centred, factor)
    rest = float((centred - found @ coefficients).square().sum()) / (count - 1 - size)
    before = float(centred.square().sum()) / (count - 1)
    if not math.isfinite(rest) or rest * (1 + size / count) >= before:
        return None
    return Control(coefficients)


def pilot_draws(noise: Noise) -> int:
    """Draws to fit the control on; 0 where there are too many features. ``noise``: any one draw ``(1, M, ...)``."""
    found = features(noise)
    return 0 if found is None else max(128, PER_FEATURE * found.shape[1])
