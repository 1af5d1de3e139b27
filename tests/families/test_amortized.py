"""Encoders with every kind of head: one density by two routes, minibatches of both kinds, and what is refused."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.engine import Calculus, Stream, make_engine, start_carry
from bbvi_conv.engine.streams import Feed
from bbvi_conv.families import IAF, Amortized, FullRank, MeanField, Mixture, NeuralSpline, StudentT
from bbvi_conv.networks.encoders import MLP, Conv
from bbvi_conv.objectives import ELBO, IWAE
from bbvi_conv.optim import Adam, CosineDecay
from bbvi_conv.program import Minibatch, Program
from bbvi_conv.program.build import build
from bbvi_conv.program.trace import TracedLogWeights

SLOPE = torch.tensor([[1.0, 0.8], [0.0, 0.6], [0.5, -0.5]], dtype=torch.float64)
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SMALL = MLP(hidden=(6,))


def gathered(x: Tensor) -> None:
    """Two sites a datum, one of them positive: z_n ~ N(0, I), s_n ~ LogNormal, x_n ~ N(W z_n, s_n)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
        pyro.sample("x", dist.Normal(z @ SLOPE.to(z).T, s.unsqueeze(-1)).to_event(1), obs=x)


def indexed(x: Tensor) -> None:
    with pyro.plate("data", 12, subsample_size=4) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
        pyro.sample("x", dist.Normal(z @ SLOPE.to(z).T, s.unsqueeze(-1)).to_event(1), obs=x[rows])


HEADS: dict[str, Any] = {
    "diagonal": MeanField(0.5),
    "student-t": StudentT(0.5),
    "full-rank": FullRank(0.5),
    "spline flow": NeuralSpline(num_layers=1, init_scale=0.5, hidden=(4,), bins=3),
    "autoregressive flow": IAF(num_layers=1, init_scale=0.5, hidden=(4,)),
    "mixture": Mixture(2, FullRank(0.5)),
    "mixture of flows": Mixture(2, NeuralSpline(num_layers=1, init_scale=0.5, hidden=(4,), bins=3)),
    "implicit mixture": Mixture(2, MeanField(0.5), gradient="implicit"),
}
EVERY = pytest.mark.parametrize("name", HEADS)


def program_of(name: str, model: Any = gathered, **more: Any) -> Program:
    more.setdefault("minibatch", Minibatch(4, plate="data"))
    return build(model, None, (X,), family=Amortized(SMALL, HEADS[name]), dtype=torch.float64, **more)


@EVERY
def test_graph_handlers_path_and_both_kinds_of_minibatch_agree(name: str, moved, draw) -> None:
    program, by_index = program_of(name), program_of(name, indexed)
    assert program.structure.unit == by_index.structure.unit == ("data",)
    assert by_index.by_index
    assert not program.by_index
    x, noise = moved(program), draw(program, 2, 2)
    feed = Feed(noise, torch.tensor([[0, 5, 7, 2], [3, 3, 11, 8]]))
    traced = TracedLogWeights(program)
    expected = Calculus(program, ELBO(2), program.log_weights, 1.0).gradients(x, feed)
    for other, weights in ((program, traced), (by_index, by_index.log_weights)):
        for got, right in zip(Calculus(other, ELBO(2), weights, 1.0).gradients(x, feed), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-8, atol=1e-8)
    theta, phi = program.split(x)
    batch = program.batch(feed.rows[0])
    own = program.log_weights(theta, phi, phi, noise.at(0).at(0), batch)
    assert own.log_q.shape == (4,)
    if HEADS[name].path_log_q:
        path = program.log_weights(theta, phi, dict(phi), noise.at(0).at(0), batch)
        torch.testing.assert_close(own.log_q, path.log_q, rtol=1e-8, atol=1e-8)


def test_a_mixture_by_datum_has_the_same_gradient_stratified_and_implicit() -> None:
    means, errors = [], []
    for seed, gradient in enumerate(("stratified", "implicit")):
        family = Amortized(SMALL, Mixture(2, MeanField(0.5), gradient=gradient))  # type: ignore[arg-type]
        program = build(gathered, None, (X[:3],), family=family, dtype=torch.float64)
        x = program.initial()
        x = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        calculus = Calculus(program, ELBO(), TracedLogWeights(program), 1.0)
        grads, _ = calculus.gradients(x, Stream(program, seed, "monitor", 1).once(0, 8000))
        means.append(grads.mean(0))
        errors.append(grads.std(0) / len(grads) ** 0.5)
    spread = torch.hypot(*errors)
    assert spread.norm() < 0.1 * means[0].norm()  # power
    assert ((means[0] - means[1]).abs() < 4.5 * spread).all()


def test_a_full_rank_head_meets_a_linear_model() -> None:
    """Posterior N(M x, C) of a linear Gaussian model: M is met by a wide encoder, C by the head; mean-field cannot."""

    def linear(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ SLOPE.to(z).T, 0.3).to_event(1), obs=x)

    data = X[:6]
    evidence = dist.MultivariateNormal(torch.zeros(3).double(), SLOPE @ SLOPE.T + 0.09 * torch.eye(3)).log_prob(data)
    gaps = []
    for head in (FullRank(0.5), MeanField(0.5)):
        program = build(linear, None, (data,), family=Amortized(MLP((32,)), head), dtype=torch.float64)
        steps, objective = 500, ELBO(2, "sticking-the-landing")
        rule = Adam(CosineDecay(0.03, steps))
        engine, stream = make_engine("traced", program, objective, rule), Stream(program, 0, "optimise", 2)
        carry, _ = engine.advance(start_carry(rule, program.initial()), stream, 0, steps)
        losses = engine.calculus.losses(carry.x, Stream(program, 0, "evaluate", 2).once(0, 500))
        gaps.append(float(evidence.sum() + losses.mean()))
    assert -1e-3 < gaps[0] < 0.05
    assert gaps[1] > gaps[0] + 0.5


@pytest.mark.parametrize("head", [MeanField(1.0), IAF(num_layers=1)], ids=["diagonal", "flow"])
def test_a_vae_on_bytes_through_fit(head: Any) -> None:
    images = torch.randint(256, (32, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    decoder = torch.nn.Linear(2, 64)

    def vae(images: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(images)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            grey = images.flatten(1) / 255
            pyro.sample("image", dist.Normal(decoder(z), 0.3).to_event(1), obs=grey)

    fit = bc.fit(
        vae,
        args=(images,),
        family=Amortized(Conv(channels=(4,), hidden=8), head),
        minibatch=Minibatch(8, plate="data"),
        objective=IWAE(3),
        max_steps=40,
        window=20,
        khat_draws=50,
        progress=False,
    )
    losses = [loss for _, _, loss in fit.state.losses]
    assert fit.engine_name != "eager"
    assert losses[-1] < losses[0]
    assert fit.sample(5)["z"].shape[0] == 5


def test_what_an_encoder_cannot_read_or_draw_is_refused() -> None:
    def outside(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"site 'mu' lies in plates \[\]; use Structured"):
        build(outside, None, (X,), family=Amortized(SMALL))
    with pytest.raises(ValueError, match="reads positional argument 1, which is no tensor of rows"):
        build(gathered, None, (X,), family=Amortized(SMALL, argument=1))
    with pytest.raises(ValueError, match=r"takes data \(H, W\) or \(C, H, W\), got shape \(3,\)"):
        build(gathered, None, (X,), family=Amortized(Conv()))
    with pytest.raises(ValueError, match="hidden must hold"):
        MLP(hidden=())
    with pytest.raises(ValueError, match="must be at least 1"):
        Conv(channels=(0,))
    assert Conv((2, 3), 5).network((3, 9, 8))[0](torch.zeros(4, 3, 9, 8)).shape == (4, 5)
    with pytest.raises(ValueError, match="too small for 2 halvings"):
        Conv().network((3, 3))
