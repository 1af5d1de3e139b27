"""Convolutional VAE for colour images of 32 x 32 or 64 x 64: Gaussian pixels, depth by option, outputs soft-clipped.

    z ~ N(0, I),   x | z ~ N(mu_theta(z), SCALE^2 I),   q(z | x) = N(m_phi(x), diag(exp(2 l_phi(x))))

Strided convolutions halve height and width, transposed ones double them. ``extra_dense`` and ``extra_conv`` have one
more layer each way, ``relu`` is the twin with kinks and nothing clipped; :func:`vae` makes any other. Loading this file
makes new networks, from torch's generator as it then stands.
Source: Surendran et al. (2025), experiments on CIFAR-100 and CelebA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import bbvi_conv as bc
from bbvi_conv.data import cifar100

CHANNELS, HIDDEN, LATENT = (16, 32, 64), 128, 32
SCALE = 0.2
"""Standard deviation of a pixel around the decoder's mean."""
BOUND = 4.0
"""Encoder means and log scales lie in [-BOUND, BOUND]."""

Program = Callable[[Tensor], None]

fit = {"minibatch": bc.Minibatch(64, plate="data"), "max_steps": 3_000}


class Pixels(nn.ConvTranspose2d):
    """The last layer: it starts at grey images, from which gradients are far smaller than from black ones."""

    def reset_parameters(self) -> None:
        """As torch does, but for the bias."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.constant_(self.bias, 0.5)


def vae(
    size: int = 32,
    *,
    channels: Sequence[int] = CHANNELS,
    hidden: int = HIDDEN,
    latent: int = LATENT,
    extra_dense: int = 0,
    extra_conv: int = 0,
    activation: Callable[[], nn.Module] = nn.SiLU,
    clipped: bool = True,
) -> tuple[Program, Program]:
    """Model and guide for images ``(B, 3, size, size)``.

    Args:
        size: height and width, divisible by 2 once for each of ``channels``.
        channels: of the convolutions that halve the image.
        hidden: units of the dense layers.
        latent: dimensions of z.
        extra_dense, extra_conv: layers more each way, dense ones at ``hidden`` and convolutions at the smallest image.
        activation: makes the layer between two others; a smooth one for the theorems.
        clipped: whether outputs are soft-clipped, those of the decoder to [0, 1].
    """
    side, rest = divmod(size, 2 ** len(channels))
    if rest or side == 0:
        raise ValueError(f"{len(channels)} halvings need a size divisible by {2 ** len(channels)}, got {size}")
    flat = channels[-1] * side * side

    def more(count: int, layer: Callable[[], nn.Module]) -> list[nn.Module]:
        return [part for _ in range(count) for part in (layer(), activation())]

    def conv() -> nn.Module:
        return nn.Conv2d(channels[-1], channels[-1], 3, padding=1)

    def dense() -> nn.Module:
        return nn.Linear(hidden, hidden)

    down = [part for i, o in pairwise((3, *channels)) for part in (nn.Conv2d(i, o, 4, 2, 1), activation())]
    encoder = [*down, *more(extra_conv, conv), nn.Flatten(), nn.Linear(flat, hidden), activation()]
    encoder += [*more(extra_dense, dense), nn.Linear(hidden, 2 * latent)]
    up = [part for i, o in pairwise(channels[::-1]) for part in (nn.ConvTranspose2d(i, o, 4, 2, 1), activation())]
    decoder = [nn.Linear(latent, hidden), activation(), *more(extra_dense, dense), nn.Linear(hidden, flat)]
    decoder += [activation(), nn.Unflatten(-1, (channels[-1], side, side)), *more(extra_conv, conv), *up]
    decoder.append(Pixels(channels[0], 3, 4, 2, 1))
    if clipped:
        encoder.append(bc.SoftClipping(-BOUND, BOUND))
        decoder.append(bc.SoftClipping(0.0, 1.0, sharpness=8.0))
    return programs(nn.Sequential(*encoder), nn.Sequential(*decoder), latent)


def programs(encoder: nn.Module, decoder: nn.Module, latent: int) -> tuple[Program, Program]:
    """Model and guide with these networks."""

    def model(images: Tensor) -> None:
        """``images``: uint8 ``(B, 3, size, size)``."""
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(images)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([latent]).to_event(1))
            pyro.sample("image", dist.Normal(decoder(z), SCALE).to_event(3), obs=pixels(images))

    def guide(images: Tensor) -> None:
        """As :func:`model`."""
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(images)):
            loc, log_scale = encoder(pixels(images)).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def pixels(images: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1] of the default float type."""
    return images.to(torch.get_default_dtype()) / 255


model, guide = vae()
extra_dense, extra_dense_guide = vae(extra_dense=1)
extra_conv, extra_conv_guide = vae(extra_conv=1)
relu, relu_guide = vae(activation=nn.ReLU, clipped=False)
faces, faces_guide = vae(64, channels=(*CHANNELS, 64))


def data() -> tuple[Tensor]:
    """12,000 images of CIFAR-100, uint8 ``(12000, 3, 32, 32)``."""
    return (cifar100("train", source="part")[0],)


def held_out() -> tuple[Tensor]:
    """The 3,000 test images that go with them."""
    return (cifar100("test", source="part")[0],)
