"""Logistic regression and a hierarchical linear regression, mean-field Gaussians."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import bbvi_conv as bc
from benchmarks.case import Case, Twin
from benchmarks.families import MEAN_FIELD


def logistic(rows: int = 500, columns: int = 10, batch: int | None = None) -> Case:
    """beta ~ N(0, I), alpha ~ N(0, 5), y_n ~ Bernoulli(sigmoid(alpha + x_n beta)); simulated data."""
    gen = torch.Generator().manual_seed(0)
    X = torch.randn(rows, columns, generator=gen)
    beta = torch.randn(columns, generator=gen) / columns**0.5
    y = torch.bernoulli(torch.sigmoid(X @ beta), generator=gen)

    def model(X: Tensor, y: Tensor, scale: float = 1.0) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(columns), 1.0).to_event(1))
        with pyro.plate("data", len(X)), pyro.poutine.scale(scale=scale):
            pyro.sample("y", dist.Bernoulli(logits=alpha + X @ beta), obs=y)

    def scaled(factor: float) -> tuple[Any, Any]:
        def full(X: Tensor, y: Tensor) -> None:
            model(X, y, factor)

        return full, AutoNormal(full)

    def twin() -> Twin:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as npd
        from numpyro.infer import Trace_ELBO
        from numpyro.infer.autoguide import AutoNormal

        def model(X: Any, y: Any, rows: Any = None) -> None:
            alpha = numpyro.sample("alpha", npd.Normal(0.0, 5.0))
            beta = numpyro.sample("beta", npd.Normal(jnp.zeros(columns), 1.0).to_event(1))
            with numpyro.plate("data", len(X), subsample_size=batch) as drawn:
                if batch is not None:
                    taken = drawn if rows is None else rows
                    X, y = X[taken], y[taken]
                numpyro.sample("y", npd.Bernoulli(logits=alpha + X @ beta), obs=y)

        return Twin(model, AutoNormal(model), (jnp.asarray(X.numpy()), jnp.asarray(y.numpy())), Trace_ELBO())

    return Case(
        model=model,
        args=(X, y),
        twin=twin,
        minibatch=bc.Minibatch(batch, plate="data") if batch else None,
        scaled=scaled,
        **MEAN_FIELD,
    )


def hierarchical(groups: int = 85, rows: int = 919) -> Case:
    """Varying intercepts with a group-level predictor, non-centered: the shape of the radon data; simulated.

    a_j = mu + gamma u_j + tau e_j, e_j ~ N(0, 1), y_n ~ N(a_{j(n)} + beta x_n, sigma); mu, beta, gamma ~ N(0, 10), tau,
    sigma ~ HalfNormal(1). Source of the shape: Gelman and Hill (2007), chapter 12.
    """
    gen = torch.Generator().manual_seed(0)
    group = torch.cat([torch.arange(groups), torch.randint(groups, (rows - groups,), generator=gen)])
    floor = torch.bernoulli(torch.full((rows,), 0.2), generator=gen)
    level = torch.randn(groups, generator=gen)
    intercept = 1.4 + 0.7 * level + 0.3 * torch.randn(groups, generator=gen)
    y = intercept[group] - 0.6 * floor + 0.8 * torch.randn(rows, generator=gen)

    def model(group: Tensor, floor: Tensor, level: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
        gamma = pyro.sample("gamma", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("group", len(level)):
            e = pyro.sample("e", dist.Normal(0.0, 1.0))
        a = mu + gamma * level + tau * e
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a[group] + beta * floor, sigma), obs=y)

    def twin() -> Twin:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as npd
        from numpyro.infer import Trace_ELBO
        from numpyro.infer.autoguide import AutoNormal

        def model(group: Any, floor: Any, level: Any, y: Any) -> None:
            mu = numpyro.sample("mu", npd.Normal(0.0, 10.0))
            beta = numpyro.sample("beta", npd.Normal(0.0, 10.0))
            gamma = numpyro.sample("gamma", npd.Normal(0.0, 10.0))
            tau = numpyro.sample("tau", npd.HalfNormal(1.0))
            sigma = numpyro.sample("sigma", npd.HalfNormal(1.0))
            with numpyro.plate("group", len(level)):
                e = numpyro.sample("e", npd.Normal(0.0, 1.0))
            a = mu + gamma * level + tau * e
            with numpyro.plate("data", len(y)):
                numpyro.sample("y", npd.Normal(a[group] + beta * floor, sigma), obs=y)

        args = tuple(jnp.asarray(a.numpy()) for a in (group, floor, level, y))
        return Twin(model, AutoNormal(model), args, Trace_ELBO())

    return Case(model=model, args=(group, floor, level, y), twin=twin, **MEAN_FIELD)
