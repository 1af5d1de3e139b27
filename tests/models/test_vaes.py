"""The variational autoencoders: densities against scipy and numpy, closed forms against each other, what is bounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.data import codes

Shipped = Callable[[str], ModuleType]
B3 = bc.Minibatch(3, plate="data")


def densities(model: Any, guide: Any, args: tuple[Any, ...], values: dict[str, Tensor]) -> tuple[float, float]:
    """log p(x, z) and log q(z | x), summed over the rows, with z given."""
    with pyro.get_param_store().scope(), torch.no_grad():
        runs = [poutine.trace(poutine.condition(run, values)).get_trace(*args) for run in (model, guide)]
        return float(runs[0].log_prob_sum()), float(runs[1].log_prob_sum())


def mlp(weights: nn.Module, inputs: np.ndarray) -> np.ndarray:
    """Linear layers with tanh between them, written out."""
    pairs = [weight.detach().double().numpy() for weight in weights.parameters()]
    for i in range(0, len(pairs), 2):
        inputs = inputs @ pairs[i].T + pairs[i + 1]
        inputs = np.tanh(inputs) if i < len(pairs) - 2 else inputs
    return inputs


# Linear


def linear_data(rows: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, 2, generator=generator, dtype=torch.float64) @ mixing + 0.3 * noise + 1.0
    return x, x.mean(0)


@pytest.mark.parametrize("sigma2", [None, 1.0])
def test_the_linear_vae_s_closed_forms(shipped: Shipped, sigma2: float | None) -> None:
    """Evidence and posterior against scipy's multivariate normal; PCA is where the evidence has no gradient."""
    module = shipped("linear_vae")
    x, _ = linear_data()
    mean, covariance = module.moments(x, rows=64)
    np.testing.assert_allclose(covariance, np.cov(x.numpy().T, bias=True), rtol=1e-10, atol=1e-12)
    best = module.pca(mean, covariance, 2, sigma2)
    total = (best.W @ best.W.T + best.sigma2 * torch.eye(6)).numpy()
    wanted = stats.multivariate_normal(mean.numpy(), total).logpdf(x.numpy()).mean()
    assert float(module.mean_log_evidence(best, mean, covariance)) == pytest.approx(wanted, rel=1e-10)
    slope, spread = module.posterior(best)
    np.testing.assert_allclose(slope, best.W.T.numpy() @ np.linalg.inv(total), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(spread, np.eye(2) - slope.numpy() @ best.W.numpy(), rtol=1e-8, atol=1e-10)
    parts = [part.clone().requires_grad_() for part in best]
    evidence = module.mean_log_evidence(module.Decoder(*parts), mean, covariance)
    gradients = torch.autograd.grad(evidence, parts if sigma2 is None else parts[:2])
    assert max(float(g.abs().max()) for g in gradients) < 1e-9
    away = module.Decoder(best.W + 0.05, best.mu, best.sigma2)
    assert module.mean_log_evidence(away, mean, covariance) < evidence - 1e-3


@pytest.mark.parametrize("factorised", [False, True])
def test_the_linear_vae_s_bound_is_the_evidence_at_pca(shipped: Shipped, factorised: bool) -> None:
    """At PCA with the exact posterior log p(x, z) - log q(z | x) is log p(x) for every z: no tolerance for noise."""
    module = shipped("linear_vae")
    x, centre = linear_data()
    model, guide = module.vae(2, factorised=factorised)
    mean, covariance = module.moments(x)
    best = module.pca(mean, covariance, 2)
    evidence = float(module.mean_log_evidence(best, mean, covariance))
    slope, spread = module.posterior(best)
    own = {"s": spread.diagonal().sqrt()} if factorised else {"L": torch.linalg.cholesky(spread)}
    values = {**best._asdict(), "V": slope, "c": torch.zeros(2, dtype=torch.float64), **own}
    with pyro.get_param_store().scope(), torch.no_grad():
        store = pyro.get_param_store()
        drawn = poutine.trace(guide).get_trace(x, centre)
        poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x, centre)
        for name, value in values.items():
            store[name] = value
        drawn = poutine.trace(guide).get_trace(x, centre)
        joint = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x, centre)
        bound = (joint.log_prob_sum() - drawn.log_prob_sum()) / len(x)
    assert float(bound.detach()) == pytest.approx(evidence, rel=1e-9)


# Bernoulli


def test_the_bernoulli_vaes_densities(shipped: Shipped) -> None:
    module = shipped("bernoulli_vae")
    images = torch.randint(256, (5, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([1, 7, 4])
    x = module.pixels(seen, images).double().numpy()
    assert set(np.unique(x)) == {0.0, 1.0}
    generator = torch.Generator().manual_seed(1)
    z, z1, z2 = (torch.randn(3, d, generator=generator) for d in (50, 100, 50))

    def gauss(raw: np.ndarray, at: Tensor) -> float:
        loc, log_scale = np.split(raw, 2, axis=-1)
        return float(stats.norm(loc, np.exp(log_scale)).logpdf(at.double().numpy()).sum())

    def seen_under(logits: np.ndarray) -> float:
        return float((x * logits - np.logaddexp(0, logits)).sum())

    at, at1, at2 = (v.double().numpy() for v in (z, z1, z2))
    start = 0.1 * torch.randn(1, 784, generator=generator)
    offsets = start.double().numpy()
    joint, density = densities(module.model, module.guide, (seen, images, start), {"z": z})
    assert joint == pytest.approx(stats.norm.logpdf(at).sum() + seen_under(offsets + mlp(module.decoder, at)), rel=1e-5)
    assert density == pytest.approx(gauss(mlp(module.encoder, x), z), rel=1e-5)
    two = {"z1": z1, "z2": z2}
    joint, density = densities(module.two_layers, module.two_layers_guide, (seen, images, start), two)
    wanted = stats.norm.logpdf(at2).sum() + gauss(mlp(module.decoder2, at2), z1)
    wanted += seen_under(offsets + mlp(module.decoder1, at1))
    assert joint == pytest.approx(wanted, rel=1e-5)
    assert density == pytest.approx(gauss(mlp(module.encoder1, x), z1) + gauss(mlp(module.encoder2, at1), z2), rel=1e-5)


def test_the_bernoulli_vaes_start_at_the_mean_image(shipped: Shipped) -> None:
    """Of the networks without their weights, whose biases start at zero."""
    module = shipped("bernoulli_vae")
    images = torch.zeros(3, 28, 28, dtype=torch.uint8)
    images[0, 3, 5], images[1, 3, 5], images[:, 4, 4] = 255, 51, 255
    start = torch.sigmoid(module.mean_log_odds(images))
    assert start.shape == (1, 784)
    mean = start.reshape(28, 28)
    assert float(mean[3, 5]) == pytest.approx(0.4)
    assert float(mean[4, 4]) == pytest.approx(0.999)
    assert float(mean[0, 0]) == pytest.approx(0.001, rel=1e-4)
    for network in (module.decoder, module.decoder1):
        assert all(not layer.bias.any() for layer in network if isinstance(layer, nn.Linear))


@pytest.mark.parametrize(("name", "size"), [("", 50), ("two_layers", 150)])
def test_the_bernoulli_vaes_have_a_unit_per_image(shipped: Shipped, name: str, size: int) -> None:
    """Codes are the data: N is the number of codes, and all draws of a bound see the same pixels."""
    module = shipped("bernoulli_vae")
    images = torch.randint(256, (5, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pair = (getattr(module, name or "model"), getattr(module, f"{name}_guide" if name else "guide"))
    program = bc.build(*pair, (codes(5, 8), images, module.mean_log_odds(images)), minibatch=B3)
    assert (program.total, program.layout.normal, program.layout.uniform) == (40, 3 * size, 0)
    assert not program.obstacles
    assert program.structure.unit == ("data",)


# Gaussian


@pytest.mark.parametrize(
    ("name", "pair"), [("deep_gaussian_vae", "model"), ("conv_vae", "model"), ("conv_vae", "extra_conv")]
)
def test_what_is_bounded_meets_every_condition_of_the_theorem(shipped: Shipped, name: str, pair: str) -> None:
    module = shipped(name)
    shape = (8, 28, 28) if name == "deep_gaussian_vae" else (8, 3, 32, 32)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    guide = module.guide if pair == "model" else getattr(module, f"{pair}_guide")
    adam = bc.TheoremAdam(0.01, radius=100.0)
    found = bc.assumptions(getattr(module, pair), guide, adam, (images,), minibatch=B3)
    assert {c.status for c in found.conditions} == {"holds"}
    twin = bc.assumptions(module.relu, module.relu_guide, adam, (images,), minibatch=B3)
    failing = {c.name for c in twin.conditions if c.status == "fails"}
    assert failing == {"smooth activations", "bounded outputs", "scales bounded away from zero"}


def test_the_deep_gaussian_vae_s_density(shipped: Shipped) -> None:
    module = shipped("deep_gaussian_vae")
    images = torch.randint(256, (3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    z = torch.randn(3, module.LATENT, generator=torch.Generator().manual_seed(1))
    x = images.flatten(1).double().numpy() / 255
    joint, density = densities(module.relu, module.relu_guide, (images,), {"z": z})

    def relu(network: nn.Module, inputs: np.ndarray) -> np.ndarray:
        pairs = [weight.detach().double().numpy() for weight in network.parameters()]
        for i in range(0, len(pairs), 2):
            inputs = inputs @ pairs[i].T + pairs[i + 1]
            inputs = np.maximum(inputs, 0) if i < len(pairs) - 2 else inputs
        return inputs

    networks = dict(zip(("decoder", "encoder"), _networks(module.relu, module.relu_guide, images), strict=True))
    at = z.double().numpy()
    wanted = stats.norm.logpdf(at).sum() + stats.norm(relu(networks["decoder"], at), module.SCALE).logpdf(x).sum()
    assert joint == pytest.approx(wanted, rel=1e-5)
    loc, log_scale = np.split(relu(networks["encoder"], x), 2, axis=-1)
    assert density == pytest.approx(stats.norm(loc, np.exp(log_scale)).logpdf(at).sum(), rel=1e-5)
    means = _networks(module.model, module.guide, images)[0](100 * z)
    assert means.min() >= 0
    assert means.max() <= 1


def _networks(model: Any, guide: Any, images: Tensor) -> list[Any]:
    """Decoder and encoder that a pair registers."""
    program = bc.build(model, guide, (images,), dtype=torch.float32)
    own = [m for m in program.modules if isinstance(m, nn.Sequential)]
    return sorted(own, key=lambda m: next(m.parameters()).shape[1])


@pytest.mark.parametrize("size", [32, 64])
def test_the_convolutional_vae_takes_its_depth_by_option(shipped: Shipped, size: int) -> None:
    """Shapes for both sizes; one more layer each way has the parameters of that layer, twice."""
    module = shipped("conv_vae")
    images = torch.zeros(4, 3, size, size, dtype=torch.uint8)

    def count(**options: Any) -> int:
        return sum(bc.build(*module.vae(size, **options), (images,), dtype=torch.float32).sizes)

    plain = count()
    assert count(extra_dense=2) - plain == 4 * (module.HIDDEN**2 + module.HIDDEN)
    last = module.CHANNELS[-1]
    assert count(extra_conv=1) - plain == 2 * (9 * last**2 + last)
    with pytest.raises(ValueError, match="3 halvings need a size divisible by 8, got 36"):
        module.vae(36)


def test_the_faces_vae_s_decoder_spans_64_pixels(shipped: Shipped) -> None:
    module = shipped("conv_vae")
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    program = bc.build(module.faces, module.faces_guide, (images,), minibatch=B3)
    assert program.structure.observed[0].size == 3 * 3 * 64 * 64
    assert math.prod(program.example()[1].args[0].shape) == 3 * 3 * 64 * 64
