"""What no graph can hold runs eagerly, with the reason; discrete sites have an unbiased gradient."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from bbvi_conv.engine import Calculus, make_engine
from bbvi_conv.engine.engine import start_carry
from bbvi_conv.engine.streams import Feed, Stream
from bbvi_conv.families import MeanField
from bbvi_conv.objectives import ELBO
from bbvi_conv.optim import SGD, Constant
from bbvi_conv.program import Program, tape
from bbvi_conv.program.build import build
from bbvi_conv.program.trace import TracedLogWeights

Y = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)


def reason(program: Program) -> str:
    """Why ``auto`` runs the program eagerly; the engine then has to make its steps."""
    rule = SGD(Constant(0.01))
    engine = make_engine("auto", program, ELBO(), rule)
    assert engine.name == "eager"
    carry = start_carry(rule, program.initial())
    carry, losses = engine.advance(carry, Stream(program, 0, "optimise", 1), 0, 3)
    assert int(carry.step) == 3
    assert torch.isfinite(losses).all()
    with pytest.raises(ValueError, match="cannot be traced"):
        make_engine("traced", program, ELBO(), rule)
    return engine.reason


# Two Bernoulli latents and a Gaussian one: the exact bound is a sum over four cases of a Gaussian expectation.


def mixture(y: Tensor) -> None:
    weight = pyro.param("weight", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
    with pyro.plate("flag", 2):
        b = pyro.sample("b", dist.Bernoulli(weight))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z + 2 * b.sum(), 1.0), obs=y)


def mixture_guide(y: Tensor) -> None:
    probs = pyro.param("probs", torch.tensor([0.3, 0.6]), constraint=dist.constraints.unit_interval)
    with pyro.plate("flag", 2):
        b = pyro.sample("b", dist.Bernoulli(probs))
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)) + 0.5 * b[0], 0.7))


def exact_mixture_bound(program: Program, x: Tensor, y: Tensor) -> Tensor:
    """Sum over the four flags, with E (y - z - c)^2 = (y - m - c)^2 + s^2 in closed form."""
    theta, phi = program.split(x)
    weight, probs = theta["weight"].sigmoid(), phi["probs"].sigmoid()
    total = x.new_zeros(())
    for flags in itertools.product((0.0, 1.0), repeat=2):
        b = torch.tensor(flags, dtype=x.dtype)
        log_q = (b * probs.log() + (1 - b) * (-probs).log1p()).sum()
        log_p = (b * weight.log() + (1 - b) * (-weight).log1p()).sum()
        mean, scale = phi["loc"] + 0.5 * b[0], 0.7
        normal = -0.5 * (mean**2 + scale**2) - 0.5 * ((y - mean - 2 * b.sum()) ** 2 + scale**2)
        entropy = 0.5 + torch.log(torch.tensor(scale, dtype=x.dtype)) + 0.5 * torch.log(torch.tensor(2 * torch.pi))
        total = total + log_q.exp() * (log_p - log_q + normal - torch.log(torch.tensor(2 * torch.pi)) + entropy)
    return total


@pytest.mark.parametrize("estimator", ["pathwise", "sticking-the-landing"])
@pytest.mark.parametrize("particles", [1, 3])
def test_discrete_latents_have_an_unbiased_gradient(moved, draw, particles: int, estimator: str) -> None:
    y = torch.tensor(1.7, dtype=torch.float64)
    program = build(mixture, mixture_guide, (y,), dtype=torch.float64)
    assert program.structure.score_sites == ("b",)
    assert not program.obstacles
    x = moved(program).requires_grad_()
    bound = exact_mixture_bound(program, x, y)
    (exact,) = torch.autograd.grad(-bound, x)
    calculus = Calculus(program, ELBO(particles, estimator), TracedLogWeights(program), 1.0)
    grads, losses = calculus.gradients(x.detach(), Feed(draw(program, 20_000 // particles, particles)))
    stderr = grads.std(0) / len(grads) ** 0.5
    assert (stderr < 0.05).all()
    assert (stderr[:3] < 0.15 * exact.abs()[:3]).any()  # power
    assert ((grads.mean(0) - exact).abs() < 4 * stderr).all()
    assert abs(losses.mean() + bound) < 4 * losses.std() / len(losses) ** 0.5


def poisson_model(y: Tensor) -> None:
    k = pyro.sample("k", dist.Poisson(2.0))
    pyro.sample("y", dist.Normal(k, 1.0), obs=y)


def poisson_guide(y: Tensor) -> None:
    pyro.sample("k", dist.Poisson(pyro.param("rate", torch.tensor(1.5), constraint=dist.constraints.positive)))


@pytest.mark.parametrize("estimator", ["pathwise", "sticking-the-landing"])
def test_poisson_latent_repeats_and_is_unbiased(draw, estimator: str) -> None:
    y = torch.tensor(2.5, dtype=torch.float64)
    program = build(poisson_model, poisson_guide, (y,), dtype=torch.float64)
    assert "poisson" in reason(program)
    x = program.initial().requires_grad_()
    k = torch.arange(40, dtype=torch.float64)
    rate = x.exp()
    log_q = dist.Poisson(rate).log_prob(k)
    log_p = dist.Poisson(torch.tensor(2.0, dtype=torch.float64)).log_prob(k) + dist.Normal(k, 1.0).log_prob(y)
    (exact,) = torch.autograd.grad(-(log_q.exp() * (log_p - log_q)).sum(), x)
    calculus = Calculus(program, ELBO(8, estimator), program.log_weights, 1.0)
    noise = draw(program, 120, 8)
    grads, losses = calculus.gradients(x.detach(), Feed(noise))
    stderr = grads.std(0) / len(grads) ** 0.5
    assert (stderr < 0.2 * exact.abs()).all()  # power
    assert abs(grads.mean(0) - exact) < 4 * stderr
    torch.rand(5)  # what torch's own generator has seen makes no difference
    assert torch.equal(calculus.gradients(x.detach(), Feed(noise.at(slice(0, 3))))[1], losses[:3])
    assert len(losses.unique()) > 60


def test_categorical_latent_is_on_the_tape(agrees_with_pyro) -> None:
    def model(y: Tensor) -> None:
        weight = pyro.param("weight", torch.ones(3), constraint=dist.constraints.simplex)
        means = pyro.param("means", torch.tensor([-1.0, 0.0, 2.0]))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(weight))
            pyro.sample("y", dist.Normal(means[k], 1.0), obs=y)

    def guide(y: Tensor) -> None:
        logits = pyro.param("logits", torch.arange(12.0).reshape(4, 3).cos())
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Categorical(logits=logits))

    program = build(model, guide, (Y,), dtype=torch.float64)
    assert program.structure.unit == ("data",)
    assert program.structure.score_sites == ("k",)
    agrees_with_pyro(program)


def test_value_dependent_flow(agrees_with_pyro) -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = z.exp() if z > 0 else z
        pyro.sample("y", dist.Normal(mean, 1.0).expand([4]).to_event(1), obs=y)

    program = build(model, None, (Y,), family=MeanField(), dtype=torch.float64)
    assert "data-dependent control flow" in reason(program)
    agrees_with_pyro(program, traced=False)


class Doubled(torch.autograd.Function):
    """Identity whose hand-written gradient is twice the true one."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_hand_written_gradient(agrees_with_pyro) -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(Doubled.apply(z), 1.0).expand([4]).to_event(1), obs=y)

    program = build(model, None, (Y,), family=MeanField(), dtype=torch.float64)
    assert "'Doubled' has a hand-written gradient" in reason(program)
    agrees_with_pyro(program, traced=False)


def test_a_model_that_changes_from_run_to_run() -> None:
    calls = []

    def model(y: Tensor) -> None:
        calls.append(y)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z * len(calls), 1.0).expand([4]).to_event(1), obs=y)

    program = build(model, None, (Y,), family=MeanField(), dtype=torch.float64)
    assert "does not give what the program itself does (the density)" in reason(program)


def test_a_graph_without_a_gradient_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = torch.tensor([1.0, 2.0, 3.0, 4.0])
        mean[1] = z  # functionalised as it stands, what is written to a new tensor has the value but not the gradient
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    monkeypatch.setattr(tape, "_functional", lambda made, given: made)
    program = build(model, None, (Y,), family=MeanField(), dtype=torch.float64)
    assert "does not give what the program itself does (" in reason(program)
    assert "(the density)" not in reason(program)


def test_batch_norm(draw) -> None:
    decoder = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()

    def model(y: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(decoder(z[:, None])[:, 0], 1.0), obs=y)

    before = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    program = build(model, None, (Y,), family=MeanField(), dtype=torch.float64)
    assert all(torch.equal(buffer, before[name]) for name, buffer in decoder.named_buffers())
    calculus = Calculus(program, ELBO(), program.log_weights, 1.0)
    calculus.gradients(program.initial(), Feed(draw(program, 3, 1)))  # a look: buffers as found
    assert all(torch.equal(buffer, before[name]) for name, buffer in decoder.named_buffers())
    assert "BatchNorm1d.running_mean" in reason(program)  # steps: buffers trained, as in any torch loop
    assert int(decoder[1].num_batches_tracked) == 3


def test_dropout_is_on_the_tape(agrees_with_pyro, draw) -> None:
    decoder = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()

    def model(y: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(decoder(z[:, None])[:, 0], 1.0), obs=y)

    program = build(model, None, (Y,), family=MeanField(), dtype=torch.float64)
    assert program.layout == (4, 32)
    agrees_with_pyro(program)
    calculus = Calculus(program, ELBO(), program.log_weights, 1.0)
    noise = draw(program, 1, 1)._replace(normal=torch.zeros(2, 1, 4, dtype=torch.float64))
    noise = noise._replace(uniform=torch.stack([torch.full((1, 32), u, dtype=torch.float64) for u in (0.2, 0.8)]))
    losses = calculus.losses(program.initial(), Feed(noise))
    assert losses[0] != losses[1]  # all units dropped, none dropped


def test_no_grad_and_detach_keep_their_meaning(agrees_with_pyro, moved, draw) -> None:
    def model(y: Tensor) -> None:
        a, b = pyro.param("a", torch.tensor(0.5)), pyro.param("b", torch.tensor(0.3))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with torch.no_grad():
            stopped = a * z + 1.0
        mean = z * stopped + z.detach() * b + (a * b).detach()
        pyro.sample("y", dist.Normal(mean, 1.0).expand([4]).to_event(1), obs=y)

    program = build(model, None, (Y,), family=MeanField(), dtype=torch.float64)
    agrees_with_pyro(program)
    x, noise = moved(program), draw(program, 3, 1)
    grads, _ = Calculus(program, ELBO(), TracedLogWeights(program), 1.0).gradients(x, Feed(noise))
    assert (grads[:, 0] == 0).all()  # a is seen only where gradients stop
    assert (grads[:, 1] != 0).all()


def test_reading_a_value_falls_to_eager() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0 + abs(z.item())).expand([4]).to_event(1), obs=y)

    assert "Python asks for a value that is computed" in reason(
        build(model, None, (Y,), family=MeanField(), dtype=torch.float64)
    )
