"""Variational autoencoder on MNIST: 784-400-20 and back, one hidden layer each way, Bernoulli pixels.

Pixels are made black or white once, with a fixed seed, each by a draw with its grey value as the probability; the
bound is therefore one on a proper likelihood, comparable in nats between runs of this file, but not with tables for
another binarisation. Loading this file makes new networks, from torch's generator as it then stands.
Source: Kingma and Welling (2014), "Auto-encoding variational Bayes", https://arxiv.org/abs/1312.6114, appendix C.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.data import binarised, mnist

PIXELS, HIDDEN, LATENT = 784, 400, 20

encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT))
decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS))

fit = {"minibatch": bc.Minibatch(128, plate="data"), "max_steps": 20_000}


def model(images: Tensor) -> None:
    """z_n ~ N(0, I), image_n ~ Bernoulli(decoder(z_n)); ``images``: uint8 ``(B, 28, 28)``, each value 0 or 255."""
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(images)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT]).to_event(1))
        pyro.sample("image", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=pixels(images))


def guide(images: Tensor) -> None:
    """q(z_n | image_n) = N(loc, scale), both from the encoder, the scale through exp."""
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(images)):
        loc, log_scale = encoder(pixels(images)).chunk(2, dim=-1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def pixels(images: Tensor) -> Tensor:
    """``(B, 28, 28)`` bytes as ``(B, 784)`` numbers in [0, 1], of the networks' float type."""
    return images.reshape(len(images), PIXELS).to(encoder[0].weight.dtype) / 255


def data() -> tuple[Tensor]:
    """The 60,000 training images, binarised once: uint8 ``(60000, 28, 28)``, each value 0 or 255."""
    images, _ = mnist("train")
    return (binarised(images, seed=0),)
