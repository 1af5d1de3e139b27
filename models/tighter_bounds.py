"""Gaussian model with an amortized affine guide, in which evidence, gradients and weights are known exactly.

For each datum n, in D dimensions, with theta = mu, phi = (A, b) and the guide's variance s^2 = 2/3 fixed,

    z_n ~ N(mu, I),   x_n | z_n ~ N(z_n, I),   q(z_n | x_n) = N(A x_n + b, s^2 I),
    log p(x_n) = log N(x_n; mu, 2 I),   p(z_n | x_n) = N((x_n + mu) / 2, I / 2).

The best parameters are mu* = the mean of x, A* = I / 2, b* = mu* / 2, for the ELBO and for every tighter bound. With
d_n = A x_n + b - (x_n + mu) / 2 and z_n = A x_n + b + s e_n the log weight is a quadratic in the noise e_n,

    log w_n = log p(x_n) + D log(sqrt(2) s) - |d_n|^2 - 2 s d_n'e_n - (s^2 - 1/2) |e_n|^2,
    E[w_n^2] / E[w_n]^2 = (2 s^2)^D (4 s^2 - 1)^(-D/2) exp(2 |d_n|^2 / (4 s^2 - 1)).

Source: Rainforth et al. (2018), "Tighter variational bounds are not necessarily better", section 4 and appendix B,
https://arxiv.org/abs/1802.04537. The guide starts at A = I / 2, b = 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import bbvi_conv as bc

VARIANCE = 2 / 3
"""s^2, the variance of the guide in each dimension; the posterior's is 1/2."""

fit = {"minibatch": bc.Minibatch(64, plate="data")}


class Parameters(NamedTuple):
    """theta = ``mu`` ``(D,)``; phi = ``A`` ``(D, D)`` and ``b`` ``(D,)``."""

    mu: Tensor
    A: Tensor
    b: Tensor


def model(x: Tensor) -> None:
    """z_n ~ N(mu, I), x_n ~ N(z_n, I); ``x``: ``(B, D)``."""
    mu = pyro.param("mu", lambda: x.new_zeros(x.shape[-1]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    """q(z_n | x_n) = N(A x_n + b, s^2 I); ``x``: ``(B, D)``."""
    slope = pyro.param("A", lambda: torch.eye(x.shape[-1], dtype=x.dtype) / 2)
    offset = pyro.param("b", lambda: x.new_zeros(x.shape[-1]))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ slope.T + offset, math.sqrt(VARIANCE)).to_event(1))


def data(size: int = 1024, dim: int = 20, seed: int = 0) -> tuple[Tensor]:
    """``size`` draws ``(size, dim)`` of the model at a mean that is itself drawn from N(0, I)."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(dim, generator=generator, dtype=torch.float64)
    return (mean + math.sqrt(2) * torch.randn(size, dim, generator=generator, dtype=torch.float64),)


def optimum(x: Tensor) -> Parameters:
    """mu*, A* and b* for the data ``x`` ``(N, D)``."""
    mean = x.mean(0)
    return Parameters(mean, torch.eye(x.shape[-1], dtype=x.dtype) / 2, mean / 2)


def near_optimum(x: Tensor, offset: float = 0.01, seed: int = 1) -> Parameters:
    """The optimum plus ``offset`` times a standard normal draw in every component."""
    generator = torch.Generator().manual_seed(seed)
    best = optimum(x)
    return Parameters(*(p + offset * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in best))


def log_evidence(x: Tensor, mu: Tensor) -> Tensor:
    """Exact log p(x_n), in nats, ``(N,)``."""
    return -(x - mu).square().sum(-1) / 4 - x.shape[-1] / 2 * math.log(4 * math.pi)


def relative_weight_variance(x: Tensor, parameters: Parameters, variance: float = VARIANCE) -> Tensor:
    """Exact Var[w_n] / E[w_n]^2, ``(N,)``, at the guide's ``variance`` s^2.

    Raises:
        ValueError: if s^2 is at most 1/4, where the weights have no variance.
    """
    if variance <= 0.25:
        raise ValueError(f"variance must exceed 1/4, else the weights have infinite variance, got {variance}")
    mu, slope, offset = parameters
    gap = x @ slope.T + offset - (x + mu) / 2
    width = 4 * variance - 1
    log_ratio = x.shape[-1] * (math.log(2 * variance) - math.log(width) / 2) + 2 * gap.square().sum(-1) / width
    return log_ratio.expm1()
