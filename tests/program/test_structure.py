"""Units: the plates shared by all latent sites and every site that depends on one."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bbvi_conv.families import FullRank, MeanField
from bbvi_conv.program import Program, Site, Terms
from bbvi_conv.program.build import build

Y = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)


def built(model, guide=None, family=None) -> Program:
    return build(model, guide, (Y,), family=family or (None if guide else MeanField()), dtype=torch.float64)


def terms(program: Program, draw) -> Terms:
    """The terms of one draw, checked against the sum of all densities."""
    theta, phi = program.split(program.initial())
    noise, batch = draw(program), program.batch(None)
    got = program.log_weights(theta, phi, phi, noise, batch)
    values = program.site_values(program.initial(), noise, batch)
    torch.testing.assert_close(got.log_p.sum() + got.free, values.log_p)
    torch.testing.assert_close(got.log_q.sum(), values.log_q)
    assert got.log_p.shape == got.log_q.shape == got.score.shape
    assert got.free.shape == ()
    return got


def test_global_latent_only(draw) -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    program = built(model)
    assert program.structure.unit == ()
    assert program.structure.describe() == "one unit: the joint bound of all latent sites"
    assert program.structure.latents == (Site("z", (), False, True, 0, 1),)
    assert program.structure.observed == (Site("y", (("data", -1, 3),), True, True, 0, 3),)
    assert terms(program, draw).log_p.shape == (1,)


def local(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_latent_in_a_plate(draw) -> None:
    program = built(local)
    assert program.structure.unit == ("data",)
    assert program.structure.unit_shape == (3,)
    assert program.structure.describe() == "3 units: one per index of plate data"
    got, noise = terms(program, draw), draw(program).normal
    z = program.split(program.initial())[1]["MeanFieldGuide.locs.z"] + 0.1 * noise
    torch.testing.assert_close(got.log_p, dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(Y))
    torch.testing.assert_close(got.log_q, dist.Normal(0.0, torch.tensor(0.1).double()).log_prob(0.1 * noise))


def test_a_guide_that_couples_the_plate_has_one_unit(draw) -> None:
    program = built(local, family=FullRank())
    assert program.structure.unit == ()
    assert terms(program, draw).log_p.shape == (1,)


def whole(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_a_guide_without_the_plate_has_one_unit(draw) -> None:
    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    program = built(whole, guide)
    assert program.structure.unit == ()
    terms(program, draw)


def test_global_and_local_latents_have_one_unit(draw) -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    program = built(model)
    assert program.structure.unit == ()
    terms(program, draw)


def test_nested_plates(draw) -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("outer", 2, dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", len(y), dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("y", dist.Normal(b, 1.0), obs=y.expand(2, -1))

    program = built(model)
    assert program.structure.unit == ("outer",)
    assert program.structure.unit_shape == (2,)
    assert {site.name: site.plates for site in program.structure.latents} == {
        "a": (("outer", -2, 2),),
        "b": (("outer", -2, 2), ("inner", -1, 3)),
    }
    assert terms(program, draw).log_p.shape == (2,)


def test_both_nested_plates_are_the_unit_where_all_sites_lie_in_both(draw) -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", len(y), dim=-1):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(b, 1.0), obs=y.expand(2, -1))

    program = built(model)
    assert program.structure.unit == ("outer", "inner")
    assert program.structure.describe() == "6 units: one per index of plate outer x inner"
    assert terms(program, draw).log_p.shape == (6,)


def test_latent_free_sites_stay_outside(draw) -> None:
    def model(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        with pyro.plate("other", 3):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=y)
        pyro.sample("w", dist.Normal(loc, 1.0), obs=torch.tensor(0.1))

    program = built(model)
    assert program.structure.unit == ("data",)  # the plates of x and w do not count: no latent reaches them
    assert {site.name: site.in_unit for site in program.structure.observed} == {"y": True, "x": False, "w": False}
    expected = dist.Normal(0.5, 1.0).log_prob(Y).sum() + dist.Normal(0.5, 1.0).log_prob(torch.tensor(0.1))
    torch.testing.assert_close(terms(program, draw).free, expected.double())


def test_an_observed_site_outside_the_plate_that_depends_on_it_joins_all(draw) -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("total", dist.Normal(z.sum(), 1.0), obs=y.sum())

    program = built(model)
    assert program.structure.unit == ()
    assert terms(program, draw).free == 0


def test_sites_report_their_sizes() -> None:
    def model(y: Tensor) -> None:
        pyro.sample("a", dist.Dirichlet(torch.ones(4)))
        with pyro.plate("p", 2):
            pyro.sample("b", dist.Normal(0.0, 1.0).expand([5]).to_event(1))

    latents = {site.name: site for site in built(model).structure.latents}
    assert (latents["a"].size, latents["a"].event_dim) == (4, 1)
    assert (latents["b"].size, latents["b"].event_dim) == (10, 1)


def test_model_without_latents(draw) -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0), obs=y)

    program = built(model, lambda y: None)
    assert program.structure.latents == ()
    got = terms(program, draw)
    assert (got.log_p, got.log_q) == (0, 0)
    torch.testing.assert_close(got.free, dist.Normal(0.5, 1.0).log_prob(Y).sum().double())
