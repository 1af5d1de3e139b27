"""Sylvester layers: planar ones of many directions at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bbvi_conv.families.flows.layer import Layer


class Sylvester(Layer):
    r"""Adds a hidden layer of M units along orthonormal directions Q, ``(D, M)``.

    .. math:: y = x + Q R \tanh(\tilde R Q^\top x + b), \quad
              \log |\det J| = \sum_m \log(1 + \tanh'(\cdot)_m R_{mm} \tilde R_{mm})

    with R and :math:`\tilde R` upper-triangular, their diagonals inside (-1, 1) so that the map is invertible. Q is a
    product of Householder reflections, cut to M columns. (Pyro 1.9's ``Sylvester`` multiplies in another order, for
    which this determinant does not hold.)

    Args:
        dim: D.
        units: M, at most D.

    Reference: van den Berg et al. (2018), sections 3 and 4.2, https://arxiv.org/abs/1803.05649
    """

    has_inverse = False

    def __init__(self, dim: int, units: int) -> None:
        super().__init__()
        self.mirrors = nn.Parameter(torch.randn(units, dim))
        self.outer = nn.Parameter(torch.zeros(units, units))
        self.inner = nn.Parameter(torch.randn(units, units) / units**0.5)
        self.bias = nn.Parameter(torch.zeros(units))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One pass."""
        directions = self._directions()
        r, d = self._triangular(self.outer)
        s, e = self._triangular(self.inner)
        act = torch.tanh(x @ (directions @ s.mT) + self.bias)
        log_det = torch.log1p((1 - act * act) * (d * e)).sum(-1)
        return x + act @ (directions @ r).mT, log_det

    def _directions(self) -> Tensor:
        dim = self.mirrors.shape[-1]
        units = self.mirrors / self.mirrors.norm(dim=-1, keepdim=True)
        q = torch.eye(dim, dtype=units.dtype, device=units.device)[:, : len(units)]
        for unit in units.unbind(0):
            q = q - 2 * torch.outer(unit, unit @ q)
        return q

    @staticmethod
    def _triangular(raw: Tensor) -> tuple[Tensor, Tensor]:
        diagonal = torch.tanh(raw.diagonal())
        return raw.triu(1) + torch.diag(diagonal), diagonal
