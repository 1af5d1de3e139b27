"""Hierarchical guides: exact where the posterior is Gaussian, subsampled or not."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bbvi_conv.engine import Calculus, Stream, make_engine, start_carry
from bbvi_conv.engine.streams import Feed
from bbvi_conv.families import FullRank, Linear, MeanField, RealNVP, Structured
from bbvi_conv.objectives import ELBO
from bbvi_conv.optim import Adam, CosineDecay
from bbvi_conv.program import Minibatch
from bbvi_conv.program.build import build
from bbvi_conv.program.trace import TracedLogWeights

Y = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.4, -1.0], dtype=torch.float64)


def hierarchy(y: Tensor) -> None:
    """mu ~ N(0, 2), z_n ~ N(mu, 0.5), y_n ~ N(z_n, 1): all Gaussian, and mu and z strongly tied."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 0.5))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def subsampled(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 6, subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(mu, 0.5))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def evidence(y: Tensor) -> float:
    covariance = 1.25 * torch.eye(len(y), dtype=y.dtype) + 4.0
    return float(dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y))


def gap(family: object, steps: int) -> float:
    """Evidence minus bound at the end of a run, in nats."""
    program = build(hierarchy, None, (Y,), family=family, dtype=torch.float64)  # type: ignore[arg-type]
    rule, objective = Adam(CosineDecay(0.1, steps)), ELBO(2, "sticking-the-landing")
    engine, stream = make_engine("traced", program, objective, rule), Stream(program, 0, "optimise", 2)
    carry, _ = engine.advance(start_carry(rule, program.initial()), stream, 0, steps)
    losses = engine.calculus.losses(carry.x, Stream(program, 0, "evaluate", 2).once(0, 500))
    return evidence(Y) + float(losses.mean())


def test_a_gaussian_hierarchy_is_met_exactly() -> None:
    assert abs(gap(Structured(), 600)) < 1e-5
    assert gap(MeanField(), 300) > 0.1  # power: what the ties between mu and z cost without them


FAMILIES = [Structured(), Structured(MeanField(scale_map=Linear())), Structured(RealNVP(2, hidden=(4,)), 0.5)]


@pytest.mark.parametrize("family", FAMILIES, ids=["full-rank", "linear", "flow"])
@pytest.mark.parametrize("minibatch", [None, Minibatch(2, plate="data")], ids=["whole", "subsampled"])
def test_graph_handlers_and_path_agree(family: Structured, minibatch: Minibatch | None, moved, draw) -> None:
    model = hierarchy if minibatch is None else subsampled
    program = build(model, None, (Y,), family=family, minibatch=minibatch, dtype=torch.float64)
    x, noise = moved(program), draw(program, 3, 2)
    rows = None if minibatch is None else torch.tensor([[0, 3], [5, 1], [2, 4]])
    traced = TracedLogWeights(program)
    results = [
        Calculus(program, ELBO(2), w, 1.0).gradients(x, Feed(noise, rows)) for w in (traced, program.log_weights)
    ]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    theta, phi = program.split(x)
    batch = program.batch(None if rows is None else rows[0])
    own, path = (traced(theta, phi, p, noise.at(0).at(0), batch) for p in (phi, dict(phi)))
    torch.testing.assert_close(own.log_q, path.log_q, rtol=1e-9, atol=1e-10)


def test_all_rows_are_the_mean_of_their_minibatches(moved, draw) -> None:
    """At a fixed draw of mu, the loss over all rows is the mean over the three pairs that make them up."""
    whole = build(hierarchy, None, (Y,), family=Structured(), dtype=torch.float64)
    part = build(subsampled, None, (Y,), family=Structured(), minibatch=Minibatch(2, plate="data"), dtype=torch.float64)
    x = moved(whole)
    assert [leaf.tensor.shape for leaf in whole.leaves] == [leaf.tensor.shape for leaf in part.leaves]
    noise = draw(whole, 1, 1)
    loss = Calculus(whole, ELBO(), whole.log_weights, 1.0).losses(x, Feed(noise))
    pairs = torch.arange(6).reshape(3, 2)
    each = noise.normal[..., 1:].reshape(3, 1, 2)
    together = torch.cat([noise.normal[..., :1].expand(3, 1, 1), each], -1)
    feed = Feed(noise._replace(normal=together, uniform=noise.uniform.expand(3, 1, 0)), pairs)
    losses = Calculus(part, ELBO(), part.log_weights, 1.0).losses(x, feed)
    assert float(losses.mean()) == pytest.approx(float(loss), rel=1e-10)
    assert float(losses.std()) > 0.01


def test_without_global_or_without_local_sites(draw) -> None:
    def local(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    def outer(y: Tensor) -> None:
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    for model, leaves in ((local, 2), (outer, 2)):
        program = build(model, None, (Y,), family=Structured(init_scale=0.3), dtype=torch.float64)
        theta, phi = program.split(program.initial())
        assert len(program.leaves) == leaves
        assert math.isfinite(
            float(program.log_weights(theta, phi, phi, draw(program), program.batch(None)).log_q.sum())
        )


def test_bad_scale() -> None:
    with pytest.raises(ValueError, match="init_scale must be positive"):
        Structured(FullRank(), init_scale=0.0)
