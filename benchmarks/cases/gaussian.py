"""Eight schools, Gaussian-process regression and a model of many latents."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bbvi_conv.model_file import load_model
from benchmarks.case import Case, Twin
from benchmarks.families import FULL_RANK, MEAN_FIELD


def eight_schools() -> Case:
    """The shipped model, non-centered, full-rank Gaussian."""
    shipped = load_model("eight_schools")
    args = tuple(a.float() for a in shipped.args)

    def twin() -> Twin:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as npd
        from numpyro.infer import Trace_ELBO
        from numpyro.infer.autoguide import AutoMultivariateNormal

        def model(y: Any, sigma: Any) -> None:
            mu = numpyro.sample("mu", npd.Normal(0.0, 5.0))
            tau = numpyro.sample("tau", npd.HalfCauchy(5.0))
            with numpyro.plate("school", len(y)):
                theta_trans = numpyro.sample("theta_trans", npd.Normal(0.0, 1.0))
                numpyro.sample("y", npd.Normal(mu + tau * theta_trans, sigma), obs=y)

        return Twin(model, AutoMultivariateNormal(model), tuple(jnp.asarray(a.numpy()) for a in args), Trace_ELBO())

    return Case(model=shipped.model, args=args, twin=twin, **FULL_RANK)


def gaussian_process(points: int = 200) -> Case:
    """y ~ N(0, s^2 exp(-|x - x'|^2 / (2 l^2)) + n^2 I) at 200 points; l, s, n log-normal; f is integrated out.

    A Cholesky factor of 200 x 200 in every step; mean-field Gaussian over the three logarithms.
    """
    gen = torch.Generator().manual_seed(0)
    x = torch.linspace(-2, 2, points)
    y = torch.sin(3 * x) + 0.3 * torch.randn(points, generator=gen)
    squared = (x[:, None] - x[None]).square()

    def model(squared: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        height = pyro.sample("height", dist.LogNormal(0.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
        cov = height**2 * torch.exp(-0.5 * squared / length**2) + noise**2 * torch.eye(len(y))
        tril = torch.linalg.cholesky_ex(cov)[0]
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)), scale_tril=tril), obs=y)

    def twin() -> Twin:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as npd
        from numpyro.infer import Trace_ELBO, init_to_value
        from numpyro.infer.autoguide import AutoNormal

        def model(squared: Any, y: Any) -> None:
            length = numpyro.sample("length", npd.LogNormal(0.0, 1.0))
            height = numpyro.sample("height", npd.LogNormal(0.0, 1.0))
            noise = numpyro.sample("noise", npd.LogNormal(-1.0, 0.5))
            cov = height**2 * jnp.exp(-0.5 * squared / length**2) + noise**2 * jnp.eye(len(y))
            tril = jnp.linalg.cholesky(cov)
            numpyro.sample("y", npd.MultivariateNormal(jnp.zeros(len(y)), scale_tril=tril), obs=y)

        start = init_to_value(values={"length": 1.0, "height": 1.0, "noise": 0.4})
        guide = AutoNormal(model, init_loc_fn=start)
        return Twin(model, guide, (jnp.asarray(squared.numpy()), jnp.asarray(y.numpy())), Trace_ELBO())

    return Case(model=model, args=(squared, y), twin=twin, steps=256, **MEAN_FIELD)


def many_latents(count: int = 10_000) -> Case:
    """z_i ~ N(0, 1), y_i ~ Poisson(exp(mu + z_i / 2)), mu ~ N(0, 2); mean-field Gaussian over all of them."""
    gen = torch.Generator().manual_seed(0)
    y = torch.poisson(torch.exp(1 + 0.5 * torch.randn(count, generator=gen)), generator=gen)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Poisson(torch.exp(mu + 0.5 * z)), obs=y)

    def twin() -> Twin:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as npd
        from numpyro.infer import Trace_ELBO
        from numpyro.infer.autoguide import AutoNormal

        def model(y: Any) -> None:
            mu = numpyro.sample("mu", npd.Normal(0.0, 2.0))
            with numpyro.plate("data", len(y)):
                z = numpyro.sample("z", npd.Normal(0.0, 1.0))
                numpyro.sample("y", npd.Poisson(jnp.exp(mu + 0.5 * z)), obs=y)

        return Twin(model, AutoNormal(model), (jnp.asarray(y.numpy()),), Trace_ELBO())

    return Case(model=model, args=(y,), twin=twin, steps=512, **MEAN_FIELD)
