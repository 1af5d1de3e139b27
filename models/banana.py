r"""Banana: a Gaussian bent along a parabola, whose density is known and which no Gaussian fits.

    x ~ N(0, s),   y | x ~ N(b (x^2 - s^2), 1),   log p(x, y) normalised: the evidence is one.

Source: Haario et al. (2001), "An adaptive Metropolis algorithm", Bernoulli 7, section 5, with a bend b per unit of x.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

SCALE, BEND = 2.0, 0.5


def model() -> None:
    """Both coordinates as one site on the plane."""
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    pyro.factor("target", log_density(z))


def log_density(z: Tensor) -> Tensor:
    """log p, in nats, ``z``: ``(..., 2)``."""
    x, y = z.unbind(-1)
    return dist.Normal(0.0, SCALE).log_prob(x) + dist.Normal(BEND * (x * x - SCALE**2), 1.0).log_prob(y)


def draws(count: int, seed: int = 0) -> Tensor:
    """Independent draws ``(count, 2)``."""
    x, e = torch.randn(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.stack([SCALE * x, BEND * SCALE**2 * (x * x - 1) + e], -1)


def data() -> tuple[()]:
    """None: the target is the density itself."""
    return ()
