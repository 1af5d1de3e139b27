"""Log-likelihoods against the linear VAE's closed form, by good and by poor guides; and the use made of latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bbvi_conv as bc
from bbvi_conv import evaluate
from bbvi_conv.posterior import draws as posterior_draws

Shipped = Callable[[str], ModuleType]
D, LATENT, N = 7, 3, 11


class Exact(NamedTuple):
    """A linear VAE with known parameters: model, guide, data and the exact log p(x_n) ``(N,)``."""

    model: Callable[[Tensor], None]
    guide: Callable[[Tensor], None]
    x: Tensor
    log_p: Tensor


def linear(shift: float = 0.0, widen: float = 1.0, sigma: float = 0.5) -> Exact:
    """The guide is the exact posterior with its means moved by ``shift`` and its deviations times ``widen``."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(D, LATENT, generator=generator, dtype=torch.float64)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64) * 1.5
    inner = w.T @ w / sigma**2 + torch.eye(LATENT, dtype=torch.float64)
    mean = torch.linalg.solve(inner, w.T) / sigma**2
    lower = torch.linalg.cholesky(torch.linalg.inv(inner))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w.to(x).T, sigma).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            law = dist.MultivariateNormal(x @ mean.to(x).T + shift, scale_tril=widen * lower.to(x))
            pyro.sample("z", law)

    total = w @ w.T + sigma**2 * torch.eye(D, dtype=torch.float64)
    exact = dist.MultivariateNormal(torch.zeros(D, dtype=torch.float64), total).log_prob(x)
    return Exact(model, guide, x, exact)


def test_with_the_exact_posterior_every_weight_is_the_likelihood() -> None:
    """No noise is left: values to rounding, errors zero, effective sample sizes full; the last batch is not whole."""
    known = linear()
    found = evaluate.log_likelihood((known.model, known.guide), known.x, num_particles=20, batch=4, dtype=torch.float64)
    torch.testing.assert_close(found.values, known.log_p, rtol=1e-9, atol=1e-9)
    assert float(found.errors.max()) < 1e-6
    torch.testing.assert_close(found.ess, torch.full((N,), 20.0, dtype=torch.float64))
    assert found.mean.value == pytest.approx(float(known.log_p.mean()), rel=1e-9)
    spread = found.population
    assert spread.low is not None
    assert spread.value is not None
    assert spread.value - spread.low == pytest.approx(1.96 * float(known.log_p.std()) / N**0.5, rel=1e-3)


def test_importance_sampling_is_right_within_its_errors() -> None:
    """A guide twice as wide: 11 data, errors under 0.05, all within 4 of them; and smaller by 2 with 4 times K."""
    known = linear(widen=2.0)
    pair = (known.model, known.guide)
    few = evaluate.log_likelihood(pair, known.x, num_particles=2000, batch=5, dtype=torch.float64)
    many = evaluate.log_likelihood(pair, known.x, num_particles=8000, batch=5, dtype=torch.float64)
    for found in (few, many):
        assert float(found.errors.max()) < 0.05
        assert ((found.values - known.log_p).abs() < 4 * found.errors).all()
    ratio = few.errors / many.errors
    assert ((ratio > 1.6) & (ratio < 2.5)).all()
    low, high = many.interval
    assert (low < many.values).all()
    assert (many.values < high).all()
    part = many.part(3, 5)
    assert part.values.tolist() == many.values[3:5].tolist()
    assert (part.ess.tolist(), part.errors.tolist()) == (many.ess[3:5].tolist(), many.errors[3:5].tolist())
    assert part.num_weights == 8000


def test_pieces_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by running few draws at once: the weights are the same ones."""
    known = linear(widen=1.5)
    pair = (known.model, known.guide)
    whole = evaluate.log_likelihood(pair, known.x, num_particles=300, batch=4)
    monkeypatch.setattr(posterior_draws, "MEMORY", 2000)
    pieces = evaluate.log_likelihood(pair, known.x, num_particles=300, batch=4)
    torch.testing.assert_close(whole.values, pieces.values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.errors, pieces.errors, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_annealing_finds_what_a_poor_guide_misses(start: Any) -> None:
    """The guide sits some deviations off the posterior: 500 of its draws miss by nats, annealed ones do not."""
    known = linear(shift=0.7)
    pair = (known.model, known.guide)
    poor = evaluate.log_likelihood(pair, known.x, num_particles=500, dtype=torch.float64)
    assert float((known.log_p - poor.values).min()) > 2
    found = evaluate.annealed_log_likelihood(
        pair, known.x, num_chains=32, num_temperatures=100, num_leapfrog=5, start=start, batch=6, dtype=torch.float64
    )
    assert float(found.errors.max()) < 0.45  # power: an estimate that misses as the guide's does is 5 of them away
    assert ((found.values - known.log_p).abs() < 4 * found.errors + found.errors**2).all()
    error = float(found.errors.square().sum().sqrt()) / N
    assert error < 0.1
    assert abs(float((found.values - known.log_p).mean())) < 4 * error


def test_annealing_from_the_posterior_has_nothing_to_do() -> None:
    known = linear()
    found = evaluate.annealed_log_likelihood(
        (known.model, known.guide), known.x, num_chains=4, num_temperatures=5, num_leapfrog=2, dtype=torch.float64
    )
    torch.testing.assert_close(found.values, known.log_p, rtol=1e-9, atol=1e-9)


def test_uniforms_are_annealed_too() -> None:
    """A Cauchy prior is drawn from uniforms; p(x) by quadrature."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Cauchy(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.tensor([0.3, 2.5, -6.0], dtype=torch.float64)
    grid = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    joint = dist.Cauchy(0.0, 1.0).log_prob(grid) + dist.Normal(grid, 0.5).log_prob(x[:, None])
    exact = joint.logsumexp(-1) + math.log(float(grid[1] - grid[0]))
    found = evaluate.annealed_log_likelihood(
        (model, model), x, num_chains=120, num_temperatures=60, num_leapfrog=5, start="prior", dtype=torch.float64
    )
    assert float(found.errors.max()) < 0.25
    assert ((found.values - exact).abs() < 4 * found.errors + found.errors**2).all()


def test_a_fit_is_evaluated_over_its_own_and_over_other_data(shipped: Shipped) -> None:
    """The fitted parameters are used, not those the modules hold; held-out rows may be of any number."""
    module = shipped("linear_vae")
    known = linear(sigma=0.3)
    x, centre = known.x.repeat(8, 1), known.x.mean(0)
    model, guide = module.vae(2)
    fit = bc.fit(
        *(model, guide, (x, centre)),
        minibatch=bc.Minibatch(16, plate="data"),
        optimiser=bc.Adam(bc.Constant(0.05)),
        max_steps=30,
        num_gradients=4,
        engine="eager",
        khat_draws=50,
        dtype=torch.float64,
        progress=False,
    )
    values = fit.constrained_params
    decoder = module.Decoder(values["W"], values["mu"], values["sigma2"])
    total = decoder.W @ decoder.W.T + decoder.sigma2 * torch.eye(D, dtype=torch.float64)
    exact = dist.MultivariateNormal(decoder.mu, total).log_prob(known.x)
    other = evaluate.log_likelihood(fit, (known.x, centre), num_particles=4000, batch=6)
    assert ((other.values - exact).abs() < 4 * other.errors + other.errors**2).all()
    own = evaluate.log_likelihood(fit, num_particles=50)
    assert own.values.shape == (len(x),)


def test_activity_and_kl_of_latents() -> None:
    """Against closed forms: a coordinate that follows x, one that follows it weakly, and one that is the prior's."""
    slope = torch.tensor([1.0, 0.05, 0.0], dtype=torch.float64)
    scale = torch.tensor([0.3, 0.9, 1.0], dtype=torch.float64)
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, None] * slope.to(x), scale.to(x)).to_event(1))

    found = evaluate.latents((model, guide), x, batch=500, dtype=torch.float64)
    loc = x[:, None] * slope
    exact = (0.5 * (loc**2 + scale**2 - 1) - scale.log()).mean(0)
    assert ((found.kl["z"] - exact).abs() < 5 * found.kl_errors["z"] + 1e-12).all()
    assert float(found.kl["z"][2].abs()) < 1e-12
    torch.testing.assert_close(found.activity["z"], loc.var(0), rtol=1e-9, atol=1e-12)
    assert found.active == {"z": 1}


def test_latents_of_two_stochastic_layers(shipped: Shipped) -> None:
    """The KLs of both layers' coordinates sum to the ELBO's own, E[log q - log p] over all latents."""
    module = shipped("bernoulli_vae")
    images = torch.randint(256, (40, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = (torch.arange(40), images, module.mean_log_odds(images))
    pair = (module.two_layers, module.two_layers_guide)
    found = evaluate.latents(pair, data, num_samples=20, batch=20)
    assert {name: value.shape for name, value in found.kl.items()} == {"z1": (100,), "z2": (50,)}
    program = bc.build(*pair, data, minibatch=bc.Minibatch(40, plate="data"))
    theta, phi = program.split(program.initial())
    noise = program.layout.draw(torch.Generator().manual_seed(1), 40, dtype=program.dtype)
    total = []
    with torch.no_grad():
        for i in range(40):
            terms = program.log_weights(theta, phi, phi, noise.at(i), program.batch(torch.arange(40)))
            total.append(float((terms.log_q - terms.log_prior).mean()))
    draws = torch.tensor(total)
    error = float(draws.std()) / 40**0.5
    assert abs(sum(float(kl.sum()) for kl in found.kl.values()) - float(draws.mean())) < 4 * 1.8 * error


def test_what_cannot_be_evaluated_is_refused() -> None:
    known = linear()
    pair = (known.model, known.guide)
    with pytest.raises(ValueError, match="data are needed"):
        evaluate.log_likelihood(pair)
    with pytest.raises(TypeError, match="a fit or a pair"):
        evaluate.log_likelihood(known.model, known.x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_particles must be at least 1, got 0"):
        evaluate.log_likelihood(pair, known.x, num_particles=0)
    with pytest.raises(ValueError, match='start must be "guide" or "prior"'):
        evaluate.annealed_log_likelihood(pair, known.x, start="posterior")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no product over coordinates"):
        evaluate.latents(pair, known.x)

    def also(x: Tensor) -> None:
        known.model(x)
        pyro.sample("free", dist.Normal(torch.zeros(()), 1.0), obs=torch.ones(()))

    with pytest.raises(ValueError, match="'free' depends on no latent"):
        evaluate.log_likelihood((also, known.guide), known.x)


def test_a_global_latent_has_one_likelihood_of_all_data(shipped: Shipped) -> None:
    """The conjugate Gaussian's evidence, from its posterior made half as wide again."""
    module = shipped("conjugate_gaussian")
    args = module.data(size=20, dim=2)
    loc, scale = module.posterior(*args)

    def guide(x: Tensor, noise_scale: Tensor) -> None:
        pyro.sample("z", dist.Normal(loc, 1.5 * scale).to_event(1))

    pair, exact = (module.model, guide), float(module.log_evidence(*args))
    found = evaluate.log_likelihood(pair, args, num_particles=4000, dtype=torch.float64)
    assert found.values.shape == (1,)
    assert float(found.errors) < 0.02
    assert abs(float(found.values) - exact) < 4 * float(found.errors)
    annealed = evaluate.annealed_log_likelihood(
        pair, args, num_chains=16, num_temperatures=20, num_leapfrog=3, dtype=torch.float64
    )
    assert float(annealed.errors) < 0.2
    assert abs(float(annealed.values) - exact) < 4 * float(annealed.errors)
