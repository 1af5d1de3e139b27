"""The ELBO: its value, its two gradients, and its life inside a stock Pyro loop."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

import bbvi_conv as bc
from bbvi_conv.engine import Calculus
from bbvi_conv.engine.streams import Feed
from bbvi_conv.families import FullRank, MeanField
from bbvi_conv.objectives import OBJECTIVES
from bbvi_conv.program import Program
from bbvi_conv.program.build import build
from bbvi_conv.program.trace import TracedLogWeights

FAMILIES = pytest.mark.parametrize("family", [MeanField(), FullRank()], ids=["mean-field", "full-rank"])


@pytest.fixture(scope="module")
def conjugate(shipped):
    """Module, data, and a mean-field program over three coordinates."""
    module = shipped("conjugate_gaussian")
    data = module.data(size=8, dim=3)
    return module, data, build(module.model, None, data, family=MeanField(), dtype=torch.float64)


def at(program: Program, loc: Tensor, scale: Tensor) -> Tensor:
    """Flat mean-field parameters whose q is N(loc, scale)."""
    values = {"locs": loc, "scales": scale + torch.log(-torch.expm1(-scale))}  # softplus inverse
    return torch.cat([values[leaf.name.split(".")[1]].reshape(-1) for leaf in program.leaves])


def test_bound_is_evidence_minus_kl(conjugate, draw) -> None:
    module, data, program = conjugate
    loc, scale = module.posterior(*data)
    off = loc + 0.5 * scale, 1.4 * scale
    kl = kl_divergence(dist.Normal(*off), dist.Normal(loc, scale)).sum()
    expected = module.log_evidence(*data) - kl
    calculus = Calculus(program, bc.ELBO(), TracedLogWeights(program), 1.0)
    bounds = -calculus.losses(at(program, *off), Feed(draw(program, 4000, 1)))
    stderr = bounds.std() / len(bounds) ** 0.5
    assert stderr < 0.05 * kl  # power: the evidence itself, or a lost constant, is 20 standard errors away
    assert abs(bounds.mean() - expected) < 4 * stderr


def test_at_the_posterior_every_draw_is_the_evidence_and_stl_has_no_noise(conjugate, draw) -> None:
    module, data, program = conjugate
    x, evidence = at(program, *module.posterior(*data)), module.log_evidence(*data)
    feed = Feed(draw(program, 50, 1))
    noisy, losses = Calculus(program, bc.ELBO(), TracedLogWeights(program), 1.0).gradients(x, feed)
    torch.testing.assert_close(-losses, evidence.expand(50), rtol=1e-12, atol=0)
    for log_weights in (program.log_weights, TracedLogWeights(program)):
        stl = bc.ELBO(estimator="sticking-the-landing")
        grads, values = Calculus(program, stl, log_weights, 1.0).gradients(x, feed)
        torch.testing.assert_close(-values, evidence.expand(50), rtol=1e-12, atol=0)
        assert grads.abs().max() < 1e-10
        assert noisy.std(0).min() > 0.5  # power: the pathwise gradient is noise there


@FAMILIES
def test_estimators_agree_in_expectation(shipped, family, moved, draw) -> None:
    module = shipped("conjugate_gaussian")
    program = build(module.model, None, module.data(size=8, dim=3), family=family, dtype=torch.float64)
    x, feed = moved(program), Feed(draw(program, 6000, 1))
    log_weights = TracedLogWeights(program)
    pathwise, one = Calculus(program, bc.ELBO(), log_weights, 1.0).gradients(x, feed)
    stl, two = Calculus(program, bc.ELBO(1, "sticking-the-landing"), log_weights, 1.0).gradients(x, feed)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=0)  # the same value, another gradient
    difference = pathwise - stl
    stderr = difference.std(0) / len(difference) ** 0.5
    assert (difference.mean(0).abs() <= 4 * stderr + 1e-12).all()
    assert (stderr < 0.05 * stl.mean(0).norm()).all()  # power
    assert difference.abs().max() > 0.1


@FAMILIES
@pytest.mark.parametrize("estimator", ["pathwise", "sticking-the-landing"])
def test_many_draws_are_the_mean_of_single_ones(shipped, family, estimator: str, moved, draw) -> None:
    module = shipped("eight_schools")
    program = build(module.model, None, module.data(), family=family)
    x, noise, log_weights = moved(program), draw(program, 5, 1), TracedLogWeights(program)
    grads, losses = Calculus(program, bc.ELBO(1, estimator), log_weights, 1.0).gradients(x, Feed(noise))
    together = noise._replace(normal=noise.normal.transpose(0, 1), uniform=noise.uniform.transpose(0, 1))
    grad, loss = Calculus(program, bc.ELBO(5, estimator), log_weights, 1.0).gradients(x, Feed(together))
    torch.testing.assert_close(grad[0], grads.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss[0], losses.mean(), rtol=1e-12, atol=0)


def test_options() -> None:
    objective = bc.ELBO(num_particles=4)
    assert (objective.draws, objective.split) == (4, False)
    assert objective.quietest() == bc.ELBO(4, "sticking-the-landing")
    assert objective.quietest().split
    assert objective.single().draws == 1
    assert objective.quietest().plain() == bc.ELBO()
    assert OBJECTIVES["elbo"]() == bc.ELBO()
    with pytest.raises(ValueError, match="num_particles must be at least 1, got 0"):
        bc.ELBO(0)
    with pytest.raises(ValueError, match="unknown estimator 'stl'; choose one of pathwise, sticking-the-landing"):
        bc.ELBO(estimator="stl")


# Inside Pyro's own loop.

Y = torch.tensor([0.3, -1.2, 2.0, 0.7])


def model(y: Tensor) -> None:
    noise = pyro.param("noise", torch.tensor(0.8), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, noise), obs=y)


def guide(y: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.1))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


@pytest.fixture
def store():
    with pyro.get_param_store().scope() as scoped, torch.random.fork_rng():
        yield scoped


def loss_and_gradient(loss, seed: int = 7) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients that a stock loss leaves in the store."""
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(model, guide, Y)
    params = pyro.get_param_store().get_state()["params"]
    grads = {name: p.grad.clone() for name, p in params.items()}
    for p in params.values():
        p.grad = None
    return value, grads


@pytest.mark.parametrize("particles", [1, 3])
def test_stock_gradient_is_that_of_trace_elbo(store, particles: int) -> None:
    ours, grads = loss_and_gradient(bc.ELBO(particles))
    value, expected = loss_and_gradient(Trace_ELBO(num_particles=particles))
    assert ours == pytest.approx(value, rel=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-6)


def test_stock_loop_by_sticking_the_landing(store) -> None:
    stl = bc.ELBO(estimator="sticking-the-landing")
    rows = {name: [] for name in ("pathwise", "stl")}
    for seed in range(300):
        for name, loss in (("pathwise", bc.ELBO()), ("stl", stl)):
            value, grads = loss_and_gradient(loss, seed)
            rows[name].append(torch.stack([torch.tensor(value), grads["loc"], grads["scale"], grads["noise"]]))
    pathwise, other = torch.stack(rows["pathwise"]), torch.stack(rows["stl"])
    torch.testing.assert_close(pathwise[:, 0], other[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pathwise[:, 3], other[:, 3], rtol=1e-4, atol=1e-4)  # theta: the same estimator
    difference = (pathwise - other)[:, 1:3]
    stderr = difference.std(0) / len(difference) ** 0.5
    assert (difference.mean(0).abs() <= 4 * stderr + 1e-6).all()
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("estimator", ["pathwise", "sticking-the-landing"])
def test_stock_loop_fits(store, estimator: str) -> None:
    pyro.set_rng_seed(0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), loss=bc.ELBO(4, estimator))
    losses = [svi.step(Y) for _ in range(400)]
    assert sum(losses[-50:]) < sum(losses[:50])
    noise, loc, scale = (float(pyro.param(name).detach()) for name in ("noise", "loc", "scale"))
    precision = 1 / 4 + 4 / noise**2
    assert scale == pytest.approx(precision**-0.5, rel=0.15)
    assert loc == pytest.approx(float(Y.sum()) / noise**2 / precision, abs=0.15)
    assert math.isfinite(svi.evaluate_loss(Y))


def test_stock_score_sites_are_unbiased_by_both_estimators(store) -> None:
    """One Bernoulli latent: its gradient by the sum over its two values."""

    def one(y: Tensor) -> None:
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    def one_guide(y: Tensor) -> None:
        pyro.sample("b", dist.Bernoulli(pyro.param("p", torch.tensor(0.4), constraint=dist.constraints.unit_interval)))

    y, free = torch.tensor(1.7), torch.tensor(0.4).logit().requires_grad_()
    p = free.sigmoid()
    log_p = [
        dist.Bernoulli(0.3).log_prob(b) + dist.Normal(b, 1.0).log_prob(y)
        for b in (torch.tensor(0.0), torch.tensor(1.0))
    ]
    bound = (1 - p) * (log_p[0] - (1 - p).log()) + p * (log_p[1] - p.log())
    (exact,) = torch.autograd.grad(-bound, free)
    pyro.set_rng_seed(1)
    for objective in (bc.ELBO(8), bc.ELBO(8, "sticking-the-landing")):
        rows = []
        for _ in range(150):
            objective.loss_and_grads(one, one_guide, y)
            leaf = pyro.get_param_store().get_state()["params"]["p"]
            rows.append(leaf.grad.clone())
            leaf.grad = None
        grads = torch.stack(rows)
        stderr = grads.std() / len(grads) ** 0.5
        assert stderr < 0.15 * abs(exact)
        assert abs(grads.mean() - exact) < 4 * stderr


def test_as_a_module_in_a_plain_torch_loop(store) -> None:
    loss = bc.ELBO(2)(model, guide)
    pyro.set_rng_seed(3)
    value = loss(Y)
    pyro.set_rng_seed(3)
    assert float(value.detach()) == pytest.approx(bc.ELBO(2).loss(model, guide, Y), rel=1e-6)
    value.backward()
    assert all(p.grad is not None for p in pyro.get_param_store().get_state()["params"].values())
