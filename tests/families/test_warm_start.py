"""A fit by one family is the start of another: locations and scales of sites are carried over by name."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.families import (
    IAF,
    Exp,
    FullRank,
    LowRank,
    MeanField,
    Mixture,
    NeuralSpline,
    RealNVP,
    SoftClip,
    Structured,
)
from bbvi_conv.posterior import draw
from bbvi_conv.program.build import build
from bbvi_conv.starts import warm_start

QUICK: dict[str, Any] = {"progress": False, "window": 50, "khat_draws": 200, "max_steps": 100, "dtype": torch.float64}


def model(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, sd).to_event(1), obs=x)


@pytest.fixture(scope="module")
def data() -> Tensor:
    return 5 + 2 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def first(data: Tensor) -> bc.Fit:
    return bc.fit(model, args=(data,), family=MeanField(), **QUICK)


def free(draws: dict[str, Tensor]) -> Tensor:
    """Draws on the unconstrained space, packed."""
    return torch.cat([draws["mean"], draws["sd"].log().unsqueeze(-1)], -1)


@pytest.mark.parametrize(
    "family",
    [
        FullRank(),
        LowRank(rank=1),
        RealNVP(num_layers=2),
        IAF(num_layers=2),
        NeuralSpline(num_layers=2),
        FullRank(0.5, Exp()),
    ],
    ids=lambda family: type(family).__name__,
)
def test_a_richer_family_starts_where_the_first_ended(first: bc.Fit, data: Tensor, family: Any) -> None:
    program = build(model, None, (data,), family=family, dtype=torch.float64)
    x = warm_start(program, first, seed=0)
    count = 4000
    old, new = free(first.sample(count)), free(draw(program, x, count, 1).latent)
    scale = old.std(0)
    assert (scale < 2).all()  # power: not the prior, whose scale is 10
    assert ((new.mean(0) - old.mean(0)).abs() < 5 * scale * (2 / count) ** 0.5).all()
    assert ((new.std(0) / scale - 1).abs() < 0.08).all()
    assert torch.equal(x, warm_start(program, first, seed=0))


def hierarchy(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("group", len(x)):
        level = pyro.sample("level", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(level, 0.5), obs=x)


def test_a_structured_guide_starts_at_global_and_local_sites(data: Tensor) -> None:
    args = (data[:6, 0],)
    first = bc.fit(hierarchy, args=args, family=MeanField(), **QUICK | {"max_steps": 400})
    program = build(hierarchy, None, args, family=Structured(), dtype=torch.float64)
    count = 4000
    old, new = first.sample(count), draw(program, warm_start(program, first, seed=0), count, 1).latent
    for name in ("mu", "level"):
        scale = old[name].std(0)
        assert ((new[name].mean(0) - old[name].mean(0)).abs() < 5 * scale * (2 / count) ** 0.5).all()
        assert ((new[name].std(0) / scale - 1).abs() < 0.08).all()
    assert float(old["mu"].mean()) > 1.5  # power: it went where the data are
    torch.testing.assert_close(new["tau"].log().mean(), old["tau"].log().mean(), rtol=0, atol=0.1)


def test_components_of_a_mixture_start_around_it(first: bc.Fit, data: Tensor) -> None:
    program = build(model, None, (data,), family=Mixture(3, spread=0.1), dtype=torch.float64)
    starts = program.constrained(warm_start(program, first, seed=0))["MixtureGuide.loc"]
    centre = free(first.sample(4000)).mean(0)
    assert starts.std(0).min() > 0
    assert ((starts - centre).abs() < 0.5).all()


def test_the_same_family_with_another_scale_map_keeps_its_scales(first: bc.Fit, data: Tensor) -> None:
    program = build(model, None, (data,), family=MeanField(scale_map=Exp()), dtype=torch.float64)
    moved = program.constrained(warm_start(program, first, seed=0))
    for name, value in first.constrained_params.items():
        torch.testing.assert_close(moved[name], value, rtol=1e-12, atol=0)
    clipped = MeanField(0.001, SoftClip(1e-4, 0.002))
    program = build(model, None, (data,), family=clipped, dtype=torch.float64)
    moved = program.constrained(warm_start(program, first, seed=0))
    assert all(torch.isfinite(value).all() for value in moved.values())


def test_a_fit_goes_on_from_there(first: bc.Fit, data: Tensor) -> None:
    fit = bc.fit(model, args=(data,), family=FullRank(), init=first, **QUICK)
    assert fit.state.losses[0][2] < -first.verdict.numbers["bound"]["value"] + 1  # nats, in the first steps
