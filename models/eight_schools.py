"""Eight schools: effects of coaching on test scores, non-centered (`model`) and centered (`centered`).

Both have the same posterior over mu, tau and theta. The centered one is a funnel that no Gaussian fits well; the
non-centered one samples theta_trans ~ N(0, 1) and derives theta = mu + tau theta_trans.
Source: Rubin (1981), "Estimation in parallel randomized experiments", Journal of Educational Statistics 6.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def model(y: Tensor, sigma: Tensor) -> None:
    """mu ~ N(0, 5), tau ~ HalfCauchy(5), theta_j ~ N(mu, tau), y_j ~ N(theta_j, sigma_j); inputs ``(8,)``."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def centered(y: Tensor, sigma: Tensor) -> None:
    """The same model with theta_j ~ N(mu, tau) sampled itself."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def data() -> tuple[Tensor, Tensor]:
    """Estimated effects and their standard errors, points on the SAT-V, schools A to H."""
    y = torch.tensor([28, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
    sigma = torch.tensor([15, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
    return y, sigma
