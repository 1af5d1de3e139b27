"""Implicit reparameterisation of draws from a mixture of factorised Gaussians."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bbvi_conv.families.family import log_normal


def implicitly(value: Tensor, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    r"""The value itself, with the gradient that a draw of the mixture has.

    The distributional transform maps a draw to independent uniforms, coordinate by coordinate,

    .. math:: S_d(z) = F(z_d \mid z_{<d}) = \sum_c r_{cd} \Phi\big((z_d - m_{cd}) / s_{cd}\big), \quad
              r_{cd} \propto w_c \prod_{k<d} N(z_k \mid m_{ck}, s_{ck}^2),

    and holding the uniforms still gives :math:`\nabla_\phi z = -(\nabla_z S)^{-1} \nabla_\phi S`, a solve with a
    lower-triangular matrix: :math:`\partial S_d / \partial z_d` is the conditional density and, for k < d,
    :math:`\partial S_d / \partial z_k = \sum_c r_{cd} (\Phi_{cd} - S_d)\, g_{ck}` with
    :math:`g_{ck} = -(z_k - m_{ck}) / s_{ck}^2`.

    Args:
        value: a draw, ``(..., D)``.
        log_weights: ``(..., C)``, normalised.
        loc: m, ``(..., C, D)``.
        scale: s, ``(..., C, D)``; its absolute value counts.

    Reference: Graves (2016), https://arxiv.org/abs/1607.05690; Figurnov et al. (2018), section 4,
    https://arxiv.org/abs/1805.08498
    """
    z, scale = value.detach().unsqueeze(-2), scale.abs()
    y = (z - loc) / scale
    log_n = log_normal(y, scale)
    before = log_n.cumsum(-1) - log_n
    r = torch.softmax(log_weights.unsqueeze(-1) + before, -2)
    phi = 0.5 * torch.erfc(-y / math.sqrt(2))
    uniforms = (r * phi).sum(-2)
    with torch.no_grad():
        density = (r * log_n.exp()).sum(-2)
        slopes = (r * (phi - uniforms.unsqueeze(-2))).mT @ (-y / scale)
        jacobian = slopes.tril(-1) / density.unsqueeze(-1)
    moved = ((uniforms - uniforms.detach()) / density).unsqueeze(-1)
    step = torch.linalg.solve_triangular(jacobian, moved, upper=False, unitriangular=True)
    same: Tensor = value.detach() - step.squeeze(-1)
    return same
