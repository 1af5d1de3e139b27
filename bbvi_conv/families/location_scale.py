r"""Location-scale Gaussian guides on the unconstrained space, with ``log q`` from the noise.

The draw is :math:`z = m + L \epsilon`. At that very draw :math:`\log q(z) = \log N(\epsilon; 0, I) - \log |L|` needs no
triangular solve; at any other value (sticking the landing detaches the density's parameters, so the value is no longer
its own draw) the path form solves for :math:`\epsilon`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.util import eye_like, sum_rightmost
from pyro.infer.autoguide import AutoContinuous, AutoGuide, AutoNormal
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import biject_to

from bbvi_conv.families.start import start

LOG_2PI = math.log(2 * math.pi)
SCALAR = torch.Size()


class DiagonalNormal(dist.Normal):  # type: ignore[misc]
    """Normal whose log density at its own last draw comes from the noise."""

    _drawn: tuple[Tensor, Tensor] | None = None

    def rsample(self, sample_shape: torch.Size = SCALAR) -> Tensor:
        """Draw and remember the noise."""
        eps = torch.empty(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device).normal_()
        value: Tensor = self.loc + self.scale * eps
        self._drawn = (value, eps)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        r""":math:`-\epsilon^2/2 - \log s - \log(2\pi)/2`, in nats."""
        own = self._drawn is not None and value is self._drawn[0]
        eps = self._drawn[1] if own and self._drawn is not None else (value - self.loc) / self.scale
        density: Tensor = -0.5 * (eps * eps + LOG_2PI) - self.scale.log()
        return density


class TrilNormal(dist.TorchDistribution):  # type: ignore[misc]
    r"""Multivariate normal :math:`m + \mathrm{diag}(s) T \epsilon` with unit lower-triangular T.

    Args:
        loc: m, ``(D,)``.
        scale: s, ``(D,)``, positive.
        tril: T, ``(D, D)``.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - the interface of torch.distributions
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, tril: Tensor) -> None:
        self.loc, self.scale, self.tril = loc, scale, tril
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> TrilNormal:
        """The same distribution; only the empty batch shape is supported."""
        if len(batch_shape):
            raise ValueError("a full-rank guide packs all sites into one vector and cannot stand inside a plate")
        return self

    def rsample(self, sample_shape: torch.Size = SCALAR) -> Tensor:
        """Draw ``(*sample_shape, D)`` and remember the noise."""
        eps = torch.empty((*sample_shape, *self.loc.shape), dtype=self.loc.dtype, device=self.loc.device).normal_()
        value = self.loc + self.scale * (self.tril * eps.unsqueeze(-2)).sum(-1)
        self._drawn = (value, eps)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        r""":math:`-|\epsilon|^2/2 - \sum \log s - D \log(2\pi)/2`, in nats."""
        if self._drawn is not None and value is self._drawn[0]:
            eps = self._drawn[1]
        else:
            shifted = ((value - self.loc) / self.scale).unsqueeze(-1)
            eps = torch.linalg.solve_triangular(self.tril, shifted, upper=False, unitriangular=True).squeeze(-1)
        return -0.5 * (eps * eps + LOG_2PI).sum(-1) - self.scale.log().sum(-1)


class FullRankGuide(AutoContinuous):  # type: ignore[misc]
    """All latent sites as one Gaussian vector on the unconstrained space; made by :class:`FullRank`."""

    def __init__(self, model: Callable[..., Any], init_scale: float) -> None:
        self._init_scale = init_scale
        super().__init__(model, init_loc_fn=start)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self.loc = nn.Parameter(self._init_loc())
        self.scale = PyroParam(torch.full_like(self.loc, self._init_scale), constraints.softplus_positive)
        self.scale_tril = PyroParam(eye_like(self.loc, self.latent_dim), constraints.unit_lower_cholesky)

    def get_posterior(self, *args: Any, **kwargs: Any) -> TrilNormal:
        """The Gaussian over the packed unconstrained vector."""
        return TrilNormal(self.loc, self.scale, self.scale_tril)


class MeanFieldGuide(AutoNormal):  # type: ignore[misc]
    """One Gaussian per latent scalar on the unconstrained space, plates kept; made by :class:`MeanField`."""

    def __init__(self, model: Callable[..., Any], init_scale: float) -> None:
        super().__init__(model, init_loc_fn=start, init_scale=init_scale)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site inside its plates."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            transform, event_dim = biject_to(site["fn"].support), site["fn"].event_dim
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    if frame.vectorized:
                        stack.enter_context(plates[frame.name])
                loc, scale = self._get_loc_and_scale(name)
                normal = DiagonalNormal(loc, scale).to_event(self._event_dims[name])
                free = pyro.sample(f"{name}_unconstrained", normal, infer={"is_auxiliary": True})
                value = transform(free)
                volume = transform.inv.log_abs_det_jacobian(value, free)
                volume = sum_rightmost(volume, volume.dim() - value.dim() + event_dim)
                result[name] = pyro.sample(name, dist.Delta(value, log_density=volume, event_dim=event_dim))
        return result


@dataclass(frozen=True)
class _LocationScale:
    """The argument that location-scale families share."""

    init_scale: float = 0.1

    def __post_init__(self) -> None:
        if not self.init_scale > 0:
            raise ValueError(f"init_scale must be positive, got {self.init_scale}")


@dataclass(frozen=True)
class MeanField(_LocationScale):
    r"""Factorised Gaussian :math:`q(z) = \prod_i N(z_i \mid m_i, s_i^2)` on the unconstrained space.

    Args:
        init_scale: standard deviation at the start.

    Raises:
        ValueError: if ``init_scale`` is not positive.

    Reference: Kucukelbir et al. (2017), https://arxiv.org/abs/1603.00788
    """

    def __call__(self, model: Callable[..., Any]) -> AutoGuide:
        """A guide for ``model``, built at its first run."""
        return MeanFieldGuide(model, self.init_scale)


@dataclass(frozen=True)
class FullRank(_LocationScale):
    r"""Gaussian :math:`N(m, L L^\top)` over all latent sites, :math:`L = \mathrm{diag}(s) T`, T unit lower-triangular.

    Args:
        init_scale: standard deviation at the start.

    Raises:
        ValueError: if ``init_scale`` is not positive.

    Reference: Kucukelbir et al. (2017), https://arxiv.org/abs/1603.00788
    """

    def __call__(self, model: Callable[..., Any]) -> AutoGuide:
        """A guide for ``model``, built at its first run."""
        return FullRankGuide(model, self.init_scale)
