r"""Forbes' law: boiling point of water and barometric pressure in the Alps and Scotland; Bayesian linear regression.

With a known noise scale the posterior is Gaussian and the evidence known: for design X = (1, t), prior scales S and
noise s, the posterior has precision X'X / s^2 + S^-2. Temperatures are in units of 5 F above 200 F, so that intercept
and slope are correlated in the posterior.
Source: Forbes (1857), Transactions of the Royal Society of Edinburgh 21; Weisberg (2005), "Applied Linear Regression",
table 1.1.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

FAHRENHEIT = (194.5, 194.3, 197.9, 198.4, 199.4, 199.9, 200.9, 201.1, 201.4)
FAHRENHEIT += (201.3, 203.6, 204.6, 209.5, 208.6, 210.7, 211.9, 212.2)
INCHES = (20.79, 20.79, 22.40, 22.67, 23.15, 23.35, 23.89, 23.99, 24.02)
INCHES += (24.01, 25.14, 26.57, 28.49, 27.76, 29.04, 29.88, 30.06)
PRIOR = (20.0, 10.0)
NOISE = 1.0
"""Scale of 100 log10(pressure) about the line, wider than the 0.4 of least squares: station 12 is an outlier."""


def model(temperature: Tensor, pressure: Tensor) -> None:
    """alpha ~ N(0, 20), beta ~ N(0, 10), pressure_n ~ N(alpha + beta temperature_n, 1); ``(17,)``."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, PRIOR[0]))
    beta = pyro.sample("beta", dist.Normal(0.0, PRIOR[1]))
    with pyro.plate("station", len(temperature)):
        pyro.sample("pressure", dist.Normal(alpha + beta * temperature, NOISE), obs=pressure)


def data() -> tuple[Tensor, Tensor]:
    """Temperatures in units of 5 F above 200 F, and 100 log10(pressure) less its value at 24 inches."""
    temperature = (torch.tensor(FAHRENHEIT, dtype=torch.float64) - 200) / 5
    return temperature, 100 * (torch.tensor(INCHES, dtype=torch.float64) / 24).log10()


def posterior(temperature: Tensor, pressure: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(2,)`` and covariance ``(2, 2)`` of (alpha, beta)."""
    design = torch.stack([torch.ones_like(temperature), temperature], -1)
    precision = design.T @ design / NOISE**2 + torch.diag(torch.tensor(PRIOR, dtype=design.dtype) ** -2)
    covariance = torch.linalg.inv(precision)
    return covariance @ design.T @ pressure / NOISE**2, covariance


def log_evidence(temperature: Tensor, pressure: Tensor) -> Tensor:
    """The exact log p(pressure), in nats, ``()``."""
    design = torch.stack([torch.ones_like(temperature), temperature], -1)
    spread = design @ torch.diag(torch.tensor(PRIOR, dtype=design.dtype) ** 2) @ design.T
    covariance = spread + NOISE**2 * torch.eye(len(design), dtype=design.dtype)
    return dist.MultivariateNormal(torch.zeros_like(pressure), covariance).log_prob(pressure)
