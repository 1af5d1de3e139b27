r"""Two modes: unit Gaussians in the plane, 8 standard deviations apart, of weights 0.3 and 0.7.

    p(z) = 0.3 N(z; (-4, 0), I) + 0.7 N(z; (4, 0), I):   the evidence is one.

What a family of one mode loses at best is about -log 0.7 = 0.36 nats. Source: the mixture targets of Morningstar et al.
(2021), "Automatic differentiation variational inference with mixtures", https://arxiv.org/abs/2003.01687, simplified.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

WEIGHTS, DISTANCE = (0.3, 0.7), 8.0


def model() -> None:
    """Both coordinates as one site on the plane."""
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    pyro.factor("target", log_density(z))


def log_density(z: Tensor) -> Tensor:
    """log p, in nats, ``z``: ``(..., 2)``."""
    x, y = z.unbind(-1)
    unit = dist.Normal(0.0, 1.0)
    modes = [math.log(w) + unit.log_prob(x - s * DISTANCE / 2) for w, s in zip(WEIGHTS, (-1, 1), strict=True)]
    return torch.stack(modes, -1).logsumexp(-1) + unit.log_prob(y)


def draws(count: int, seed: int = 0) -> Tensor:
    """Independent draws ``(count, 2)``."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    side = torch.where(torch.rand(count, generator=generator) < WEIGHTS[0], -1.0, 1.0)
    z[:, 0] += side * DISTANCE / 2
    return z


def data() -> tuple[()]:
    """None: the target is the density itself."""
    return ()
