"""GARCH(1, 1): a recursion in the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import bbvi_conv as bc
from benchmarks.case import Case, Twin
from benchmarks.families import MEAN_FIELD


def _series(steps: int) -> Tensor:
    rng = np.random.default_rng(0)
    variance, y = 1.0, []
    for e in rng.standard_normal(steps):
        y.append(0.5 + variance**0.5 * e)
        variance = 0.2 + 0.3 * (y[-1] - 0.5) ** 2 + 0.5 * variance
    return torch.tensor(y, dtype=torch.float32)


def garch(steps: int = 200, *, device: str = "cpu") -> Case:
    """y_t ~ N(mu, s_t), s_t^2 = a0 + a1 (y_{t-1} - mu)^2 + b1 s_{t-1}^2, b1 = (1 - a1) share; mean-field Gaussian.

    Bollerslev (1986), "Generalized autoregressive conditional heteroskedasticity"; simulated series.
    """
    y = _series(steps)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        a0 = pyro.sample("a0", dist.HalfNormal(1.0))
        a1 = pyro.sample("a1", dist.Uniform(0.0, 1.0))
        share = pyro.sample("share", dist.Uniform(0.0, 1.0))

        def step(variance: Tensor, shock: Tensor) -> tuple[Tensor, Tensor]:
            following = a0 + a1 * shock + (1 - a1) * share * variance
            return following, following

        shocks = (y[:-1] - mu).square()
        _, variances = bc.scan(step, torch.ones(()), shocks)
        variances = torch.cat([torch.ones(1), variances])
        pyro.sample("y", dist.Normal(mu, variances.sqrt()).to_event(1), obs=y)

    def twin() -> Twin:
        import jax
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as npd
        from numpyro.infer import Trace_ELBO
        from numpyro.infer.autoguide import AutoNormal

        def model(y: Any) -> None:
            mu = numpyro.sample("mu", npd.Normal(0.0, 10.0))
            a0 = numpyro.sample("a0", npd.HalfNormal(1.0))
            a1 = numpyro.sample("a1", npd.Uniform(0.0, 1.0))
            share = numpyro.sample("share", npd.Uniform(0.0, 1.0))

            def step(variance: Any, shock: Any) -> tuple[Any, Any]:
                following = a0 + a1 * shock + (1 - a1) * share * variance
                return following, following

            _, variances = jax.lax.scan(step, 1.0, jnp.square(y[:-1] - mu))
            variances = jnp.concatenate([jnp.ones(1), variances])
            numpyro.sample("y", npd.Normal(mu, jnp.sqrt(variances)).to_event(1), obs=y)

        return Twin(model, AutoNormal(model), (jnp.asarray(y.numpy()),), Trace_ELBO())

    return Case(model=model, args=(y,), twin=twin, steps=512, pyro_steps=3, device=device, **MEAN_FIELD)
