"""Engines: same noise, same iterates; chunk boundaries anywhere; a bad step freezes the carry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import iterated, spline_coupling
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import Tensor

from bbvi_conv.engine import Calculus, Carry, Engine, Stream, make_engine, start_carry
from bbvi_conv.engine.streams import Feed, block_of
from bbvi_conv.families import FullRank, MeanField
from bbvi_conv.objectives import ELBO
from bbvi_conv.optim import SGD, Adam, Constant, InverseSqrt
from bbvi_conv.program import Minibatch, Program
from bbvi_conv.program.build import build
from bbvi_conv.program.trace import TracedLogWeights

RULE = Adam(InverseSqrt(0.1))


def engines(program: Program, objective: ELBO, rule: Any = RULE) -> tuple[Engine, Engine]:
    return make_engine("eager", program, objective, rule), make_engine("traced", program, objective, rule)


def run(engine: Engine, objective: ELBO, *chunks: int, rule: Any = RULE, start: int = 0) -> tuple[Carry, Tensor]:
    """Consecutive chunks of steps; a fresh stream for each, as a resumed run has."""
    program = engine.calculus.program
    carry, losses = start_carry(rule, program.initial()), []
    for count in chunks:
        carry, part = engine.advance(carry, Stream(program, 0, "optimise", objective.draws), start, count)
        losses.append(part)
        start += count
    return carry, torch.cat(losses)


def test_same_noise_same_iterates(small: tuple[Program, ELBO]) -> None:
    program, objective = small
    (eager, seen), (traced, expected) = (run(e, objective, 200) for e in engines(program, objective))
    assert int(eager.step) == int(traced.step) == 200
    assert (eager.x - program.initial()).norm() > 0.1  # power: the iterates moved
    torch.testing.assert_close(traced.x, eager.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(traced.average.mean, eager.average.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)


def regression(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


@pytest.fixture(scope="module")
def minibatched() -> Program:
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)
    batch = Minibatch(3, plate="data", sampling="epoch")
    return build(regression, None, (x, 2 * x), family=MeanField(), minibatch=batch, dtype=torch.float64)


@pytest.mark.parametrize("name", ["eager", "traced"])
def test_chunk_boundaries_may_fall_anywhere(minibatched: Program, name: str) -> None:
    engine = make_engine(name, minibatched, ELBO(2), RULE)
    start = block_of(minibatched, 2) - 256
    whole, losses = run(engine, ELBO(2), 270, start=start)
    for chunks in ((1, 254, 2, 13), (256, 14), (100, 170)):
        parts, pieces = run(engine, ELBO(2), *chunks, start=start)
        assert all(torch.equal(a, b) for a, b in zip(whole.flat(), parts.flat(), strict=True))
        assert torch.equal(losses, pieces)


def test_minibatched_engines_agree(minibatched: Program) -> None:
    (eager, seen), (traced, expected) = (run(e, ELBO(), 100) for e in engines(minibatched, ELBO()))
    torch.testing.assert_close(traced.x, eager.x, rtol=1e-12, atol=0)
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=0)


def test_normaliser_divides_loss_and_gradient(minibatched: Program, draw) -> None:
    x, feed = minibatched.initial(), Feed(draw(minibatched, 2, 1), torch.tensor([[0, 1, 2], [3, 4, 5]]))
    log_weights = TracedLogWeights(minibatched)
    grads, losses = Calculus(minibatched, ELBO(), log_weights, 1.0).gradients(x, feed)
    by_datum, per = Calculus(minibatched, ELBO(), log_weights, 11.0).gradients(x, feed)
    torch.testing.assert_close(by_datum * 11, grads)
    torch.testing.assert_close(per * 11, losses)


def steep(y: Tensor) -> None:
    """Loses its finite log-probability once the scale of the guide has moved far enough."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("wall", torch.where(z > 2.0, (2.0 - z).sqrt(), 3 * z))


@pytest.mark.parametrize("name", ["eager", "traced"])
def test_a_step_that_is_not_finite_freezes_the_carry(name: str) -> None:
    program = build(steep, None, (torch.tensor(0.0),), family=MeanField(), dtype=torch.float64)
    rule = SGD(Constant(0.01))
    engine = make_engine(name, program, ELBO(), rule)
    carry, losses = run(engine, ELBO(), 300, rule=rule)
    bad = int(carry.bad)
    assert 0 < bad < 299
    assert torch.isfinite(losses[:bad]).all()
    assert not torch.isfinite(losses[bad])
    before, _ = run(engine, ELBO(), bad, rule=rule)  # the run that ends just before the bad step
    assert int(before.bad) == -1
    assert torch.equal(carry.x, before.x)
    assert torch.equal(carry.average.mean, before.average.mean)
    assert int(carry.step) == bad
    assert torch.isfinite(carry.x).all()
    later, _ = run(engine, ELBO(), 300, 50, rule=rule)  # and it stays frozen
    assert torch.equal(later.x, carry.x)
    assert int(later.bad) == bad
    feed = next(Stream(program, 0, "optimise", 1).steps(bad, 1))
    assert "site 'wall' is not finite" in program.first_bad_site(carry.x, feed.noise.at(0), feed.batch(program, 0))


def lifted(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    one = torch.ones((), dtype=z.dtype)
    mean = torch.index_put(z, (z > 0.1,), one, accumulate=True)  # keeps the shape, but has no rule under vmap
    pyro.sample("y", dist.Normal(mean.sum(), 0.5), obs=y)


def correlated(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(), 0.5), obs=y)


@pytest.mark.parametrize(("model", "vectorises"), [(correlated, True), (lifted, False)])
def test_what_vmap_cannot_do_a_loop_does(model: Callable[..., None], vectorises: bool, moved, draw) -> None:
    program = build(model, None, (torch.tensor(0.5),), family=FullRank(), dtype=torch.float64)
    traced = Calculus(program, ELBO(2), TracedLogWeights(program), 1.0)
    assert traced.vectorise == vectorises
    eager = Calculus(program, ELBO(2), program.log_weights, 1.0)
    x, feed = moved(program), Feed(draw(program, 4, 2))
    for got, expected in zip(traced.gradients(x, feed), eager.gradients(x, feed), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    (a, _), (b, _) = (run(e, ELBO(2), 10) for e in engines(program, ELBO(2)))
    torch.testing.assert_close(a.x, b.x, rtol=1e-10, atol=1e-12)


def spline(model: Callable[..., Any]) -> AutoNormalizingFlow:
    transform = functools.partial(spline_coupling, hidden_dims=[4], count_bins=3, bound=0.5)
    return AutoNormalizingFlow(model, functools.partial(iterated, 1, transform))


def test_shapes_that_depend_on_values_stay_eager(moved, draw) -> None:
    """A spline flow treats the draws inside its bound apart: how many there are differs from draw to draw."""
    program = build(correlated, None, (torch.tensor(0.5),), family=spline, dtype=torch.float64)
    engine = make_engine("auto", program, ELBO(2), RULE)
    assert engine.name == "eager"
    assert "the shape of a result depends on values" in engine.reason
    carry, losses = run(engine, ELBO(2), 10)
    assert int(carry.step) == 10
    assert torch.isfinite(losses).all()


def test_a_mask_of_the_data_has_a_fixed_shape() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        seen = y[y > 0]
        with pyro.plate("seen", len(seen)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=seen)

    program = build(model, None, (torch.tensor([0.5, -1.0, 2.0]),), family=MeanField(), dtype=torch.float64)
    (eager, _), (traced, _) = (run(e, ELBO(), 20) for e in engines(program, ELBO()))
    torch.testing.assert_close(traced.x, eager.x, rtol=1e-12, atol=0)


def test_score_sites_in_both_engines(draw) -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            b = pyro.sample("b", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("b", dist.Bernoulli(logits=slope * y))

    y = torch.tensor([0.2, 1.4, -0.3], dtype=torch.float64)
    for objective in (ELBO(3), ELBO(3, "sticking-the-landing")):
        program = build(model, guide, (y,), dtype=torch.float64)
        (eager, seen), (traced, expected) = (run(e, objective, 100) for e in engines(program, objective))
        assert eager.x != program.initial()
        torch.testing.assert_close(traced.x, eager.x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)


def test_curvature_products_are_those_of_torch(moved, draw) -> None:
    program = build(correlated, None, (torch.tensor(0.5),), family=FullRank(), dtype=torch.float64)
    x, noise = moved(program), draw(program, 3, 1)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    eager = Calculus(program, ELBO(), program.log_weights, 1.0)

    def loss(x: Tensor) -> Tensor:
        return torch.stack(
            [eager.loss(x, noise.at(j), program.batch(None), torch.tensor(1.0)) for j in range(3)]
        ).mean()

    expected = torch.autograd.functional.hvp(loss, x, v)[1]
    for log_weights in (program.log_weights, TracedLogWeights(program)):
        got = Calculus(program, ELBO(), log_weights, 1.0).hessian_products(x, v[None], Feed(noise))[0]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_fisher_information_of_a_gaussian(draw) -> None:
    program = build(correlated, None, (torch.tensor(0.5),), family=MeanField(0.5), dtype=torch.float64)
    x, v = program.initial(), torch.arange(1.0, 7.0, dtype=torch.float64)
    objective = ELBO(1, "sticking-the-landing")
    calculus = Calculus(program, objective, TracedLogWeights(program), 1.0)
    feeds = [Feed(draw(program, 400, 1, seed=seed)) for seed in range(20)]
    products = torch.stack([calculus.fisher_products(x, v[None], feed)[0] for feed in feeds])
    slope = 1 - torch.exp(torch.tensor(-0.5, dtype=x.dtype))  # d softplus(u) / d u where softplus(u) is 0.5
    exact = torch.cat([v[:3] / 0.5**2, 2 * v[3:] * (slope / 0.5) ** 2])
    stderr = products.std(0) / len(products) ** 0.5
    assert (stderr < 0.1 * exact).all()
    assert ((products.mean(0) - exact).abs() <= 4 * stderr + 1e-12 * exact).all()


def test_which_engine_and_why() -> None:
    program = build(correlated, None, (torch.tensor(0.5),), family=MeanField(), dtype=torch.float64)
    auto = make_engine("auto", program, ELBO(), RULE, steps=1_000)
    assert (auto.name, auto.reason) == ("traced", "the program traces, and 1,000 steps do not repay compiling")
    assert make_engine("eager", program, ELBO(), RULE).reason == "asked for"
    with pytest.raises(ValueError, match="unknown engine 'jit'; choose one of auto, eager, traced"):
        make_engine("jit", program, ELBO(), RULE)


def test_streams_are_independent_and_repeat(minibatched: Program) -> None:
    def normals(name: str, seed: int = 0) -> Tensor:
        return torch.cat([f.noise.normal for f in Stream(minibatched, seed, name, 1).steps(0, 2000)]).reshape(-1)

    one = normals("optimise")
    assert torch.equal(one, normals("optimise"))
    for other in (normals("evaluate"), normals("optimise", 1)):
        correlation = torch.corrcoef(torch.stack([one, other]))[0, 1]
        assert abs(correlation) < 4 / 2000**0.5
        assert correlation != 0
    assert abs(one.mean()) < 4 / 2000**0.5
