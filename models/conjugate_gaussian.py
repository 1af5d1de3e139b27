"""Conjugate Gaussian: the mean of a normal with known variances, whose posterior and evidence are known exactly.

With z_i ~ N(0, s_0) and x_ni ~ N(z_i, s_i), every coordinate i on its own,

    z_i | x ~ N(m_i, t_i),   1 / t_i^2 = 1 / s_0^2 + N / s_i^2,   m_i = t_i^2 sum_n x_ni / s_i^2,
    log p(x) = sum_i [ sum_n log N(x_ni; 0, s_i) + log(t_i / s_0) + m_i^2 / (2 t_i^2) ].

Source: Bishop (2006), "Pattern Recognition and Machine Learning", section 2.3.6.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

PRIOR_SCALE = 2.0


def model(x: Tensor, noise_scale: Tensor) -> None:
    """z ~ N(0, s_0), x_n ~ N(z, noise_scale); ``x``: ``(N, d)``, ``noise_scale``: ``(d,)``."""
    z = pyro.sample("z", dist.Normal(torch.zeros_like(noise_scale), PRIOR_SCALE).to_event(1))
    with pyro.plate("observation", len(x)):
        pyro.sample("x", dist.Normal(z, noise_scale).to_event(1), obs=x)


def data(size: int = 50, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``size`` draws around a mean that is itself drawn from the prior; noise scales run from 0.5 to 4."""
    generator = torch.Generator().manual_seed(seed)
    noise_scale = torch.logspace(-1, 2, dim, base=2, dtype=torch.float64)
    z = PRIOR_SCALE * torch.randn(dim, generator=generator, dtype=torch.float64)
    return z + noise_scale * torch.randn(size, dim, generator=generator, dtype=torch.float64), noise_scale


def posterior(x: Tensor, noise_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Means m and standard deviations t of the exact posterior, each ``(d,)``."""
    scale = (PRIOR_SCALE**-2 + len(x) / noise_scale**2) ** -0.5
    return scale**2 * x.sum(0) / noise_scale**2, scale


def log_evidence(x: Tensor, noise_scale: Tensor) -> Tensor:
    """The exact log p(x), in nats, ``()``."""
    loc, scale = posterior(x, noise_scale)
    at_zero = dist.Normal(torch.zeros_like(noise_scale), noise_scale).log_prob(x).sum()
    return at_zero + (scale / PRIOR_SCALE).log().sum() + (loc**2 / (2 * scale**2)).sum()
