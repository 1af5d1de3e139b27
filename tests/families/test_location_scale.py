"""Gaussian families: one density by two routes, the right start, and the right fit of a Gaussian target."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy import integrate
from torch import Tensor

from bbvi_conv.engine import Stream, make_engine, start_carry
from bbvi_conv.families import FAMILIES, FullRank, MeanField
from bbvi_conv.families.full_rank import TrilNormal
from bbvi_conv.families.mean_field import DiagonalNormal
from bbvi_conv.objectives import ELBO
from bbvi_conv.optim import Adam, CosineDecay
from bbvi_conv.program.build import build
from bbvi_conv.program.trace import TracedLogWeights

ALL = pytest.mark.parametrize("family", [MeanField(), FullRank()], ids=["mean-field", "full-rank"])


def diagonal() -> DiagonalNormal:
    return DiagonalNormal(torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 2.0]).double())


def tril() -> TrilNormal:
    lower = torch.tensor([[0.0, 0.0], [-1.4, 0.0]]).double()
    return TrilNormal(torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 2.0]).double(), lower)


def reference(q: Any) -> torch.distributions.Distribution:
    """The same law by torch's own class, factorised coordinates summed."""
    if isinstance(q, TrilNormal):
        return torch.distributions.MultivariateNormal(q.loc, scale_tril=torch.diag(q.scale) + q.lower)
    return torch.distributions.Independent(torch.distributions.Normal(q.loc, q.scale), 1)


@pytest.mark.parametrize("make", [diagonal, tril])
def test_log_q_from_the_noise_by_path_and_by_torch(make) -> None:
    q, torch_q = make(), reference(make())
    torch.manual_seed(0)
    for shape in ((), (5,)):
        value = q.rsample(torch.Size(shape))
        at_draw, elsewhere = (q.log_prob(v) for v in (value, value.clone()))
        if make is diagonal:
            at_draw, elsewhere = at_draw.sum(-1), elsewhere.sum(-1)
        torch.testing.assert_close(at_draw, torch_q.log_prob(value), rtol=1e-12, atol=0)
        torch.testing.assert_close(elsewhere, torch_q.log_prob(value), rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [diagonal, tril])
def test_draws_have_the_mean_and_the_covariance(make) -> None:
    q, torch_q = make(), reference(make())
    torch.manual_seed(1)
    z = q.rsample(torch.Size([20_000]))
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance(torch_q)), (z - torch_q.mean).T, upper=False
    )
    assert (whitened.mean(1).abs() < 4 / 20_000**0.5).all()
    products = whitened[:, None] * whitened[None]
    stderr = products.std(-1) / 20_000**0.5
    assert ((products.mean(-1) - torch.eye(2)).abs() < 4 * stderr).all()


def covariance(q: Any) -> Tensor:
    return q.covariance_matrix if hasattr(q, "covariance_matrix") else torch.diag(q.variance)


@pytest.mark.parametrize("make", [diagonal, tril])
def test_density_integrates_to_one(make) -> None:
    q = make()
    grid = torch.linspace(-16, 16, 641, dtype=torch.float64)
    points = torch.cartesian_prod(grid * 0.25, grid)
    log_q = q.log_prob(points).sum(-1) if make is diagonal else q.log_prob(points)
    total = integrate.simpson(
        integrate.simpson(log_q.exp().reshape(641, 641).numpy(), x=grid.numpy()), x=0.25 * grid.numpy()
    )
    assert total == pytest.approx(1, abs=1e-8)


@ALL
@pytest.mark.parametrize(
    ("support", "low", "high"),
    [
        (constraints.real, -8.0, 8.0),
        (constraints.positive, 0.0, 40.0),
        (constraints.interval(-1.0, 2.0), -1.0, 2.0),
        (constraints.greater_than(1.0), 1.0, 40.0),
    ],
    ids=["real", "positive", "interval", "greater-than"],
)
def test_density_of_a_constrained_site_integrates_to_one(family, support: Any, low: float, high: float) -> None:
    """log q(z) of ``Terms`` at draws on a grid of noise, as a density in z by the change of variables."""

    def model() -> None:
        pyro.sample("z", dist.ImproperUniform(support, (), ()))

    program = build(model, None, (), family=type(family)(init_scale=0.6), dtype=torch.float64)
    eps = torch.linspace(-9, 9, 721, dtype=torch.float64)
    theta, phi = program.split(program.initial())
    graph, batch = TracedLogWeights(program), program.batch(None)
    z, log_q = [], []
    for e in eps:
        noise = program.example()[0]._replace(normal=e.reshape(1))
        z.append(float(program.site_values(program.initial(), noise, batch).latent["z"]))
        log_q.append(float(graph(theta, phi, phi, noise, batch).log_q))
    assert low <= min(z)
    assert max(z) <= high * (1 if math.isfinite(high) and high < 40 else 10)
    assert np.trapezoid(np.exp(log_q), z) == pytest.approx(1, abs=1e-4)


@ALL
def test_starts_at_improper_uniform_and_where_the_prior_has_no_mean(family) -> None:
    def model() -> None:
        pyro.sample("flat", dist.ImproperUniform(constraints.real, (), (2,)))
        pyro.sample("positive", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("heavy", dist.HalfCauchy(3.0))
        pyro.sample("location", dist.Normal(7.0, 0.001))

    program = build(model, None, (), family=type(family)(init_scale=1e-6), dtype=torch.float64)
    noise, batch = program.example()
    latent = program.site_values(program.initial(), noise, batch).latent
    torch.testing.assert_close(latent["flat"], torch.zeros(2).double(), rtol=0, atol=1e-5)
    assert float(latent["positive"]) == pytest.approx(1, abs=1e-4)
    assert 1 < float(latent["heavy"]) < 9  # the median is 3
    assert float(latent["location"]) == pytest.approx(7, abs=0.01)


@ALL
def test_path_form_is_the_noise_form(family, shipped, moved, draw) -> None:
    module = shipped("eight_schools")
    program = build(module.model, None, module.data(), family=family)
    theta, phi = program.split(moved(program))
    noise, batch = draw(program), program.batch(None)
    for log_weights in (program.log_weights, TracedLogWeights(program)):
        own = log_weights(theta, phi, phi, noise, batch)
        path = log_weights(theta, phi, dict(phi), noise, batch)
        torch.testing.assert_close(own.log_q, path.log_q, rtol=1e-11, atol=0)
        torch.testing.assert_close(own.log_p, path.log_p, rtol=1e-12, atol=0)


MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.3, 0.5, 2.0]], dtype=torch.float64)


def gaussian() -> None:
    a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), (2,)))
    b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
    z = torch.cat([a, b.reshape(1)])
    pyro.factor("target", dist.MultivariateNormal(MEAN, scale_tril=FACTOR).log_prob(z))


def fitted(family: Any, seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the fit; z is affine in the noise, so a few draws tell both exactly."""
    program = build(gaussian, None, (), family=family, dtype=torch.float64)
    rule, objective = Adam(CosineDecay(0.1, steps)), ELBO(2, "sticking-the-landing")
    engine, stream = make_engine("traced", program, objective, rule), Stream(program, seed, "optimise", 2)
    carry, _ = engine.advance(start_carry(rule, program.initial()), stream, 0, steps)
    rows = []
    for eps in (torch.zeros(3), *torch.eye(3)):
        noise = program.example()[0]._replace(normal=eps.double())
        latent = program.site_values(carry.x, noise, program.batch(None)).latent
        rows.append(torch.cat([latent["a"], latent["b"].reshape(1)]))
    factor = torch.stack(rows[1:], 1) - rows[0][:, None]
    return rows[0], factor @ factor.T


def test_full_rank_finds_a_gaussian_target_exactly() -> None:
    mean, cov = fitted(FullRank(), 0, 1500)  # sticking the landing has no noise left at the target
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=1e-5)
    torch.testing.assert_close(cov, FACTOR @ FACTOR.T, rtol=0, atol=1e-5)


def test_mean_field_finds_the_mean_and_the_inverse_diagonal_of_the_precision() -> None:
    fits = [fitted(MeanField(), seed, 400) for seed in range(5)]
    precision = torch.linalg.inv(FACTOR @ FACTOR.T)
    means, log_vars = torch.stack([mean for mean, _ in fits]), torch.stack([cov.diagonal().log() for _, cov in fits])
    for found, exact in ((means, MEAN), (log_vars, -precision.diagonal().log())):
        stderr = found.std(0) / 5**0.5
        assert (stderr < 0.05).all()
        assert ((found.mean(0) - exact).abs() < 5 * stderr).all()
    assert (precision.diagonal().log()[:2] > 1).all()  # power: the marginal variances of a are 1


@pytest.mark.parametrize("name", [n for n, make in FAMILIES.items() if "init_scale" in signature(make).parameters])
def test_bad_scales(name: str) -> None:
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"init_scale must be positive and finite, got {bad}"):
            FAMILIES[name](init_scale=bad)


def test_full_rank_cannot_stand_in_a_plate() -> None:
    with pytest.raises(ValueError, match="packs all sites into one vector"):
        tril().expand(torch.Size([3]))
