"""The Gaussian with a diagonal plus a low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from bbvi_conv.families.family import Parameter, VectorFamily, VectorLaw, log_normal, normals
from bbvi_conv.families.scale_maps import ScaleMap, Softplus


class LowRankNormal(VectorLaw):
    r"""Normal :math:`m + s \odot (V \epsilon_r + \epsilon_D)`: covariance :math:`\mathrm{diag}(s) (I + V V^\top)
    \mathrm{diag}(s)`.

    With :math:`y = (z - m) / s`, :math:`C = I + V^\top V` and R its Cholesky factor, the determinant lemma and
    Woodbury's identity give

    .. math:: \log q = -\tfrac12 (|y|^2 - |R^{-1} V^\top y|^2) - \tfrac12 \log |C| - \sum \log |s| - \tfrac D2 \log 2\pi

    at the cost of a factorisation in the rank. At its own draw y needs no division.

    Args:
        loc: m, ``(..., D)``.
        scale: s, ``(..., D)``, not zero.
        factor: V, ``(..., D, r)``.
    """

    def __init__(self, loc: Tensor, scale: Tensor, factor: Tensor) -> None:
        self.loc, self.scale, self.factor = loc, scale, factor
        super().__init__(loc.shape)

    def draw(self, shape: Size) -> tuple[Tensor, Tensor]:
        """From D + r standard normals."""
        few, many = (normals((*shape[:-1], n), self.loc) for n in (self.factor.shape[-1], shape[-1]))
        y = many + (self.factor * few.unsqueeze(-2)).sum(-1)
        return self.loc + self.scale * y, self._log_density(y)

    def density(self, value: Tensor) -> Tensor:
        """From y."""
        return self._log_density((value - self.loc) / self.scale)

    def _log_density(self, y: Tensor) -> Tensor:
        rank = self.factor.shape[-1]
        eye = torch.eye(rank, dtype=y.dtype, device=y.device)
        # C >= I, so that the factorisation cannot fail short of NaN
        root = torch.linalg.cholesky_ex(eye + self.factor.mT @ self.factor).L
        seen = (self.factor * y.unsqueeze(-1)).sum(-2)
        inner = torch.linalg.solve_triangular(root, seen.unsqueeze(-1), upper=False).squeeze(-1)
        volume = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        density: Tensor = log_normal(y, self.scale).sum(-1) + 0.5 * (inner * inner).sum(-1) - volume
        return density


@dataclass(frozen=True)
class LowRank(VectorFamily):
    r"""Gaussian with covariance :math:`\mathrm{diag}(s) (I + V V^\top) \mathrm{diag}(s)` over all latent sites.

    Args:
        rank: r, columns of V.
        init_scale: standard deviation at the start; V starts at random, small, for its gradient vanishes at zero.
        scale_map: :math:`\phi`, from the leaf to s.

    Raises:
        ValueError: if the rank is below 1, or ``init_scale`` is not positive or outside the range of the scale map.

    Reference: Ong et al. (2018), "Gaussian variational approximation with a factor covariance structure",
    https://arxiv.org/abs/1701.03208
    """

    rank: int = 4
    init_scale: float = 0.1
    scale_map: ScaleMap = Softplus()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        self.scale_map.check(self.init_scale)
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def parameters(self, loc: Tensor, scale: Tensor) -> dict[str, Parameter]:
        """Location, scale and V."""
        dim = len(loc)
        rank = min(self.rank, dim)
        factor = 0.1 * torch.randn(dim, rank, dtype=loc.dtype, device=loc.device) / rank**0.5
        return {
            "loc": Parameter(loc),
            "scale": Parameter(scale, self.scale_map.constraint),
            "factor": Parameter(factor),
        }

    def law(self, values: Mapping[str, Tensor], layers: Any) -> LowRankNormal:
        """The Gaussian."""
        return LowRankNormal(values["loc"], values["scale"], values["factor"])
