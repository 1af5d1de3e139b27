"""The factorised Gaussian, with ``log q`` from the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from torch import Size, Tensor

from bbvi_conv.families.by_site import SiteGuide
from bbvi_conv.families.family import SCALAR, Parameter, VectorFamily, log_normal, normals, recalled
from bbvi_conv.families.scale_maps import ScaleMap, Softplus


class DiagonalNormal(dist.Normal):  # type: ignore[misc]
    """Normal whose log density at its own last draw comes from the noise; its standard deviation is ``|scale|``."""

    arg_constraints: dict[str, Any] = {"loc": constraints.real, "scale": constraints.real}  # noqa: RUF012 - torch's
    _drawn: tuple[Tensor, Tensor] | None = None

    def rsample(self, sample_shape: Size = SCALAR) -> Tensor:
        """Draw and remember the noise."""
        eps = normals(self._extended_shape(sample_shape), self.loc)
        value: Tensor = self.loc + self.scale * eps
        self._drawn = (value, eps)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """In nats; at the law's own draw from the noise."""
        eps = recalled(self._drawn, value)
        return log_normal((value - self.loc) / self.scale if eps is None else eps, self.scale)


class ScoredNormal(DiagonalNormal):
    """The same law with draws that carry no gradient: what is known of it is the score of its density."""

    has_rsample = False

    def sample(self, sample_shape: Size = SCALAR) -> Tensor:
        """Draw, detached."""
        eps = normals(self._extended_shape(sample_shape), self.loc)
        value: Tensor = self.loc.detach() + self.scale.detach() * eps
        return value


@dataclass(frozen=True)
class MeanField(VectorFamily):
    r"""Factorised Gaussian :math:`q(z) = \prod_i N(z_i \mid m_i, \phi(s_i)^2)` on the unconstrained space.

    Args:
        init_scale: standard deviation at the start.
        scale_map: :math:`\phi`.

    Raises:
        ValueError: if ``init_scale`` is not positive, or outside the range of the scale map.

    Reference: Kucukelbir et al. (2017), https://arxiv.org/abs/1603.00788
    """

    init_scale: float = 0.1
    scale_map: ScaleMap = Softplus()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        self.scale_map.check(self.init_scale)

    def __call__(self, model: Callable[..., Any]) -> AutoGuide:
        """A guide for ``model`` with one law per site, plates kept, built at its first run."""
        return SiteGuide(model, self)

    def more(self, loc: Tensor) -> dict[str, Parameter]:
        """None."""
        return {}

    def coordinates(self, loc: Tensor, scale: Tensor, **more: Tensor) -> DiagonalNormal:
        """A normal of every coordinate."""
        return DiagonalNormal(loc, scale)

    def parameters(self, loc: Tensor, scale: Tensor) -> dict[str, Parameter]:
        """Location and scale."""
        return {"loc": Parameter(loc), "scale": Parameter(scale, self.scale_map.constraint)}

    def law(self, values: Mapping[str, Tensor], layers: Any) -> Any:
        """A vector of independent normals."""
        return DiagonalNormal(values["loc"], values["scale"]).to_event(1)


@dataclass(frozen=True)
class ScoreMeanField(MeanField):
    """:class:`MeanField` whose gradient is that of the score function, for comparison: it asks nothing of log p.

    Reference: Ranganath et al. (2014), "Black box variational inference", https://arxiv.org/abs/1401.0118
    """

    def coordinates(self, loc: Tensor, scale: Tensor, **more: Tensor) -> ScoredNormal:
        """A normal of every coordinate, drawn without a gradient."""
        return ScoredNormal(loc, scale)
