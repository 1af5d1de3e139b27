"""Discrete latents that no guide draws are summed out exactly: Pyro's ``TraceEnum_ELBO``, brute force, closed forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor

from bbvi_conv.engine import make_engine
from bbvi_conv.engine.engine import start_carry
from bbvi_conv.engine.streams import Stream
from bbvi_conv.families import FullRank, MeanField
from bbvi_conv.objectives import ELBO, IWAE
from bbvi_conv.optim import Adam, Constant
from bbvi_conv.program import Minibatch, Program
from bbvi_conv.program.build import build
from bbvi_conv.theory.target import Target

Y = torch.tensor([-2.1, -1.7, 0.4, 2.9, 3.3, 3.1], dtype=torch.float64)


def mixture(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("component", 3):
        means = pyro.sample("means", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(means[z], scale), obs=y)


def log_mixture(values: dict[str, Tensor], y: Tensor) -> Tensor:
    """The same likelihood by torch's own mixture."""
    parts = dist.Normal(values["means"], values["scale"])
    return dist.MixtureSameFamily(dist.Categorical(values["weights"]), parts).log_prob(y)


def one_switch_for_all(y: Tensor) -> None:
    """A discrete latent outside the plate of what depends on it: which of two models made the data?"""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    wide = pyro.sample("wide", dist.Bernoulli(0.3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 0.5 + 2.5 * wide), obs=y)


def change_point(y: Tensor) -> None:
    early, late = pyro.sample("early", dist.Normal(0.0, 3.0)), pyro.sample("late", dist.Normal(0.0, 3.0))
    when = pyro.sample("when", dist.Categorical(torch.ones(len(y))))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(torch.where(torch.arange(len(y)) < when, early, late), 1.0), obs=y)


def markov_chain(y: Tensor) -> None:
    """Hidden Markov model; dimensions are used again every other step."""
    with pyro.plate("state", 2):
        rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2)))
        means = pyro.sample("means", dist.Normal(0.0, 3.0))
    z: Any = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
        pyro.sample(f"y_{t}", dist.Normal(means[z], 1.0), obs=y[t])


def labelled_codes(y: Tensor) -> None:
    """A continuous latent whose prior depends on the discrete one, both of single data."""
    centre = pyro.param("centre", torch.tensor([-1.0, 2.0]))
    with pyro.plate("data", len(y)):
        label = pyro.sample("label", dist.Bernoulli(0.4)).long()
        code = pyro.sample("code", dist.Normal(centre[label], 0.5))
        pyro.sample("y", dist.Normal(code, 1.0), obs=y)


def nested(y: Tensor) -> None:
    """Groups of groups: a kind for each row, a flag for each entry; y of shape (3, 2)."""
    low, high = pyro.sample("low", dist.Normal(-1.0, 1.0)), pyro.sample("high", dist.Normal(2.0, 1.0))
    rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
    with pyro.plate("row", 3, dim=-2):
        kind = pyro.sample("kind", dist.Bernoulli(rate))
        with pyro.plate("column", 2, dim=-1):
            flag = pyro.sample("flag", dist.Bernoulli(0.2 + 0.6 * kind))
            pyro.sample("y", dist.Normal(flag * high + (1 - flag) * low, 0.7), obs=y.reshape(3, 2))


def vectors(y: Tensor) -> None:
    """Values that are vectors, and two sites on one discrete latent."""
    means = pyro.sample("means", dist.Normal(0.0, 3.0).expand([3]).to_event(1))
    with pyro.plate("data", len(y)):
        hot = pyro.sample("hot", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        loc = (hot * means).sum(-1)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        pyro.sample("again", dist.StudentT(4.0, loc, 2.0), obs=y + 0.3)


MODELS = {
    f.__name__: f
    for f in (mixture, one_switch_for_all, change_point, markov_chain, labelled_codes, nested, vectors)
}  # fmt: skip


def made(model: Callable[..., Any], **settings: Any) -> Program:
    return build(model, None, (Y,), family=MeanField(), **{"dtype": torch.float64, **settings})


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_pyros_enumeration(name: str, agrees_with_pyro) -> None:
    program = made(MODELS[name])
    assert program.enumerated is not None
    assert not program.obstacles
    assert agrees_with_pyro(program) < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_density_is_the_sum_over_all_values(name: str, draw, moved) -> None:
    """Every combination of the values, each run by itself."""
    program = made(MODELS[name])
    assert program.enumerated is not None
    x, noise = moved(program), draw(program)
    seen = program.site_values(x, noise, program.batch(None))
    bound = program.bind(program.model, x)
    plain = poutine.trace(poutine.condition(bound, data=seen.latent)).get_trace(Y)
    laws = {site.name: plain.nodes[site.name]["fn"] for site in program.structure.enumerated}
    supports = {n: fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape) for n, fn in laws.items()}
    entries = [n for n, fn in laws.items() for _ in range(fn.batch_shape.numel())]
    total = []
    for chosen in itertools.product(*(range(len(supports[n])) for n in entries)):
        places = {n: torch.tensor([c for c, m in zip(chosen, entries, strict=True) if m == n]) for n in laws}
        given = {n: supports[n][places[n]].reshape(laws[n].shape()) for n in laws}
        total.append(poutine.trace(poutine.condition(bound, data={**seen.latent, **given})).get_trace(Y).log_prob_sum())
    torch.testing.assert_close(seen.log_p, torch.stack(total).logsumexp(0), rtol=1e-9, atol=1e-9)
    theta, phi = program.split(x)
    terms = program.log_weights(theta, phi, phi, noise, program.batch(None))
    torch.testing.assert_close(terms.log_p.sum() + terms.free, seen.log_p, rtol=1e-9, atol=1e-9)


def test_prior_and_likelihood_of_a_code_whose_prior_is_a_mixture(draw, moved) -> None:
    program = made(labelled_codes)
    assert program.structure.unit == ("data",)
    x, noise, batch = moved(program), draw(program), program.batch(None)
    theta, phi = program.split(x)
    terms, code = (
        program.log_weights(theta, phi, phi, noise, batch),
        program.site_values(x, noise, batch).latent["code"],
    )
    prior = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.6, 0.4])), dist.Normal(theta["centre"], 0.5))
    torch.testing.assert_close(terms.log_prior, prior.log_prob(code), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(terms.log_p - terms.log_prior, dist.Normal(code, 1.0).log_prob(Y), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mixture", "markov_chain", "nested"])
@pytest.mark.parametrize("bound", [ELBO(4), IWAE(4)], ids=["elbo", "iwae"])
def test_compiled_steps_are_those_of_the_traced_engine(name: str, bound) -> None:
    program = made(MODELS[name])
    ends = []
    for engine in ("traced", "compiled"):
        rule = Adam(Constant(0.02))
        stepper = make_engine(engine, program, bound, rule)
        carry, losses = stepper.advance(start_carry(rule, program.initial()), Stream(program, 0, "optimise", 4), 0, 50)
        assert int(carry.step) == 50
        ends.append((carry.x, losses))
    assert (ends[0][0] - program.initial()).norm() > 0.3  # power: the steps went somewhere
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("by_index", [False, True])
def test_rows_of_a_mixture(by_index: bool, draw, moved) -> None:
    def indexed(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("component", 3):
            means = pyro.sample("means", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(Y), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(means[z], scale), obs=y[rows])

    program = made(indexed if by_index else mixture, minibatch=Minibatch(2, plate="data"))
    assert program.by_index == by_index
    x, noise, whole = moved(program), draw(program), made(mixture)
    theta, phi = program.split(x)
    values = whole.site_values(x, noise, whole.batch(None)).latent
    for rows in ([0, 3], [5, 1]):
        terms = program.log_weights(theta, phi, phi, noise, program.batch(torch.tensor(rows)))
        likelihood = 3.0 * log_mixture(values, Y[rows]).sum()
        torch.testing.assert_close((terms.log_p - terms.log_prior).sum(), likelihood, rtol=1e-9, atol=1e-9)


def test_a_sum_over_rows_that_are_not_there() -> None:
    def stepwise(y: Tensor) -> None:
        wide = pyro.sample("wide", dist.Bernoulli(0.3))
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 0.5 + wide), obs=y)

    with pytest.raises(ValueError, match=r"'wide' is shared by rows of plate 'data', which is subsampled"):
        made(stepwise, minibatch=Minibatch(2, plate="data"))


def test_masked_entries_leave_the_density_as_it_is(draw) -> None:
    def masked(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=y < 3.2):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.1, 0.2, 0.7])))
            pyro.sample("y", dist.Normal(loc + z, 1.0), obs=y)

    program = made(masked)
    seen = program.site_values(program.initial(), draw(program), program.batch(None))
    loc = seen.latent["loc"]
    parts = dist.Normal(loc + torch.arange(3.0), 1.0)
    right = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.1, 0.2, 0.7])), parts).log_prob(Y)
    expected = dist.Normal(0.0, 1.0).log_prob(loc) + right[Y < 3.2].sum()
    torch.testing.assert_close(seen.log_p, expected, rtol=1e-6, atol=1e-6)
    assert float(seen.sums[0].log_likelihood[4]) == pytest.approx(0.0, abs=1e-12)


def test_scales_of_one_sum(draw) -> None:
    def scaled(y: Tensor, other: float = 3.0) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            with poutine.scale(scale=3.0):
                z = pyro.sample("z", dist.Bernoulli(0.3))
            with poutine.scale(scale=other):
                pyro.sample("y", dist.Normal(loc + z, 1.0), obs=y)

    program = made(scaled)
    seen = program.site_values(program.initial(), draw(program), program.batch(None))
    loc = seen.latent["loc"]
    parts = dist.Normal(loc + torch.tensor([0.0, 1.0]), 1.0)
    right = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.7, 0.3])), parts).log_prob(Y).sum()
    torch.testing.assert_close(seen.log_p, dist.Normal(0.0, 1.0).log_prob(loc) + 3 * right, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"'z' is summed out, so that sites z, y need one scale"):
        made(lambda y: scaled(y, 1.0))


def sum_over_a_plate(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("flags", 2):
        flag = pyro.sample("flag", dist.Bernoulli(0.4))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc + flag.sum(), 1.0), obs=y)


def neighbours(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(loc + z.roll(1, -1), 1.0), obs=y)


@pytest.mark.parametrize("model", [sum_over_a_plate, neighbours], ids=lambda model: model.__name__)
def test_what_enumeration_would_get_wrong_is_refused(model) -> None:
    with pytest.raises(ValueError, match=r"is in no guide, .*site 'y' does not stand that.* or draw it in a guide"):
        made(model)


def test_a_model_that_fails_with_all_values_at_once() -> None:
    def meets_a_vector(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z, 1.0).expand([len(y)]).to_event(1), obs=y)

    def asks(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(loc + 1.0 if z else loc, 1.0).expand([len(y)]).to_event(1), obs=y)

    for model in (meets_a_vector, asks):
        with pytest.raises(ValueError, match=r"'z' is in no guide, .* and the model does not stand that \(.*None"):
            made(model)


def test_tables_looked_up_entry_by_entry(agrees_with_pyro) -> None:
    def looked_up(y: Tensor) -> None:
        table = pyro.sample("table", dist.Normal(0.0, 1.0).expand([len(y), 2]).to_event(2))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("y", dist.Normal(Vindex(table)[torch.arange(len(y)), z], 1.0), obs=y)

    assert agrees_with_pyro(made(looked_up)) < 1e-9


def test_a_guide_that_draws_a_part(agrees_with_pyro) -> None:
    """What the guide draws gets the score function, what it leaves out is summed."""

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Bernoulli(0.4))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
            pyro.sample("y", dist.Normal(loc + b, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("a", dist.Bernoulli(pyro.param("p", torch.tensor(0.3), constraint=dist.constraints.unit_interval)))
        pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.5)), 0.7))

    program = build(model, guide, (Y,), dtype=torch.float64)
    assert [site.name for site in program.structure.enumerated] == ["b"]
    assert program.structure.score_sites == ("a",)
    hidden = build(
        model, AutoNormal(poutine.block(config_enumerate(model), hide=["a", "b"])), (Y,), dtype=torch.float64
    )
    assert [site.name for site in hidden.structure.enumerated] == ["a", "b"]
    assert agrees_with_pyro(hidden) < 1e-9


def test_parameters_alone() -> None:
    """Maximum likelihood of a mixture without a continuous latent, its assignments summed out."""

    def model(y: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=dist.constraints.simplex)
        means = pyro.param("means", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(means[z], 1.0), obs=y)

    program = build(model, lambda y: None, (Y,), dtype=torch.float64)
    rule = Adam(Constant(0.05))
    carry, losses = make_engine("traced", program, ELBO(), rule).advance(
        start_carry(rule, program.initial()), Stream(program, 0, "optimise", 1), 0, 400
    )
    found = program.constrained(carry.x)
    assert losses[-1] < losses[0] - 3.0
    slopes = torch.autograd.functional.jacobian(
        lambda m: log_mixture({"weights": found["weights"], "means": m, "scale": torch.ones(())}, Y).sum(),
        found["means"],
    )
    assert slopes.abs().max() < 1e-2  # the likelihood's maximum, by torch's own mixture


@pytest.mark.parametrize("model", [mixture, labelled_codes])
def test_loss_of_a_stock_loop(model) -> None:
    """``loss=`` of Pyro's own SVI: the value and gradient of ``TraceEnum_ELBO`` at the same draw."""
    with pyro.get_param_store().scope():
        guide = AutoNormal(poutine.block(model, hide=["z", "label"]))
        guide(Y.float())
        leaves = list(guide.parameters())

        def gradient(bound: Any, loss_model: Any) -> tuple[Tensor, ...]:
            pyro.set_rng_seed(3)
            loss = bound.differentiable_loss(loss_model, guide, Y.float())
            return (loss.detach(), *torch.autograd.grad(loss, leaves))

        ours = gradient(ELBO(), model)
        again = gradient(ELBO(), model)  # what is remembered of the pair gives the same
        right = gradient(TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(model))
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again, ours)
        assert max(float(g.abs().max()) for g in ours[1:]) > 0.1
        before = [p.detach().clone() for p in leaves]
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=ELBO()).step(Y.float())
        assert any(not torch.equal(a, b) for a, b in zip(before, leaves, strict=True))


def test_stock_loop_refuses_what_enumeration_would_get_wrong() -> None:
    with pyro.get_param_store().scope():
        guide = AutoNormal(poutine.block(sum_over_a_plate, hide=["flag"]))
        with pytest.raises(ValueError, match="site 'y' does not stand that"):
            ELBO().loss(sum_over_a_plate, guide, Y.float())


def test_target_density_of_all_latents(draw, moved) -> None:
    program = build(mixture, None, (Y,), family=FullRank(), dtype=torch.float64)
    x, noise = moved(program), draw(program)
    target, values = Target(program, x), program.site_values(x, noise, program.batch(None)).latent
    zeta = target.pack({name: value.detach() for name, value in values.items()})
    volume = target._values(zeta)[1]
    right = program.site_values(x, noise, program.batch(None)).log_p + volume
    torch.testing.assert_close(target(zeta), right, rtol=1e-7, atol=1e-7)
