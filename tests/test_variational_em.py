"""Variational EM on the linear VAE, where the best factors, both gaps and the best parameters are known exactly."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import bbvi_conv as bc
from bbvi_conv import evaluate
from bbvi_conv.evaluate.gaps import _elbo
from bbvi_conv.evaluate.subject import Subject
from bbvi_conv.optim import SGD, Constant, Within

D, LATENT, N, SIGMA = 6, 2, 9, 0.7
GENERATOR = torch.Generator().manual_seed(5)
W = torch.randn(D, LATENT, generator=GENERATOR, dtype=torch.float64)
X = torch.randn(N, D, generator=GENERATOR, dtype=torch.float64)
PRECISION = W.T @ W / SIGMA**2 + torch.eye(LATENT, dtype=torch.float64)
MEAN = torch.linalg.solve(PRECISION, W.T) / SIGMA**2
LOG_P = dist.MultivariateNormal(
    torch.zeros(D, dtype=torch.float64), W @ W.T + SIGMA**2 * torch.eye(D, dtype=torch.float64)
).log_prob(X)
APPROXIMATION = 0.5 * float(PRECISION.diagonal().log().sum() - torch.linalg.slogdet(PRECISION).logabsdet)
"""KL of the best factorised Gaussian, whose precisions are the diagonal of the posterior's, to the posterior."""


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.to(x).T, SIGMA).to_event(1), obs=x)


SLOPE = MEAN + 0.1
SCALE = 1.2 * PRECISION.diagonal().rsqrt()


def guide(x: Tensor) -> None:
    """A factorised encoder that is somewhat off."""
    slope = pyro.param("slope", lambda: SLOPE.to(x))
    scale = pyro.param("scale", lambda: SCALE.to(x), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ slope.T, scale).to_event(1))


def amortization() -> Tensor:
    """L[q*] - L[q_phi] per datum ``(N,)``: the KLs to the posterior of both."""
    gap = X @ (SLOPE - MEAN).T
    quadratic = 0.5 * ((gap @ PRECISION) * gap).sum(-1)
    widths = 0.5 * (PRECISION.diagonal() * SCALE**2 - 1 - (PRECISION.diagonal() * SCALE**2).log()).sum()
    return quadratic + widths


@pytest.mark.parametrize(("gradient", "until"), [("pathwise", "elbo"), ("score-function", "parameters")])
def test_an_e_step_finds_the_best_factors(gradient: Any, until: Any) -> None:
    """The bound of every datum is log p(x_n) less the exact approximation gap, within 0.01 nat; the score function's
    draws are noisier, and it is given more of them.
    """
    score = gradient == "score-function"
    em = bc.VariationalEM(
        gradient=gradient,
        until=until,
        tol=2e-3 if score else 1e-4,
        num_particles=64 if score else 8,
        window=100,
        max_steps=1500,
        engine="traced",
    )
    found = em.e_step(model, X)
    assert found.program.structure.score_sites == (("z_unconstrained",) if score else ())
    assert found.converged
    assert len(found.history) == found.steps // 100
    bound = _elbo(Subject(found.program, found.x), 4000, 0, 0.95)
    assert float(bound.errors.max()) < 0.02
    excess = LOG_P - APPROXIMATION - bound.values
    assert (excess.abs() < 4 * bound.errors + 0.01).all()
    assert abs(float(excess.mean())) < 0.01  # power: the encoder's bound is lower by 0.1 to 1


def test_both_gaps_equal_their_closed_forms() -> None:
    """To 0.01 nat per datum, from a fit whose encoder was stopped at its start."""
    fit = bc.fit(
        *(model, guide, (X,)),
        minibatch=bc.Minibatch(3, plate="data"),
        optimiser=bc.SGD(bc.Constant(1e-12)),
        max_steps=4,
        dtype=torch.float64,
        engine="eager",
        num_gradients=4,
        khat_draws=10,
        progress=False,
    )
    exact = evaluate.log_likelihood(fit, (X,), num_particles=10_000)
    em = bc.VariationalEM(tol=1e-4, window=100, max_steps=1000, engine="traced")
    found = evaluate.inference_gaps(fit, (X,), exact, em=em, num_particles=10_000)
    assert found.converged
    for gap, wanted in ((found.approximation, APPROXIMATION), (found.amortization, float(amortization().mean()))):
        mean = gap.mean
        assert mean.value is not None
        assert mean.low is not None
        assert mean.value - mean.low < 0.015
        assert abs(mean.value - wanted) < 0.01
    assert float(amortization().min()) > 0.02
    torch.testing.assert_close(found.inference.values, found.approximation.values + found.amortization.values)


def test_em_learns_the_model_too() -> None:
    """One unknown mean: its maximum likelihood value is the mean of the data, and the bound never falls by much."""
    x = X[:, :2] + 3.0

    def shifted(x: Tensor) -> None:
        mu = pyro.param("mu", lambda: x.new_zeros(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + mu, SIGMA).to_event(1), obs=x)

    em = bc.VariationalEM(window=50, max_steps=100, m_steps=40, step_size=0.2, engine="traced")
    found = em.fit(shifted, x, rounds=12)
    mu = found.program.constrained(found.x)["mu"]
    assert (mu - x.mean(0)).abs().max() < 0.1
    bounds = [bound for _, bound in found.history]
    assert bounds[-1] > bounds[0] + 3
    assert bounds[-1] > max(bounds) - 0.05


def test_only_one_part_moves() -> None:
    rule = Within(SGD(Constant(0.5)), 1, 3)
    x = torch.arange(4.0)
    moved, _ = rule.update(torch.ones(4), rule.init(x), x, torch.ones(()))
    assert moved.tolist() == [0.0, 0.5, 1.5, 3.0]
    with pytest.raises(ValueError, match="at least one coordinate, got 2 to 2"):
        Within(SGD(), 2, 2)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="gradient must be pathwise or score-function"):
        bc.VariationalEM(gradient="reinforce")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2 for its baseline"):
        bc.VariationalEM(gradient="score-function", num_particles=1)
    with pytest.raises(ValueError, match="tol must be positive"):
        bc.VariationalEM(tol=0.0)
    with pytest.raises(ValueError, match="no parameters to maximise over"):
        bc.VariationalEM(engine="traced").fit(model, X, rounds=1)
    assert math.isfinite(APPROXIMATION)
