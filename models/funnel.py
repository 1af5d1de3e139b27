r"""Neal's funnel in ten dimensions: the scale of nine coordinates is itself a coordinate.

    v ~ N(0, 3),   x_i | v ~ N(0, exp(v / 2)),  i = 1 .. 9:   the evidence is one.

Source: Neal (2003), "Slice sampling", Annals of Statistics 31, section 8, https://doi.org/10.1214/aos/1056562461
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

DIM, SCALE = 10, 3.0


def model() -> None:
    """All coordinates as one site, v first."""
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (DIM,)))
    pyro.factor("target", log_density(z))


def log_density(z: Tensor) -> Tensor:
    """log p, in nats, ``z``: ``(..., 10)``."""
    v, x = z[..., 0], z[..., 1:]
    return dist.Normal(0.0, SCALE).log_prob(v) + dist.Normal(0.0, (0.5 * v).exp().unsqueeze(-1)).log_prob(x).sum(-1)


def draws(count: int, seed: int = 0) -> Tensor:
    """Independent draws ``(count, 10)``."""
    e = torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v = SCALE * e[:, :1]
    return torch.cat([v, (0.5 * v).exp() * e[:, 1:]], -1)


def data() -> tuple[()]:
    """None: the target is the density itself."""
    return ()
