"""Deep Gaussian VAE on MNIST, bounded as the convergence theorems ask: soft-clipped outputs, smooth Lipschitz layers.

    z ~ N(0, I),   x | z ~ N(mu_theta(z), SCALE^2 I),   q(z | x) = N(m_phi(x), diag(exp(2 l_phi(x))))

Decoder means lie in [0, 1], encoder means and log scales in [-BOUND, BOUND], by generalized soft-clipping, and every
linear layer has an operator norm below NORM whatever its weights are. ``relu`` is the twin without any of it: plain
layers, ReLU, nothing bounded but the decoder's noise. Loading this file makes new networks, from torch's generator as
it then stands.
Source: Surendran et al. (2025), theorem for Adam and its experiments.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.data import mnist

PIXELS, HIDDEN, LATENT = 784, (256, 256), 16
SCALE = 0.25
"""Standard deviation of a pixel around the decoder's mean."""
BOUND, NORM = 3.0, 4.0

Program = Callable[[Tensor], None]

fit = {
    "minibatch": bc.Minibatch(64, plate="data"),
    "optimiser": bc.TheoremAdam(0.02, radius=200.0),
    "max_steps": 20_000,
}


def vae(encoder: nn.Module, decoder: nn.Module, latent: int = LATENT) -> tuple[Program, Program]:
    """Model and guide: ``encoder`` gives m and l side by side, ``decoder`` the means of the pixels."""

    def model(images: Tensor) -> None:
        """``images``: uint8 ``(B, 28, 28)``."""
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(images)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([latent]).to_event(1))
            pyro.sample("image", dist.Normal(decoder(z), SCALE).to_event(1), obs=pixels(images))

    def guide(images: Tensor) -> None:
        """As :func:`model`."""
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(images)):
            loc, log_scale = encoder(pixels(images)).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def bounded(*sizes: int, low: float, high: float, sharpness: float = 1.0) -> nn.Sequential:
    """A network for the theorems: tanh, layers of bounded norm, outputs soft-clipped to [low, high]."""
    return bc.bounded_mlp(sizes, low, high, norm=NORM, activation=nn.Tanh, sharpness=sharpness)


def plain(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    return nn.Sequential(*[layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())][:-1])


def pixels(images: Tensor) -> Tensor:
    """``(B, 28, 28)`` bytes as ``(B, 784)`` numbers in [0, 1] of the default float type."""
    return images.reshape(len(images), PIXELS).to(torch.get_default_dtype()) / 255


model, guide = vae(
    bounded(PIXELS, *HIDDEN, 2 * LATENT, low=-BOUND, high=BOUND),
    bounded(LATENT, *HIDDEN, PIXELS, low=0.0, high=1.0, sharpness=8.0),
)
relu, relu_guide = vae(plain(PIXELS, *HIDDEN, 2 * LATENT), plain(LATENT, *HIDDEN, PIXELS))


def data() -> tuple[Tensor]:
    """The 60,000 training images, uint8 ``(60000, 28, 28)``."""
    return (mnist("train")[0],)
