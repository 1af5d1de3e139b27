"""What people write in models and guides: each construct gives Pyro's gradient in both engines."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn

from bbvi_conv.engine import Stream, make_engine, start_carry
from bbvi_conv.families import FullRank, MeanField
from bbvi_conv.objectives import ELBO
from bbvi_conv.optim import Adam, Constant
from bbvi_conv.program import Program
from bbvi_conv.program.build import build

RULE = Adam(Constant(0.01))
Y = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)


def built(model, guide=None, args=(Y,), family=None, **kwargs) -> Program:
    return build(model, guide, args, family=family or (None if guide else MeanField()), dtype=torch.float64, **kwargs)


def location(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_hand_written_guide_with_constrained_parameters(agrees_with_pyro) -> None:
    def model(y: Tensor) -> None:
        noise = pyro.param("noise", torch.tensor(0.7), constraint=constraints.positive)
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z + weights[0], noise), obs=y)

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.1))
        scale = pyro.param("scale", torch.tensor(0.4), constraint=constraints.interval(0.1, 3.0))
        tril = pyro.param("tril", torch.eye(2), constraint=constraints.lower_cholesky)
        free = pyro.sample(
            "free", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril), infer={"is_auxiliary": True}
        )
        simplex = torch.nn.functional.pad(free, (0, 1)).softmax(-1)
        pyro.sample("weights", dist.Delta(simplex, log_density=-simplex.log().sum(), event_dim=1))
        pyro.sample("z", dist.Normal(loc, scale))

    program = built(model, guide)
    assert {leaf.name: leaf.group for leaf in program.leaves} == {
        "noise": "theta",
        "loc": "phi",
        "scale": "phi",
        "tril": "phi",
    }
    assert [site.name for site in program.structure.auxiliary] == ["free"]
    agrees_with_pyro(program)


def test_a_parameter_of_both_is_shared_and_counted_once(agrees_with_pyro) -> None:
    def model(y: Tensor) -> None:
        width = pyro.param("width", torch.tensor(1.3), constraint=constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, width))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        width = pyro.param("width", torch.tensor(1.3), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.5 * width))

    program = built(model, guide)
    assert [(leaf.name, leaf.group) for leaf in program.leaves] == [("loc", "phi"), ("width", "shared")]
    agrees_with_pyro(program)


def test_a_tensor_under_two_names_is_one_leaf(agrees_with_pyro) -> None:
    layer = nn.Linear(1, 1).double()

    def model(y: Tensor) -> None:
        pyro.module("decoder", layer)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(layer(z[:, None])[:, 0], 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.module("encoder", layer)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(layer(y[:, None])[:, 0], 0.5))

    program = built(model, guide)
    assert [leaf.group for leaf in program.leaves] == ["shared", "shared"]
    agrees_with_pyro(program)


class Regression(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.slope = PyroSample(lambda self: dist.Normal(0.0, 2.0))
        self.scale = PyroParam(torch.tensor(0.8), constraint=constraints.positive)
        self.linear = PyroModule[nn.Linear](1, 1)
        self.linear.weight = PyroSample(lambda self: dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))

    def forward(self, y: Tensor) -> None:
        mean = self.slope * torch.arange(len(y)) + self.linear(torch.ones(len(y), 1, dtype=y.dtype))[:, 0]
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=y)


@pytest.mark.parametrize("family", [MeanField(), FullRank()], ids=["mean-field", "full-rank"])
def test_pyro_module_with_random_and_learned_attributes(agrees_with_pyro, family) -> None:
    program = built(Regression().double(), family=family)
    assert {site.name for site in program.structure.latents} == {"slope", "linear.weight"}
    assert {leaf.name for leaf in program.leaves if leaf.group == "theta"} == {"scale", "linear.bias"}
    agrees_with_pyro(program)


def test_modules_registered_by_pyro_module(agrees_with_pyro) -> None:
    encoder = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    decoder = nn.Sequential(nn.Linear(1, 3), nn.Softplus(), nn.Linear(3, 1)).double()

    def model(y: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(decoder(z[:, None])[:, 0], 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(y)):
            loc, log_scale = encoder(y[:, None]).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    program = built(model, guide)
    assert program.structure.unit == ("data",)
    assert {leaf.group for leaf in program.leaves} == {"theta", "phi"}
    agrees_with_pyro(program)


def scaled(y: Tensor) -> None:
    with poutine.scale(scale=2.5):
        location(y)


def masked(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    seen = torch.tensor([True, False, True, True])
    with pyro.plate("data", len(y)), poutine.mask(mask=seen):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def masked_distribution(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0).mask(y > 0), obs=y)


def partly_observed(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    seen = torch.tensor([True, False, True, True])
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=seen)


def nested_plates(y: Tensor) -> None:
    with pyro.plate("outer", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", len(y), dim=-1):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Normal(b, 1.0), obs=y.expand(3, -1))


def crossed_plates(y: Tensor) -> None:
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", len(y), dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    with rows, columns:
        pyro.sample("y", dist.Normal(a, b), obs=y.expand(2, -1))


def two_plates_in_a_row(y: Tensor) -> None:
    with pyro.plate("first", 2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("second", len(y)):
        b = pyro.sample("b", dist.Normal(a.sum(), 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=y)


def python_loop(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for i in range(len(y)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.9 * z, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])


def with_factor(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    pyro.factor("penalty", -0.3 * z.abs() + 0.1 * y.sum())


def with_deterministic(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        mean = pyro.deterministic("mean", z * torch.arange(len(y)))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def improper(y: Tensor) -> None:
    z = pyro.sample("z", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def factor_in_a_masked_plate(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
    censored = torch.tensor([True, False, False, True])
    with pyro.plate("data", len(y)):
        with poutine.mask(mask=~censored):
            pyro.sample("y", dist.Exponential(rate), obs=y.abs())
        with poutine.mask(mask=censored):
            pyro.factor("beyond", -rate * y.abs())


def picked_by_a_constant_mask(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(4), 2.0).to_event(1))
    seen = y > 0
    pyro.sample("y", dist.Normal(z[seen], 1.0).to_event(1), obs=y[seen])


def written_through_a_mask(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(4), 2.0).to_event(1))
    mean = z * 1.0
    mean[z > 0.1] = 0.1
    mean[y < 0] = torch.tensor([0.5])
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


def missing_values_filled_in(y: Tensor) -> None:
    missing = torch.tensor([False, True, False, True])
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    x = y.clone()
    x[missing] = z
    pyro.sample("y", dist.Normal(x.cumsum(0), 1.0).to_event(1), obs=y)


def written_to_a_new_tensor(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    mean, more = torch.tensor([1.0, 2.0, 3.0, 4.0]), 2.0 * y
    mean[1] = z[0]
    mean[2:4] += z
    more[:2].mul_(z)
    pyro.sample("y", dist.Normal(mean + more, 1.0).to_event(1), obs=y)


def counts(y: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    pyro.sample("y", dist.Multinomial(10, p), obs=torch.tensor([2.0, 0.0, 8.0]))


def ordered_categories(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        cuts = torch.tensor([-1.0, 0.0, 1.5])
        pyro.sample("y", dist.OrderedLogistic(z * y, cuts), obs=torch.tensor([2, 0, 3, 1]))


def covariance(y: Tensor) -> None:
    tril = pyro.sample("tril", dist.LKJCholesky(4, 2.0))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(4), scale_tril=tril), obs=y)


def hidden_chain(y: Tensor) -> None:
    stay = pyro.sample("stay", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    means = pyro.sample("means", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), stay.log(), dist.Normal(means, 1.0), duration=4), obs=y)


CHECKED = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0, validate_args=True)


def prior_made_with_validation(y: Tensor) -> None:
    z = pyro.sample("z", CHECKED)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


MODELS = [
    location,
    scaled,
    masked,
    masked_distribution,
    nested_plates,
    crossed_plates,
    two_plates_in_a_row,
    python_loop,
    with_factor,
    with_deterministic,
    improper,
    factor_in_a_masked_plate,
    picked_by_a_constant_mask,
    written_through_a_mask,
    missing_values_filled_in,
    written_to_a_new_tensor,
    counts,
    ordered_categories,
    covariance,
    hidden_chain,
    prior_made_with_validation,
]


@pytest.mark.parametrize("family", [MeanField(), FullRank()], ids=["mean-field", "full-rank"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_models(agrees_with_pyro, model, family) -> None:
    assert agrees_with_pyro(built(model, family=family)) <= 1e-9


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_models_are_mapped_and_compiled(model) -> None:
    """Many draws at once, and as compiled code: no construct falls back to a loop over draws or over operations."""
    program = built(model)
    traced, compiled = (make_engine(name, program, ELBO(3), RULE) for name in ("traced", "compiled"))
    assert traced.calculus.vectorise
    carry, losses = traced.advance(start_carry(RULE, program.initial()), Stream(program, 0, "optimise", 3), 0, 20)
    again, same = compiled.advance(start_carry(RULE, program.initial()), Stream(program, 0, "optimise", 3), 0, 20)
    torch.testing.assert_close(same, losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(again.x, carry.x, rtol=1e-9, atol=1e-12)


def test_sequential_plate(agrees_with_pyro) -> None:
    def model(y: Tensor) -> None:
        for i in pyro.plate("data", len(y)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])

    def guide(y: Tensor) -> None:
        for i in pyro.plate("data", len(y)):
            pyro.sample(f"z_{i}", dist.Normal(pyro.param(f"loc_{i}", torch.tensor(0.1)), 0.5))

    agrees_with_pyro(built(model, guide))
    with pytest.raises(ValueError, match=r"MeanFieldGuide cannot be made.*sequential pyro.plate.*write a guide"):
        built(model, family=MeanField())


def test_partly_observed_site(agrees_with_pyro) -> None:
    program = built(partly_observed)
    assert {site.name for site in program.structure.latents} == {"z", "y_unobserved"}
    agrees_with_pyro(program)


def test_deterministic_sites_are_reported(draw) -> None:
    program = built(with_deterministic)
    values = program.site_values(program.initial(), draw(program), program.batch(None))
    torch.testing.assert_close(values.deterministic["mean"], values.latent["z"] * torch.arange(4))
    assert values.log_likelihood["y"].shape == (4,)


def test_keyword_arguments_and_values_that_are_no_tensors(agrees_with_pyro) -> None:
    def model(y: Tensor, power: int, *, scale: Tensor, flag: bool) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z**power if flag else z, scale), obs=y)

    program = built(model, args=(Y, 2), kwargs={"scale": torch.tensor(0.7), "flag": True})
    assert agrees_with_pyro(program) <= 1e-9
    assert (program.args[1], program.kwargs["flag"]) == (2, True)


def test_parameters_that_start_at_random_take_nothing_from_the_tape(agrees_with_pyro) -> None:
    def guide(y: Tensor) -> None:
        start = pyro.param("start", lambda: torch.randn(3) + torch.randperm(3))
        pyro.sample("z", dist.Normal(start.mean(), 0.5))

    program = built(location, guide)
    assert program.layout == (1, 0)
    assert program.obstacles == ()
    agrees_with_pyro(program)


def test_parts_of_the_flat_vector_have_names(moved) -> None:
    program = built(Regression().double())
    x = moved(program)
    nested, flat = program.params(x), program.constrained(x)
    assert nested["theta"]["scale"].exp() == pytest.approx(float(flat["scale"]), rel=1e-12)
    assert sum(value.numel() for group in nested.values() for value in group.values()) == len(x)
    assert sum(part.stop - part.start for part in program.groups.values()) == len(x)
    program.write_back(x)
    torch.testing.assert_close(program.initial(), x)
