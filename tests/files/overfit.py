"""A VAE with far more parameters than its sixty training images can tell, for tests of held-out data.

The images are those of MNIST at half their size where BBVI_CONV_DATA is there, else noisy copies of random prototypes.
"""

import os

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import bbvi_conv as bc
from bbvi_conv.data import mnist

TRAIN, UNSEEN, PIXELS, LATENT = 60, 400, 196, 4

fit = {
    "minibatch": bc.Minibatch(20, plate="data"),
    "optimiser": bc.Adam(bc.Constant(1e-2)),
    "engine": "traced",
    "window": 100,
    "max_steps": 3200,
    "num_gradients": 8,
    "khat_draws": 100,
}

encoder = nn.Sequential(nn.Linear(PIXELS, 32), nn.Tanh(), nn.Linear(32, 2 * LATENT))
decoder = nn.Sequential(nn.Linear(LATENT, 32), nn.Tanh(), nn.Linear(32, PIXELS))


def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT]).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)


def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        loc, log_scale = encoder(x).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def images(split, count):
    if "BBVI_CONV_DATA" in os.environ:
        shown = mnist(split)[0][:count].float().unsqueeze(1) / 255
        return (nn.functional.avg_pool2d(shown, 2).flatten(1) > 0.5).float()
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, PIXELS, generator=generator).round()
    generator.manual_seed(1 if split == "train" else 2)
    chosen = prototypes[torch.randint(10, (count,), generator=generator)]
    return torch.where(torch.rand(count, PIXELS, generator=generator) < 0.2, 1 - chosen, chosen)


def data():
    return (images("train", TRAIN),)


def held_out():
    return (images("test", UNSEEN),)
