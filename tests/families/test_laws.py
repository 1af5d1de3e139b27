"""What holds of every family, over one table: a new member is one line."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import transform_to

from bbvi_conv.engine.calculus import Calculus
from bbvi_conv.engine.streams import Feed, Stream
from bbvi_conv.families import (
    FAMILIES,
    IAF,
    Exp,
    FullRank,
    Linear,
    LowRank,
    MeanField,
    Mixture,
    NeuralSpline,
    Planar,
    Radial,
    RealNVP,
    SoftClip,
    StudentT,
    Sylvester,
)
from bbvi_conv.families.family import VectorFamily
from bbvi_conv.families.flows.law import Flow
from bbvi_conv.objectives import ELBO, IWAE
from bbvi_conv.program import Noise, Program
from bbvi_conv.program.build import build
from bbvi_conv.program.tape import Tape
from bbvi_conv.program.trace import TracedLogWeights

TABLE: dict[str, VectorFamily] = {
    "mean-field": MeanField(),
    "mean-field, linear": MeanField(scale_map=Linear()),
    "mean-field, exp": MeanField(scale_map=Exp()),
    "mean-field, soft-clip": MeanField(scale_map=SoftClip(0.02, 3.0, 2.0)),
    "full-rank": FullRank(),
    "full-rank, linear": FullRank(scale_map=Linear()),
    "low-rank": LowRank(rank=1),
    "student-t": StudentT(init_df=4.0),
    "planar": Planar(num_layers=3),
    "radial": Radial(num_layers=3),
    "sylvester": Sylvester(num_layers=2, units=2),
    "real-nvp": RealNVP(num_layers=3, hidden=(8,)),
    "iaf": IAF(num_layers=2, hidden=(8,)),
    "neural-spline": NeuralSpline(num_layers=2, hidden=(8,), bins=4),
    "mixture": Mixture(2),
    "mixture, implicit": Mixture(2, MeanField(), gradient="implicit"),
    "mixture of flows": Mixture(2, RealNVP(num_layers=2, hidden=(8,))),
}


def every(**chosen: Any) -> Any:
    """Parametrise over the members of the table that have these attributes."""
    members = {n: f for n, f in TABLE.items() if all(getattr(f, k) == v for k, v in chosen.items())}
    return pytest.mark.parametrize("name", members)


def test_every_family_is_in_the_table() -> None:
    vectors = {make for make in FAMILIES.values() if isinstance(make, type) and issubclass(make, VectorFamily)}
    assert {type(family) for family in TABLE.values()} == vectors


# ---- the law itself, at random parameters ----


def law(name: str, dim: int, *, batch: tuple[int, ...] = (), by: float = 0.4) -> Any:
    """The law at parameters some way off the start, in float64."""
    family = TABLE[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loc = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64)[:dim]
        parameters, layers = family.parameters(loc, torch.full_like(loc, 0.5)), family.layers(dim).to(loc)
        values = {}
        with torch.no_grad():
            for weight in layers.parameters():
                weight += by * torch.randn_like(weight)
            for key, parameter in parameters.items():
                to = transform_to(parameter.constraint)
                free = to.inv(parameter.start)
                values[key] = to(free + by * torch.randn(*batch, *free.shape, dtype=torch.float64))
        return family.law(values, layers)


def trapezoid(q: Any, dim: int) -> float:
    """The integral of exp(log q) over all space, by the trapezoid rule in t, z = sinh(t) / 4."""
    t = torch.linspace(-12, 12, 12_001 if dim == 1 else 801, dtype=torch.float64)
    z, stretch = torch.sinh(t) / 4, torch.cosh(t) / 4 * (t[1] - t[0])
    points = torch.cartesian_prod(*[z] * dim).reshape(-1, dim)
    volume = torch.cartesian_prod(*[stretch] * dim).reshape(-1, dim).prod(-1)
    with torch.no_grad():
        pieces = zip(points.split(50_000), volume.split(50_000), strict=True)
        return float(sum((q.log_prob(p).exp() * v).sum() for p, v in pieces))


@every(path_log_q=True)
@pytest.mark.parametrize("dim", [1, 2])
def test_path_density_integrates_to_one(name: str, dim: int) -> None:
    if name == "low-rank":  # rank one in one dimension is a diagonal
        dim = 2
    rough = 2e-5 if name == "neural-spline" else 1e-7  # its density has kinks at the knots
    assert trapezoid(law(name, dim, by=0.2), dim) == pytest.approx(1, abs=rough)


SQUARE = [n for n, f in TABLE.items() if isinstance(f, MeanField | FullRank | Flow)]


@pytest.mark.parametrize("name", SQUARE)
@pytest.mark.parametrize("dim", [1, 3])
def test_density_from_the_noise_is_the_change_of_variables(name: str, dim: int) -> None:
    """log q = log N(eps) - log |det dz/deps|, the Jacobian by automatic differentiation, without a kink in sight."""
    q = law(name, dim)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        eps = torch.randn(dim, generator=generator, dtype=torch.float64)

        def drawn(eps: Tensor) -> Tensor:
            with Tape(Noise(eps, eps[:0]), {}):
                return q.rsample()

        jacobian = torch.autograd.functional.jacobian(drawn, eps)
        expected = dist.Normal(0.0, 1.0).log_prob(eps).sum() - torch.linalg.slogdet(jacobian).logabsdet
        value = drawn(eps)
        torch.testing.assert_close(q.log_prob(value), expected)


@every()
def test_any_batch_shape(name: str) -> None:
    """Parameters of shape (2, 3, ...) make (2, 3) laws; what each says is what it says alone."""
    q = law(name, 3, batch=() if TABLE[name].layers(3) else (2, 3))
    torch.manual_seed(2)
    z = q.rsample(torch.Size([4]))
    own = q.log_prob(z)
    assert z.shape == (4, *q.batch_shape, 3)
    assert own.shape == z.shape[:-1]
    assert torch.isfinite(own).all()
    if TABLE[name].path_log_q:
        torch.testing.assert_close(q.log_prob(z.clone()), own, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(q.log_prob(z[1].clone()), own[1], rtol=1e-9, atol=1e-9)


@every()
def test_starts_as_the_gaussian_it_is_asked_for(name: str) -> None:
    """At the start a draw has the location and the scale it was given, to 4 standard errors; flows exactly."""
    family = TABLE[name]
    loc, scale = torch.tensor([1.0, -2.0, 3.0]).double(), torch.tensor([0.2, 0.5, 1.0]).double()
    torch.manual_seed(3)
    start = {k: p.start for k, p in family.parameters(loc, scale).items()}
    if isinstance(family, Mixture):
        start["loc"] = loc.expand(2, 3)
    q = family.law(start, family.layers(3).double())
    z = q.rsample(torch.Size([20_000])).detach()
    spread = scale * (2.0**0.5 if isinstance(family, StudentT) else 1.0)  # variance nu / (nu - 2), nu = 4
    assert ((z.mean(0) - loc).abs() < 4 * spread / 20_000**0.5).all()
    assert ((z.std(0) / spread - 1).abs() < (0.2 if isinstance(family, StudentT) else 0.03)).all()
    if isinstance(family, Flow):
        with Tape(Noise(torch.ones(3).double(), torch.ones(0).double()), {}):
            torch.testing.assert_close(q.rsample(), loc + scale)


# ---- the law in a program ----


class Case(NamedTuple):
    """A program, its graphs for two draws, and parameters some way off the start."""

    program: Program
    graph: Calculus
    x: Tensor


def target() -> None:
    """A bent target over a vector and a positive scalar, both flat: starts, constraints and volumes included."""
    z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    s = pyro.sample("s", dist.ImproperUniform(constraints.positive, (), ()))
    pyro.factor("target", -0.5 * (z[0] - 1) ** 2 - (z[1] - z[0] ** 2) ** 2 - (s - 1.5 + 0.3 * z[1]) ** 2)


@cache
def case(name: str) -> Case:
    program = build(target, None, (), family=TABLE[name], dtype=torch.float64)
    x = program.initial()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Case(program, Calculus(program, ELBO(2), TracedLogWeights(program), 1.0), x + 0.05 * noise)


@every()
def test_the_graph_says_what_the_handlers_say_and_maps_over_draws_and_seeds(name: str) -> None:
    program, graph, x = case(name)
    handlers = Calculus(program, ELBO(2), program.log_weights, 1.0)
    assert graph.vectorise
    feed = Stream(program, 0, "monitor", 2).once(0, 3)
    grads, losses = graph.gradients(x, feed)
    for got, expected in zip((grads, losses), handlers.gradients(x, feed), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    seeds = torch.stack([x, program.initial(), 1.01 * x])

    def gradient(x: Tensor) -> Tensor:
        n = torch.ones((), dtype=x.dtype)
        return graph.function("_gradient", x, feed.noise.at(0), program.batch(None), n)(x, *feed.noise.at(0), n)[0]

    together = torch.vmap(gradient)(seeds)
    torch.testing.assert_close(together, torch.stack([gradient(x) for x in seeds]), rtol=1e-9, atol=1e-9)


@every()
def test_gradients_match_finite_differences(name: str) -> None:
    """On fixed noise, along random directions. An implicit gradient is that of another coupling: see test_mixture."""
    if name == "mixture, implicit":
        name = "mixture"
    program, calculus, x = case(name)
    feed = Stream(program, 1, "monitor", 2).once(0, 1)
    (grad,), _ = calculus.gradients(x, feed)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        v = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        h = 1e-5 / v.norm()
        slope = (calculus.losses(x + h * v, feed) - calculus.losses(x - h * v, feed)) / (2 * h)
        assert float(slope) == pytest.approx(float(grad @ v), rel=2e-6, abs=1e-6)


@every(path_log_q=True)
def test_log_q_of_a_draw_is_that_of_its_value(name: str, draw) -> None:
    program, graph, x = case(name)
    theta, phi = program.split(x)
    noise, batch = draw(program), program.batch(None)
    for log_weights in (program.log_weights, graph.log_weights):
        own, path = (log_weights(theta, phi, density, noise, batch) for density in (phi, dict(phi)))
        torch.testing.assert_close(own.log_q, path.log_q, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own.log_p, path.log_p, rtol=1e-12, atol=0)


@every(path_log_q=False)
def test_where_there_is_no_density_at_given_values_the_estimators_that_need_it_are_refused(name: str) -> None:
    program, graph, _ = case(name)
    for objective in (ELBO(1, "sticking-the-landing"), IWAE(3, "doubly-reparameterised")):
        with pytest.raises(ValueError, match=r"no density at given values.*use estimator=\"pathwise\""):
            Calculus(program, objective, graph.log_weights, 1.0)


@every()
def test_single_precision(name: str, draw) -> None:
    """Value and gradient in float32 are those in float64, to its rounding."""
    double, graph, x = case(name)
    single = build(target, None, (), family=TABLE[name], dtype=torch.float32)
    noise = draw(double, 1, 2)
    grads, losses = graph.gradients(x, Feed(noise))
    rounded = Feed(Noise(*(part.float() for part in noise)))
    grads32, losses32 = Calculus(single, ELBO(2), single.log_weights, 1.0).gradients(x.float(), rounded)
    assert grads32.dtype == torch.float32
    torch.testing.assert_close(losses32.double(), losses, rtol=1e-4, atol=1e-4)
    assert (grads32 - grads).norm() < 1e-3 * grads.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every()
def test_on_a_cuda_device(name: str) -> None:
    program = build(target, None, (), family=TABLE[name], dtype=torch.float64, device="cuda")
    x = program.initial()
    feed = Stream(program, 0, "monitor", 2).once(0, 3)
    grads, losses = Calculus(program, ELBO(2), TracedLogWeights(program), 1.0).gradients(x, feed)
    assert grads.device.type == "cuda"
    assert torch.isfinite(grads).all()
    assert torch.isfinite(losses).all()
