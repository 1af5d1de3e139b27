"""Optimisers meet programs: scales are found, unsound pairs are refused, sound ones reach the posterior to rounding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv.binding import bind, scales_of
from bbvi_conv.engine import make_engine, start_carry
from bbvi_conv.engine.streams import Stream
from bbvi_conv.families import Linear
from bbvi_conv.families.scale_maps import linear_scale
from bbvi_conv.monitor.strata import Strata
from bbvi_conv.optim import Scales

MEAN = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)
SMOOTHNESS = float(1 / torch.linalg.eigvalsh(COVARIANCE)[0])
STL = "sticking-the-landing"
DENSE = bc.FullRank(0.5, Linear())


def correlated() -> None:
    pyro.sample("z", dist.MultivariateNormal(MEAN, COVARIANCE))


def independent() -> None:
    pyro.sample("z", dist.Normal(MEAN, COVARIANCE.diagonal().sqrt()).to_event(1))


def positive() -> None:
    with pyro.plate("p", 3):
        rate = pyro.sample("rate", dist.LogNormal(MEAN, 1.0))
        pyro.sample("count", dist.Poisson(rate), obs=torch.tensor([2.0, 4.0, 0.0], dtype=torch.float64))


def divergence(program: bc.Program, x: Tensor) -> float:
    """KL(q || p) in nats, in closed form, for a full-rank guide on ``correlated``."""
    q = {name.split(".")[-1]: value for name, value in program.constrained(x).items()}
    factor = torch.diag(q["scale"])
    factor[tuple(torch.tril_indices(3, 3, -1))] = q["lower"]
    root = torch.linalg.cholesky(COVARIANCE)
    spread, shift = torch.linalg.solve(root, factor), torch.linalg.solve(root, q["loc"] - MEAN)
    logs = q["scale"].log().sum() - root.diagonal().log().sum()
    return float(0.5 * (spread.square().sum() - 3 + shift.square().sum()) - logs)


OPTIMISERS: list[Any] = [
    bc.ProjectedSGD(bc.Constant(0.1 / SMOOTHNESS), floor=0.5 / math.sqrt(SMOOTHNESS)),
    bc.ProximalSGD(bc.Constant(0.1 / SMOOTHNESS), control_variate=True),
]


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda o: type(o).__name__)
def test_a_gaussian_posterior_is_reached_at_a_geometric_rate(optimiser: Any) -> None:
    path: list[tuple[int, Tensor]] = []
    fit = bc.fit(
        correlated,
        family=DENSE,
        objective=bc.ELBO(10, STL),
        optimiser=optimiser,
        average="last",
        max_steps=1500,
        window=1500,
        khat_draws=100,
        on_look=lambda state: path.append((state.step, state.carry.x.clone())),
    )
    steps, kl = (np.array(c) for c in zip(*((n, divergence(fit.program, x)) for n, x in path), strict=True))
    assert kl[0] > 1
    assert divergence(fit.program, fit.x) < 1e-12
    above = (kl > 1e-11) & (steps > 0)
    slope, start = np.polyfit(steps[above], np.log(kl[above]), 1)
    residual = np.log(kl[above]) - slope * steps[above] - start
    assert slope < -0.02
    assert np.log(kl[above]).min() < math.log(1e-10)
    # ten decades are 23 nats: a rate that slows down, as any power law does, bends by far more than 3
    assert np.abs(residual).max() < 3


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda o: type(o).__name__)
def test_without_sticking_the_landing_a_constant_step_stalls(optimiser: Any) -> None:
    if isinstance(optimiser, bc.ProximalSGD):
        optimiser = bc.ProximalSGD(optimiser.step_size)
    common: dict[str, Any] = {"average": "last", "max_steps": 500, "khat_draws": 100}
    fit = bc.fit(correlated, family=DENSE, objective=bc.ELBO(10), optimiser=optimiser, **common)
    assert 1e-4 < divergence(fit.program, fit.x) < 1


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_a_proximal_step_solves_for_the_entropy_that_the_loss_holds(engine: str, kl_weight: float) -> None:
    """One step of size g: the scale solves t - s = -g dE/ds + g c / t, with c the weight of the entropy."""
    program = bc.build(positive, family=bc.MeanField(0.4, Linear()))
    objective, size, normaliser = bc.ELBO(3, kl_weight=kl_weight), 0.05, 2.0
    optimiser = bind(bc.ProximalSGD(bc.Constant(size)), program, objective, normaliser)
    runner = make_engine(engine, program, objective, optimiser, normaliser=normaliser)
    stream, x = Stream(program, 0, "optimise", 3), program.initial()
    carry, _ = runner.advance(start_carry(optimiser, x), stream, 0, 1)
    scales, weight = scales_of(program), kl_weight / normaliser
    feed = next(stream.steps(0, 1))
    grad, _ = runner.calculus._gradient(x, feed.noise.at(0), feed.batch(program, 0), torch.tensor(1.0))
    s, t = scales.of(x), scales.of(carry.x)
    energy = scales.of(grad) + weight / s
    torch.testing.assert_close(t - s, size * (weight / t - energy), rtol=1e-9, atol=1e-12)


def test_both_end_at_the_posterior_of_a_constrained_site() -> None:
    common: dict[str, Any] = {"family": bc.MeanField(0.4, Linear()), "max_steps": 600, "average": "all"}
    rule = bc.InverseSqrt(0.2)
    near = bc.fit(positive, objective=bc.ELBO(10), optimiser=bc.ProximalSGD(rule), **common)
    held = bc.fit(positive, objective=bc.ELBO(10), optimiser=bc.ProjectedSGD(rule, floor=0.05), **common)
    adam = bc.fit(positive, objective=bc.ELBO(10), max_steps=1000)
    for fit in (near, held):
        found, wanted = fit.verdict.numbers["bound"], adam.verdict.numbers["bound"]
        assert found["low"] < wanted["high"] + 0.01
        assert wanted["low"] < found["high"] + 0.01


def test_scales_are_found_wherever_they_lie() -> None:
    program = bc.build(correlated, family=DENSE)
    assert [size for size, are in scales_of(program).parts if are] == [3]
    x = program.initial()
    assert torch.equal(scales_of(program).of(x), torch.full((3,), 0.5, dtype=torch.float64))
    assert not any(are for _, are in scales_of(bc.build(correlated, family=bc.FullRank())).parts)


def own_guide() -> None:
    loc = pyro.param("loc", torch.zeros(3, dtype=torch.float64))
    scale = pyro.param("scale", torch.ones(3, dtype=torch.float64), constraint=linear_scale)
    pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def squared_guide() -> None:
    loc = pyro.param("loc", torch.zeros(3, dtype=torch.float64))
    scale = pyro.param("scale", torch.ones(3, dtype=torch.float64), constraint=linear_scale)
    pyro.sample("z", dist.Normal(loc, scale**2).to_event(1))


def test_a_guide_of_the_users_own_may_have_linear_scales() -> None:
    program = bc.build(independent, own_guide)
    bound: Any = bind(bc.ProximalSGD(), program, bc.ELBO(), 1.0)
    assert bound.scales == Scales(((3, False), (3, True)), 1.0)


LINEAR = {"family": bc.MeanField(scale_map=Linear())}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"objective": bc.ELBO(2, STL), **LINEAR}, r"would count it twice \(.* settles at 1.44\); use ProximalSGD"),
        (
            {"objective": bc.ELBO(2), "optimiser": bc.ProximalSGD(control_variate=True), **LINEAR},
            r"control_variate=True\) needs ELBO\(estimator=\"sticking-the-landing\"\)",
        ),
        ({"objective": bc.IWAE(2), **LINEAR}, "ProximalSGD needs the ELBO.*IWAE has no such parts"),
        ({"objective": bc.ELBO(kl_weight=bc.LinearWarmup(10)), **LINEAR}, "needs a constant kl_weight"),
        ({"family": bc.MeanField()}, r"ProximalSGD acts on scales.*use a family with scale_map=bc.Linear\(\)"),
        ({"optimiser": bc.ProjectedSGD(), "family": bc.FullRank()}, "Projected acts on scales"),
        ({"guide": squared_guide}, "needs a guide whose entropy is the sum of the logarithms of its scales"),
    ],
)
def test_unsound_pairs_are_refused_by_name(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        bc.fit(independent, **{"optimiser": bc.ProximalSGD(), "objective": bc.ELBO(2), "max_steps": 5, **given})


def test_rows_outside_a_minibatch_have_no_proximal_step() -> None:
    data = torch.randn(20, generator=torch.Generator().manual_seed(0))

    def rows(x: Tensor) -> None:
        with pyro.plate("rows", 20, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    minibatch = bc.Minibatch(5, plate="rows")
    with pytest.raises(ValueError, match="scales of rows outside a minibatch are not in it"):
        bc.fit(rows, args=(data,), minibatch=minibatch, optimiser=bc.ProximalSGD(), max_steps=5, **LINEAR)
    fit = bc.fit(rows, args=(data,), minibatch=minibatch, optimiser=bc.ProjectedSGD(), max_steps=5, **LINEAR)
    assert fit.state.step == 5


def test_the_average_over_the_whole_run_is_that_of_every_iterate() -> None:
    seen: dict[int, Tensor] = {}
    fit = bc.fit(
        independent,
        average="all",
        max_steps=24,
        window=4,
        strata=Strata(1, 0.0),
        on_look=lambda state: seen.update({state.step: state.carry.x.clone()}),
    )
    last = fit.state.carry.x
    iterates = [seen[n] for n in range(1, 24)] + [last]
    torch.testing.assert_close(fit.x, torch.stack(iterates).mean(0), rtol=1e-12, atol=1e-14)
