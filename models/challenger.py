"""Challenger O-rings: did any primary O-ring show distress, given the temperature at launch; logistic regression.

The 23 launches before the accident of 28 January 1986 (31 F), temperatures standardised.
Source: Dalal, Fowlkes and Hoadley (1989), "Risk analysis of the space shuttle: pre-Challenger prediction of failure",
Journal of the American Statistical Association 84, table 1.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

# Flights 1 to 3 and 5 to 9, 41-B, 41-C, 41-D, 41-G, 51-A, 51-C, 51-D, 51-B, 51-G, 51-F, 51-I, 51-J, 61-A, 61-B, 61-C.
FAHRENHEIT = (66, 70, 69, 68, 67, 72, 73, 70, 57, 63, 70, 78, 67, 53, 67, 75, 70, 81, 76, 79, 75, 76, 58)
DISTRESS = (0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1)


def model(temperature: Tensor, distress: Tensor) -> None:
    """alpha ~ N(0, 5), beta ~ N(0, 2.5), distress_n ~ Bernoulli(sigmoid(alpha + beta temperature_n)); ``(23,)``."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 2.5))
    with pyro.plate("launch", len(temperature)):
        pyro.sample("distress", dist.Bernoulli(logits=alpha + beta * temperature), obs=distress)


def data() -> tuple[Tensor, Tensor]:
    """Standardised temperatures (mean 0, sample standard deviation 1) and distress (1) or none (0)."""
    temperature = torch.tensor(FAHRENHEIT, dtype=torch.float64)
    return (temperature - temperature.mean()) / temperature.std(), torch.tensor(DISTRESS, dtype=torch.float64)
