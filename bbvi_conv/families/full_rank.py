"""The full-rank Gaussian, with ``log q`` from the noise: no triangular solve at its own draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from bbvi_conv.families.family import Parameter, VectorFamily, VectorLaw, log_normal, normals
from bbvi_conv.families.scale_maps import Linear, ScaleMap, Softplus


class TrilNormal(VectorLaw):
    r"""Multivariate normal :math:`m + L \epsilon`, :math:`L = \mathrm{diag}(s) + \mathrm{strictly\ lower}`.

    At its own draw :math:`\log q = \log N(\epsilon; 0, I) - \sum \log |s|`; elsewhere a triangular solve finds
    :math:`\epsilon`.

    Args:
        loc: m, ``(..., D)``.
        scale: s, ``(..., D)``, not zero.
        lower: ``(..., D, D)``, zero on and above the diagonal.
    """

    def __init__(self, loc: Tensor, scale: Tensor, lower: Tensor) -> None:
        self.loc, self.scale, self.lower = loc, scale, lower
        super().__init__(loc.shape)

    def draw(self, shape: Size) -> tuple[Tensor, Tensor]:
        """From standard normals."""
        eps = normals(shape, self.loc)
        value = self.loc + self.scale * eps + (self.lower * eps.unsqueeze(-2)).sum(-1)
        return value, log_normal(eps, self.scale).sum(-1)

    def density(self, value: Tensor) -> Tensor:
        """By a triangular solve."""
        factor = self.lower + torch.diag_embed(self.scale)
        eps = torch.linalg.solve_triangular(factor, (value - self.loc).unsqueeze(-1), upper=False).squeeze(-1)
        return log_normal(eps, self.scale).sum(-1)


def strictly_lower(entries: Tensor, dim: int) -> Tensor:
    """``(..., D (D - 1) / 2)``, row by row, to ``(..., D, D)`` with zeros elsewhere."""
    rows, columns = torch.tril_indices(dim, dim, -1, device=entries.device)
    where = (rows * dim + columns).expand(entries.shape)
    flat = torch.zeros((*entries.shape[:-1], dim * dim), dtype=entries.dtype, device=entries.device)
    return flat.scatter(-1, where, entries).reshape(*entries.shape[:-1], dim, dim)


@dataclass(frozen=True)
class FullRank(VectorFamily):
    r"""Gaussian :math:`N(m, L L^\top)` over all latent sites, L lower-triangular with :math:`\phi(s)` on its diagonal.

    Args:
        init_scale: standard deviation at the start.
        scale_map: :math:`\phi`.
        relative: whether the entries below the diagonal are in units of their row's scale,
            :math:`L = \mathrm{diag}(\phi(s)) T` with T unit lower-triangular, so that a step size suits coordinates of
            any scale; or are those of L itself, :math:`L = \mathrm{diag}(\phi(s)) + T_{strict}`, as the convergence
            theorems have it. None: relative, but for the linear map, which is linear only without.

    Raises:
        ValueError: if ``init_scale`` is not positive, or outside the range of the scale map.

    Reference: Kucukelbir et al. (2017), https://arxiv.org/abs/1603.00788; parameterisations: Kim et al. (2023),
    https://arxiv.org/abs/2305.15349, section 2
    """

    init_scale: float = 0.1
    scale_map: ScaleMap = Softplus()  # noqa: RUF009 - frozen
    relative: bool | None = None

    def __post_init__(self) -> None:
        self.scale_map.check(self.init_scale)

    def parameters(self, loc: Tensor, scale: Tensor) -> dict[str, Parameter]:
        """Location, scale and the entries below the diagonal, row by row; the last not in one dimension."""
        dim = len(loc)
        found = {"loc": Parameter(loc), "scale": Parameter(scale, self.scale_map.constraint)}
        return found | ({"lower": Parameter(loc.new_zeros(dim * (dim - 1) // 2))} if dim > 1 else {})

    def law(self, values: Mapping[str, Tensor], layers: Any) -> TrilNormal:
        """The Gaussian."""
        loc, scale = values["loc"], values["scale"]
        dim = loc.shape[-1]
        lower = strictly_lower(values["lower"], dim) if dim > 1 else torch.zeros_like(loc).unsqueeze(-1)
        relative = not isinstance(self.scale_map, Linear) if self.relative is None else self.relative
        return TrilNormal(loc, scale, scale.unsqueeze(-1) * lower if relative else lower)
