"""The factorised Student-t with learnt degrees of freedom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from torch import Size, Tensor

from bbvi_conv.families.by_site import SiteGuide
from bbvi_conv.families.family import SCALAR, Parameter, VectorFamily, recalled
from bbvi_conv.families.scale_maps import ScaleMap, Softplus

LEAST = 2.0
"""Degrees of freedom stay above it, so that the draw has a variance."""


class DiagonalStudentT(dist.StudentT):  # type: ignore[misc]
    r"""Student-t drawn from two uniforms, smoothly in its degrees of freedom.

    .. math:: t = \sqrt{\nu (u^{-2/\nu} - 1)} \cos(2 \pi v), \quad z = m + s t

    Reference: Bailey (1994), "Polar generation of random variates with the t-distribution", Mathematics of Computation
    62, https://doi.org/10.1090/S0025-5718-1994-1219702-8
    """

    arg_constraints: dict[str, Any] = {  # noqa: RUF012 - the interface of torch.distributions
        "df": constraints.positive,
        "loc": constraints.real,
        "scale": constraints.real,
    }
    _drawn: tuple[Tensor, Tensor] | None = None

    def rsample(self, sample_shape: Size = SCALAR) -> Tensor:
        """Draw and remember t."""
        shape = self._extended_shape(sample_shape)
        u, v = (torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device) for _ in range(2))
        radius = (self.df * torch.expm1(-2 * u.clamp(min=torch.finfo(u.dtype).tiny).log() / self.df)).sqrt()
        t = radius * torch.cos(2 * math.pi * v)
        value: Tensor = self.loc + self.scale * t
        self._drawn = (value, t)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """In nats; at the law's own draw from t."""
        t = recalled(self._drawn, value)
        t = (value - self.loc) / self.scale if t is None else t
        half = 0.5 * (self.df + 1)
        volume = 0.5 * (self.df * math.pi).log() + torch.lgamma(0.5 * self.df) - torch.lgamma(half)
        density: Tensor = -half * torch.log1p(t * t / self.df) - volume - self.scale.abs().log()
        return density


@dataclass(frozen=True)
class StudentT(VectorFamily):
    r"""Factorised Student-t :math:`q(z) = \prod_i t_{\nu_i}(z_i \mid m_i, \phi(s_i))` on the unconstrained space.

    Args:
        init_scale: scale at the start.
        scale_map: :math:`\phi`.
        init_df: degrees of freedom :math:`\nu` at the start, above 2; each coordinate learns its own, and stays above
            2, where a variance exists.

    Raises:
        ValueError: if ``init_df`` is not above 2, or ``init_scale`` is not positive or outside the range.
    """

    init_scale: float = 0.1
    scale_map: ScaleMap = Softplus()  # noqa: RUF009 - frozen
    init_df: float = 10.0

    def __post_init__(self) -> None:
        self.scale_map.check(self.init_scale)
        if not (self.init_df > LEAST and math.isfinite(self.init_df)):
            raise ValueError(f"init_df must exceed {LEAST:g} and be finite, got {self.init_df}")

    def __call__(self, model: Callable[..., Any]) -> AutoGuide:
        """A guide for ``model`` with one law per site, plates kept, built at its first run."""
        return SiteGuide(model, self)

    def more(self, loc: Tensor) -> dict[str, Parameter]:
        """Degrees of freedom."""
        return {"df": Parameter(torch.full_like(loc, self.init_df), constraints.greater_than(LEAST))}

    def coordinates(self, loc: Tensor, scale: Tensor, **more: Tensor) -> DiagonalStudentT:
        """A Student-t of every coordinate."""
        return DiagonalStudentT(more["df"], loc, scale)

    def parameters(self, loc: Tensor, scale: Tensor) -> dict[str, Parameter]:
        """Location, scale and degrees of freedom."""
        return {"loc": Parameter(loc), "scale": Parameter(scale, self.scale_map.constraint), **self.more(loc)}

    def law(self, values: Mapping[str, Tensor], layers: Any) -> Any:
        """A vector of independent Student-t's."""
        return self.coordinates(values["loc"], values["scale"], df=values["df"]).to_event(1)
