"""Each shipped model against formulas written here with scipy and numpy, and against published numbers."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from scipy import integrate, optimize, stats

from bbvi_conv.model_file import load_module as load

MODELS = Path(__file__).parents[2] / "models"
needs_data = pytest.mark.skipif(
    "BBVI_CONV_DATA" not in os.environ, reason="BBVI_CONV_DATA names no folder of real data"
)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Plain numbers in a model become tensors of this type, and of the old one again afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def log_joint(model: Any, args: tuple[torch.Tensor, ...], values: dict[str, Any]) -> float:
    """log p(data, values) as Pyro sees it, priors' constants in float64 too; every latent site must be given."""
    given = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}
    with pyro.get_param_store().scope(), torch.no_grad(), default_dtype(torch.float64):
        trace = poutine.trace(poutine.condition(model, given)).get_trace(*args)
        assert given.keys() <= trace.nodes.keys()
        assert [name for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name])] == []
        return float(trace.log_prob_sum())


def test_nothing_ships_untested() -> None:
    assert {path.stem for path in MODELS.glob("*.py")} == {
        "banana",
        "bernoulli_vae",
        "challenger",
        "coal_mining",
        "conjugate_gaussian",
        "conv_vae",
        "deep_gaussian_vae",
        "eight_schools",
        "forbes",
        "funnel",
        "linear_vae",
        "tighter_bounds",
        "two_modes",
        "vae",
    }
    assert "models" not in sys.modules


# Eight schools

MU, TAU = 3.0, 2.5
THETA = np.linspace(-4.0, 9.0, 8)


def eight_schools_density() -> tuple[float, float]:
    """log p(y, mu, tau, theta) of the centered model, and log |d theta / d theta_trans|."""
    y = np.array([28, 8, -3, 7, -1, 1, 18, 12])
    sigma = np.array([15, 10, 16, 11, 9, 11, 10, 18])
    prior = stats.norm(0, 5).logpdf(MU) + stats.halfcauchy(0, 5).logpdf(TAU) + stats.norm(MU, TAU).logpdf(THETA).sum()
    return prior + stats.norm(THETA, sigma).logpdf(y).sum(), 8 * math.log(TAU)


def test_eight_schools_both_parameterisations() -> None:
    module = load("eight_schools")
    density, jacobian = eight_schools_density()
    values = {"mu": MU, "tau": TAU}
    assert log_joint(module.centered, module.data(), values | {"theta": THETA}) == pytest.approx(density, rel=1e-12)
    trans = (THETA - MU) / TAU
    noncentered = log_joint(module.model, module.data(), values | {"theta_trans": trans})
    assert noncentered == pytest.approx(density + jacobian, rel=1e-12)


def test_eight_schools_records_theta() -> None:
    module = load("eight_schools")
    trace = poutine.trace(
        poutine.condition(module.model, {"mu": torch.tensor(MU), "tau": torch.tensor(TAU)})
    ).get_trace(*module.data())
    theta, trans = trace.nodes["theta"]["value"], trace.nodes["theta_trans"]["value"]
    assert theta.shape == (8,)
    assert torch.allclose(theta, MU + TAU * trans)


@needs_data
@pytest.mark.parametrize("parameterisation", ["centered", "noncentered"])
def test_eight_schools_is_the_one_of_the_reference_draws(parameterisation: str) -> None:
    """The data are the database's, and laws of the posterior hold over its draws, with the model's own gradients.

    Integration by parts, E[div g + g . grad log p] = 0, for three fields g whose terms have finite variance: moving mu
    and all theta together (the prior of mu, the likelihood), widening tau and all theta - mu together (the prior of
    tau), and widening one theta_j - mu (the prior of theta_j). Each mean is within 5 standard errors of 0. Power:
    a prior scale of mu, or of tau, that is twice as large moves its law by more than 10.
    """
    from bbvi_conv.data import posterior

    module = load("eight_schools")
    reference = posterior(f"eight_schools-eight_schools_{parameterisation}")
    y, sigma = module.data()
    assert y.tolist() == reference.data["y"]
    assert sigma.tolist() == reference.data["sigma"]
    draws = {key: torch.from_numpy(value.ravel()) for key, value in reference.draws.items()}
    mu, tau = (draws[name][:, None].clone().requires_grad_() for name in ("mu", "tau"))
    theta = torch.stack([draws[f"theta[{j}]"] for j in range(1, 9)], -1).requires_grad_()

    def many() -> None:
        with pyro.plate("draw", len(mu), dim=-2):
            module.centered(y, sigma)

    trace = poutine.trace(poutine.condition(many, {"mu": mu, "tau": tau, "theta": theta})).get_trace()
    by_mu, by_tau, by_theta = torch.autograd.grad(trace.log_prob_sum(), [mu, tau, theta])
    away = theta - mu
    together = by_mu + by_theta.sum(-1, keepdim=True)
    wider = 9 + tau * by_tau + (away * by_theta).sum(-1, keepdim=True)
    laws = torch.cat([together, wider, 1 + away * by_theta], -1).detach()

    def standardised(law: torch.Tensor) -> torch.Tensor:
        return law.mean(0) / (law.std(0) / len(law) ** 0.5)

    assert (standardised(laws).abs() < 5).all()
    wrong = torch.cat([mu / 25 - mu / 100, 2 * tau**2 * (1 / (25 + tau**2) - 1 / (100 + tau**2))], -1).detach()
    assert (standardised(laws[:, :2] + wrong).abs() > 10).all()


# Challenger


def test_challenger_density() -> None:
    module = load("challenger")
    temperature, distress = (array.numpy() for array in module.data())
    logits = -1.5 - 1.25 * temperature
    likelihood = np.where(distress == 1, -np.log1p(np.exp(-logits)), -np.log1p(np.exp(logits))).sum()
    expected = likelihood + stats.norm(0, 5).logpdf(-1.5) + stats.norm(0, 2.5).logpdf(-1.25)
    assert log_joint(module.model, module.data(), {"alpha": -1.5, "beta": -1.25}) == pytest.approx(expected, rel=1e-12)
    assert temperature.mean() == pytest.approx(0, abs=1e-12)
    assert temperature.std(ddof=1) == pytest.approx(1, rel=1e-12)


def test_challenger_data_give_the_published_fit() -> None:
    """The maximum likelihood estimates known from textbooks: logit p = 15.043 - 0.2322 F, deviance 20.315."""
    module = load("challenger")
    fahrenheit, distress = np.array(module.FAHRENHEIT), np.array(module.DISTRESS)

    def deviance(coefficients: np.ndarray) -> float:
        logits = coefficients[0] + coefficients[1] * (fahrenheit - 70)
        return float(2 * np.logaddexp(0, (1 - 2 * distress) * logits).sum())

    best = optimize.minimize(deviance, [0.0, 0.0], method="BFGS", options={"gtol": 1e-8})
    assert best.x[0] - 70 * best.x[1] == pytest.approx(15.043, abs=1e-3)
    assert best.x[1] == pytest.approx(-0.2322, abs=1e-4)
    assert best.fun == pytest.approx(20.315, abs=1e-3)


# Coal mining


def test_coal_mining_density() -> None:
    module = load("coal_mining")
    (disasters,) = module.data()
    assert (len(disasters), int(disasters.sum()), module.FIRST) == (112, 191, 1851)
    rates = np.where(np.arange(112) <= 40, 3.0, 0.9)
    expected = stats.poisson(rates).logpmf(disasters.numpy()).sum() - math.log(111)
    expected += stats.gamma(2).logpdf([3.0, 0.9]).sum()
    values = {"early": 3.0, "late": 0.9, "change": 40}
    assert log_joint(module.model, module.data(), values) == pytest.approx(expected, rel=1e-12)


def test_coal_mining_evidence_by_quadrature() -> None:
    module = load("coal_mining")
    (disasters,) = module.data()
    counts = disasters.numpy()

    def segment(part: np.ndarray) -> float:
        value, _ = integrate.quad(
            lambda rate: stats.gamma(2).pdf(rate) * np.exp(stats.poisson(rate).logpmf(part).sum() + 1.3 * len(part)),
            0,
            12,
            points=[0.5, 1.0, 2.0, 3.0, 4.0],
        )
        return math.log(value) - 1.3 * len(part)

    each = np.array([segment(counts[: k + 1]) + segment(counts[k + 1 :]) for k in range(111)]) - math.log(111)
    evidence, probability = module.posterior(disasters)
    assert float(evidence) == pytest.approx(np.logaddexp.reduce(each), abs=1e-6)
    np.testing.assert_allclose(probability.numpy(), np.exp(each - np.logaddexp.reduce(each)), atol=1e-7)


# Conjugate Gaussian


def test_conjugate_gaussian_density() -> None:
    module = load("conjugate_gaussian")
    x, noise_scale = module.data()
    assert (x.shape, noise_scale.shape) == ((50, 5), (5,))
    z = np.linspace(-1.0, 1.0, 5)
    expected = stats.norm(0, 2).logpdf(z).sum() + stats.norm(z, noise_scale).logpdf(x).sum()
    assert log_joint(module.model, (x, noise_scale), {"z": z}) == pytest.approx(expected, rel=1e-12)


def test_conjugate_gaussian_evidence_is_a_multivariate_normal() -> None:
    """Marginally each coordinate's column is N(0, s_i^2 I + s_0^2 11'), whose density needs no posterior."""
    module = load("conjugate_gaussian")
    x, noise_scale = module.data()
    covariances = [scale**2 * np.eye(50) + module.PRIOR_SCALE**2 for scale in noise_scale.numpy()]
    expected = sum(stats.multivariate_normal(np.zeros(50), c).logpdf(x[:, i]) for i, c in enumerate(covariances))
    assert float(module.log_evidence(x, noise_scale)) == pytest.approx(expected, rel=1e-10)


def test_conjugate_gaussian_posterior_is_the_normalised_joint() -> None:
    """Evidence, mean and standard deviation by quadrature of the model's own density, in one dimension."""
    module = load("conjugate_gaussian")
    args = module.data(size=7, dim=1, seed=3)
    loc, scale = (float(value) for value in module.posterior(*args))
    evidence = float(module.log_evidence(*args))

    def moment(power: int) -> float:
        def integrand(z: float) -> float:
            return (z - loc) ** power * math.exp(log_joint(module.model, args, {"z": [z]}) - evidence)

        return integrate.quad(integrand, loc - 12 * scale, loc + 12 * scale, epsabs=1e-11, epsrel=1e-11)[0]

    assert moment(0) == pytest.approx(1, rel=1e-9)
    assert moment(1) == pytest.approx(0, abs=1e-9)
    assert moment(2) == pytest.approx(scale**2, rel=1e-9)


def test_conjugate_gaussian_data_are_reproducible_and_leave_the_generator_alone() -> None:
    module = load("conjugate_gaussian")
    before = torch.get_rng_state()
    assert torch.equal(module.data()[0], module.data()[0])
    assert not torch.equal(module.data()[0], module.data(seed=1)[0])
    assert torch.equal(torch.get_rng_state(), before)


# Tighter bounds


def test_tighter_bounds_density_and_evidence() -> None:
    """Model and guide against scipy at parameters of the store; the joint over the exact posterior is the evidence."""
    module = load("tighter_bounds")
    (x,) = module.data(size=3, dim=2, seed=4)
    mu, slope, offset = module.near_optimum(x, offset=0.4)
    z = np.array([[0.3, -1.0], [0.5, 0.1], [2.0, 1.0]])
    with pyro.get_param_store().scope(), torch.no_grad():
        store = pyro.get_param_store()
        store["mu"], store["A"], store["b"] = mu, slope, offset
        given = {"z": torch.from_numpy(z)}
        joint, density = (
            float(poutine.trace(poutine.condition(program, given)).get_trace(x).log_prob_sum())
            for program in (module.model, module.guide)
        )
    data, mean = x.numpy(), mu.detach().numpy()
    expected = stats.norm(mean, 1).logpdf(z).sum() + stats.norm(z, 1).logpdf(data).sum()
    assert joint == pytest.approx(expected, rel=1e-12)
    centre = data @ slope.detach().numpy().T + offset.detach().numpy()
    assert density == pytest.approx(stats.norm(centre, math.sqrt(2 / 3)).logpdf(z).sum(), rel=1e-12)
    posterior = stats.norm((data + mean) / 2, math.sqrt(0.5)).logpdf(z).sum()
    assert float(module.log_evidence(x, mu.detach()).sum()) == pytest.approx(expected - posterior, rel=1e-12)


@pytest.mark.parametrize("variance", [2 / 3, 1.0])
def test_tighter_bounds_weight_variance_is_that_of_the_densities(variance: float) -> None:
    """E[w] and E[w^2] by quadrature of the densities as written, in one dimension, far from the optimum."""
    module = load("tighter_bounds")
    (x,) = module.data(size=2, dim=1, seed=5)
    parameters = module.near_optimum(x, offset=0.6)
    found = module.relative_weight_variance(x, parameters, variance)
    mu, slope, offset = (float(p) for p in parameters)
    for n, datum in enumerate(x[:, 0].tolist()):
        q = stats.norm(slope * datum + offset, math.sqrt(variance))

        def moment(power: int, q: Any = q, datum: float = datum) -> float:
            def integrand(z: float) -> float:
                log_w = stats.norm.logpdf(z, mu) + stats.norm.logpdf(datum, z) - q.logpdf(z)
                return math.exp(power * log_w + q.logpdf(z))

            centre = slope * datum + offset
            return integrate.quad(integrand, centre - 14, centre + 14, epsabs=1e-13, epsrel=1e-11, limit=400)[0]

        assert moment(1) == pytest.approx(math.exp(module.log_evidence(x, parameters.mu)[n]), rel=1e-8)
        assert float(found[n]) == pytest.approx(moment(2) / moment(1) ** 2 - 1, rel=1e-8)
        assert found[n] > 0.05


def test_tighter_bounds_optimum_and_refusal() -> None:
    """At the optimum every datum has its own posterior mean, and mu* is where grad log Z vanishes."""
    module = load("tighter_bounds")
    (x,) = module.data(size=50, dim=4)
    mu, slope, offset = module.optimum(x)
    torch.testing.assert_close(x @ slope.T + offset, (x + mu) / 2)
    mu.requires_grad_()
    (gradient,) = torch.autograd.grad(module.log_evidence(x, mu).sum(), mu)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="must exceed 1/4"):
        module.relative_weight_variance(x, module.optimum(x), 0.25)


# VAE


def test_vae_density() -> None:
    """Networks written out in numpy from their weights; the grey values of real data are only 0 and 255."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = load("vae")
        images = (torch.rand(3, 28, 28) < 0.3).to(torch.uint8) * 255
        z = torch.randn(3, 20)
    module.encoder.double()
    module.decoder.double()

    def network(weights: Any, inputs: np.ndarray) -> np.ndarray:
        w1, b1, w2, b2 = (weight.detach().numpy() for weight in weights.parameters())
        return np.tanh(inputs @ w1.T + b1) @ w2.T + b2

    x = images.reshape(3, 784).double().numpy() / 255
    logits = network(module.decoder, z.double().numpy())
    expected = stats.norm.logpdf(z.double().numpy()).sum() + (x * logits - np.logaddexp(0, logits)).sum()
    assert log_joint(module.model, (images,), {"z": z}) == pytest.approx(expected, rel=1e-10)
    code = network(module.encoder, x)
    expected = stats.norm(code[:, :20], np.exp(code[:, 20:])).logpdf(z.double().numpy()).sum()
    assert log_joint(module.guide, (images,), {"z": z}) == pytest.approx(expected, rel=1e-10)


def test_vae_shapes() -> None:
    module = load("vae")
    assert [sum(p.numel() for p in net.parameters()) for net in (module.encoder, module.decoder)] == [
        784 * 400 + 400 + 400 * 40 + 40,
        20 * 400 + 400 + 400 * 784 + 784,
    ]
    assert module.fit["minibatch"].size == 128
    assert module.fit["minibatch"].plate == "data"


@needs_data
def test_vae_data_are_binarised_with_the_grey_value_as_probability() -> None:
    """Per grey value v, the fraction of white pixels is v / 255 within 5 standard errors; 0 and 255 exactly."""
    from bbvi_conv.data import mnist

    (images,) = load("vae").data()
    grey, _ = mnist("train")
    assert images.dtype == torch.uint8
    assert images.shape == (60_000, 28, 28)
    count = torch.bincount(grey.flatten().long(), minlength=256).double()
    white = torch.bincount(grey[images == 255].long(), minlength=256).double()
    assert int(((images != 0) & (images != 255)).sum()) == 0
    p = torch.arange(256) / 255.0
    assert white[0] == 0
    assert white[255] == count[255]
    assert ((white - count * p).abs() <= 5 * (count * p * (1 - p)).sqrt()).all()
    assert count.min() > 1000  # power: at a thousand pixels a value five standard errors are at most 0.08


# Targets of known density


def banana(z: np.ndarray) -> np.ndarray:
    """log p by scipy."""
    return stats.norm.logpdf(z[:, 0], 0, 2) + stats.norm.logpdf(z[:, 1], 0.5 * z[:, 0] ** 2 - 2, 1)


def funnel(z: np.ndarray) -> np.ndarray:
    """log p by scipy."""
    return stats.norm.logpdf(z[:, 0], 0, 3) + stats.norm.logpdf(z[:, 1:], 0, np.exp(z[:, :1] / 2)).sum(1)


def two_modes(z: np.ndarray) -> np.ndarray:
    """log p by scipy."""
    left, right = (stats.multivariate_normal.pdf(z, [m, 0]) for m in (-4, 4))
    return np.log(0.3 * left + 0.7 * right)


MOMENTS = {
    "banana": ([0, 0], [2, (0.25 * 32 + 1) ** 0.5]),  # var y = b^2 * 2 s^4 + 1
    "funnel": ([0], [3]),
    "two_modes": ([4 * 0.4, 0], [(1 + 16 * (1 - 0.16)) ** 0.5, 1]),
}


@pytest.mark.parametrize(("name", "log_p"), [("banana", banana), ("funnel", funnel), ("two_modes", two_modes)])
def test_a_target_is_the_density_of_its_draws(name: str, log_p: Any) -> None:
    module = load(name)
    z = module.draws(20_000)
    with default_dtype(torch.float64):
        torch.testing.assert_close(module.log_density(z), torch.as_tensor(log_p(z.numpy())), rtol=1e-11, atol=1e-11)
        assert log_joint(module.model, module.data(), {"z": z[0]}) == pytest.approx(log_p(z[:2].numpy())[0], rel=1e-11)
    mean, deviation = (np.array(column) for column in MOMENTS[name])
    seen = z[:, : len(mean)].numpy()
    assert (np.abs(seen.mean(0) - mean) < 4 * deviation / 20_000**0.5).all()
    assert (np.abs(seen.std(0) / deviation - 1) < 0.05).all()


# Forbes


def test_forbes_evidence_and_posterior_against_scipy() -> None:
    forbes = load("forbes")
    temperature, pressure = (x.numpy() for x in forbes.data())
    design = np.stack([np.ones(17), temperature], -1)
    prior = np.diag(np.square(forbes.PRIOR))
    wanted = stats.multivariate_normal(np.zeros(17), design @ prior @ design.T + forbes.NOISE**2 * np.eye(17))
    evidence = float(forbes.log_evidence(*forbes.data()))
    assert evidence == pytest.approx(wanted.logpdf(pressure), rel=1e-10)
    mean, covariance = (x.numpy() for x in forbes.posterior(*forbes.data()))
    for point in (mean, mean + np.array([0.3, -0.2])):  # log p(y) = log p(y, z) - log p(z | y) at any z
        joint = log_joint(forbes.model, forbes.data(), {"alpha": point[0], "beta": point[1]})
        posterior = stats.multivariate_normal(mean, covariance).logpdf(point)
        assert joint - posterior == pytest.approx(evidence, rel=1e-10)


def test_forbes_least_squares_is_that_of_weisberg() -> None:
    """Weisberg (2005), section 2.1: 100 log10(pressure) = -42.138 + 0.895 temperature, residual scale 0.379."""
    forbes = load("forbes")
    temperature, pressure = np.array(forbes.FAHRENHEIT), np.round(100 * np.log10(forbes.INCHES), 2)  # as printed
    slope, intercept = np.polyfit(temperature, pressure, 1)
    residual = pressure - intercept - slope * temperature
    assert slope == pytest.approx(0.895, abs=0.0006)
    assert intercept == pytest.approx(-42.138, abs=0.02)
    assert math.sqrt((residual**2).sum() / 15) == pytest.approx(0.379, abs=0.0006)
