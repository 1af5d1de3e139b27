"""Mixtures: two pathwise gradients of one bound, both modes held, and what each is refused for."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.optim import Adam as PyroAdam
from scipy import optimize, stats
from torch import Tensor

from bbvi_conv.engine import Calculus, Stream, make_engine, start_carry
from bbvi_conv.families import IAF, FullRank, MeanField, Mixture, StudentT
from bbvi_conv.families.implicit import implicitly
from bbvi_conv.objectives import ELBO, IWAE, PIWAE
from bbvi_conv.optim import Adam, CosineDecay
from bbvi_conv.posterior import draw
from bbvi_conv.program.build import build
from bbvi_conv.program.trace import TracedLogWeights


def target() -> None:
    z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    pyro.factor("target", -0.5 * (z[0] - 1) ** 2 - (z[1] - 0.5 * z[0] ** 2) ** 2)


def point(x: Tensor) -> Tensor:
    """Unequal weights, and components that overlap in one coordinate."""
    return x + 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)


@pytest.mark.parametrize("estimator", ["pathwise", "sticking-the-landing"])
def test_stratified_and_implicit_gradients_agree_in_expectation(estimator: str) -> None:
    means, errors, bounds = [], [], []
    for seed, gradient in enumerate(("stratified", "implicit")):
        family = Mixture(3, MeanField(0.7), gradient=gradient)  # type: ignore[arg-type]
        program = build(target, None, (), family=family, dtype=torch.float64)
        calculus = Calculus(program, ELBO(1, estimator), TracedLogWeights(program), 1.0)
        grads, losses = calculus.gradients(
            point(program.initial()), Stream(program, seed, "monitor", 1).once(0, 40_000)
        )
        means.append(grads.mean(0))
        errors.append(grads.std(0) / len(grads) ** 0.5)
        bounds.append((losses.mean(), losses.std() / len(losses) ** 0.5))
    (a, b), (ea, eb) = means, errors
    assert (torch.hypot(ea, eb) < 0.05 * a.norm()).all()  # power
    assert ((a - b).abs() < 4 * torch.hypot(ea, eb)).all()
    assert abs(bounds[0][0] - bounds[1][0]) < 4 * torch.hypot(bounds[0][1], bounds[1][1])


def test_the_implicit_gradient_in_one_dimension_is_that_of_the_quantile() -> None:
    """At a fixed probability u, dz/dphi of z = F^-1(u), by scipy's root finding and finite differences."""

    def quantile(p: Tensor, u: float) -> float:
        w = torch.softmax(p[:2], 0)

        def excess(z: float) -> float:
            return sum(float(w[c]) * stats.norm.cdf(z, float(p[2 + c]), float(p[4 + c])) for c in range(2)) - u

        return float(optimize.brentq(excess, -20, 20, xtol=1e-13))

    start = torch.tensor([0.3, -0.4, -1.0, 1.5, 0.6, 1.2], dtype=torch.float64)
    for u in (0.02, 0.4, 0.55, 0.97):
        p = start.clone().requires_grad_()
        value = torch.tensor([quantile(start, u)], dtype=torch.float64)
        z = implicitly(value, torch.log_softmax(p[:2], 0), p[2:4].unsqueeze(-1), p[4:].unsqueeze(-1))
        assert float(z.detach()) == float(value)
        (grad,) = torch.autograd.grad(z.sum(), p)
        for i, step in enumerate(1e-5 * torch.eye(6, dtype=torch.float64)):
            slope = (quantile(start + step, u) - quantile(start - step, u)) / 2e-5
            assert float(grad[i]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_two_modes_are_both_held_with_their_weights(shipped) -> None:
    """In a few hundred steps: KL under 0.02 nats where one Gaussian keeps at least -log 0.7 = 0.36."""
    module, steps = shipped("two_modes"), 400
    program = build(module.model, None, (), family=Mixture(2, FullRank(1.0), spread=3.0), dtype=torch.float64)
    rule, objective = Adam(CosineDecay(0.1, steps)), ELBO(2)
    engine, stream = make_engine("traced", program, objective, rule), Stream(program, 0, "optimise", 2)
    carry, _ = engine.advance(start_carry(rule, program.initial()), stream, 0, steps)
    losses = engine.calculus.losses(carry.x, Stream(program, 0, "evaluate", 2).once(0, 4000))
    stderr = float(losses.std()) / 4000**0.5
    assert stderr < 0.005
    assert float(losses.mean()) < 0.02 + 4 * stderr
    drawn = draw(program, carry.x, 20_000, 0)
    share = float((drawn.latent["z"][:, 0] < 0).double().mean())
    assert share == pytest.approx(0.3, abs=0.05)
    weights = torch.softmax(program.constrained(carry.x)["MixtureGuide.logits"], 0)
    assert sorted(weights.tolist()) == pytest.approx([0.3, 0.7], abs=0.05)
    assert drawn.log_p is not None  # draws outside an evaluation are those of the mixture: weights p / q about 1
    log_w = drawn.log_p - drawn.log_q
    assert float(log_w.exp().mean()) == pytest.approx(1, abs=4 * float(log_w.exp().std()) / 20_000**0.5)


def test_what_stratification_is_refused_for() -> None:
    program = build(target, None, (), family=Mixture(2), dtype=torch.float64)
    for objective in (IWAE(1), IWAE(5), PIWAE(2, 2)):
        with pytest.raises(ValueError, match=r'stratified.*gradient="implicit"'):
            Calculus(program, objective, program.log_weights, 1.0)
    with pytest.raises(ValueError, match=r"stock loop.*implicit"):
        SVI(target, program.guide, PyroAdam({"lr": 1e-3}), loss=copy.copy(ELBO())).step()
    pyro.clear_param_store()


def test_an_implicit_mixture_takes_any_objective_and_says_it_has_no_curvature() -> None:
    program = build(target, None, (), family=Mixture(2, MeanField(), gradient="implicit"), dtype=torch.float64)
    assert program.implicit
    for objective in (IWAE(3), IWAE(3, "doubly-reparameterised"), PIWAE(2, 2)):
        calculus = Calculus(program, objective, TracedLogWeights(program), 1.0)
        grads, _ = calculus.gradients(program.initial(), Stream(program, 0, "monitor", objective.draws).once(0, 2))
        assert torch.isfinite(grads).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_components": 1}, "at least 2"),
        ({"spread": -1.0}, "must not be negative"),
        ({"component": IAF()}, "must be one of MeanField"),
        ({"component": StudentT()}, "must be one of MeanField"),
        ({"component": Mixture()}, "must be one of MeanField"),
        ({"gradient": "score"}, "stratified.*implicit"),
        ({"component": FullRank(), "gradient": "implicit"}, "known for MeanField components"),
    ],
)
def test_bad_arguments(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(**arguments)
