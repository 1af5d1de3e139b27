"""Linear VAE on MNIST: probabilistic PCA with an affine encoder, where everything is known in closed form.

For each image x in D pixels, with theta = (W, mu, sigma^2) and phi = (V, c, L),

    z ~ N(0, I),   x | z ~ N(W z + mu, sigma^2 I),   q(z | x) = N(V (x - centre) + c, L L'),
    log p(x) = log N(x; mu, W W' + sigma^2 I),
    p(z | x) = N(A (x - mu), sigma^2 (W'W + sigma^2 I)^-1),   A = (W'W + sigma^2 I)^-1 W'.

The likelihood is highest at mu = the mean of x, W = U (L - sigma^2 I)^(1/2) R and sigma^2 = the mean of the D - d least
eigenvalues of the covariance of x, U and L the first d eigenvectors and eigenvalues, R any rotation. The guide of
``model`` has a full covariance and is exact at every R. ``factorised`` has diag(s^2) instead: it asks for W'W diagonal
and then loses nothing, the best ELBO is the best likelihood; but between close eigenvalues it turns there very slowly.
Source: Tipping and Bishop (1999), "Probabilistic principal component analysis"; Lucas et al. (2019), "Don't blame the
ELBO!", https://arxiv.org/abs/1911.02469
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

import bbvi_conv as bc
from bbvi_conv.data import mnist

LATENT = 5

fit = {
    "minibatch": bc.Minibatch(256, plate="data"),
    "objective": bc.ELBO(estimator="sticking-the-landing"),
    "optimiser": bc.SGD(bc.CosineDecay(2e-3, 12_000, final=0.003)),
    "max_steps": 12_000,
}

Program = Callable[[Tensor, Tensor], None]


def vae(latent: int, sigma2: float | None = None, *, factorised: bool = False) -> tuple[Program, Program]:
    """Model and guide with ``latent`` dimensions; the variance of a pixel is learned, or fixed to ``sigma2``.

    Both take ``images``, bytes ``(B, 28, 28)`` or any numbers ``(B, D)``, and ``centre`` ``(D,)``, where mu starts.
    """

    def model(images: Tensor, centre: Tensor) -> None:
        x = pixels(images)
        loadings = pyro.param("W", lambda: x.new_empty(x.shape[-1], latent).normal_(std=0.1))
        mean = pyro.param("mu", lambda: centre.clone())
        if sigma2 is None:
            variance = pyro.param("sigma2", lambda: x.new_tensor(0.1), constraint=constraints.positive)
        else:
            variance = x.new_tensor(sigma2)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings.T + mean, variance.sqrt()).to_event(1), obs=x)

    def guide(images: Tensor, centre: Tensor) -> None:
        x = pixels(images)
        slope = pyro.param("V", lambda: x.new_zeros(latent, x.shape[-1]))
        offset = pyro.param("c", lambda: x.new_zeros(latent))
        loc = (x - centre) @ slope.T + offset
        if factorised:
            scale = pyro.param("s", lambda: x.new_full((latent,), 0.5), constraint=constraints.positive)
            law = dist.Normal(loc, scale).to_event(1)
        else:
            lower = pyro.param("L", lambda: 0.5 * torch.eye(latent).to(x), constraint=constraints.lower_cholesky)
            law = dist.MultivariateNormal(loc, scale_tril=lower)
        with pyro.plate("data", len(x)):
            pyro.sample("z", law)

    return model, guide


model, guide = vae(LATENT)
factorised, factorised_guide = vae(LATENT, factorised=True)
unit_noise, unit_noise_guide = vae(LATENT, sigma2=1.0)


def pixels(images: Tensor) -> Tensor:
    """``(B, ...)`` bytes as ``(B, D)`` numbers in [0, 1] of the default float type; other numbers as they are."""
    flat = images.flatten(1)
    return flat if flat.is_floating_point() else flat.to(torch.get_default_dtype()) / 255


def data() -> tuple[Tensor, Tensor]:
    """The 60,000 training images, uint8 ``(60000, 28, 28)``, and their mean ``(784,)``."""
    images, _ = mnist("train")
    return images, images.flatten(1).sum(0, dtype=torch.float64) / (255 * len(images))


class Decoder(NamedTuple):
    """theta: ``W`` ``(D, d)``, ``mu`` ``(D,)`` and ``sigma2``, the variance of a pixel."""

    W: Tensor
    mu: Tensor
    sigma2: Tensor


def moments(images: Tensor, rows: int = 4096) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and covariance ``(D, D)`` (divided by N) of the pixels, in float64, a few ``rows`` at a time."""
    total = torch.zeros(pixels(images[:1]).shape[-1], dtype=torch.float64)
    square = torch.zeros(len(total), len(total), dtype=torch.float64)
    for some in images.split(rows):
        x = pixels(some).double()
        total += x.sum(0)
        square += x.T @ x
    mean = total / len(images)
    return mean, square / len(images) - torch.outer(mean, mean)


def pca(mean: Tensor, covariance: Tensor, latent: int, sigma2: float | None = None) -> Decoder:
    """The likeliest decoder for data of these moments, R = I; with ``sigma2`` fixed, columns below it are zero."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    noise = values[latent:].mean() if sigma2 is None else values.new_tensor(sigma2)
    return Decoder(vectors[:, :latent] * (values[:latent] - noise).clamp(min=0).sqrt(), mean, noise)


def posterior(decoder: Decoder) -> tuple[Tensor, Tensor]:
    """A ``(d, D)`` and the covariance ``(d, d)`` of p(z | x)."""
    loadings, _, sigma2 = decoder
    inner = loadings.T @ loadings + sigma2 * torch.eye(loadings.shape[1], dtype=loadings.dtype)
    return torch.linalg.solve(inner, loadings.T), sigma2 * torch.linalg.inv(inner)


def mean_log_evidence(decoder: Decoder, mean: Tensor, covariance: Tensor) -> Tensor:
    """Mean of log p(x) over data of these moments, in nats per datum: exact."""
    loadings, mu, sigma2 = decoder
    size, latent = loadings.shape
    inner = loadings.T @ loadings + sigma2 * torch.eye(latent, dtype=loadings.dtype)
    log_det = torch.linalg.slogdet(inner).logabsdet + (size - latent) * sigma2.log()
    spread = covariance + torch.outer(mean - mu, mean - mu)
    explained = (torch.linalg.solve(inner, loadings.T) @ spread @ loadings).trace()
    return -(size * math.log(2 * math.pi) + log_det + (spread.trace() - explained) / sigma2) / 2
