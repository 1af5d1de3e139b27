"""Bernoulli VAE on MNIST with one or two stochastic layers, pixels binarised anew at every visit.

    one layer:   z ~ N(0, I) (50),   x | z ~ Bernoulli(o + f(z)),
    two layers:  z2 ~ N(0, I) (50),  z1 | z2 ~ N(f(z2)) (100),  x | z1 ~ Bernoulli(o + f(z1)),

the guides the other way round, q(z1 | x) and q(z2 | z1); every f has two hidden layers of 200 (between z1 and z2 of
100), tanh; o are the log odds of the mean image: from a decoder that starts at grey fewer latents stay active
(docs/vae.md). Weights start as Glorot and Bengio (2010) have them. Loading this file makes new networks, from torch's
generator as it then stands.
Source: Burda et al. (2016), "Importance weighted autoencoders", section 5, https://arxiv.org/abs/1509.00519
"""

from __future__ import annotations

from itertools import pairwise

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.data import codes, mnist, rebinarised

PIXELS, HIDDEN, LATENT, FIRST, BETWEEN = 784, 200, 50, 100, 100
VISITS = 100
"""Binarisations of each image."""

fit = {
    "minibatch": bc.Minibatch(100, plate="data"),
    "optimiser": bc.Adam(bc.Constant(1e-3), eps=1e-4),
    "max_steps": 100_000,
}


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them, Glorot's start, no offsets."""
    layers = []
    for inputs, outputs in pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


encoder, decoder = mlp(PIXELS, HIDDEN, HIDDEN, 2 * LATENT), mlp(LATENT, HIDDEN, HIDDEN, PIXELS)
encoder1, encoder2 = mlp(PIXELS, HIDDEN, HIDDEN, 2 * FIRST), mlp(FIRST, BETWEEN, BETWEEN, 2 * LATENT)
decoder2, decoder1 = mlp(LATENT, BETWEEN, BETWEEN, 2 * FIRST), mlp(FIRST, HIDDEN, HIDDEN, PIXELS)


def model(seen: Tensor, images: Tensor, offsets: Tensor) -> None:
    """One stochastic layer.

    Args:
        seen: codes ``(B,)`` of binarised images.
        images: uint8 ``(N, 28, 28)``.
        offsets: o, ``(1, 784)``.
    """
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(seen)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT]).to_event(1))
        pyro.sample("image", dist.Bernoulli(logits=offsets + decoder(z)).to_event(1), obs=pixels(seen, images))


def guide(seen: Tensor, images: Tensor, offsets: Tensor) -> None:
    """As :func:`model`."""
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(seen)):
        pyro.sample("z", normal(encoder(pixels(seen, images))))


def two_layers(seen: Tensor, images: Tensor, offsets: Tensor) -> None:
    """Two stochastic layers; as :func:`model`."""
    pyro.module("decoder2", decoder2)
    pyro.module("decoder1", decoder1)
    with pyro.plate("data", len(seen)):
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0).expand([LATENT]).to_event(1))
        z1 = pyro.sample("z1", normal(decoder2(z2)))
        pyro.sample("image", dist.Bernoulli(logits=offsets + decoder1(z1)).to_event(1), obs=pixels(seen, images))


def two_layers_guide(seen: Tensor, images: Tensor, offsets: Tensor) -> None:
    """As :func:`two_layers`."""
    pyro.module("encoder1", encoder1)
    pyro.module("encoder2", encoder2)
    with pyro.plate("data", len(seen)):
        z1 = pyro.sample("z1", normal(encoder1(pixels(seen, images))))
        pyro.sample("z2", normal(encoder2(z1)))


def normal(raw: Tensor) -> dist.Distribution:
    """N(loc, scale) from what a network gives, the scale through exp."""
    loc, log_scale = raw.chunk(2, dim=-1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def pixels(seen: Tensor, images: Tensor) -> Tensor:
    """``(B, 784)`` numbers 0 and 1, of the networks' float type."""
    return rebinarised(images, seen).flatten(1).to(encoder[0].weight.dtype) / 255


def mean_log_odds(images: Tensor) -> Tensor:
    """Log odds of the mean of ``images`` ``(N, 28, 28)``, that clipped to [0.001, 0.999]; ``(1, 784)``."""
    mean = images.sum(0).flatten() / (255 * len(images))
    return mean.clamp(1e-3, 1 - 1e-3).logit()[None]


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the 60,000 training images in 100 binarisations each, int64; the images, uint8; their offsets."""
    images, _ = mnist("train")
    return codes(len(images), VISITS), images, mean_log_odds(images)


def held_out() -> tuple[Tensor, Tensor, Tensor]:
    """The 10,000 test images, each in one binarisation, with the offsets of the training images."""
    images, _ = mnist("test")
    return codes(len(images), 1), images, mean_log_odds(mnist("train")[0])
