"""Pyro's distributions of chains of hidden states, whose length the data tell."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.families import MeanField
from bbvi_conv.program.build import build

Y = torch.sin(torch.arange(20.0, dtype=torch.float64))


def states(y: Tensor) -> dist.DiscreteHMM:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    return dist.DiscreteHMM(torch.zeros(3), torch.eye(3).log_softmax(-1), dist.Normal(loc, 1.0))


def gaussian(y: Tensor, duration: int | None = None) -> dist.GaussianHMM:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0)).reshape(1)
    start, step, seen = (dist.Normal(torch.zeros(1), s).to_event(1) for s in (torch.ones(1), scale, torch.ones(1)))
    return dist.GaussianHMM(start, torch.eye(1), step, torch.eye(1), seen, duration=duration)


def field(y: Tensor) -> dist.GaussianMRF:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    laws = (torch.eye(1), torch.eye(2) * (0.5 + scale), torch.eye(2))
    return dist.GaussianMRF(*(dist.MultivariateNormal(torch.zeros(len(law)), law) for law in laws))


def side_by_side(y: Tensor) -> dist.IndependentHMM:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0)).reshape(1)
    start = dist.Normal(torch.zeros(2, 1), torch.ones(1)).to_event(1)
    step, seen = (dist.Normal(torch.zeros(2, 1, 1), s).to_event(1) for s in (scale, torch.ones(1)))
    return dist.IndependentHMM(
        dist.GaussianHMM(start, torch.eye(1).expand(2, 1, 1, 1), step, torch.eye(1).expand(2, 1, 1, 1), seen)
    )


def apart(y: Tensor) -> dist.TorchDistribution:
    """Three chains, an event together."""
    start = dist.Normal(torch.zeros(3, 1), torch.ones(1)).to_event(1)
    step = dist.Normal(torch.zeros(3, 1, 1), pyro.sample("scale", dist.LogNormal(0.0, 1.0)).reshape(1)).to_event(1)
    seen = dist.Normal(torch.zeros(3, 1, 1), torch.ones(1)).to_event(1)
    return dist.GaussianHMM(
        start, torch.eye(1).expand(3, 1, 1, 1), step, torch.eye(1).expand(3, 1, 1, 1), seen
    ).to_event(1)


DATA = {
    states: Y,
    gaussian: Y[:, None],
    field: Y[:, None],
    side_by_side: torch.stack([Y, Y.cos()], -1),
    apart: torch.stack([Y, Y, Y])[..., None],
}


@pytest.mark.parametrize("law", DATA)
def test_the_data_tell_how_long_a_chain_is(law: Callable[[Tensor], dist.TorchDistribution]) -> None:
    def model(y: Tensor) -> None:
        pyro.sample("y", law(y), obs=y)

    made = build(model, None, (DATA[law],), family=MeanField(), dtype=torch.float64)
    seen = made.site_values(made.initial(), *made.example())
    with pyro.poutine.condition(data=seen.latent):
        expected = law(DATA[law]).log_prob(DATA[law])
    torch.testing.assert_close(seen.log_likelihood["y"], expected)


def test_a_fit_says_why_no_data_are_drawn() -> None:
    def model(y: Tensor) -> None:
        pyro.sample("y", gaussian(y), obs=y)

    fit = bc.fit(model, args=(DATA[gaussian],), max_steps=20, khat_draws=100, num_gradients=8, progress=False)
    exported = fit.to_arviz(20)
    assert "without y: GaussianHMM is of no length of its own" in str(exported.attrs["posterior_predictive"])
    assert exported["log_likelihood"]["y"].shape == (1, 20)


def test_a_chain_of_its_own_length_is_drawn_and_other_data_are_refused() -> None:
    def model(y: Tensor, duration: int) -> None:
        pyro.sample("y", gaussian(y, duration), obs=y)

    run = {"max_steps": 20, "khat_draws": 100, "num_gradients": 8, "progress": False}
    exported = bc.fit(model, args=(DATA[gaussian], 20), **run).to_arviz(20)
    assert exported["posterior_predictive"]["y"].shape == (1, 20, 20, 1)
    with pytest.raises(ValueError, match=r"site 'y' expects event shape \(15, 1\), got a value of shape \(20, 1\)"):
        build(model, None, (DATA[gaussian], 15), family=MeanField())
    with pytest.raises(ValueError, match=r"site 'y' expects event shape \(20, 1\), got a value of shape \(20, 2\)"):
        build(lambda y: pyro.sample("y", gaussian(y), obs=y), None, (DATA[side_by_side],), family=MeanField())
