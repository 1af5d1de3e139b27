"""Draws from the noise tape follow the right law, repeat for the same noise, and carry the right gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from bbvi_conv.program import Noise, NoiseLayout
from bbvi_conv.program.build import build
from bbvi_conv.program.tape import GAMMA_ROUNDS, Tape, is_random, taped

N = 4000
P_VALUE = 1e-4
"""A right law fails one of these tests with this probability; its seed is fixed."""

Make = Callable[[], Any]


def t(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


# Name: distribution, and the law of its (first) coordinate.
BY_INVERSE_CDF: dict[str, tuple[Make, Any]] = {
    "normal": (lambda: dist.Normal(t(1.0), t(2.0)), stats.norm(1, 2)),
    "log-normal": (lambda: dist.LogNormal(t(0.2), t(0.7)), stats.lognorm(0.7, scale=math.exp(0.2))),
    "half-normal": (lambda: dist.HalfNormal(t(1.5)), stats.halfnorm(0, 1.5)),
    "uniform": (lambda: dist.Uniform(t(-1.0), t(3.0)), stats.uniform(-1, 4)),
    "exponential": (lambda: dist.Exponential(t(2.0)), stats.expon(scale=0.5)),
    "laplace": (lambda: dist.Laplace(t(1.0), t(2.0)), stats.laplace(1, 2)),
    "cauchy": (lambda: dist.Cauchy(t(1.0), t(2.0)), stats.cauchy(1, 2)),
    "half-cauchy": (lambda: dist.HalfCauchy(t(2.0)), stats.halfcauchy(0, 2)),
    "gumbel": (lambda: dist.Gumbel(t(1.0), t(2.0)), stats.gumbel_r(1, 2)),
    "weibull": (lambda: dist.Weibull(t(2.0), t(1.5)), stats.weibull_min(1.5, scale=2)),
    "pareto": (lambda: dist.Pareto(t(1.0), t(3.0)), stats.pareto(3)),
    "logistic": (lambda: dist.Logistic(t(1.0), t(2.0)), stats.logistic(1, 2)),
    "kumaraswamy": (lambda: dist.Kumaraswamy(t(1.0), t(3.0)), stats.beta(1, 3)),
    "multivariate-normal": (
        lambda: dist.MultivariateNormal(t(1.0, 0.0), t(4.0, 1.0, 1.0, 2.0).reshape(2, 2)),
        stats.norm(1, 2),
    ),
    "low-rank": (
        lambda: dist.LowRankMultivariateNormal(t(1.0, 0.0), t(1.0, 1.0)[:, None], t(3.0, 1.0)),
        stats.norm(1, 2),
    ),
    "relaxed-bernoulli": (lambda: dist.RelaxedBernoulliStraightThrough(t(0.5), probs=t(0.3)), stats.bernoulli(0.3)),
}
BY_GAMMA: dict[str, tuple[Make, Any]] = {
    "gamma-0.3": (lambda: dist.Gamma(t(0.3), t(2.0)), stats.gamma(0.3, scale=0.5)),
    "gamma-1": (lambda: dist.Gamma(t(1.0), t(2.0)), stats.gamma(1, scale=0.5)),
    "gamma-5": (lambda: dist.Gamma(t(5.0), t(2.0)), stats.gamma(5, scale=0.5)),
    "inverse-gamma": (lambda: dist.InverseGamma(t(3.0), t(2.0)), stats.invgamma(3, scale=2)),
    "chi2": (lambda: dist.Chi2(t(3.0)), stats.chi2(3)),
    "beta": (lambda: dist.Beta(t(0.7), t(2.0)), stats.beta(0.7, 2)),
    "dirichlet": (lambda: dist.Dirichlet(t(0.5, 1.0, 2.0)), stats.beta(0.5, 3)),
    "student-t": (lambda: dist.StudentT(t(4.0), t(1.0), t(2.0)), stats.t(4, 1, 2)),
    "fisher-snedecor": (lambda: dist.FisherSnedecor(t(5.0), t(7.0)), stats.f(5, 7)),
    # The off-diagonal entry of a 2 x 2 factor is the correlation: its law is 2 Beta(eta, eta) - 1.
    "lkj": (lambda: dist.LKJCholesky(2, t(1.5)), stats.beta(1.5, 1.5, -1, 2)),
}
DISCRETE: dict[str, tuple[Make, Any]] = {
    "bernoulli": (lambda: dist.Bernoulli(t(0.3)), stats.bernoulli(0.3)),
    "categorical": (lambda: dist.Categorical(t(0.2, 0.5, 0.3)), stats.rv_discrete(values=((0, 1, 2), (0.2, 0.5, 0.3)))),
    "geometric": (lambda: dist.Geometric(t(0.4)), stats.geom(0.4, -1)),
}


def first(name: str, value: Tensor) -> Tensor:
    """The coordinate whose law the table names."""
    if name == "lkj":
        return value[..., 1, 0]
    return value[..., 0] if name in ("multivariate-normal", "low-rank", "dirichlet") else value


def sample(make: Make, size: int, noise: Noise | None = None, seed: int = 0) -> tuple[Tensor, Tape]:
    """``size`` draws from given noise, or from fresh noise of the right layout."""
    with taped(Tape(None, {})) as counted:
        make().expand_by([size]).sample()
    if noise is None:
        noise = counted.used.draw(torch.Generator().manual_seed(seed), dtype=torch.float64)
    tape = Tape(noise, {})
    with taped(tape):
        return make().expand_by([size])(), tape


@pytest.mark.parametrize("name", {**BY_INVERSE_CDF, **BY_GAMMA})
def test_law_of_continuous_draws(name: str) -> None:
    make, law = {**BY_INVERSE_CDF, **BY_GAMMA}[name]
    value, tape = sample(make, N)
    assert not tape.untaped
    assert tape.implicit == (name in BY_GAMMA)
    drawn = first(name, value).numpy()
    if name == "relaxed-bernoulli":
        assert stats.binomtest(int(drawn.sum()), N, 0.3).pvalue > P_VALUE
        return
    assert stats.kstest(drawn, law.cdf).pvalue > P_VALUE
    # Power: the same draws moved by 0.15 of a quartile range are found out.
    shift = 0.15 * (law.ppf(0.75) - law.ppf(0.25))
    assert stats.kstest(drawn + shift, law.cdf).pvalue < P_VALUE


@pytest.mark.parametrize("name", DISCRETE)
def test_law_of_discrete_draws(name: str) -> None:
    make, law = DISCRETE[name]
    value, tape = sample(make, N)
    assert not tape.untaped
    seen = torch.bincount(value.long(), minlength=3)[:3].numpy()
    expected = N * law.pmf([0, 1, 2])
    seen, expected = [*seen, N - seen.sum()], [*expected, N - expected.sum()]
    kept = [i for i in range(4) if expected[i] > 1]
    assert stats.chisquare([seen[i] for i in kept], [expected[i] for i in kept]).pvalue > P_VALUE
    assert stats.chisquare([seen[i] for i in kept], [N / len(kept)] * len(kept)).pvalue < P_VALUE  # power


@pytest.mark.parametrize("name", {**BY_INVERSE_CDF, **BY_GAMMA, **DISCRETE})
def test_same_noise_same_draws_whatever_torch_has_drawn(name: str) -> None:
    make, _ = {**BY_INVERSE_CDF, **BY_GAMMA, **DISCRETE}[name]
    _, tape = sample(make, 5)
    one, two = sample(make, 5, seed=1)[0], sample(make, 5, seed=2)[0]
    torch.rand(3)
    assert torch.equal(sample(make, 5, seed=1)[0], one)
    assert name in DISCRETE or name == "relaxed-bernoulli" or not torch.equal(one, two)
    assert tape.used.normal + tape.used.uniform > 0


# Mean of a function of the draw, its exact derivative in the concentration.
IMPLICIT: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Tensor], Tensor, Tensor]] = {
    "gamma-0.3": (lambda a: dist.Gamma(a, t(1.0)), lambda z: z, t(0.3), t(1.0)),
    "gamma-1": (lambda a: dist.Gamma(a, t(1.0)), lambda z: z, t(1.0), t(1.0)),
    "gamma-5": (lambda a: dist.Gamma(a, t(1.0)), lambda z: z**2, t(5.0), t(11.0)),
    "chi2": (dist.Chi2, lambda z: z, t(3.0), t(1.0)),
    "beta": (lambda a: dist.Beta(a, t(2.0)), lambda z: z, t(0.7), t(2 / 2.7**2)),
    "dirichlet": (
        lambda a: dist.Dirichlet(torch.stack([a, torch.ones_like(a), 2 * torch.ones_like(a)], -1)),
        lambda z: z[..., 1],
        t(0.5),
        t(-1 / 3.5**2),
    ),
    # E z = b / (a - 1), whose derivative is -b / (a - 1)^2.
    "inverse-gamma": (lambda a: dist.InverseGamma(a, t(2.0)), lambda z: z, t(6.0), t(-2 / 25)),
}


@pytest.mark.parametrize("name", IMPLICIT)
def test_implicit_gradient_of_a_mean(name: str) -> None:
    make, function, at, exact = IMPLICIT[name]
    alpha = at.expand(N).clone().requires_grad_()
    rows = []
    for seed in range(3):
        value, _ = sample(lambda: make(alpha), 1, seed=seed)
        rows.append(torch.autograd.grad(function(value).sum(), alpha)[0])
    grads = torch.cat(rows)
    stderr = grads.std() / len(grads) ** 0.5
    assert stderr < 0.1 * exact.abs()  # power: a lost or doubled gradient is ten standard errors away
    assert abs(grads.mean() - exact) < 4 * stderr


@pytest.mark.parametrize("name", ["gamma", "beta", "dirichlet", "student-t", "weibull", "inverse-gamma"])
def test_gamma_like_guides_trace_to_the_same_gradient(name: str, agrees_with_pyro) -> None:
    def prior() -> Any:
        return dist.Dirichlet(torch.ones(3)) if name == "dirichlet" else dist.LogNormal(0.0, 1.0)

    def model(y: Tensor) -> None:
        support = dist.Beta(1.0, 1.0) if name == "beta" else dist.Normal(0.0, 1.0) if name == "student-t" else prior()
        z = pyro.sample("z", support)
        pyro.sample("y", dist.Normal(z.sum() if name != "dirichlet" else z[0], 1.0), obs=y)

    def guide(y: Tensor) -> None:
        a = pyro.param(
            "a", torch.tensor([0.6, 1.5, 2.0] if name == "dirichlet" else 2.2), constraint=dist.constraints.positive
        )
        b = pyro.param("b", torch.tensor(1.4), constraint=dist.constraints.positive)
        kinds = {
            "gamma": lambda: dist.Gamma(a, b),
            "beta": lambda: dist.Beta(a, b),
            "dirichlet": lambda: dist.Dirichlet(a * b),
            "student-t": lambda: dist.StudentT(a, b, 1.0),
            "weibull": lambda: dist.Weibull(a, b),
            "inverse-gamma": lambda: dist.InverseGamma(a, b),
        }
        pyro.sample("z", kinds[name]())

    program = build(model, guide, (t(0.4),), dtype=torch.float64)
    assert program.implicit == (name != "weibull")
    agrees_with_pyro(program)


def test_the_tape_holds_exactly_what_is_drawn() -> None:
    _, tape = sample(lambda: dist.Normal(t(0.0), t(1.0)).expand([3]), 4)
    assert tape.used == (12, 0)
    _, tape = sample(lambda: dist.Gamma(t(2.0), t(1.0)), 4)
    assert tape.used == (4 * GAMMA_ROUNDS, 4 * (GAMMA_ROUNDS + 1))


def test_a_random_operation_is_known_by_its_tag() -> None:
    assert is_random("poisson")
    assert is_random("randn")
    assert is_random("_standard_gamma")
    assert not is_random("add")
    assert not is_random("zeros")
    tape = Tape(None, {})
    with taped(tape):
        torch.poisson(torch.ones(3))
    assert tape.untaped == {"poisson"}


def test_uniforms_stay_inside_the_open_interval() -> None:
    many = NoiseLayout(0, 200_000).draw(torch.Generator().manual_seed(0), dtype=torch.float16).uniform
    assert many.min() > 0  # half precision rounds some of 200,000 uniforms to 0
    assert many.max() < 1
    ends = torch.tensor([torch.finfo(torch.float32).tiny, 1 - torch.finfo(torch.float32).eps])
    with taped(Tape(Noise(torch.zeros(0), ends), {})):
        value = dist.Gumbel(torch.zeros(2), 1.0).sample()
    assert torch.isfinite(value).all()
